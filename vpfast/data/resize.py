"""Resizing of frames, one rule for every source."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 8192
"""Rows, and columns, of a frame that a video is brought to."""

Fit = Literal["squash", "crop"]
Size = tuple[int, int] | int | None

_SPARE = 8
"""A frame up to so many times longer than ``size`` in its proportions is resized whole before it is cropped."""


def parse_size(size: Size) -> tuple[int, int] | None:
    """``None``, the side of a square or (height, width) -> ``None`` or (height, width); ValueError otherwise."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size must be None, the side of a square or (height, width) in pixels, got {size!r}")
    return pair[0], pair[1]


def resize_frames(frames: Tensor, size: tuple[int, int], fit: Fit = "squash") -> Tensor:
    """Resize frames, as all data sets here do: uint8 (T, C, H, W) -> uint8 (T, C, *size).

    ``fit="squash"`` keeps the whole picture and not its proportions, as the KTH literature does (160x120 to 128x128).
    ``"crop"`` keeps the proportions: the frame is resized to cover ``size``, then its centre is cut out, as PredNet
    does. Bilinear with antialiasing (each output pixel averages the whole area it covers), by PyTorch and not by the
    video decoder: the result is then the same for videos and image files, and does not depend on the pixel format or on
    the build of FFmpeg.

    Raises:
        ValueError: another ``fit``.
    """
    if fit not in ("squash", "crop"):
        raise ValueError(f'fit must be "squash" or "crop", got {fit!r}')
    height, width = frames.shape[-2:]
    if fit == "crop":
        scale = max(size[0] / height, size[1] / width)
        # Of a frame that is far longer than asked the middle will do: memory must not follow a file's proportions.
        frames = _centre(frames, (math.ceil(_SPARE * size[0] / scale), math.ceil(_SPARE * size[1] / scale)))
        height, width = frames.shape[-2:]
        covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        return _centre(_interpolated(frames, covering), size)
    return _interpolated(frames, size)


def _centre(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the frames, where they are larger than ``size``."""
    height, width = frames.shape[-2:]
    top, left = max(0, height - size[0]) // 2, max(0, width - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]].contiguous()


def _interpolated(frames: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(frames.shape[-2:]) == size:
        return frames
    # In float32: torch 2.13's faster uint8 kernel fails on frames of one column, and differs between processors.
    result = F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return result.round_().clamp_(0, 255).to(torch.uint8).contiguous()


def to_grey(frames: Tensor) -> Tensor:
    """uint8 RGB (T, 3, H, W) -> uint8 (T, 1, H, W): luma (BT.601 weights, rounded), or channel 0 of a grey frame.

    A frame counts as grey if its channels differ by at most three steps in every pixel. One step of chroma gives that
    difference, and video codecs produce it in grey videos (KTH's). The literature uses channel 0 there.
    """
    red, green, blue = frames.to(torch.int32).unbind(dim=1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    colour = (frames.amax(dim=1) - frames.amin(dim=1)).amax(dim=(1, 2), keepdim=True) > 3
    return torch.where(colour, luma, red).to(torch.uint8).unsqueeze(1)
