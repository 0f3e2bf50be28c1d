# ruff: noqa: N803
"""Which tiles the Triton kernels of masked_attention3d visit: all visible pairs, each once; no tile that is hidden."""

import importlib.util

import pytest
import torch
from attention import MASKS

from vpfast.ops import Mask3d

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import interpreter

if not torch.cuda.is_available():
    interpreter.mend()

import triton
import triton.language as tl

from vpfast.kernels import masked_attention3d as kernels
from vpfast.kernels.masked_attention3d_mask import MIXED, block_of, walk

SIZE = 16
GRIDS = [(2, 3, 9), (5, 1, 3), (1, 2, 40)]  # frames longer and shorter than a tile, rows longer
if torch.cuda.is_available():
    GRIDS = [*GRIDS, (3, 4, 9), (2, 5, 13), (3, 4, 5), (7, 1, 3), (2, 2, 40), (4, 9, 33), (1, 1, 700), (1, 1, 1)]


@triton.jit
def _finish(
    state, context, start, seen, penalty, MASKED: tl.constexpr, FIXED: tl.constexpr, MOVING: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr,
    LIFT: tl.constexpr,
):  # fmt: skip
    """Count every pair of the tile that is not masked, and write its start down, with whether it was masked."""
    counts, visits, first, count, length = context
    row, column = tl.arange(0, FIXED), start + tl.arange(0, MOVING)
    at = counts + (first + row)[:, None] * length + column[None, :]
    inside = (row < count)[:, None] & (column < length)[None, :]
    if MASKED:
        one = tl.where(seen, 1, 0) + tl.where((penalty == 0) != seen, 1000, 0)
    else:
        one = tl.full((FIXED, MOVING), 1, tl.int32)
    tl.store(at, tl.load(at, mask=inside, other=0) + one, mask=inside)
    tl.store(visits + state[0], start)
    return (state[0] + 1,)


@triton.jit
def _begin(
    context, start, MASKED: tl.constexpr, FIXED: tl.constexpr, MOVING: tl.constexpr, DIM: tl.constexpr,
    D: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    return start


@triton.jit(do_not_specialize=["frames", "rows", "columns", "radius_t", "radius_y", "radius_x"])
def _walk_kernel(
    counts, visits, frames, rows, columns, radius_t, radius_y, radius_x, SIZE: tl.constexpr, RULE: tl.constexpr,
    LINE: tl.constexpr, WINDOW_T: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    first, count = block_of(tl.program_id(0), frames, rows, columns, SIZE, LINE)
    length = frames * rows * columns
    own = visits + tl.program_id(0) * length
    context = (counts, own, first, count, length)
    grid = (frames, rows, columns, radius_t, radius_y, radius_x)
    walk(
        (0,), context, grid, first, count, _begin, _finish, SIZE, SIZE, RULE, LINE, WINDOW_T, WINDOW_Y,
        WINDOW_X, OF_KEYS, 1, 16, 1, 1, 0, 0
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("of_keys", [False, True], ids=["keys of queries", "queries of keys"])
@pytest.mark.parametrize(
    "mask", [*MASKS, Mask3d("raster", (None, None, 9))][:: 1 if torch.cuda.is_available() else 2], ids=str
)
def test_tiles(mask, of_keys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for grid in GRIDS:
        clip = kernels._clip(grid, mask.name, mask.radii)
        line = kernels._line(clip, kernels.Tiles(SIZE, SIZE, 4, 1))
        blocks = kernels._blocks(clip, line, SIZE)
        counts = torch.zeros(clip.length, clip.length, dtype=torch.int32, device=device)
        visits = torch.full((blocks, clip.length), -1, dtype=torch.int32, device=device)
        _walk_kernel[(blocks,)](
            counts, visits, *clip.geometry, SIZE=SIZE, RULE=clip.rule, LINE=line, WINDOW_T=clip.window_t,
            WINDOW_Y=clip.window_y, WINDOW_X=clip.window_x, OF_KEYS=of_keys,
        )  # fmt: skip
        visible = mask.visible(grid)
        seen = visible.T if of_keys else visible
        assert torch.equal(counts.cpu(), seen.int()), (grid, line)
        if line == MIXED or clip.window_x or not seen.any():
            continue
        stretch = {kernels.FRAME: clip.rows * clip.columns}.get(line, clip.length)
        for block, starts in enumerate(visits.cpu().tolist()):
            per_line = -(-stretch // SIZE)
            first = block // per_line * stretch + block % per_line * SIZE
            last = min(first + SIZE, block // per_line * stretch + stretch)
            for start in (start for start in starts if start >= 0):
                assert seen[first:last, start : start + SIZE].any(), (grid, first, start)
