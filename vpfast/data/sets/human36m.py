"""Human3.6M (Ionescu, Papava, Olaru and Sminchisescu, PAMI 2014): 7 subjects, 4 cameras, 1000x1000 at 50 fps."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vpfast.data._files import natural_key, open_regular, walk
from vpfast.data.errors import DataError, VideoError
from vpfast.data.moving_digits import Split
from vpfast.data.resize import Fit
from vpfast.data.sets.folder import frames_of_video
from vpfast.data.sets.source import Recording, option, tagged
from vpfast.data.video import iter_images

FPS = 50.0
TEST_SUBJECTS = frozenset({"S11"})
SUBJECTS = frozenset({"S1", "S5", "S6", "S7", "S8", "S9"}) | TEST_SUBJECTS

LIST_STEP = 5
"""Frames from one to the next in a window of OpenSTL's lists."""

_LISTS: dict[str, Split] = {"train.txt": "train", "test.txt": "test"}
_VIDEO = re.compile(r"(?P<action>[A-Za-z]+( \d)?)\.(?P<camera>\d{8})")
_PREFIX = re.compile(r"(?P<subject>S\d+)_(?P<action>[^./]+)\.(?P<camera>\d{8})_")
_LONGEST_LINE = 4096


@dataclass(frozen=True)
class Human36M:
    """``SN/Videos/ACTION.CAMERA.mp4`` in any depth below ``src``: S11 tests, as MSPN and many before it have it; of the
    others, ``val_subjects`` are held apart. ``_ALL.*`` are no actions and are left out.

    With ``lists``, what OpenSTL publishes instead: a folder with ``train.txt`` and ``test.txt``, whose lines
    ``images/S11_Walking.60457274_,1621`` each name a window of ``length`` pictures five frames apart, the first
    ``images/S11_Walking.60457274_001621.jpg``. They are not cropped. Every window becomes a recording, as windows there
    overlap at will. OpenSTL's own size is ``--size [256,256]``.
    """

    name: ClassVar[str] = "human36m"
    size: tuple[int, int] = option((128, 128), "height and width, [H, W]; OpenSTL has [256, 256]")
    fit: Fit = option("squash", "frames of another aspect ratio: squash, or crop to the centre")
    channels: Literal[1, 3] = option(3, "3 keeps RGB, 1 makes grey")
    crop: tuple[int, int] | None = option(
        (120, 880), "of a video keep from this row and column up to that one, as MSPN does; null keeps all"
    )
    val_subjects: tuple[str, ...] = option(("S9",), "subjects held apart from training for validation; [] holds none")
    lists: bool = option(False, "read OpenSTL's train.txt, test.txt and pictures instead of the videos")
    length: int = option(8, "with lists: pictures of a window; OpenSTL predicts 4 from 4")

    def recordings(self, src: Path) -> list[Recording]:
        """Named ``SN/ACTION.CAMERA``; with ``lists`` followed by ``/FIRST``, six digits."""
        if self.crop is not None and not 0 <= self.crop[0] < self.crop[1]:
            raise ValueError(f"crop must be null or two numbers from 0 on, the second larger, got {self.crop}")
        if odd := sorted(set(self.val_subjects) - (SUBJECTS - TEST_SUBJECTS)):
            known = ", ".join(sorted(SUBJECTS - TEST_SUBJECTS))
            raise ValueError(f"val_subjects: {odd} given, must be of {known}; S11 is the test split")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        made: dict[str, Recording] = {}
        for recording in self._windows(src) if self.lists else self._videos(src):
            if recording.name in made:
                raise DataError(
                    f"{recording.source}: {recording.name} is there twice, {made[recording.name].source} is another; "
                    "keep one of them"
                )
            made[recording.name] = recording
        return [made[name] for name in sorted(made, key=natural_key)]

    def _videos(self, src: Path) -> Iterator[Recording]:
        none = True
        for folder, _, names in walk(src):
            subject = folder.parent.name
            if folder.name != "Videos" or subject not in SUBJECTS:
                continue
            for path in (folder / name for name in names):
                if path.suffix.lower() != ".mp4" or path.name.startswith("_ALL"):
                    continue
                match = _VIDEO.fullmatch(path.stem)
                if not match:
                    raise DataError(f"{path}: not named as Human3.6M's videos are, ACTION.CAMERA.mp4; move it away")
                none = False
                yield Recording(
                    f"{subject}/{path.stem}",
                    self._split(subject),
                    path,
                    partial(_frames_of_video, path, self.crop),
                    fps=FPS,
                    tags=tagged(subject=subject, **match.groupdict()),
                )
        if none:
            raise DataError(
                f"{src}: no video of Human3.6M, SN/Videos/ACTION.CAMERA.mp4 (S1, S5 to S9, S11), in it or below; for "
                "OpenSTL's folder of pictures give --lists true"
            )

    def _windows(self, src: Path) -> Iterator[Recording]:
        there: dict[Path, set[str]] = {}
        for listed, split in _LISTS.items():
            for line, prefix, start in _read_list(src / listed):
                place = f"{src / listed}: line {line}"
                match = _PREFIX.fullmatch(prefix.name)
                if not match or match["subject"] not in SUBJECTS:
                    raise DataError(f"{place}: {prefix} is no prefix such as images/S11_Walking.60457274_")
                names = _names_of_window(prefix.name, start, self.length)
                folder = src / prefix.parent
                if folder not in there:
                    there[folder] = _names_in(folder, place)
                if missing := [each for each in names if each not in there[folder]]:
                    raise DataError(f"{place}: {folder / missing[0]} is missing, of the {self.length} of a window")
                yield Recording(
                    f"{prefix.name[:-1].replace('_', '/', 1)}/{start:06}",
                    self._split(match["subject"]) if split == "train" else split,
                    folder / names[0],
                    partial(_frames_of_window, folder, prefix.name, start, self.length),
                    fps=FPS / LIST_STEP,
                    tags=tagged(**match.groupdict()),
                )

    def _split(self, subject: str) -> Split:
        if subject in TEST_SUBJECTS:
            return "test"
        return "val" if subject in self.val_subjects else "train"


def _names_of_window(prefix: str, start: int, length: int) -> list[str]:
    return [f"{prefix}{start + LIST_STEP * index:06}.jpg" for index in range(length)]


def _frames_of_window(folder: Path, prefix: str, start: int, length: int) -> Iterator[NDArray[np.uint8]]:
    return iter_images(folder / name for name in _names_of_window(prefix, start, length))


def _frames_of_video(path: Path, crop: tuple[int, int] | None) -> Iterator[NDArray[np.uint8]]:
    for frame in frames_of_video(path):
        if crop is None:
            yield frame
            continue
        height, width = frame.shape[:2]
        if min(height, width) < crop[1]:
            raise VideoError(
                f"{path}: frames of {height}x{width} (height x width) are too small to keep {list(crop)} of them; "
                "give --crop null where they have been cropped before"
            )
        yield frame[crop[0] : crop[1], crop[0] : crop[1]]


def _read_list(path: Path) -> Iterator[tuple[int, PurePosixPath, int]]:
    """Number of the line, prefix and first frame, of every line that is not empty."""
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if line.strip():
                    yield number, *_parse_line(line, f"{path}: line {number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); OpenSTL has train.txt, test.txt") from error
    if number == 0:
        raise DataError(f"{path}: an empty file (0 bytes)")


def _parse_line(line: bytes, place: str) -> tuple[PurePosixPath, int]:
    match = re.fullmatch(rb"([\x21-\x2b\x2d-\x7e ]+),([0-9]{1,6})", line.strip())
    if not match:
        raise DataError(f"{place} reads {line[:60]!r}; expected is PREFIX,FIRST such as images/S1_Eating.54138969_,120")
    prefix = PurePosixPath(match[1].decode("ascii"))
    if prefix.is_absolute() or ".." in prefix.parts:
        raise DataError(f"{place}: {prefix} leads out of the folder of the list")
    return prefix, int(match[2])


def _names_in(folder: Path, place: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{place}: its folder {folder} cannot be read ({error.strerror})") from error
