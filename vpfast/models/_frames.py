"""The checks of what a model is given: one clear error instead of a crash, or a picture of noise, later."""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vpfast.nn._common import as_integer, autocast_converts
from vpfast.ops._backend import is_mapped

LOWEST, HIGHEST = -0.5, 1.5
"""Accepted values: [0, 1] with room for predictions, which are not clamped, to be fed back."""


def check_frames(frames: Tensor, names: str, channels: int, multiple: int, weight: Tensor) -> None:
    """Check shape, type, device and, unless compiling or capturing a CUDA graph, the values.

    Args:
        frames: frames in [0, 1].
        names: the dimensions expected, such as ``"B, T, C, H, W"``; the last three are C, H, W.
        channels: C that the model was built for.
        multiple: H and W are multiples of it.
        weight: a parameter of the model, for its type and device.

    The values are read in one pass, and on a GPU with one synchronisation.

    Raises:
        TypeError: frames that are not a tensor, not floating point, or of another type than the model.
        ValueError: anything else; the message holds the offending number.
    """
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames must be a tensor ({names}), got {type(frames).__name__}")
    if frames.dim() != names.count(",") + 1:
        raise ValueError(f"frames must be ({names}), got {frames.dim()} dimensions: {tuple(frames.shape)}")
    check_type(frames, weight)
    if frames.shape[-3] != channels:
        raise ValueError(
            f"frames ({names}) have {frames.shape[-3]} channels, but the model was built with in_channels={channels}"
        )
    check_size(frames.shape[-2], frames.shape[-1], multiple)
    check_values(frames)


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ValueError unless both are positive multiples of ``multiple``."""
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % multiple != 0:
            near = max(size // multiple, 1) * multiple
            raise ValueError(
                f"frame {name} {size} is not a multiple of {multiple}, which this model needs; "
                f"crop or resize to {near} or {near + multiple}"
            )


def check_count(name: str, count: int, lowest: int = 0) -> int:
    """``count`` as an int; raise TypeError unless it is a whole number, ValueError where it is below ``lowest``."""
    whole = as_integer(count)
    if whole is None:
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if whole < lowest:
        raise ValueError(f"{name} must be {lowest} or more, got {whole}")
    return whole


def check_values(frames: Tensor) -> None:
    """Raise ValueError for NaN, infinity, or values far outside [0, 1], where values can be read at all."""
    if not values_can_be_read(frames) or frames.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(frames.detach())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        position = tuple(torch.nonzero(~torch.isfinite(frames))[0].tolist())
        raise ValueError(f"frames must be finite: the value at index {position} is {frames[position].item()}")
    if low < LOWEST or high > HIGHEST:
        raise ValueError(f"frames must lie in [0, 1], but reach from {low:.6g} to {high:.6g}; {_advice(low, high)}")


def check_type(frames: Tensor, weight: Tensor) -> None:
    """Raise unless ``frames`` are floating point, on the device of ``weight`` and, without autocast, of its type."""
    check_float(frames)
    check_device(frames, weight, "model")
    if frames.dtype != weight.dtype and not autocast_converts(frames, weight):
        raise TypeError(f"frames are {frames.dtype} and the model's weights {weight.dtype}; convert one of them")


def check_float(frames: Tensor) -> None:
    """Raise TypeError unless ``frames`` is a floating-point tensor."""
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames must be a tensor, got {type(frames).__name__}")
    if not frames.is_floating_point():
        raise TypeError(
            f"frames must be floating point in [0, 1], got {frames.dtype}; 8-bit pixels become that by "
            "frames.float() / 255"
        )


def check_device(frames: Tensor, beside: Tensor, name: str) -> None:
    """Raise ValueError unless both tensors are on one device; ``name`` says what ``beside`` stands for."""
    if frames.device != beside.device:
        raise ValueError(f"frames are on {frames.device} and the {name} on {beside.device}; move one of them")


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError with ``message`` unless ``holds``, one bool, is true.

    What is compiled or exported asks for itself each time it runs, and raises a RuntimeError.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif values_can_be_read(holds) and not holds:
        raise ValueError(message)


def values_can_be_read(frames: Tensor) -> bool:
    """Whether there are values to look at, which no trace, no ``vmap`` and no CUDA graph being captured has."""
    if torch.compiler.is_compiling() or frames.is_meta or isinstance(frames, FakeTensor) or is_mapped(frames):
        return False
    return not (frames.is_cuda and torch.cuda.is_current_stream_capturing())


def _advice(low: float, high: float) -> str:
    if high > HIGHEST and low >= 0:
        return "8-bit pixels are brought there by dividing by 255"
    if low >= -1 and high <= 1:
        return "frames in [-1, 1] are brought there by (frames + 1) / 2"
    return "scale them first"
