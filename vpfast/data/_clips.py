"""Clips out of arrays on disk: uint8 (frames, C, H, W) ``.npy`` files, and which windows of them are the clips."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpfast.data.errors import DataError

Shape = tuple[int, int, int, int]
"""(frames, C, H, W)"""

Anchor = Literal["start", "end"]
"""Which frame of a film its windows are counted from: the first, or backwards from the last."""

HEADER_BYTES = 128


def npy_header(shape: tuple[int, ...]) -> bytes:
    """A version 1.0 ``.npy`` header of exactly 128 bytes, which any numpy reads."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def array_bytes(shape: Shape) -> int:
    """The length of the file that holds frames of this shape."""
    frames, channels, height, width = shape
    return HEADER_BYTES + frames * channels * height * width


def write_frames(file: BinaryIO, frames: Iterable[Tensor]) -> Shape:
    """Write uint8 (C, H, W) frames of one shape as they come; memory does not grow with their number."""
    count, shape = 0, (0, 0, 0)
    file.write(npy_header((0, 0, 0, 0)))  # its length is fixed; the number of frames is known at the end
    for frame in frames:
        file.write(frame.numpy().tobytes())
        count, shape = count + 1, (frame.shape[0], frame.shape[1], frame.shape[2])
    file.seek(0)
    file.write(npy_header((count, *shape)))
    return (count, *shape)


def read_frames(array: Path, shape: Shape, start: int, count: int, of: str, remedy: str) -> NDArray[np.uint8]:
    """Copy frames ``start`` to ``start + count`` out of the file, of which no more is read.

    Raises:
        DataError: the file is gone, or shorter than it was; says what it is the frames ``of`` and the ``remedy``.
    """
    # Mapped anew for every window: a map held open costs a file descriptor, and data sets have thousands of arrays.
    offset = HEADER_BYTES + start * int(np.prod(shape[1:]))
    try:
        return np.array(np.memmap(array, np.uint8, "r", offset, (count, *shape[1:])))
    except (OSError, ValueError) as error:  # ValueError: shorter than it was
        raise DataError(f"{array}: the decoded frames of {of} can no longer be read ({error}); {remedy}") from error


def as_clip(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 0..255 -> float32 [0, 1] of the same shape."""
    return torch.from_numpy(frames).to(torch.float32).div_(255)


class Windows:
    """The windows of ``length`` frames in films of ``frames[i]`` frames, ``steps[i]`` frames from start to start.

    A film shorter than ``length`` has none. The windows of film i start at its first frame, or, where ``from_end[i]``,
    end at its last one and are told in reading order all the same.
    """

    def __init__(
        self, frames: Sequence[int], length: int, steps: Sequence[int], from_end: Sequence[bool] | None = None
    ) -> None:
        self._steps = np.asarray(steps, np.int64)
        spare = np.asarray(frames, np.int64) - length
        counts = np.where(spare < 0, 0, spare // self._steps + 1)
        self._ends = np.cumsum(counts)
        self._firsts = np.where(from_end, spare % self._steps, 0) if from_end is not None else np.zeros_like(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(film, first frame) of window ``index``, which may count from the end; IndexError where there is none."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a set of {len(self)} clips")
        index %= len(self)
        film = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[film - 1]) if film else 0
        return film, int(self._firsts[film] + (index - before) * self._steps[film])
