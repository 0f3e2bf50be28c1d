"""masked_attention3d on the GPU in Triton: the operators of ``vpfast.ops.masked_attention3d`` by the kernels here.

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

from vpfast.kernels import masked_attention3d_forward as forward
from vpfast.kernels import masked_attention3d_mask as mask3d
from vpfast.kernels._ahead_of_time import Compilation
from vpfast.kernels.masked_attention3d_backward import keys_kernel, levels_kernel, queries_kernel
from vpfast.kernels.masked_attention3d_decode import combine_kernel, decode_kernel
from vpfast.kernels.masked_attention3d_forward import forward_kernel, survey_kernel
from vpfast.kernels.masked_attention3d_mask import RULES

TAME, PLAIN, CAREFUL = (int(mode) for mode in (forward.TAME, forward.PLAIN, forward.CAREFUL))
SEQUENCE, FRAME, ROW, MIXED = (int(line) for line in (mask3d.SEQUENCE, mask3d.FRAME, mask3d.ROW, mask3d.MIXED))
PEAKS = int(forward.PEAKS)

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
    """Grid and mask as kernels take them. Radii are no larger than their axis; ``window_t`` and so
    on tell whether they hide anything."""

    frames: int
    rows: int
    columns: int
    rule: int
    radius_t: int
    radius_y: int
    radius_x: int
    window_t: bool
    window_y: bool
    window_x: bool

    @property
    def length(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def is_simple(self) -> bool:
        """Neither windows nor frames shorter than the longest tile: few registers go into masks."""
        return not (self.window_t or self.window_y or self.window_x) and self.rows * self.columns > 64

    @property
    def geometry(self) -> tuple[int, ...]:
        return self.frames, self.rows, self.columns, self.radius_t, self.radius_y, self.radius_x


# --- choices: functions of the problem alone --------------------------------------------------------------------------


def _clip(grid: Sequence[int], mask: str, window: Sequence[int]) -> Clip:
    t, y, x = (size if radius < 0 else min(radius, size) for size, radius in zip(grid, window, strict=True))
    frames, rows, columns = grid
    return Clip(frames, rows, columns, RULES.index(mask), t, y, x, t < frames - 1, y < rows - 1, x < columns - 1)


def _rows(dim: int, dtype: torch.dtype) -> Rows:
    """Whole rows up to 128 components; of float32 and float64, whose operands lie in registers, up to 64."""
    padded = min(128 if dtype in _HALF else 64, max(16, triton.next_power_of_2(dim)))
    return Rows(padded, -(-dim // padded))


def _forward_tiles(clip: Clip, dtype: torch.dtype, padded: int, mode: int) -> Tiles:
    """Half precision: 128 x 64 pairs in 8 warps take 110 to 120 registers a thread at d = 16 and 32, so that two
    programs share an SM and one's products hide behind the other's exponentials; 64 queries would read every tile of
    keys twice as often, 3 TB/s of the L2 cache at d = 16. At d = 64 four warps do, twice, where masks are simple. The
    careful mode holds more of a tile, the others of float32 and float64 their operands too."""
    if dtype == torch.float64:
        return Tiles(16, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if padded <= 32 else Tiles(32, 16, 4, 1)
    if mode == CAREFUL:
        return Tiles(64, 32, 4 if padded <= 32 else 8, 2)
    return Tiles(128, 64, 4 if padded == 64 and clip.is_simple else 8, 2 if padded <= 32 else 3)


def _backward_tiles(dtype: torch.dtype, padded: int, mode: int) -> Tiles:
    """Half precision: 64 x 64 pairs in 4 warps, with two tiles of scores at a time, take 140 to 160 registers at d =
    16, three programs an SM. Longer heads take fewer pairs, or more warps."""
    if dtype == torch.float64:
        return Tiles(16, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(16, 16, 4, 1) if mode == CAREFUL else Tiles(32, 16, 4, 2)
    if mode == CAREFUL:
        return Tiles(32, 16, 8 if padded == 128 else 4, 1)
    if padded == 128:
        return Tiles(64, 32, 8, 2)
    return Tiles(64, 64, 4, 3) if padded <= 32 else Tiles(64, 32, 4, 2)


def _line(clip: Clip, tiles: Tiles) -> int:
    """How the sequence is divided for a walk: see masked_attention3d_mask.py."""
    frame = clip.rows * clip.columns
    windowed = clip.window_y or clip.window_x
    if not windowed and RULES[clip.rule] in ("raster", "raster_strict", "past_frames"):
        return SEQUENCE
    if frame <= tiles.moving:
        return MIXED
    return ROW if clip.window_x and clip.columns > tiles.fixed else FRAME


def _blocks(clip: Clip, line: int, fixed: int) -> int:
    size = {FRAME: clip.rows * clip.columns, ROW: clip.columns}.get(line, clip.length)
    return clip.length // size * -(-size // fixed)


def _splits(programs: int, length: int) -> int:
    """Among how many programs the keys of a query are shared out: enough to fill a GPU, and 512 keys for each."""
    wanted = min(64, 1024 // programs, length // 512)
    return 1 << max(0, wanted.bit_length() - 1)


def _slots(rows: Rows) -> int:
    """Keys at a time in decode: 32 registers a thread for the sums of values."""
    return 4096 // rows.padded


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
    return max(512, -(-length // PEAKS))


def _lift(dtype: torch.dtype) -> int:
    """The power of two that weights of float16 carry, so that small ones are not rounded off."""
    return 14 if dtype == torch.float16 else 0


def _limit(dtype: torch.dtype) -> float:
    """The power of two that scores stay below where nothing is taken off them; float32 always takes the largest off."""
    return {torch.float16: 14.0, torch.bfloat16: 32.0}.get(dtype, -1.0)


def _constants(clip: Clip, dim: int, dtype: torch.dtype, scale: float, unit: int, line: int) -> dict[str, object]:
    """What forward, backward and decode are compiled for alike."""
    rows = _rows(dim, dtype)
    return {
        "EXACT_SCALE": _exact(scale, dtype),
        "RULE": clip.rule,
        "LINE": line,
        "WINDOW_T": clip.window_t,
        "WINDOW_Y": clip.window_y,
        "WINDOW_X": clip.window_x,
        "DIM": dim,
        "D": rows.padded,
        "CHUNKS": rows.chunks,
        "UNIT": unit,
    }


def _modes(dtype: torch.dtype, length: int, chunks: int) -> tuple[int, ...]:
    """The launches that share the work, each what the survey leaves to it; without one the careful does it all."""
    if dtype == torch.float64 or length < SURVEYED_FROM or chunks > 1:
        return (CAREFUL,)
    return (TAME, PLAIN, CAREFUL) if dtype in _HALF else (PLAIN, CAREFUL)


def _options(tiles: Tiles, mode: int, modes: tuple[int, ...]) -> dict[str, object]:
    """What a mode is compiled for."""
    return {
        "SURVEYED": len(modes) > 1,
        "MODE": mode,
        "FIXED": tiles.fixed,
        "MOVING": tiles.moving,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": _is_fused(mode),
    }


def _is_fused(mode: int) -> bool:
    """The careful mode takes off a row's largest score exactly: no product and difference of its may be fused."""
    return mode != CAREFUL


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
    rows, unit = _rows(dim, q.dtype), _unit(q, k, v)
    modes = _modes(q.dtype, clip.length, rows.chunks)
    peaks = lse
    if len(modes) > 1:
        peaks = q.new_zeros((planes, 2, PEAKS), dtype=torch.float32)
        part = _part(clip.length)
        survey_kernel[(planes, -(-clip.length // part))](
            k, v, peaks, *_strides(unit, k, v), heads, clip.length, part,
            DIM=dim, D=rows.padded, CHUNKS=rows.chunks, UNIT=unit, SIZE=64, num_warps=4,
        )  # fmt: skip
    for mode in modes:
        tiles = _forward_tiles(clip, q.dtype, rows.padded, mode)
        line = _line(clip, tiles)
        blocks = _blocks(clip, line, tiles.fixed)
        forward_kernel[(planes * blocks, rows.chunks)](
            q, k, v, out, lse, peaks, *_strides(unit, q, k, v), heads, blocks, *clip.geometry, scale,
            **_constants(clip, dim, q.dtype, scale, unit, line), **_options(tiles, mode, modes),
            LIFT=_lift(q.dtype), LIMIT=_limit(q.dtype),
        )  # fmt: skip
    return out, lse


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
    rows, unit = _rows(dim, q.dtype), _unit(q, k, v, grad)
    modes = tuple(mode for mode in _modes(q.dtype, clip.length, rows.chunks) if mode != TAME)
    lift = _lift(q.dtype)
    surveyed = len(modes) > 1 or lift > 0
    strides = _strides(unit, q, k, v, grad)
    levels = lse.new_empty((*lse.shape, 2))
    peaks = q.new_zeros((planes, 5, PEAKS), dtype=torch.float32) if surveyed else levels
    part = _part(clip.length)
    levels_kernel[(planes, -(-clip.length // part))](
        q, k, v, grad, out, lse, levels, peaks, *strides, heads, clip.length, part,
        DIM=dim, D=rows.padded, CHUNKS=rows.chunks, UNIT=unit, SIZE=64, SURVEYED=surveyed, LIFT=lift, num_warps=4,
    )  # fmt: skip
    for mode in modes:
        tiles = _backward_tiles(q.dtype, rows.padded, mode)
        line = _line(clip, tiles)
        blocks = _blocks(clip, line, tiles.fixed)
        common = (*strides, heads, blocks, *clip.geometry, scale)
        constants = {
            **_constants(clip, dim, q.dtype, scale, unit, line), **_options(tiles, mode, modes), "LIFT": lift
        }  # fmt: skip
        programs = (planes * blocks, rows.chunks)
        keys_kernel[programs](q, k, v, grad, lse, levels, peaks, grad_k, grad_v, *common, **constants)
        queries_kernel[programs](q, k, v, grad, lse, levels, peaks, grad_q, *common, **constants)
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
    rows, unit = _rows(dim, q.dtype), _unit(q, k, v)
    size = _slots(rows)
    planes = q.shape[0] * heads
    splits = _splits(planes * count * rows.chunks, clip.length)
    by_frame = _line(clip, Tiles(1, size, 4, 1)) in (FRAME, ROW)
    line = FRAME if by_frame else MIXED
    parts, tops = out, q.new_empty((planes * count, splits), dtype=_wide(q.dtype))
    totals = torch.empty_like(tops)
    if splits > 1:
        parts = q.new_empty((planes * count, splits, dim), dtype=_wide(q.dtype))
    decode_kernel[(planes * count, splits, rows.chunks)](
        q, k, v, positions, parts, tops, totals, *_strides(unit, q, k, v), heads, count, *clip.geometry, scale,
        **_constants(clip, dim, q.dtype, scale, unit, line),
        SIZE=size, SPLITS=splits, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(planes * count, rows.chunks)](
            parts, tops, totals, out, DIM=dim, D=rows.padded, SPLITS=splits, num_warps=4
        )
    return out


# --- with no GPU ------------------------------------------------------------------------------------------------------

_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_GRID = (30, 32, 32)
_OPEN, _WINDOW = (-1, -1, -1), (2, 3, 4)


def ahead_of_time() -> Iterator[Compilation]:
    """The clip of 30 frames of 32 x 32 in every head dimension, modes and types beside it, windows, small frames."""
    bf16 = torch.bfloat16
    for dim in (16, 32, 64, 128):
        yield _walking(forward_kernel, bf16, dim, "eq6", TAME)
        yield _walking(keys_kernel, bf16, dim, "eq6", PLAIN)
        yield _walking(queries_kernel, bf16, dim, "eq6", PLAIN)
    for dim in (32, 64, 128):
        for kernel in (forward_kernel, keys_kernel, queries_kernel):
            yield _walking(kernel, bf16, dim, "eq6", CAREFUL)
    for kernel in (forward_kernel, keys_kernel, queries_kernel):
        yield _walking(kernel, bf16, 32, "raster", PLAIN)
        yield _walking(kernel, bf16, 32, "raster", PLAIN, window=_WINDOW)
        yield _walking(kernel, torch.float32, 32, "raster", PLAIN)
        yield _walking(kernel, torch.float16, 24, "separable", PLAIN, grid=(30, 4, 8))
        yield _walking(kernel, torch.float64, 16, "raster", CAREFUL)
    for dim in (32, 128):
        yield _sharing(decode_kernel, bf16, dim, splits=1)
        yield _sharing(decode_kernel, bf16, dim, splits=16)
    yield _sharing(combine_kernel, bf16, 32, splits=16)
    yield _reading(survey_kernel, bf16, 32)
    yield _reading(levels_kernel, bf16, 32)


def _signature(kernel: triton.JITFunction, dtype: torch.dtype, constants: dict[str, object]) -> dict[str, str]:
    wide = _TYPES[_wide(dtype)]
    kinds = dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("lse", "levels", "tops", "totals", "parts"), wide)
    kinds |= dict.fromkeys(("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"), _TYPES[dtype])
    kinds |= {"peaks": "*fp32", "positions": "*i64", "scale": "fp32"}
    return {name: kinds.get(name, "i32") for name in kernel.arg_names}


def _compilation(
    kernel: triton.JITFunction, name: str, dtype: torch.dtype, constants: dict[str, object], warps: int, stages: int
) -> Compilation:
    signature = _signature(kernel, dtype, constants)
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    kind = str(dtype).removeprefix("torch.")
    return Compilation(f"{kernel.__name__} {kind} {name}", kernel, signature, constants, warps, stages, pointers)


def _walking(
    kernel: triton.JITFunction,
    dtype: torch.dtype,
    dim: int,
    mask: str,
    mode: int,
    grid: tuple[int, int, int] = _GRID,
    window: tuple[int, int, int] = _OPEN,
) -> Compilation:
    clip, rows = _clip(grid, mask, window), _rows(dim, dtype)
    modes = _modes(dtype, clip.length, rows.chunks)
    tiles = _backward_tiles(dtype, rows.padded, mode)
    if kernel is forward_kernel:
        tiles = _forward_tiles(clip, dtype, rows.padded, mode)
    constants = {
        **_constants(clip, dim, dtype, dim**-0.5, 16 // dtype.itemsize, _line(clip, tiles)),
        **_options(tiles, mode, modes),
        "LIFT": _lift(dtype),
        "LIMIT": _limit(dtype),
    }
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    where = "" if window == _OPEN else " in a window"
    name = f"d {dim} {mask}{where}, {_NAMES[mode]}, {tiles.fixed} x {tiles.moving}"
    compilation = _compilation(kernel, name, dtype, constants, tiles.warps, tiles.stages)
    return compilation._replace(fused=_is_fused(mode))


_NAMES = ("tame", "plain", "careful")


def _sharing(kernel: triton.JITFunction, dtype: torch.dtype, dim: int, splits: int) -> Compilation:
    clip, rows = _clip(_GRID, "eq6", _OPEN), _rows(dim, dtype)
    constants = _constants(clip, dim, dtype, dim**-0.5, 16 // dtype.itemsize, FRAME)
    constants |= {"SIZE": _slots(rows), "SPLITS": splits}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    return _compilation(kernel, f"d {dim} in {splits}", dtype, constants, 4, 2)


def _reading(kernel: triton.JITFunction, dtype: torch.dtype, dim: int) -> Compilation:
    rows = _rows(dim, dtype)
    constants: dict[str, object] = {
        "DIM": dim,
        "D": rows.padded,
        "CHUNKS": rows.chunks,
        "UNIT": 16 // dtype.itemsize,
        "SIZE": 64,
    }
    constants |= {"SURVEYED": True, "LIFT": _lift(dtype)} if kernel is levels_kernel else {}
    return _compilation(kernel, f"d {dim}", dtype, constants, 4, 3)
