"""Which tiles of keys a block of queries sees, and which tiles of queries see a block of keys, in closed form.

Of a *line*, a stretch of raster order, every query sees an interval of keys, and every key is seen by an interval of
queries; both ends only move on from one position to the next. So of a block of positions, the fixed side, the first and
the last say which tiles of a line, the moving side, are hidden from all, seen by all, or seen in part:

    begin(first) .. begin(last)   seen by some: masked
    begin(last)  .. end(first)    seen by all: no mask
    end(first)   .. end(last)     seen by some: masked

Tiles are counted from begin(first), which no boundary in memory need agree with. The line that a block is in is *near*;
the *far* ones, of other frames, are all alike, one frame after another. A walk is thus a few integers, worked out by
every program for itself: there is no list to make, to keep or to copy, and nothing to wait for.

    SEQUENCE  the line is the whole sequence: rules without y and x, and no window on those axes
    FRAME     the line is a frame
    ROW       the line is a row, for a window in x that is much shorter
    MIXED     frames shorter than a tile: the line is the sequence, and every tile of it is masked by the rule itself

A block lies in one line; only the last of a line is not full. FRAME and ROW visit no hidden tile; with a window in x
FRAME may, at the edges of a frame, and so may MIXED at the ends of what the block sees.
"""

import triton
import triton.language as tl

RULES = ("raster", "raster_strict", "past_frames", "separable", "eq6")
RASTER, STRICT, PAST, SEPARABLE, EQ6 = (tl.constexpr(rule) for rule in range(5))
SEQUENCE, FRAME, ROW, MIXED = (tl.constexpr(line) for line in range(4))
PENALTY = tl.constexpr(2.0**100)


@triton.constexpr_function
def _is_strict(rule: int) -> bool:
    """Does a raster position that counts hide itself?"""
    return rule in (1, 4)


@triton.constexpr_function
def _cuts_far(rule: int) -> bool:
    """Does the raster position count in other frames too?"""
    return rule in (3, 4)


@triton.constexpr_function
def _hides_near(rule: int) -> bool:
    """Is the query's own frame hidden?"""
    return rule in (2, 4)


@triton.jit
def block_of(
    block: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, SIZE: tl.constexpr, LINE: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The first position of a block, and how many there are."""
    line = rows * columns
    if LINE == ROW:
        line = columns
    elif LINE != FRAME:
        line = line * frames
    blocks = tl.cdiv(line, SIZE)
    offset = block % blocks * SIZE
    return block // blocks * line + offset, tl.minimum(line - offset, SIZE)


@triton.jit
def sight(
    at: tl.tensor,
    frames: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_t: tl.tensor,
    radius_y: tl.tensor,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    OF_KEYS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Intervals of a near and of a far line, (begin, end, begin, end): the keys that queries ``at`` see, or with
    ``OF_KEYS`` the queries that see keys ``at``. Counted from the start of the line. Of SEQUENCE and FRAME."""
    frame = rows * columns
    t = at // frame
    if LINE == SEQUENCE:
        if OF_KEYS:
            begin = (t + 1) * frame if RULE == PAST else (at + 1 if RULE == STRICT else at)
            end = tl.minimum(t + radius_t + 1, frames) * frame
        else:
            begin = tl.maximum(t - radius_t, 0) * frame
            end = t * frame if RULE == PAST else (at if RULE == STRICT else at + 1)
        return begin, end, begin, end
    j = at - t * frame
    begin = j * 0
    end = begin + frame
    if WINDOW_Y:
        y = j // columns
        begin = tl.maximum(y - radius_y, 0) * columns
        end = tl.minimum(y + radius_y + 1, rows) * columns
    # What the raster position in the frame adds, where it counts: up to it, or from it on.
    strict: tl.constexpr = 1 if _is_strict(RULE) else 0
    if OF_KEYS:
        cut_begin, cut_end = tl.maximum(begin, j + strict), end
    else:
        cut_begin, cut_end = begin, tl.minimum(end, j + 1 - strict)
    far_is_cut: tl.constexpr = _cuts_far(RULE)
    far_begin, far_end = (cut_begin, cut_end) if far_is_cut else (begin, end)
    near_is_hidden: tl.constexpr = _hides_near(RULE)
    near_begin, near_end = (j * 0, j * 0) if near_is_hidden else (cut_begin, cut_end)
    return near_begin, near_end, far_begin, far_end


@triton.jit
def sight_in_row(
    x: tl.tensor, cut: tl.tensor, columns: tl.tensor, radius_x: tl.tensor, RULE: tl.constexpr, OF_KEYS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The interval of a row; ``cut`` where it is the positions' own one and counts only up to them, or from them on."""
    strict: tl.constexpr = 1 if _is_strict(RULE) else 0
    begin = tl.maximum(x - radius_x, 0)
    end = tl.minimum(x + radius_x + 1, columns)
    if OF_KEYS:
        begin = tl.where(cut, x + strict, begin)
    else:
        end = tl.where(cut, x + 1 - strict, end)
    return begin, end


@triton.jit
def is_visible(
    query: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_t: tl.tensor,
    radius_y: tl.tensor,
    radius_x: tl.tensor,
    RULE: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
) -> tl.tensor:
    """The rule itself, for every pair."""
    frame = rows * columns
    t, key_t = query // frame, key // frame
    j, key_j = query - t * frame, key - key_t * frame
    past = (key_t < t) & (t - key_t <= radius_t)
    if RULE == RASTER:
        seen = past | ((key_t == t) & (key_j <= j))
    elif RULE == STRICT:
        seen = past | ((key_t == t) & (key_j < j))
    elif RULE == PAST:
        seen = past
    elif RULE == SEPARABLE:
        seen = (past | (key_t == t)) & (key_j <= j)
    else:
        seen = past & (key_j < j)
    if WINDOW_Y:
        seen = seen & (tl.abs(j // columns - key_j // columns) <= radius_y)
    if WINDOW_X:
        seen = seen & (tl.abs(j % columns - key_j % columns) <= radius_x)
    return seen


@triton.jit
def ends_of_mixed(
    first: tl.tensor,
    last: tl.tensor,
    frames: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    radius_t: tl.tensor,
    RULE: tl.constexpr,
    OF_KEYS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The stretch of the sequence that positions first .. last have to do with, where no line is told apart."""
    frame = rows * columns
    first_t, last_t = first // frame, last // frame
    if OF_KEYS:
        begin = (first_t + 1) * frame if _hides_near(RULE) else first
        return begin, tl.minimum(last_t + radius_t + 1, frames) * frame
    end = last + 1
    if RULE == STRICT:
        end = last
    elif RULE == PAST:
        end = last_t * frame
    elif RULE == EQ6:
        end = last - frame
    return tl.maximum(first_t - radius_t, 0) * frame, end


@triton.jit
def far_lines(
    at: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, radius_t: tl.tensor, OF_KEYS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """How many far frames there are, and the start of the first of them."""
    t = at // (rows * columns)
    if OF_KEYS:
        return tl.minimum(radius_t, frames - 1 - t), (t + 1) * rows * columns
    begin = tl.maximum(t - radius_t, 0)
    return t - begin, begin * rows * columns


@triton.jit
def tiles_of(
    begin_first: tl.tensor, end_first: tl.tensor, begin_last: tl.tensor, end_last: tl.tensor, SIZE: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Of a line, in tiles from ``begin_first`` on: how many, the first that is seen by all, and the end of those."""
    count = tl.cdiv(tl.maximum(end_last - begin_first, 0), SIZE)
    full = tl.minimum(tl.cdiv(begin_last - begin_first, SIZE), count)
    full_end = tl.maximum(tl.maximum(end_first - begin_first, 0) // SIZE, full)
    return count, full, tl.minimum(full_end, count)


@triton.jit
def walk(
    state: tl.tuple,
    context: tl.tuple,
    grid: tl.tuple,
    first: tl.tensor,
    count: tl.tensor,
    BEGIN: tl.constexpr,
    FINISH: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_T: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    OF_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tl.tuple:
    """Take ``count`` positions from ``first`` on through every tile of MOVING positions that has to do with them:
    ``FINISH(state, context, BEGIN(context, start, MASKED), seen, penalty, MASKED)`` gives the next state. Where MASKED,
    ``seen`` (FIXED, MOVING) tells what is seen, and ``penalty`` is 0 there and below -2^99 elsewhere. The latter is
    made without a condition: of those the compiler packs a bit for every pair and takes them apart again. The last
    constants are handed on; in a tuple they would be none."""
    frames, rows, columns, radius_t, radius_y, radius_x = grid
    at = first + tl.arange(0, FIXED)
    last = first + count - 1
    if LINE == MIXED:
        begin, end = ends_of_mixed(first, last, frames, rows, columns, radius_t, RULE, OF_KEYS)
        near = (begin, tl.cdiv(tl.maximum(end - begin, 0), MOVING), 0, 0)
        state = _walk_lines(
            state, context, grid, at, near, (at, at), near, (at, at), 0, BEGIN, FINISH, FIXED, MOVING, RULE, LINE,
            WINDOW_T, WINDOW_Y, WINDOW_X, OF_KEYS, DIM, D, CHUNKS, UNIT, MODE, LIFT
        )  # fmt: skip
    elif LINE == ROW:
        t, y, x = first // (rows * columns), first // columns % rows, at % columns
        above, below = tl.maximum(y - radius_y, 0), tl.minimum(y + radius_y + 1, rows)
        far_is_cut: tl.constexpr = _cuts_far(RULE)
        near_is_hidden: tl.constexpr = 1 if _hides_near(RULE) else 0
        if OF_KEYS:
            first_frame, end_frame = t + near_is_hidden, tl.minimum(t + radius_t + 1, frames)
        else:
            first_frame, end_frame = tl.maximum(t - radius_t, 0), t + 1 - near_is_hidden
        for frame in range(first_frame, end_frame):
            is_cut = (frame == t) | far_is_cut
            first_row, end_row = above, below
            if OF_KEYS:
                first_row = tl.where(is_cut, y, above)
            else:
                end_row = tl.where(is_cut, y + 1, below)
            for row in range(first_row, end_row):
                cut = is_cut & (row == y)
                begin, end = sight_in_row(x, cut, columns, radius_x, RULE, OF_KEYS)
                of_first, of_first_end = sight_in_row(first % columns, cut, columns, radius_x, RULE, OF_KEYS)
                of_last, of_last_end = sight_in_row(last % columns, cut, columns, radius_x, RULE, OF_KEYS)
                tiles = tiles_of(of_first, of_first_end, of_last, of_last_end, MOVING)
                near = ((frame * rows + row) * columns + of_first, tiles[0], tiles[1], tiles[2])
                interval = (begin - of_first, end - of_first)
                state = _walk_lines(
                    state, context, grid, at, near, interval, near, interval, 0, BEGIN, FINISH, FIXED, MOVING, RULE,
                    LINE, WINDOW_T, WINDOW_Y, WINDOW_X, OF_KEYS, DIM, D, CHUNKS, UNIT, MODE, LIFT
                )  # fmt: skip
    else:
        vectors = sight(at, frames, rows, columns, radius_t, radius_y, RULE, LINE, WINDOW_Y, OF_KEYS)
        one = sight(first, frames, rows, columns, radius_t, radius_y, RULE, LINE, WINDOW_Y, OF_KEYS)
        other = sight(last, frames, rows, columns, radius_t, radius_y, RULE, LINE, WINDOW_Y, OF_KEYS)
        lines, near_start, far_start = 0, 0, 0
        if LINE == FRAME:
            lines, far_start = far_lines(first, frames, rows, columns, radius_t, OF_KEYS)
            near_start = first // (rows * columns) * (rows * columns)
        near_tiles = tiles_of(one[0], one[1], other[0], other[1], MOVING)
        far_tiles = tiles_of(one[2], one[3], other[2], other[3], MOVING)
        near = (near_start + one[0], near_tiles[0], near_tiles[1], near_tiles[2])
        far = (far_start + one[2], far_tiles[0], far_tiles[1], far_tiles[2])
        if WINDOW_X:  # which the intervals do not tell: no tile goes without a mask
            near, far = (near[0], near[1], 0, 0), (far[0], far[1], 0, 0)
        of_near = (vectors[0] - one[0], vectors[1] - one[0])
        of_far = (vectors[2] - one[2], vectors[3] - one[2])
        state = _walk_lines(
            state, context, grid, at, near, of_near, far, of_far, lines, BEGIN, FINISH, FIXED, MOVING, RULE, LINE,
            WINDOW_T, WINDOW_Y, WINDOW_X, OF_KEYS, DIM, D, CHUNKS, UNIT, MODE, LIFT
        )  # fmt: skip
    return state


@triton.jit
def _walk_lines(
    state: tl.tuple,
    context: tl.tuple,
    grid: tl.tuple,
    at: tl.tensor,
    near: tl.tuple,
    of_near: tl.tuple,
    far: tl.tuple,
    of_far: tl.tuple,
    lines: tl.tensor,
    BEGIN: tl.constexpr,
    FINISH: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    RULE: tl.constexpr,
    LINE: tl.constexpr,
    WINDOW_T: tl.constexpr,
    WINDOW_Y: tl.constexpr,
    WINDOW_X: tl.constexpr,
    OF_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    LIFT: tl.constexpr,
) -> tl.tuple:
    """The near line and ``lines`` far ones, a frame apart. Of each: where its first tile starts, and ``tiles_of``;
    the intervals count from that start. One loop for tiles that are not masked, one for those that are: a line's end is
    a step in it, so that loads run ahead from one line to the next."""
    frames, rows, columns, radius_t, radius_y, radius_x = grid
    near_at, near_count, near_full, near_full_end = near
    far_at, far_count, far_full, far_full_end = far
    frame = rows * columns

    if LINE != MIXED and not (LINE == FRAME and WINDOW_X):
        near_tiles, far_tiles = near_full_end - near_full, far_full_end - far_full
        start, left, following = near_at + near_full * MOVING, near_tiles, far_at + far_full * MOVING
        if LINE == FRAME:
            skip = near_tiles == 0
            start = tl.where(skip, following, start)
            left = tl.where(skip, far_tiles, left)
            following += tl.where(skip, frame, 0)
        for _ in range(near_tiles + lines * far_tiles):
            begun = BEGIN(context, start, False, FIXED, MOVING, DIM, D, CHUNKS, UNIT, MODE, LIFT)
            state = FINISH(state, context, begun, at, at, False, FIXED, MOVING, DIM, D, CHUNKS, UNIT, MODE, LIFT)
            left -= 1
            over = left == 0
            start = tl.where(over, following, start + MOVING)
            following += tl.where(over, frame, 0)
            left = tl.where(over, far_tiles, left)

    near_tiles, far_tiles = near_count - near_full_end + near_full, far_count - far_full_end + far_full
    near_first = tl.where(near_full == 0, near_full_end, 0)
    far_first = tl.where(far_full == 0, far_full_end, 0)
    is_near = near_tiles > 0
    origin = tl.where(is_near, near_at, far_at)
    tile = tl.where(is_near, near_first, far_first)
    following = tl.where(is_near, far_at, far_at + frame)
    for _ in range(near_tiles + lines * far_tiles):
        start = origin + tile * MOVING
        begun = BEGIN(context, start, True, FIXED, MOVING, DIM, D, CHUNKS, UNIT, MODE, LIFT)
        moving = tl.arange(0, MOVING)
        if LINE == MIXED:
            there = (start + moving)[None, :]
            if OF_KEYS:
                seen = is_visible(
                    there, at[:, None], rows, columns, radius_t, radius_y, radius_x, RULE, WINDOW_Y, WINDOW_X
                ) & (there < frames * frame)  # fmt: skip
            else:
                seen = is_visible(
                    at[:, None], there, rows, columns, radius_t, radius_y, radius_x, RULE, WINDOW_Y, WINDOW_X
                )  # fmt: skip
            penalty = tl.where(seen, 0.0, -PENALTY)
        else:
            begin, end = of_near
            if LINE == FRAME:
                begin, end = tl.where(is_near, begin, of_far[0]), tl.where(is_near, end, of_far[1])
            begin, end = (begin - tile * MOVING)[:, None], (end - tile * MOVING)[:, None]
            seen = moving[None, :] < end
            from_start = (moving.to(tl.float32) * PENALTY)[None, :]
            penalty = tl.minimum((end.to(tl.float32) - 0.5) * PENALTY - from_start, 0.0)
            if OF_KEYS or WINDOW_T or WINDOW_Y or LINE == ROW:  # else what is seen begins with the line
                seen = seen & (moving[None, :] >= begin)
                penalty += tl.minimum(from_start - (begin.to(tl.float32) - 0.5) * PENALTY, 0.0)
            if WINDOW_X and LINE == FRAME:
                near_x = tl.abs(((start + moving) % columns)[None, :] - (at % columns)[:, None]) <= radius_x
                seen = seen & near_x
                penalty = tl.where(near_x, penalty, -PENALTY)
        state = FINISH(state, context, begun, seen, penalty, True, FIXED, MOVING, DIM, D, CHUNKS, UNIT, MODE, LIFT)
        if LINE != MIXED:
            tile += 1
            tile = tl.where(
                tile == tl.where(is_near, near_full, far_full), tl.where(is_near, near_full_end, far_full_end), tile
            )
            over = tile >= tl.where(is_near, near_count, far_count)
            tile = tl.where(over, far_first, tile)
            origin = tl.where(over, following, origin)
            following += tl.where(over, frame, 0)
            is_near = is_near & (over == 0)
        else:
            tile += 1
    return state
