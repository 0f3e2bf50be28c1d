"""masked_attention3d on the GPU in Triton: the operators of ``vpfast.ops.masked_attention3d`` by the kernels beside this.

Story. The mask is integer rules and every kernel works out for itself which tiles it has to visit, and which of them to
mask (masked_attention3d_mask.py): nothing of the size of a mask, nor a list of tiles, is made on the host or kept.
Forward (masked_attention3d_forward.py) and backward (masked_attention3d_backward.py) own blocks of queries or keys and
walk the other side; decode (masked_attention3d_decode.py) shares the keys of single queries out. What is here picks
tiles, allocates and launches, by plain functions of the problem: no trial runs, no synchronisation, nothing copied to
the GPU, so that calls can be captured in a CUDA graph once each kernel has been compiled.

Every result is bitwise repeatable: a sum is one program's, or of parts in their order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vpfast.kernels._ahead_of_time import Compilation
from vpfast.kernels.masked_attention3d_backward import delta_kernel, keys_kernel, queries_kernel
from vpfast.kernels.masked_attention3d_decode import combine_kernel, decode_kernel
from vpfast.kernels.masked_attention3d_forward import PEAKS, forward_kernel, survey_kernel
from vpfast.kernels.masked_attention3d_mask import FRAME, MIXED, ROW, RULES, SEQUENCE

SURVEYED_FROM = 1024
"""Positions of the shortest clip whose rows are surveyed; below it two more launches cost more than they save."""

_HALF = (torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """How many positions a program owns and how many it takes at a time, in how many warps, loading how far ahead."""

    fixed: int
    moving: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Head dimension d as kernels take it: ``chunks`` times ``padded`` components."""

    padded: int
    chunks: int


class Clip(NamedTuple):
    """Grid and mask as kernels take them. Radii are no larger than their axis; ``window_y`` and ``window_x`` tell
    whether they hide anything."""

    frames: int
    rows: int
    columns: int
    rule: int
    radius_t: int
    radius_y: int
    radius_x: int
    window_y: bool
    window_x: bool

    @property
    def length(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def geometry(self) -> tuple[int, ...]:
        return self.frames, self.rows, self.columns, self.radius_t, self.radius_y, self.radius_x


# --- choices: functions of the problem alone --------------------------------------------------------------------------


def _clip(grid: Sequence[int], mask: str, window: Sequence[int]) -> Clip:
    radii = [size if radius < 0 else min(radius, size) for size, radius in zip(grid, window, strict=True)]
    hides_y, hides_x = radii[1] < grid[1] - 1, radii[2] < grid[2] - 1
    return Clip(grid[0], grid[1], grid[2], RULES.index(mask), radii[0], radii[1], radii[2], hides_y, hides_x)


def _rows(dim: int) -> Rows:
    padded = min(128, max(16, triton.next_power_of_2(dim)))
    return Rows(padded, -(-dim // padded))


def _forward_tiles(dtype: torch.dtype, rows: Rows) -> Tiles:
    """128 x 64 pairs: 64 registers of scores, 32 of weights and 16 to 64 of sums a thread leave room for three programs
    an SM at d = 16 and 32, so that one's products hide behind another's exponentials. Longer heads take more warps, to
    hold the sums. Twice the queries read a tile of keys half as often. Without matrix units float32 and float64 hold
    both operands in registers and take smaller tiles."""
    if dtype in _HALF:
        return Tiles(128, 64, 4 if rows.padded <= 64 else 8, 3)
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2)
    return Tiles(32, 16, 4, 1)


def _backward_tiles(dtype: torch.dtype, rows: Rows) -> Tiles:
    """As forward's, with two tiles of scores at a time and, for keys, two of sums: twice the warps."""
    if dtype in _HALF:
        return Tiles(128, 64, 8, 2)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2)
    return Tiles(16, 16, 4, 1)


def _line(clip: Clip, tiles: Tiles) -> int:
    """How the sequence is divided for a walk: see masked_attention3d_mask.py."""
    frame = clip.rows * clip.columns
    windowed = clip.window_y or clip.window_x
    if not windowed and RULES[clip.rule] in ("raster", "raster_strict", "past_frames"):
        return int(SEQUENCE)
    if frame <= tiles.moving:
        return int(MIXED)
    return int(ROW if clip.window_x and clip.columns > tiles.fixed else FRAME)


def _blocks(clip: Clip, line: int, fixed: int) -> int:
    size = {int(FRAME): clip.rows * clip.columns, int(ROW): clip.columns}.get(line, clip.length)
    return clip.length // size * -(-size // fixed)


def _splits(programs: int, length: int) -> int:
    """Among how many programs the keys of a query are shared out: enough to fill a GPU, and 512 keys for each."""
    wanted = min(64, 1024 // programs, length // 512)
    return 1 << max(0, wanted.bit_length() - 1)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _dense(tensor: Tensor) -> Tensor:
    """With the components of a row one after another."""
    return tensor if tensor.shape[3] == 1 or tensor.stride(3) == 1 else tensor.contiguous()


def _unit(*tensors: Tensor) -> int:
    """Elements in 16 bytes if every row of these begins at a multiple of that, else 1."""
    unit = 16 // tensors[0].element_size()
    aligned = all(
        tensor.data_ptr() % 16 == 0 and all(step % unit == 0 for step in _steps(tensor)) for tensor in tensors
    )
    return unit if aligned else 1


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row; 0 where there is but one."""
    batch, head, row = (tensor.stride(k) if tensor.shape[k] > 1 else 0 for k in range(3))
    return batch, head, row


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    return [step // unit for tensor in tensors for step in _steps(tensor)]


def _exact(scale: float, dtype: torch.dtype) -> float | None:
    """float64 takes the scale as a constant: as an argument it would be a float32."""
    return scale if dtype == torch.float64 else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _part(length: int) -> int:
    """Rows that a program of a survey goes through: at most PEAKS programs a plane."""
    return max(512, -(-length // int(PEAKS)))


def _numbers(dtype: torch.dtype) -> dict[str, object]:
    """LIMIT: the power of two that scores of a TAME row stay below; LIFT: that weights of float16 carry on top."""
    half = dtype == torch.float16
    return {"LIMIT": 14.0 if half else 32.0, "LIFT": 14 if half else 0, "PRECISION": "ieee"}


def _constants(clip: Clip, dim: int, dtype: torch.dtype, scale: float, unit: int, line: int) -> dict[str, object]:
    """What forward, backward and decode are compiled for alike."""
    rows = _rows(dim)
    return {
        "EXACT_SCALE": _exact(scale, dtype),
        "RULE": clip.rule,
        "LINE": line,
        "WINDOW_Y": clip.window_y,
        "WINDOW_X": clip.window_x,
        "DIM": dim,
        "D": rows.padded,
        "CHUNKS": rows.chunks,
        "UNIT": unit,
    }


def _launches(dtype: torch.dtype, length: int, chunks: int) -> list[dict[str, object]]:
    """The launches that share the work: one for all, or one for what the survey finds tame and one for the rest."""
    if dtype in _HALF and length >= SURVEYED_FROM and chunks == 1:
        return [{"SURVEYED": True, "TAME": True}, {"SURVEYED": True, "TAME": False}]
    return [{"SURVEYED": False, "TAME": False}]


# --- the operators ----------------------------------------------------------------------------------------------------


def masked_attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], mask: str, window: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, heads, L, d) -> (out (B, heads, L, d), lse (B, heads, L)), as ``reference.masked_attention3d``."""
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=_wide(q.dtype))
    if out.numel() == 0:
        return out, lse
    q, k, v = _dense(q), _dense(k), _dense(v)
    clip, dim, planes, heads = _clip(grid, mask, window), q.shape[3], q.shape[0] * q.shape[1], q.shape[1]
    rows, unit = _rows(dim), _unit(q, k, v)
    tiles = _forward_tiles(q.dtype, rows)
    line = _line(clip, tiles)
    launches = _launches(q.dtype, clip.length, rows.chunks)
    peaks = lse
    if launches[0]["SURVEYED"]:
        peaks = q.new_zeros((planes, 2, int(PEAKS)), dtype=torch.float32)
        part = _part(clip.length)
        survey_kernel[(-(-clip.length // part), planes)](
            k, v, peaks, *_strides(unit, k, v), heads, clip.length, part,
            DIM=dim, D=rows.padded, CHUNKS=rows.chunks, UNIT=unit, SIZE=64, num_warps=4,
        )  # fmt: skip
    blocks = _blocks(clip, line, tiles.fixed)
    for launch in launches:
        forward_kernel[(planes * blocks, rows.chunks)](
            q, k, v, out, lse, peaks, *_strides(unit, q, k, v), heads, blocks, *clip.geometry, scale,
            **_constants(clip, dim, q.dtype, scale, unit, line), **_numbers(q.dtype), **launch,
            FIXED=tiles.fixed, MOVING=tiles.moving, **_compiled(tiles, launch),
        )  # fmt: skip
    return out, lse


def _compiled(tiles: Tiles, launch: dict[str, object]) -> dict[str, object]:
    """A launch that is careful takes off a row's largest score, exactly: products and differences are not fused."""
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": bool(launch["TAME"])}


def masked_attention3d_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Sequence[int],
    mask: str,
    window: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (grad_q, grad_k, grad_v), as ``reference.masked_attention3d_backward``."""
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in range(3))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    grad, q, k, v = (_dense(tensor) for tensor in (grad_out.to(q.dtype), q, k, v))
    out, lse = out.to(q.dtype).contiguous(), lse.contiguous()
    clip, dim, planes, heads = _clip(grid, mask, window), q.shape[3], q.shape[0] * q.shape[1], q.shape[1]
    rows, unit = _rows(dim), _unit(q, k, v, grad)
    tiles = _backward_tiles(q.dtype, rows)
    line = _line(clip, tiles)
    launches = _launches(q.dtype, clip.length, rows.chunks)
    numbers = _numbers(q.dtype)
    strides = _strides(unit, q, k, v, grad)
    delta = torch.empty_like(lse)
    surveyed = bool(launches[0]["SURVEYED"] or numbers["LIFT"])
    peaks = q.new_zeros((planes, 5, int(PEAKS)), dtype=torch.float32) if surveyed else delta
    part = _part(clip.length)
    delta_kernel[(-(-clip.length // part), planes)](
        q, k, v, grad, out, delta, peaks, *strides, heads, clip.length, part,
        DIM=dim, D=rows.padded, CHUNKS=rows.chunks, UNIT=unit, SIZE=64, SURVEYED=surveyed, num_warps=4,
    )  # fmt: skip
    blocks = _blocks(clip, line, tiles.fixed)
    for launch in launches:
        common = (*strides, heads, blocks, *clip.geometry, scale)
        constants = {
            **_constants(clip, dim, q.dtype, scale, unit, line), **numbers, **launch,
            "FIXED": tiles.fixed, "MOVING": tiles.moving, **_compiled(tiles, launch),
        }  # fmt: skip
        programs = (planes * blocks, rows.chunks)
        keys_kernel[programs](q, k, v, grad, lse, delta, peaks, grad_k, grad_v, *common, **constants)
        queries_kernel[programs](q, k, v, grad, lse, delta, peaks, grad_q, *common, **constants)
    return grad_q, grad_k, grad_v


def masked_attention3d_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    grid: Sequence[int],
    mask: str,
    window: Sequence[int],
    scale: float,
) -> Tensor:
    """q (B, heads, n, d) at ``positions`` (n,) -> out (B, heads, n, d), as ``reference.masked_attention3d_decode``; NaN
    for a position outside the grid."""
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    clip, dim, count, heads = _clip(grid, mask, window), q.shape[3], q.shape[2], q.shape[1]
    if clip.length == 0:
        return out.fill_(math.nan)
    q, k, v, positions = _dense(q), _dense(k), _dense(v), positions.contiguous()
    rows, unit = _rows(dim), _unit(q, k, v)
    size = 4096 // rows.padded  # 32 registers a thread for the values' sums
    planes = q.shape[0] * heads
    splits = _splits(planes * count * rows.chunks, clip.length)
    line = _line(clip, Tiles(1, size, 4, 1))
    parts, tops = out, q.new_empty((planes * count, splits), dtype=_wide(q.dtype))
    totals = torch.empty_like(tops)
    if splits > 1:
        parts = q.new_empty((planes * count, splits, dim), dtype=_wide(q.dtype))
    decode_kernel[(planes * count, splits, rows.chunks)](
        q, k, v, positions, parts, tops, totals, *_strides(unit, q, k, v), heads, count, *clip.geometry, scale,
        **{**_constants(clip, dim, q.dtype, scale, unit, line), "LINE": int(FRAME if line in (FRAME, ROW) else MIXED)},
        SIZE=size, SPLITS=splits, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(planes * count, rows.chunks)](
            parts, tops, totals, out, DIM=dim, D=rows.padded, SPLITS=splits, num_warps=4
        )
    return out
