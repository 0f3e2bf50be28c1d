"""Forward of masked_attention3d.

Story. A program owns FIXED queries of one plane (a head of a batch) and walks the tiles of MOVING keys that they see
(masked_attention3d_mask.py): scores by one product, weights by exp2, sums by another. Queries, sums and the result
stay in registers, tiles of keys and values are on their way to shared memory while others are worked on. Written are
the result and the log of each row's sum of exponentials.

What limits it. A visible pair takes one exponential and 4 d FLOP. An SM of Hopper gives 16 exponentials a clock, a tile
of 128 x 64 takes 512 clocks; its products at d = 16, 2 x 128 x 64 x 16 x 2 FLOP at 4096 a clock, 128. So for short
heads the exponentials are the limit (132 SMs at 1.7 GHz: 3.6 T a second, 0.13 ms for the 4.7 10^8 pairs of `raster` at
L = 30,720) and all else has to hide behind them. 32 of them occupy a scheduler's exponential unit for 8 clocks, in
which it issues 8 instructions. A running maximum needs 4.5 and a chain from each product through a maximum across
lanes to the exponential; without it, 3.5 and no chain: multiply, exp2, add to the sum, half a conversion.

So nothing is taken off the scores where they are known to be small. A survey of the keys and values (one pass over
them, a percent of the work) tells the longest key and whether all is finite; by Cauchy-Schwarz no score of a query is
larger than its length times that. If weights are then at most 2^32, or 2^14 for float16 whose range they must not
leave, the row is TAME: weights are exp2 of the scores as they are, whose sums cannot overflow or vanish. Programs that
find their rows otherwise leave them to further launches. PLAIN takes off a running maximum. CAREFUL does so in the
order of operations of the reference, and minds what is not finite: hidden values must not come in as 0 times NaN. Each
launch ends at once where another serves. float32 has no TAME; short clips have no survey, and the careful launch alone.

Order. Blocks of one plane follow one another, so that the planes being worked on at a time, few of them, stay in the
L2 cache; the last blocks, which see most, come first.
"""

import triton
import triton.language as tl

from vpfast.kernels.masked_attention3d_mask import block_of, walk
from vpfast.kernels.masked_attention3d_rows import add_weighted, load_rows, peak_of, plane_at, products

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-(2.0**30))  # below every score where a maximum runs, and far above what is hidden
TAME, PLAIN, CAREFUL = (tl.constexpr(mode) for mode in range(3))
PEAKS = tl.constexpr(256)  # of each plane, in parts that the survey's programs have gone through


@triton.jit(do_not_specialize=["k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "length", "part"])
def survey_kernel(
    k: tl.tensor,
    v: tl.tensor,
    peaks: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    part: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """``peaks`` (planes, 2, PEAKS): of every ``part`` rows of k and v the largest sum of squares, inf if one is not
    finite. Parts that do not exist are 0."""
    plane, index = tl.program_id(0), tl.program_id(1)
    start = index * part
    end = tl.minimum(start + part, length)
    to = peaks + plane.to(tl.int64) * (2 * PEAKS) + index
    k_rows = (plane_at(k, plane, heads, k_batch, k_head, UNIT), k_row)
    v_rows = (plane_at(v, plane, heads, v_batch, v_head, UNIT), v_row)
    k_peak, k_strange = peak_of(k_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
    v_peak, v_strange = peak_of(v_rows, start, end, SIZE, DIM, D, CHUNKS, UNIT)
    tl.store(to, tl.where(k_strange > 0, float("inf"), k_peak))
    tl.store(to + PEAKS, tl.where(v_strange > 0, float("inf"), v_peak))


@triton.jit
def _mode_of(longest_squared: tl.tensor, peaks: tl.tensor, scale: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """The MODE that queries up to this long are served in."""
    part = tl.arange(0, PEAKS)
    key_squared = tl.max(tl.load(peaks + part), 0)
    value_squared = tl.max(tl.load(peaks + PEAKS + part), 0)
    largest = tl.sqrt(longest_squared) * tl.sqrt(key_squared) * tl.abs(scale) * LOG2E
    finite = value_squared < 1e36
    return tl.where((largest <= LIMIT) & finite, TAME, tl.where((largest <= 2**20) & finite, PLAIN, CAREFUL))


@triton.jit
def _begin(
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
    """Of one tile of keys the scores, and its values."""
    _, length, chunk, own, q, tensors = context
    q_rows, k_rows, v_rows = tensors
    k = q
    if CHUNKS == 1:
        k = load_rows(k_rows, start, length, 0, MASKED, MOVING, DIM, D, UNIT)
    v = load_rows(v_rows, start, length, chunk, MASKED, MOVING, DIM, D, UNIT)
    scores = products(q, k, q_rows, own, k_rows, start, length, FIXED, MOVING, DIM, D, CHUNKS, UNIT)
    return scores, v


@triton.jit
def _finish(
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
    """With it, ``state``: the sum of weighted values, that of weights, the running maximum, and whether anything was
    seen."""
    out, total, top, found = state
    scale = context[0]
    scores, v = begun
    if MODE == TAME:
        scores = scores * (scale * LOG2E)
        if MASKED:
            scores += penalty
        weights = tl.exp2(scores)
        total += tl.sum(weights, 1)
    elif MODE == PLAIN:
        scores = scores * (scale * LOG2E)
        if MASKED:
            scores += penalty
        higher = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp2(top - higher)
        weights = tl.exp2(scores - (higher - LIFT)[:, None])
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None]
        top = higher
    else:
        scores = scores * scale
        if MASKED:
            scores = tl.where(seen, scores, float("-inf"))
            found = tl.maximum(found, tl.max(seen.to(tl.int32), 1))
        else:
            found = tl.full(found.shape, 1, tl.int32)
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2((top - base) * LOG2E)
        weights = tl.exp2((scores - base[:, None]) * LOG2E + LIFT)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None]
        top = higher
    out = add_weighted(out, weights, seen, v, MASKED and MODE == CAREFUL)
    return out, total, top, found


@triton.jit(
    do_not_specialize=[
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "blocks",
        "frames", "rows", "columns", "radius_t", "radius_y", "radius_x",
    ]
)  # fmt: skip
def forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
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
    LIMIT: tl.constexpr,
    LIFT: tl.constexpr,
) -> None:
    """Program (block of a plane, chunk of components of the result); ``out`` and ``lse`` are dense."""
    SUM: tl.constexpr = lse.dtype.element_ty
    if EXACT_SCALE is not None:
        scale = tl.full((), EXACT_SCALE, SUM)
    plane = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    chunk = tl.program_id(1)
    first, count = block_of(block, frames, rows, columns, FIXED, LINE)
    length = frames * rows * columns
    q_rows = (plane_at(q, plane, heads, q_batch, q_head, UNIT), q_row)
    k_rows = (plane_at(k, plane, heads, k_batch, k_head, UNIT), k_row)
    v_rows = (plane_at(v, plane, heads, v_batch, v_head, UNIT), v_row)
    queries = load_rows(q_rows, first, first + count, 0, True, FIXED, DIM, D, UNIT)
    if SURVEYED:
        wide = queries.to(tl.float32)
        squares = tl.sum(wide * wide, 1)
        # A maximum passes over NaN.
        longest = tl.max(tl.where(squares < float("inf"), squares, float("inf")), 0)
        if _mode_of(longest, peaks + plane.to(tl.int64) * (2 * PEAKS), scale, LIMIT) != MODE:
            return

    state = (
        tl.zeros((FIXED, D), SUM),
        tl.zeros((FIXED,), SUM),
        tl.full((FIXED,), float("-inf") if MODE == CAREFUL else LOWEST, SUM),
        tl.zeros((FIXED,), tl.int32),
    )
    context = (scale, length, chunk, (first, first + count), queries, (q_rows, k_rows, v_rows))
    grid = (frames, rows, columns, radius_t, radius_y, radius_x)
    state = walk(
        state, context, grid, first, count, _begin, _finish, FIXED, MOVING, RULE, LINE, WINDOW_T, WINDOW_Y, WINDOW_X,
        False, DIM, D, CHUNKS, UNIT, MODE, LIFT
    )  # fmt: skip
    result, total, top, found = state

    if MODE == TAME:
        blind = total == 0
        norm = tl.log(total)
    elif MODE == PLAIN:
        blind = total == 0
        norm = (top - LIFT) * LN2 + tl.log(total)
    else:
        blind = found == 0
        norm = top + (tl.log(total) - LIFT * LN2)
    result = tl.where(blind[:, None], 0.0, result / total[:, None])
    norm = tl.where(blind, float("-inf"), norm)
    row = tl.arange(0, FIXED)
    column = chunk * D + tl.arange(0, D)
    to = plane.to(tl.int64) * length + first
    inside = row < count
    tl.store(
        out + to * DIM + (row[:, None] * DIM + column[None, :]),
        result.to(out.dtype.element_ty),
        mask=inside[:, None] & (column < DIM)[None, :],
    )
    tl.store(lse + to + row, norm, mask=row < tl.where(chunk == 0, count, 0))
