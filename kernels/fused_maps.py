"""What lies between MSPN's convolutions on a GPU, a launch each: `vpfast.ops._fused_maps` says what is computed.

Maps are channels_last: element i of a dense map is of channel i mod C, which is compiled in, so that the elements of a
thread and their biases are loaded, and stored, 16 bytes at once. Every element is read and written once; at the sizes
of one clip the time is that of a launch. Errors have places to compute, by divisions: their programs own few elements.
Not measured on a GPU.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpfast.kernels._ahead_of_time import Compilation

BLOCK, WARPS = 1024, 4
FEW = 256  # elements of a program that computes errors
NARROW = 2**31  # below it numbers of elements are 32-bit


@triton.jit
def _leaky_sum(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    count: tl.tensor,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_Y: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    value = tl.load(x + i, mask=live, other=0.0).to(wide) + tl.load(bias + i % C).to(wide)
    if HAS_Y:
        value += tl.load(y + i, mask=live, other=0.0).to(wide)
    if SLOPE == 0:  # 0 times minus infinity is no number
        value = tl.where(value < 0.0, 0.0, value)
    else:
        value = tl.where(value < 0.0, value * SLOPE, value)
    tl.store(x + i, value.to(x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "columns", "by_batch", "by_channel", "by_row", "by_column"])
def _signed_errors(
    prediction: tl.tensor,
    frame: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    by_batch: tl.tensor,  # strides of the frame, which may be every second pixel of one
    by_channel: tl.tensor,
    by_row: tl.tensor,
    by_column: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    i = (program.to(tl.int64) if WIDE else program) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    pixel, channel = i // C, i % C
    line = pixel // columns
    batch, row, column = line // rows, line - line // rows * rows, pixel - line * columns
    place = batch.to(tl.int64) * by_batch + channel * by_channel + row.to(tl.int64) * by_row + column * by_column
    real = tl.load(frame + place, mask=live, other=0.0).to(wide)
    made = tl.load(prediction + i, mask=live, other=0.0).to(wide)
    above = tl.maximum(real - made, 0.0, propagate_nan=tl.PropagateNan.ALL)
    below = tl.maximum(made - real, 0.0, propagate_nan=tl.PropagateNan.ALL)
    to = out + pixel.to(tl.int64) * (2 * C) + channel
    tl.store(to, above.to(out.dtype.element_ty), mask=live)
    tl.store(to + C, below.to(out.dtype.element_ty), mask=live)


def leaky_sum_(x: Tensor, bias: Tensor, y: Tensor | None, slope: float) -> None:
    """x (B, C, H, W) <- leaky(x + bias + y), in place; all channels_last."""
    if x.numel() == 0:
        return
    _leaky_sum[(triton.cdiv(x.numel(), BLOCK),)](
        x, bias, x if y is None else y, x.numel(),
        C=x.shape[1], SLOPE=slope, HAS_Y=y is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def signed_errors(prediction: Tensor, frame: Tensor) -> Tensor:
    """(B, C, H, W) channels_last, and a frame of any strides -> (B, 2 C, H, W) channels_last."""
    batch, channels, rows, columns = prediction.shape
    out = prediction.new_empty((batch, rows, columns, 2 * channels)).movedim(-1, 1)
    if out.numel() == 0:
        return out
    count = prediction.numel()
    _signed_errors[(triton.cdiv(count, FEW),)](
        prediction, frame, out, count, rows, columns, *frame.stride(),
        C=channels, BLOCK=FEW, WIDE=count + FEW > NARROW, num_warps=WARPS,
    )  # fmt: skip
    return out


# --- compilation with no GPU ------------------------------------------------------------------------------------------

_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def ahead_of_time() -> Iterator[Compilation]:
    """Sums of the widths of the presets, wide and narrow, with and without a second map; errors of grey and RGB."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = _TYPES[dtype]
        for channels, has_y in ((64, True), (1024, False), (3, False)):
            constants: dict[str, object] = {"C": channels, "SLOPE": 0.01, "HAS_Y": has_y, "BLOCK": BLOCK}
            types = {"x": kind, "bias": kind, "y": kind, "count": "i32", **dict.fromkeys(constants, "constexpr")}
            name = f"leaky_sum {kind[1:]} of {channels}{', two maps' if has_y else ''}"
            yield Compilation(name, _leaky_sum, types, constants, WARPS, 3, ("x", "bias", "y", "count"))
        for channels in (1, 3):
            constants = {"C": channels, "BLOCK": FEW, "WIDE": False}
            types = dict.fromkeys(_signed_errors.arg_names, "i32")
            types |= {"prediction": kind, "frame": kind, "out": kind, **dict.fromkeys(constants, "constexpr")}
            name = f"signed_errors {kind[1:]} of {channels}"
            yield Compilation(name, _signed_errors, types, constants, WARPS, 3, ("prediction", "frame", "out"))
