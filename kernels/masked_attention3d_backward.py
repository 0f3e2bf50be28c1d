"""Backward of masked_attention3d.

Story. With g the gradient of the result and D_i = g_i . out_i, a pair's weight p_ij = exp(s_ij - lse_i) is computed
again, and d_ij = p_ij (g_i . v_j - D_i); grad_v_j = sum_i p_ij g_i, grad_k_j = scale sum_i d_ij q_i, grad_q_i = scale
sum_j d_ij k_j. The first two are sums over queries, the third over keys: one kernel owns blocks of keys and walks the
queries that see them, another owns blocks of queries and walks their keys. Nothing is added up across programs, so
every result is bitwise repeatable, and nothing is kept beyond D and lse.

What limits it. 8 d FLOP and one exponential a pair in the first, 6 d and one in the second, instead of 10 d and one in
a single kernel, which would have to add gradients of queries up across programs: in any order, and not repeatable, or
in memory for every block of keys. At d = 16 exponentials are the limit of both (see masked_attention3d_forward.py), at
d = 64 and more the products.

Before them one pass over the rows finds D and, for half precision, their longest: what forward's survey tells it. A
plane whose scores are all small and whose rows are all finite is TAME and computes weights in one step; the others are
left to a second launch, careful as forward's is. For float16 weights carry a factor 2^LIFT and d_ij a unit, a power of
two no smaller than any |g_i . v_j - D_i|: neither leaves the range of the type on its way into a product.
"""

import triton
import triton.language as tl

from vpfast.kernels.masked_attention3d_forward import LOG2E, PEAKS
from vpfast.kernels.masked_attention3d_mask import block_of, walk
from vpfast.kernels.masked_attention3d_rows import add_weighted, load_rows, peak_of, plane_at, products

STRIDES = [f"{name}_{step}" for name in ("q", "k", "v", "grad") for step in ("batch", "head", "row")]
GEOMETRY = ["heads", "blocks", "frames", "rows", "columns", "radius_t", "radius_y", "radius_x"]


@triton.jit(do_not_specialize=[*STRIDES, "heads", "length", "part"])
def delta_kernel(
    q,
    k,
    v,
    grad,
    out,
    delta,
    peaks,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    heads,
    length,
    part,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    SURVEYED: tl.constexpr,
):
    """``delta`` (planes, length), and where SURVEYED ``peaks`` (planes, 5, PEAKS): of every ``part`` rows of q, k, v and
    grad the largest sum of squares of a finite one, and whether there is another."""
    SUM: tl.constexpr = delta.dtype.element_ty
    index, plane = tl.program_id(0), tl.program_id(1)
    start = index * part
    end = tl.minimum(start + part, length)
    grad_at = plane_at(grad, plane, heads, grad_batch, grad_head, UNIT)
    dense = plane.to(tl.int64) * length
    out_at = out + dense * DIM
    for first in range(start, end, SIZE):
        total = tl.zeros((SIZE,), SUM)
        for chunk in range(CHUNKS):
            a = load_rows(grad_at, grad_row, first, end, chunk, True, SIZE, DIM, D, UNIT)
            b = load_rows(out_at, tl.full((), DIM, tl.int32), first, end, chunk, True, SIZE, DIM, D, 1)
            total += tl.sum(a.to(SUM) * b.to(SUM), 1)
        row = first + tl.arange(0, SIZE)
        tl.store(delta + dense + row, total, mask=row < end)
    if SURVEYED:
        to = peaks + plane.to(tl.int64) * (5 * PEAKS) + index
        q_at = plane_at(q, plane, heads, q_batch, q_head, UNIT)
        k_at = plane_at(k, plane, heads, k_batch, k_head, UNIT)
        v_at = plane_at(v, plane, heads, v_batch, v_head, UNIT)
        q_peak, q_strange = peak_of(q_at, q_row, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        k_peak, k_strange = peak_of(k_at, k_row, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        v_peak, v_strange = peak_of(v_at, v_row, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        g_peak, g_strange = peak_of(grad_at, grad_row, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        tl.store(to, q_peak)
        tl.store(to + PEAKS, k_peak)
        tl.store(to + 2 * PEAKS, v_peak)
        tl.store(to + 3 * PEAKS, g_peak)
        tl.store(to + 4 * PEAKS, (q_strange + k_strange + v_strange + g_strange).to(tl.float32))


@triton.jit
def _root_of_peak(peaks, which: tl.constexpr):
    return tl.sqrt(tl.max(tl.load(peaks + which * PEAKS + tl.arange(0, PEAKS)), 0))


@triton.jit
def _is_tame(peaks, scale, LIMIT: tl.constexpr):
    """Are the plane's scores all small, and its rows finite and no longer than 2^60?"""
    largest = _root_of_peak(peaks, 0) * _root_of_peak(peaks, 1) * tl.abs(scale) * LOG2E
    longest = tl.maximum(_root_of_peak(peaks, 2), _root_of_peak(peaks, 3))
    return (largest <= LIMIT) & (longest < 1e18) & (_root_of_peak(peaks, 4) == 0)


@triton.jit
def _unit_of(peaks, LIFT: tl.constexpr):
    """What d_ij is measured in; 1 where the type has the range of float32."""
    unit = 1.0
    if LIFT > 0:
        bound = 2 * _root_of_peak(peaks, 2) * _root_of_peak(peaks, 3)
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(bound, 1e-30))))
    return unit


@triton.jit
def _weights(scores, norm, seen, scale, MASKED: tl.constexpr, TAME: tl.constexpr, LIFT: tl.constexpr):
    """2^LIFT exp(scale scores - norm), 0 where hidden; ``norm`` has the shape (1, n) or (n, 1)."""
    if TAME:
        weights = tl.exp2(scores * (scale * LOG2E) - (norm * LOG2E - LIFT))
    else:
        weights = tl.exp2((scores * scale - norm) * LOG2E + LIFT)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def _key_tile(state, context, start, seen, MASKED: tl.constexpr):
    """One tile of queries, for the gradients of a block of keys and values."""
    grad_k, grad_v = state
    (k, v, scale, unit, k_at, k_row, v_at, v_row, first, end, q_at, q_row, g_at, g_row, lse, delta, length, chunk, FIXED,
     MOVING, DIM, D, CHUNKS, UNIT, TAME, LIFT, PRECISION) = context  # fmt: skip
    SUM: tl.constexpr = grad_k.dtype
    q = load_rows(q_at, q_row, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    g = load_rows(g_at, g_row, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    row = start + tl.arange(0, MOVING)
    if MASKED:
        norm = tl.load(lse + row, mask=row < length, other=0.0)
        level = tl.load(delta + row, mask=row < length, other=0.0)
    else:
        norm = tl.load(lse + row)
        level = tl.load(delta + row)
    scores = products(
        k, q, k_at, k_row, first, end, q_at, q_row, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT, PRECISION, SUM
    )  # fmt: skip
    weights = _weights(scores, norm[None, :], seen, scale, MASKED, TAME, LIFT)
    grad_v = add_weighted(grad_v, weights, seen, g, MASKED and not TAME, PRECISION)
    slopes = products(
        v, g, v_at, v_row, first, end, g_at, g_row, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT, PRECISION, SUM
    )  # fmt: skip
    slopes = weights * (slopes * (1 / unit) - (level * (1 / unit))[None, :])
    if MASKED and not TAME:
        slopes = tl.where(seen, slopes, 0.0)
    grad_k = add_weighted(grad_k, slopes, seen, q, MASKED and not TAME, PRECISION)
    return grad_k, grad_v


@triton.jit
def _query_tile(state, context, start, seen, MASKED: tl.constexpr):
    """One tile of keys, for the gradients of a block of queries."""
    (grad_q,) = state
    (q, g, norm, level, scale, unit, q_at, q_row, g_at, g_row, first, end, k_at, k_row, v_at, v_row, length, chunk, FIXED,
     MOVING, DIM, D, CHUNKS, UNIT, TAME, LIFT, PRECISION) = context  # fmt: skip
    SUM: tl.constexpr = grad_q.dtype
    k = load_rows(k_at, k_row, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    v = load_rows(v_at, v_row, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    scores = products(
        q, k, q_at, q_row, first, end, k_at, k_row, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT, PRECISION, SUM
    )  # fmt: skip
    slopes = products(
        g, v, g_at, g_row, first, end, v_at, v_row, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT, PRECISION, SUM
    )  # fmt: skip
    weights = _weights(scores, norm[:, None], seen, scale, MASKED, TAME, LIFT)
    slopes = weights * (slopes * (1 / unit) - level[:, None])
    if MASKED and not TAME:
        slopes = tl.where(seen, slopes, 0.0)
    return (add_weighted(grad_q, slopes, seen, k, MASKED and not TAME, PRECISION),)


@triton.jit
def _store(to, values, plane, length, first, count, chunk, FIXED: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, FIXED)
    column = chunk * D + tl.arange(0, D)
    tl.store(
        to + (plane.to(tl.int64) * length + first) * DIM + (row[:, None] * DIM + column[None, :]),
        values.to(to.dtype.element_ty),
        mask=(row < count)[:, None] & (column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=[*STRIDES, *GEOMETRY])
def keys_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    peaks,
    grad_k,
    grad_v,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    heads,
    blocks,
    frames,
    rows,
    columns,
    radius_t,
    radius_y,
    radius_x,
    scale,
    EXACT_SCALE: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    SURVEYED: tl.constexpr,
    TAME: tl.constexpr,
    LIMIT: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (block of keys of a plane, chunk of components). The first blocks are seen by most, and come first."""
    SUM: tl.constexpr = delta.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    chunk = tl.program_id(1)
    peaks += plane.to(tl.int64) * (5 * PEAKS)
    if SURVEYED:
        if _is_tame(peaks, scale, LIMIT) != TAME:
            return
    unit = _unit_of(peaks, LIFT)
    first, count = block_of(block, frames, rows, columns, FIXED, LINE)
    length = frames * rows * columns
    dense = plane.to(tl.int64) * length
    q_at = plane_at(q, plane, heads, q_batch, q_head, UNIT)
    k_at = plane_at(k, plane, heads, k_batch, k_head, UNIT)
    v_at = plane_at(v, plane, heads, v_batch, v_head, UNIT)
    g_at = plane_at(grad, plane, heads, grad_batch, grad_head, UNIT)
    keys = load_rows(k_at, k_row, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    values = load_rows(v_at, v_row, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    context = (keys, values, scale, unit, k_at, k_row, v_at, v_row, first, first + count, q_at, q_row, g_at, grad_row,
               lse + dense, delta + dense, length, chunk, FIXED, MOVING, DIM, D, CHUNKS, UNIT, TAME, LIFT, PRECISION)  # fmt: skip
    state = (tl.zeros((FIXED, D), SUM), tl.zeros((FIXED, D), SUM))
    state = walk(
        state, context, first, count, frames, rows, columns, radius_t, radius_y, radius_x, _key_tile, FIXED, MOVING, RULE,
        LINE, WINDOW_Y, WINDOW_X, True
    )  # fmt: skip
    lowered: tl.constexpr = 2.0**-LIFT
    _store(grad_k, state[0] * (scale * unit * lowered), plane, length, first, count, chunk, FIXED, DIM, D)
    _store(grad_v, state[1] * lowered, plane, length, first, count, chunk, FIXED, DIM, D)


@triton.jit(do_not_specialize=[*STRIDES, *GEOMETRY])
def queries_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    peaks,
    grad_q,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    heads,
    blocks,
    frames,
    rows,
    columns,
    radius_t,
    radius_y,
    radius_x,
    scale,
    EXACT_SCALE: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    SURVEYED: tl.constexpr,
    TAME: tl.constexpr,
    LIMIT: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (block of queries of a plane, chunk of components). The last blocks see most, and come first."""
    SUM: tl.constexpr = delta.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    plane = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    chunk = tl.program_id(1)
    peaks += plane.to(tl.int64) * (5 * PEAKS)
    if SURVEYED:
        if _is_tame(peaks, scale, LIMIT) != TAME:
            return
    unit = _unit_of(peaks, LIFT)
    first, count = block_of(block, frames, rows, columns, FIXED, LINE)
    length = frames * rows * columns
    dense = plane.to(tl.int64) * length
    q_at = plane_at(q, plane, heads, q_batch, q_head, UNIT)
    k_at = plane_at(k, plane, heads, k_batch, k_head, UNIT)
    v_at = plane_at(v, plane, heads, v_batch, v_head, UNIT)
    g_at = plane_at(grad, plane, heads, grad_batch, grad_head, UNIT)
    queries = load_rows(q_at, q_row, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    grads = load_rows(g_at, grad_row, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    row = tl.arange(0, FIXED)
    norm = tl.load(lse + dense + first + row, mask=row < count, other=0.0)
    level = tl.load(delta + dense + first + row, mask=row < count, other=0.0) * (1 / unit)
    context = (queries, grads, norm, level, scale, unit, q_at, q_row, g_at, grad_row, first, first + count, k_at, k_row, v_at,
               v_row, length, chunk, FIXED, MOVING, DIM, D, CHUNKS, UNIT, TAME, LIFT, PRECISION)  # fmt: skip
    state = walk(
        (tl.zeros((FIXED, D), SUM),), context, first, count, frames, rows, columns, radius_t, radius_y, radius_x,
        _query_tile, FIXED, MOVING, RULE, LINE, WINDOW_Y, WINDOW_X, False
    )  # fmt: skip
    lowered: tl.constexpr = 2.0**-LIFT
    _store(grad_q, state[0] * (scale * unit * lowered), plane, length, first, count, chunk, FIXED, DIM, D)
