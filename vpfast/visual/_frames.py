"""What every picture starts from: frames as 8-bit RGB, and files that are either whole or not there."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpfast._files import new_file

Pixels = NDArray[np.uint8]
"""uint8 (T, H, W, 3)."""

_FAR_OUT = 10.0  # a network that aims at [0, 1] may miss it by a little, 8-bit frames miss it by hundreds


def to_pixels(frames: Tensor, name: str = "frames") -> Pixels:
    """(T, C, H, W), float in [0, 1] (a little outside is clipped) or uint8, RGB or grey -> uint8 (T, H, W, 3).

    Raises:
        TypeError: another type.
        ValueError: another shape, no frame, NaN, floats on another scale (beyond [-10, 10]).
    """
    if frames.dim() != 4 or frames.shape[1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(f"{name} must be (T, C, H, W) with C = 1 or 3 and none of them 0, got {tuple(frames.shape)}")
    frames = frames.detach().cpu()
    if frames.is_floating_point():
        if frames.isnan().any():
            raise ValueError(f"{name} holds NaN, which has no colour")
        frames = frames.float()
        low, high = (bound.item() for bound in frames.aminmax())
        if max(-low, high) > _FAR_OUT:
            raise ValueError(
                f"{name} must be in [0, 1] where they are floating point, found {low:.4g} to {high:.4g}; "
                "divide by 255 what counts 8-bit steps"
            )
        frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    if frames.dtype != torch.uint8:
        raise TypeError(f"{name} must be floating point in [0, 1] or uint8, got {frames.dtype}")
    pixels: Pixels = np.ascontiguousarray(frames.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    return pixels


def check_rows(rows: Mapping[str, Tensor], context: int) -> tuple[dict[str, Pixels], int]:
    """The rows of a picture, all of one frame size, and the length of the longest.

    Raises:
        TypeError, ValueError: as :func:`to_pixels`; no row, sizes that differ, a context longer than the clips.
    """
    if not rows:
        raise ValueError("there must be at least one clip to show, got none")
    pixels = {name: to_pixels(frames, name) for name, frames in rows.items()}
    sizes = {name: f"{clip.shape[1]}x{clip.shape[2]}" for name, clip in pixels.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"frames must have one size (height x width), got {sizes}")
    steps = max(len(clip) for clip in pixels.values())
    if not 0 <= context <= steps:
        raise ValueError(f"context must be between 0 and the {steps} frames of the longest clip, got {context}")
    return pixels, steps


def temporary_for(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Path of a draft; it takes the place of ``path`` in one step when the block ends well."""
    return new_file(Path(path), replace=True)
