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

Before them one pass over the rows finds D and, where forward has a survey, the longest rows. A plane whose scores are
all small and whose rows are all finite is PLAIN and computes weights in one step; the others are left to a second
launch, careful as forward's is. For float16 weights carry a factor 2^LIFT and d_ij a unit, a power of
two no smaller than any |g_i . v_j - D_i|: neither leaves the range of the type on its way into a product.
"""

import triton
import triton.language as tl

from vpfast.kernels.masked_attention3d_forward import CAREFUL, LOG2E, LOWEST, PEAKS, PLAIN
from vpfast.kernels.masked_attention3d_mask import block_of, walk
from vpfast.kernels.masked_attention3d_rows import add_weighted, load_rows, peak_of, plane_at, products

STRIDES = [f"{name}_{step}" for name in ("q", "k", "v", "grad") for step in ("batch", "head", "row")]
GEOMETRY = ["heads", "blocks", "frames", "rows", "columns", "radius_t", "radius_y", "radius_x"]


@triton.jit(do_not_specialize=[*STRIDES, "heads", "length", "part"])
def levels_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    levels: tl.tensor,
    peaks: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    grad_batch: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    part: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    SURVEYED: tl.constexpr,
    LIFT: tl.constexpr,
) -> None:
    """``levels`` (planes, length, 2): of each query lse as a power of two, less LIFT, and D. Where SURVEYED ``peaks``
    (planes, 5, PEAKS): of every ``part`` rows of q, k, v and grad the largest sum of squares of a finite one, and
    whether there is another."""
    SUM: tl.constexpr = levels.dtype.element_ty
    plane, index = tl.program_id(0), tl.program_id(1)
    start = index * part
    end = tl.minimum(start + part, length)
    g_rows = (plane_at(grad, plane, heads, grad_batch, grad_head, UNIT), grad_row)
    dense = plane.to(tl.int64) * length
    out_rows = (out + dense * DIM, tl.full((), DIM, tl.int32))
    for first in range(start, end, SIZE):
        total = tl.zeros((SIZE,), SUM)
        for chunk in range(CHUNKS):
            a = load_rows(g_rows, first, end, chunk, True, SIZE, DIM, D, UNIT)
            b = load_rows(out_rows, first, end, chunk, True, SIZE, DIM, D, 1)
            total += tl.sum(a.to(SUM) * b.to(SUM), 1)
        row = first + tl.arange(0, SIZE)
        norm = tl.load(lse + dense + row, mask=row < end, other=0.0)
        to = levels + 2 * (dense + row)
        tl.store(to, tl.maximum(norm, LOWEST) * LOG2E - LIFT, mask=row < end)
        tl.store(to + 1, total, mask=row < end)
    if SURVEYED:
        to = peaks + plane.to(tl.int64) * (5 * PEAKS) + index
        q_rows = (plane_at(q, plane, heads, q_batch, q_head, UNIT), q_row)
        k_rows = (plane_at(k, plane, heads, k_batch, k_head, UNIT), k_row)
        v_rows = (plane_at(v, plane, heads, v_batch, v_head, UNIT), v_row)
        q_peak, q_strange = peak_of(q_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        k_peak, k_strange = peak_of(k_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        v_peak, v_strange = peak_of(v_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        g_peak, g_strange = peak_of(g_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
        tl.store(to, q_peak)
        tl.store(to + PEAKS, k_peak)
        tl.store(to + 2 * PEAKS, v_peak)
        tl.store(to + 3 * PEAKS, g_peak)
        tl.store(to + 4 * PEAKS, (q_strange + k_strange + v_strange + g_strange).to(tl.float32))


@triton.jit
def _root_of_peak(peaks: tl.tensor, which: tl.constexpr) -> tl.tensor:
    return tl.sqrt(tl.max(tl.load(peaks + which * PEAKS + tl.arange(0, PEAKS)), 0))


@triton.jit
def _mode_of(peaks: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The MODE that the plane is served in: PLAIN where no score can be large, and all is finite."""
    largest = _root_of_peak(peaks, 0) * _root_of_peak(peaks, 1) * tl.abs(scale) * LOG2E
    longest = tl.maximum(_root_of_peak(peaks, 2), _root_of_peak(peaks, 3))
    plain = (largest <= 2**20) & (longest < 1e18) & (_root_of_peak(peaks, 4) == 0)
    return tl.where(plain, PLAIN, CAREFUL)


@triton.jit
def _unit_of(peaks: tl.tensor, LIFT: tl.constexpr) -> tl.tensor:
    """What d_ij is measured in; 1 where the type has the range of float32."""
    unit = 1.0
    if LIFT > 0:
        bound = 2 * _root_of_peak(peaks, 2) * _root_of_peak(peaks, 3)
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(bound, 1e-30))))
    return unit


@triton.jit
def _weights(
    scores: tl.tensor,
    norm: tl.tensor,
    seen: tl.tensor,
    penalty: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tl.tensor:
    """2^LIFT exp(scale scores - lse), 0 where hidden. ``norm``, (1, n) or (n, 1), is lse if CAREFUL, else what
    levels_kernel made of it."""
    if MODE == CAREFUL:
        weights = tl.exp2((scores * scale - norm) * LOG2E + LIFT)
        if MASKED:
            weights = tl.where(seen, weights, 0.0)
        return weights
    power = scores * (scale * LOG2E) - norm
    if MASKED:
        power += penalty
    return tl.exp2(power)


@triton.jit
def _begin_for_keys(
    context: tl.tuple,
    start: tl.tensor,
    MASKED: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of one tile of queries the scores, and what else is known of them."""
    _, length, chunk, own, tiles, tensors, known = context
    k, _ = tiles
    k_rows, _, q_rows, g_rows = tensors
    lse, levels = known
    q = load_rows(q_rows, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    g = load_rows(g_rows, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    row = start + tl.arange(0, MOVING)
    both = levels + 2 * start.to(tl.int64) + (tl.arange(0, MOVING)[:, None] * 2 + tl.arange(0, 2)[None, :])
    if MASKED:
        norm, level = tl.split(tl.load(both, mask=(row < length)[:, None], other=0.0))
    else:
        norm, level = tl.split(tl.load(both))
    if MODE == CAREFUL:
        norm = tl.load(lse + row, mask=row < length, other=0.0)
    scores = products(k, q, k_rows, own, q_rows, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT)
    return scores, q, g, norm, level, start


@triton.jit
def _finish_for_keys(
    state: tl.tuple,
    context: tl.tuple,
    begun: tl.tuple,
    seen: tl.tensor,
    penalty: tl.tensor,
    MASKED: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """With it, ``state``: the gradients of a block of keys and of their values."""
    grad_k, grad_v = state
    factors, length, _, own, tiles, tensors, _ = context
    scale, unit = factors
    _, v = tiles
    _, v_rows, _, g_rows = tensors
    scores, q, g, norm, level, start = begun
    weights = _weights(scores, norm[None, :], seen, penalty, scale, MASKED, MODE, LIFT)
    grad_v = add_weighted(grad_v, weights, seen, g, MASKED and MODE == CAREFUL)
    slopes = products(v, g, v_rows, own, g_rows, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT)
    slopes = weights * (slopes * (1 / unit) - (level * (1 / unit))[None, :])
    if MASKED and MODE == CAREFUL:
        slopes = tl.where(seen, slopes, 0.0)
    grad_k = add_weighted(grad_k, slopes, seen, q, MASKED and MODE == CAREFUL)
    return grad_k, grad_v


@triton.jit
def _begin_for_queries(
    context: tl.tuple,
    start: tl.tensor,
    MASKED: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of one tile of keys the scores, what the gradients of weights are made of, and the keys."""
    _, length, chunk, own, tiles, tensors, _ = context
    q, g = tiles
    q_rows, g_rows, k_rows, v_rows = tensors
    k = load_rows(k_rows, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    v = load_rows(v_rows, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    scores = products(q, k, q_rows, own, k_rows, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT)
    slopes = products(g, v, g_rows, own, v_rows, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT)
    return scores, slopes, k


@triton.jit
def _finish_for_queries(
    state: tl.tuple,
    context: tl.tuple,
    begun: tl.tuple,
    seen: tl.tensor,
    penalty: tl.tensor,
    MASKED: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """With it, ``state``: the gradients of a block of queries."""
    (grad_q,) = state
    factors, _, _, _, _, _, known = context
    scale, unit = factors
    norm, level = known
    scores, slopes, k = begun
    weights = _weights(scores, norm[:, None], seen, penalty, scale, MASKED, MODE, LIFT)
    slopes = weights * (slopes * (1 / unit) - level[:, None])
    if MASKED and MODE == CAREFUL:
        slopes = tl.where(seen, slopes, 0.0)
    return (add_weighted(grad_q, slopes, seen, k, MASKED and MODE == CAREFUL),)


@triton.jit
def _store(
    to: tl.tensor,
    values: tl.tensor,
    plane: tl.tensor,
    length: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    chunk: tl.tensor,
    FIXED: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    row = tl.arange(0, FIXED)
    column = chunk * D + tl.arange(0, D)
    tl.store(
        to + (plane.to(tl.int64) * length + first) * DIM + (row[:, None] * DIM + column[None, :]),
        values.to(to.dtype.element_ty),
        mask=(row < count)[:, None] & (column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=[*STRIDES, *GEOMETRY])
def keys_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    levels: tl.tensor,
    peaks: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    grad_batch: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    heads: tl.tensor,
    blocks: tl.tensor,
    frames: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_t: tl.tensor,
    radius_y: tl.tensor,
    radius_x: tl.tensor,
    scale: tl.tensor,
    EXACT_SCALE: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_T: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    SURVEYED: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> None:
    """Program (block of keys of a plane, chunk of components). The first blocks are seen by most, and come first."""
    SUM: tl.constexpr = levels.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    chunk = tl.program_id(1)
    peaks += plane.to(tl.int64) * (5 * PEAKS)
    if SURVEYED and _mode_of(peaks, scale) != MODE:
        return
    unit = _unit_of(peaks, LIFT)
    first, count = block_of(block, frames, rows, columns, FIXED, LINE)
    length = frames * rows * columns
    dense = plane.to(tl.int64) * length
    own = (first, first + count)
    q_rows = (plane_at(q, plane, heads, q_batch, q_head, UNIT), q_row)
    k_rows = (plane_at(k, plane, heads, k_batch, k_head, UNIT), k_row)
    v_rows = (plane_at(v, plane, heads, v_batch, v_head, UNIT), v_row)
    g_rows = (plane_at(grad, plane, heads, grad_batch, grad_head, UNIT), grad_row)
    keys = load_rows(k_rows, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    values = load_rows(v_rows, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    tiles, tensors, known = (keys, values), (k_rows, v_rows, q_rows, g_rows), (lse + dense, levels + 2 * dense)
    context = ((scale, unit), length, chunk, own, tiles, tensors, known)
    grid = (frames, rows, columns, radius_t, radius_y, radius_x)
    state = (tl.zeros((FIXED, D), SUM), tl.zeros((FIXED, D), SUM))
    state = walk(
        state, context, grid, first, count, _begin_for_keys, _finish_for_keys, FIXED, MOVING, RULE, LINE, WINDOW_T,
        WINDOW_Y, WINDOW_X, True, DIM, D, CHUNKS, UNIT, MODE, LIFT
    )  # fmt: skip
    lowered: tl.constexpr = 2.0**-LIFT
    _store(grad_k, state[0] * (scale * unit * lowered), plane, length, first, count, chunk, FIXED, DIM, D)
    _store(grad_v, state[1] * lowered, plane, length, first, count, chunk, FIXED, DIM, D)


@triton.jit(do_not_specialize=[*STRIDES, *GEOMETRY])
def queries_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    levels: tl.tensor,
    peaks: tl.tensor,
    grad_q: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    grad_batch: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    heads: tl.tensor,
    blocks: tl.tensor,
    frames: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_t: tl.tensor,
    radius_y: tl.tensor,
    radius_x: tl.tensor,
    scale: tl.tensor,
    EXACT_SCALE: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_T: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    SURVEYED: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> None:
    """Program (block of queries of a plane, chunk of components). The last blocks see most, and come first."""
    SUM: tl.constexpr = levels.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    plane = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    chunk = tl.program_id(1)
    peaks += plane.to(tl.int64) * (5 * PEAKS)
    if SURVEYED and _mode_of(peaks, scale) != MODE:
        return
    unit = _unit_of(peaks, LIFT)
    first, count = block_of(block, frames, rows, columns, FIXED, LINE)
    length = frames * rows * columns
    dense = plane.to(tl.int64) * length
    q_rows = (plane_at(q, plane, heads, q_batch, q_head, UNIT), q_row)
    k_rows = (plane_at(k, plane, heads, k_batch, k_head, UNIT), k_row)
    v_rows = (plane_at(v, plane, heads, v_batch, v_head, UNIT), v_row)
    g_rows = (plane_at(grad, plane, heads, grad_batch, grad_head, UNIT), grad_row)
    queries = load_rows(q_rows, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    grads = load_rows(g_rows, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    row = tl.arange(0, FIXED)
    own = levels + 2 * (dense + first + row)
    if MODE == CAREFUL:
        norm = tl.load(lse + dense + first + row, mask=row < count, other=0.0)
    else:
        norm = tl.load(own, mask=row < count, other=0.0)
    level = tl.load(own + 1, mask=row < count, other=0.0) * (1 / unit)
    tiles, tensors, known = (queries, grads), (q_rows, g_rows, k_rows, v_rows), (norm, level)
    context = ((scale, unit), length, chunk, (first, first + count), tiles, tensors, known)
    grid = (frames, rows, columns, radius_t, radius_y, radius_x)
    state = walk(
        (tl.zeros((FIXED, D), SUM),), context, grid, first, count, _begin_for_queries, _finish_for_queries, FIXED,
        MOVING, RULE, LINE, WINDOW_T, WINDOW_Y, WINDOW_X, False, DIM, D, CHUNKS, UNIT, MODE, LIFT
    )  # fmt: skip
    lowered: tl.constexpr = 2.0**-LIFT
    _store(grad_q, state[0] * (scale * unit * lowered), plane, length, first, count, chunk, FIXED, DIM, D)
