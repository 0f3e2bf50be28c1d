"""Moving MNIST: clips generated from MNIST's idx files, and the fixed test clips of ``mnist_test_seq.npy``."""

# ruff: noqa: RUF009 - option() makes a dataclass field

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vpfast.data.errors import DataError
from vpfast.data.moving_digits import SPLITS, MovingDigits, Split, find_idx
from vpfast.data.resize import Fit
from vpfast.data.sets.source import Recording, option

FIXED_NAME = "mnist_test_seq.npy"


@dataclass(frozen=True)
class MovingMNIST:
    """A recording is a clip, 64x64 and grey, as ``vpfast.data.MovingDigits`` makes it.

    ``src`` is a folder with MNIST's ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, plain or ``.gz``, and
    perhaps ``mnist_test_seq.npy``, uint8 (20, 10000, 64, 64), which then is the test split; or that file alone. A
    split whose file is not there is left out.
    """

    name: ClassVar[str] = "moving-mnist"
    size: tuple[int, int] = option((64, 64), "height and width of the prepared frames, [H, W]")
    fit: Fit = option("squash", "frames of another aspect ratio: squash, or crop to the centre")
    channels: Literal[1, 3] = option(1, "1 for grey, as the digits are, 3 for RGB")
    length: int = option(20, "frames a clip")
    train: int = option(10_000, "clips of the training split, from the first 55,000 training digits")
    val: int = option(1_000, "clips of the validation split, from the other 5,000")
    test: int = option(10_000, "clips of the test split: of the fixed ones, or from the test digits")
    seed: int = option(0, "decides the generated clips")

    def recordings(self, src: Path) -> list[Recording]:
        """Named ``SPLIT/00042``; those of the fixed test clips are in their file's order."""
        for key in ("length", "train", "val", "test"):
            if getattr(self, key) < (1 if key == "length" else 0):
                raise ValueError(f"{key}: {getattr(self, key)} given, must be at least {int(key == 'length')}")
        sources = {split: file for split in SPLITS if getattr(self, split) and (file := _source(src, split))}
        if not sources:
            raise DataError(
                f"{src}: holds neither MNIST's idx files (train-images-idx3-ubyte, t10k-images-idx3-ubyte, plain or "
                f".gz) nor {FIXED_NAME}"
            )
        return [each for split in sorted(sources) for each in self._of_split(split, sources[split])]

    def _of_split(self, split: Split, file: Path) -> list[Recording]:
        source, changed = (file if file.suffix == ".npy" else file.parent), file.stat().st_mtime_ns
        given = (source, split, self.length, getattr(self, split), self.seed, changed)
        clips = _digits(*given)  # a damaged file is told now
        digits = max(5, len(str(len(clips) - 1)))
        return [
            Recording(f"{split}/{index:0{digits}}", split, file, partial(_frames, given, index))
            for index in range(len(clips))
        ]


def _source(src: Path, split: Split) -> Path | None:
    """The file that the clips of ``split`` come from."""
    fixed = src / FIXED_NAME if src.is_dir() else src
    if fixed.is_file() and fixed.suffix == ".npy":
        return fixed if split == "test" else find_idx(fixed.parent, split) if src.is_dir() else None
    return find_idx(src, split)


@lru_cache(maxsize=3)
def _digits(source: Path, split: Split, length: int, count: int, seed: int, changed: int) -> MovingDigits:
    """Kept in a process, until the file has changed: the digits are read once, not once a clip."""
    return MovingDigits(source, split=split, length=length, count=count, seed=seed)


def _frames(given: tuple[Path, Split, int, int, int, int], index: int) -> Iterator[NDArray[np.uint8]]:
    for frame in _digits(*given).frames(index):
        yield np.repeat(frame[..., None], 3, axis=2)
