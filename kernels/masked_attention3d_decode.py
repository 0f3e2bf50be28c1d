"""The decode form of masked_attention3d: single queries against caches.

Story. A program owns one query of one plane and a share of the tiles of keys that it sees; where queries are few their
keys are shared out among up to 64 programs, whose parts a second kernel puts together. Which tiles there are follows
from the query's position, read on the GPU. Bound by memory, or by latency while caches are small: every key and value
is read once, 16 bytes a thread, and none that the query does not see, for it may be uninitialised.

Each of SIZE slots of a tile keeps a running maximum, sum and weighted values of its own, so that nothing crosses
threads until the end, but for the components of a product, which lie in a few lanes of a warp.
"""

import triton
import triton.language as tl

from vpfast.kernels.masked_attention3d_forward import LOG2E
from vpfast.kernels.masked_attention3d_mask import FRAME as BY_FRAME
from vpfast.kernels.masked_attention3d_mask import ends_of_mixed, far_lines, is_visible, sight
from vpfast.kernels.masked_attention3d_rows import plane_at, rows_at


@triton.jit
def _merged(top: tl.tensor, higher: tl.tensor) -> tl.tensor:
    """Exponentials measured from ``top`` times this are measured from ``higher``, which may be that of nothing."""
    return tl.exp2((top - tl.where(higher == float("-inf"), 0.0, higher)) * LOG2E)


@triton.jit
def _ends_in_frame(
    at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_y: tl.tensor,
    radius_x: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    WINDOW_X: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The interval [begin, end) of a frame, from the first to the last key that a window in x leaves of it."""
    if WINDOW_X:
        y, x = at // columns % rows, at % columns
        begin = tl.maximum(begin, tl.maximum(y - radius_y, 0) * columns + tl.maximum(x - radius_x, 0))
        end = tl.minimum(end, tl.minimum(y + radius_y, rows - 1) * columns + tl.minimum(x + radius_x + 1, columns))
    return begin, end


@triton.jit(
    do_not_specialize=[
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "count",
        "frames", "rows", "columns", "radius_t", "radius_y", "radius_x",
    ]
)  # fmt: skip
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
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
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Program (row of a plane, share of its keys, chunk of components). ``out`` (rows, d) is the result, or with SPLITS
    its parts (rows, SPLITS, d) beside ``tops`` and ``totals`` (rows, SPLITS); a total of -1 is that of nothing seen."""
    SUM: tl.constexpr = totals.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    row, share, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    plane = row // count
    length = frames * rows * columns
    position = tl.load(positions + row % count)
    outside = (position < 0) | (position >= length)
    at = tl.where(outside, 0, position).to(tl.int32)

    lines, far_count, far_start = 0, 1, 0
    if LINE == BY_FRAME:
        near_begin, near_end, far_begin, far_end = sight(
            at, frames, rows, columns, radius_t, radius_y, RULE, LINE, WINDOW_Y, False
        )
        near_begin, near_end = _ends_in_frame(at, rows, columns, radius_y, radius_x, near_begin, near_end, WINDOW_X)
        far_begin, far_end = _ends_in_frame(at, rows, columns, radius_y, radius_x, far_begin, far_end, WINDOW_X)
        lines, far_start = far_lines(at, frames, rows, columns, radius_t, False)
        near_start = at // (rows * columns) * (rows * columns)
        near_begin, near_end = near_begin + near_start, near_end + near_start
        far_begin, far_end = far_begin + far_start, far_end + far_start
        far_count = tl.cdiv(tl.maximum(far_end - far_begin, 0), SIZE)
    else:
        near_begin, near_end = ends_of_mixed(at, at, frames, rows, columns, radius_t, RULE, False)
        far_begin, far_end = near_begin, near_end
    near_count = tl.cdiv(tl.maximum(near_end - near_begin, 0), SIZE)
    tiles = near_count + lines * far_count
    per = tl.cdiv(tiles, SPLITS)

    column = tl.arange(0, D)
    query = plane_at(q, plane, heads, q_batch, q_head, UNIT) + (row % count).to(tl.int64) * q_row * UNIT
    k_at = plane_at(k, plane, heads, k_batch, k_head, UNIT)
    v_at = plane_at(v, plane, heads, v_batch, v_head, UNIT)
    whole = tl.zeros((D,), SUM)
    if CHUNKS == 1:
        whole = tl.load(query + column, mask=column < DIM, other=0.0).to(SUM)
    sums = tl.zeros((SIZE, D), SUM)
    total = tl.zeros((SIZE,), SUM)
    top = tl.full((SIZE,), float("-inf"), SUM)
    found = tl.zeros((SIZE,), tl.int32)
    for tile in range(share * per, tl.minimum(share * per + per, tiles)):
        far = tile - near_count
        line = tl.maximum(far, 0) // tl.maximum(far_count, 1)
        shift = line * (rows * columns)
        start = tl.where(far < 0, near_begin + tile * SIZE, far_begin + shift + (far - line * far_count) * SIZE)
        end = tl.where(far < 0, near_end, far_end + shift)
        key = start + tl.arange(0, SIZE)
        seen = is_visible(at, key, rows, columns, radius_t, radius_y, radius_x, RULE, WINDOW_Y, WINDOW_X) & (key < end)
        scores = tl.zeros((SIZE,), SUM)
        for part in range(CHUNKS):
            known = part * D + column < DIM
            some = whole
            if CHUNKS > 1:
                some = tl.load(query + part * D + column, mask=known, other=0.0).to(SUM)
            keys = tl.load(rows_at(k_at + part * D, k_row, start, SIZE, D, UNIT), mask=seen[:, None] & known[None, :], other=0.0)  # fmt: skip  # noqa: E501
            scores += tl.sum(some[None, :] * keys.to(SUM), 1)
        scores = tl.where(seen, scores * scale, float("-inf"))
        known = chunk * D + column < DIM
        values = tl.load(rows_at(v_at + chunk * D, v_row, start, SIZE, D, UNIT), mask=seen[:, None] & known[None, :], other=0.0)  # fmt: skip  # noqa: E501
        higher = tl.maximum(top, scores)
        kept = _merged(top, higher)
        weights = _merged(scores, higher)
        total = total * kept + weights
        sums = sums * kept[:, None] + weights[:, None] * values.to(SUM)
        top = higher
        found = tl.maximum(found, seen.to(tl.int32))

    highest = tl.max(top, 0)
    kept = _merged(top, highest)
    total_all = tl.sum(total * kept, 0)
    result = tl.sum(sums * kept[:, None], 0)
    nothing = tl.max(found, 0) == 0
    column += chunk * D
    if SPLITS == 1:
        result = tl.where(nothing, 0.0, result / total_all)
        result = tl.where(outside, float("nan"), result)
        tl.store(out + row.to(tl.int64) * DIM + column, result.to(out.dtype.element_ty), mask=column < DIM)
    else:
        to = row.to(tl.int64) * SPLITS + share
        tl.store(out + to * DIM + column, tl.where(outside, float("nan"), result), mask=column < DIM)
        if chunk == 0:
            tl.store(tops + to, highest)
            tl.store(totals + to, tl.where(nothing & (outside == 0), -1.0, total_all))


@triton.jit
def combine_kernel(
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Program (row, chunk of components): its SPLITS parts into one result."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share = row * SPLITS + tl.arange(0, SPLITS)
    column = chunk * D + tl.arange(0, D)
    top, total = tl.load(tops + share), tl.load(totals + share)
    seen = total != -1
    highest = tl.max(top, 0)
    kept = tl.where(seen, _merged(top, highest), 0.0)
    values = tl.load(parts + share[:, None] * DIM + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    result = tl.sum(values * kept[:, None], 0) / tl.sum(total * kept, 0)
    result = tl.where(tl.max(seen.to(tl.int32), 0) == 0, 0.0, result)
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty), mask=column < DIM)
