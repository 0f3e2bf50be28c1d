"""Fixed positions of the cells of a (T, H, W) grid, to be added to what stands there."""

import math

import torch
from torch import Tensor

from vpfast.nn._common import as_integer

_LONGEST = 100.0
"""Wavelengths reach from 2 pi cells to almost this many times that, which tells apart the positions of any clip."""


def sinusoidal_positions(
    grid: tuple[int, int, int],
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sines and cosines of t, y and x: (T, H, W, ``channels``), in [-1, 1].

    Channels come in pairs, sine and cosine of one angle, whose axis is t, y, x in turn; from one pair of an axis to its
    next the angle's frequency falls by the same factor, beginning with one radian a cell. Any number of channels will
    do: what is left of an incomplete turn is cut off.

    Raises:
        ValueError: a grid that is not three sizes of at least 0, or fewer than one channel.
    """
    sizes = [as_integer(size) for size in grid]
    if len(sizes) != 3 or any(size is None or size < 0 for size in sizes):
        raise ValueError(f"sinusoidal_positions: grid must be (T, H, W), three sizes of at least 0, got {grid!r}")
    if (as_integer(channels) or 0) < 1:
        raise ValueError(f"sinusoidal_positions: channels must be an integer of at least 1, got {channels!r}")
    channel = torch.arange(channels, device=device)
    pair = channel // 2
    frequency = torch.exp(-math.log(_LONGEST) * (pair // 3).double() / math.ceil(channels / 6))
    quarter_turn = (channel % 2).double() * (math.pi / 2)
    positions = torch.zeros(1, 1, 1, channels, dtype=torch.float64, device=device)
    for axis, size in enumerate(grid):
        angle = torch.arange(size, device=device, dtype=torch.float64)[:, None] * frequency + quarter_turn
        waves = torch.where(pair % 3 == axis, angle.sin(), 0)
        positions = positions + waves.reshape([size if a == axis else 1 for a in range(3)] + [channels])
    return positions.to(dtype)
