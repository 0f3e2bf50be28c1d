"""Moving MNIST: handwritten digits that travel over a small canvas and turn back at its walls."""

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vpfast.data._clips import as_clip
from vpfast.data.errors import DataError
from vpfast.data.idx import read_idx
from vpfast.data.resize import resize_frames

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_IDX_NAMES = {"train": "train-images", "test": "t10k-images"}
_IDX_ENDINGS = ("-idx3-ubyte", "-idx3-ubyte.gz", ".idx3-ubyte", ".idx3-ubyte.gz")


class MovingDigits(Dataset[Tensor]):
    """Clips of digits at constant speed in a random direction, merged by maximum: float32 (T, 1, size, size) in [0, 1].

    As OpenSTL generates Moving MNIST: start and direction are uniform; ``speed`` is the distance per frame as a
    fraction of ``size - digit_size`` (0.1 of 36 pixels); a digit that meets a wall stays there for that frame and turns
    back; positions are rounded down to whole pixels.

    A clip depends only on (``seed``, ``split``, index): not on the order of access, the worker, the process, or any
    global random state.

    Args:
        source: where the digits come from.

            * ``None``: scikit-learn's 1,797 digits of 8x8, upscaled (the ``[demo]`` extra). Blocks of 80 % train,
              10 % val, 10 % test.
            * a folder with MNIST's ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, plain or ``.gz``. Test
              is the second file, val the last twelfth of the first (5,000 of 60,000), train the rest of it.
            * one idx file: blocks of 80, 10 and 10 % as above.
            * ``mnist_test_seq.npy``, uint8 (20, N, 64, 64): its clips as they are, first ``count`` of them and first
              ``length`` frames. It is a test set, so ``split`` must be ``"test"``.

            No digit image is ever in two splits.
        split: ``"train"``, ``"val"`` or ``"test"``.
        length: frames a clip.
        count: clips in the data set.
        seed: non-negative; another seed, other clips.
        size, digits, digit_size, speed: side of the canvas in pixels, digits a clip, side of a digit in pixels, and
            the speed as above.

    Raises:
        ValueError: an argument out of its range; the message names it.
        DataError: a source that is missing, damaged or not what it says; the message names the file.
        ImportError: ``source=None`` without scikit-learn.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        split: Split = "train",
        length: int = 20,
        count: int = 10_000,
        seed: int = 0,
        size: int = 64,
        digits: int = 2,
        digit_size: int = 28,
        speed: float = 0.1,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        for name, value in (("length", length), ("count", count), ("digits", digits), ("digit_size", digit_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if size < digit_size:
            raise ValueError(f"size ({size}) must be at least digit_size ({digit_size})")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if not (math.isfinite(speed) and 0 <= speed < 1):
            raise ValueError(f"speed must be in [0, 1), a fraction of the range a frame, got {speed}")
        self.split, self.length, self.count, self.seed = split, length, count, seed
        self.size, self.digits, self.digit_size, self.speed = size, digits, digit_size, speed

        self._fixed_clips: Path | None = None
        self._images: NDArray[np.uint8] = np.empty((0, digit_size, digit_size), np.uint8)
        path = None if source is None else Path(source)
        if path is not None and path.suffix == ".npy":
            self._fixed_clips = path
            self.count = min(count, self._check_fixed_clips(path))
        else:
            images = _scikit_learn_digits() if path is None else _idx_digits(path, split)
            self._images = _to_size(images if path is not None and path.is_dir() else _block(images, split), digit_size)
            if len(self._images) == 0:
                raise DataError(f"{source or 'digits'}: too few digit images to give the split {split!r} any")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return as_clip(self.frames(index)).unsqueeze(1)

    def frames(self, index: int) -> NDArray[np.uint8]:
        """The clip as uint8 (length, size, size)."""
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} in a set of {self.count} clips")
        index %= self.count
        if self._fixed_clips is not None:
            return np.array(_open_npy(self._fixed_clips)[: self.length, index])
        return self._generate(index)

    def _generate(self, index: int) -> NDArray[np.uint8]:
        key = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), index))
        random = np.random.Generator(np.random.Philox(key))
        images = self._images[random.integers(len(self._images), size=self.digits)]
        position = random.uniform(size=(self.digits, 2))
        angle = random.uniform(0, 2 * math.pi, size=self.digits)
        velocity = self.speed * np.stack([np.sin(angle), np.cos(angle)], axis=1)

        clip = np.zeros((self.length, self.size, self.size), np.uint8)
        for frame in clip:
            position += velocity
            velocity[(position <= 0) | (position >= 1)] *= -1
            position.clip(0, 1, out=position)
            corners = (position * (self.size - self.digit_size)).astype(np.int64)
            for image, (top, left) in zip(images, corners.tolist(), strict=True):
                patch = frame[top : top + self.digit_size, left : left + self.digit_size]
                np.maximum(patch, image, out=patch)
        return clip

    def _check_fixed_clips(self, path: Path) -> int:
        array = _open_npy(path)
        if array.dtype != np.uint8 or array.ndim != 4:
            raise DataError(
                f"{path}: expected uint8 (frames, clips, height, width), found {array.dtype} {array.shape}; "
                "generated clips come from MNIST's idx files"
            )
        frames, clips, height, width = array.shape
        if (height, width) != (self.size, self.size) or clips == 0:
            raise DataError(
                f"{path}: holds {clips} clips of {height}x{width}, asked were clips of {self.size}x{self.size}"
            )
        if frames < self.length:
            raise DataError(f"{path}: its clips have {frames} frames, {self.length} were asked")
        if self.split != "test":
            raise ValueError(
                f"{path}: holds the fixed test clips, asked was split={self.split!r}; "
                "give the folder of MNIST's idx files (or no source) for train and val"
            )
        return int(clips)


def _open_npy(path: Path) -> NDArray[np.uint8]:
    """Memory-map a ``.npy`` file; pickled objects are refused and the header's shape is checked against the file."""
    try:
        array: NDArray[np.uint8] = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged header surfaces as one of many types: ValueError, SyntaxError, TypeError...
        raise DataError(f"{path}: not a .npy file that can be memory-mapped ({error})") from error
    return array


def find_idx(folder: Path, split: Split) -> Path | None:
    """MNIST's file of the images that clips of ``split`` are made from, plain or ``.gz``; None where there is none."""
    stem = _IDX_NAMES["test" if split == "test" else "train"]
    candidates = [folder / (stem + ending) for ending in _IDX_ENDINGS]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _idx_digits(path: Path, split: Split) -> NDArray[np.uint8]:
    if not path.is_dir():
        return read_idx(path)
    found = find_idx(path, split)
    if found is None:
        stem = _IDX_NAMES["test" if split == "test" else "train"]
        raise DataError(f"{path}: holds no {stem}-idx3-ubyte or {stem}-idx3-ubyte.gz, which split={split!r} needs")
    images = read_idx(found)
    first_val = len(images) - len(images) // 12
    return {"train": images[:first_val], "val": images[first_val:], "test": images}[split]


def _scikit_learn_digits() -> NDArray[np.uint8]:
    """uint8 (1797, 28, 28): the 8x8 digits scaled to 20x20 inside a margin of 4, as MNIST's lie in theirs."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "moving digits without an MNIST file come from scikit-learn: pip install 'vpfast[demo]', "
            "or give the path of MNIST's idx files as source"
        ) from error
    small = torch.from_numpy(load_digits().images).to(torch.float32).unsqueeze(1) / 16
    large = torch.nn.functional.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False)
    stroke = ((large - 0.15) / 0.7).clamp(0, 1)  # steeper edges, or the enlarged strokes are all blur
    padded = torch.nn.functional.pad(stroke, (4, 4, 4, 4)).squeeze(1)
    images: NDArray[np.uint8] = (padded * 255).round().to(torch.uint8).numpy()
    return images


def _block(images: NDArray[np.uint8], split: Split) -> NDArray[np.uint8]:
    first_val, first_test = len(images) * 8 // 10, len(images) * 9 // 10
    return {"train": images[:first_val], "val": images[first_val:first_test], "test": images[first_test:]}[split]


def _to_size(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if images.shape[1:] == (side, side):
        return images
    resized: NDArray[np.uint8] = (
        resize_frames(torch.from_numpy(images.copy()).unsqueeze(1), (side, side)).squeeze(1).numpy()
    )
    return resized
