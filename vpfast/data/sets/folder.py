"""Any folder of videos, or of folders of frames, its splits told apart by patterns on the paths."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vpfast.data.errors import DataError
from vpfast.data.moving_digits import SPLITS, Split
from vpfast.data.resize import Fit
from vpfast.data.sets.source import Recording, option
from vpfast.data.video import iter_video
from vpfast.data.video_folder import find_videos


@dataclass(frozen=True)
class Folder:
    """A video is a file with a video's ending, or a folder with images right inside it, in any depth below src. One
    that no split's patterns match is left out, one that two splits match is refused."""

    name: ClassVar[str] = "folder"
    size: tuple[int, int] = option((128, 128), "height and width of the prepared frames, [H, W]")
    fit: Fit = option("squash", "frames of another aspect ratio: squash, or crop to the centre")
    channels: Literal[1, 3] = option(3, "3 keeps RGB, 1 makes grey")
    train: tuple[str, ...] = option(("train/*",), "patterns of the videos to train on, on the path below --src")
    val: tuple[str, ...] = option(("val/*",), "patterns of the videos to watch training with")
    test: tuple[str, ...] = option(("test/*",), "patterns of the videos to measure on")

    def recordings(self, src: Path) -> list[Recording]:
        """One a video, named by its path below ``src``, ending included."""
        found = []
        for path in find_videos(src):
            name = path.relative_to(src).as_posix() if path != src else path.name
            if split := self._split(name, path):
                found.append(Recording(name, split, path, partial(frames_of_video, path)))
        if not found:
            asked = ", ".join(f"{split}: {list(getattr(self, split))}" for split in SPLITS)
            raise DataError(f"{src}: none of the videos there is of a split ({asked}); give --train, --val, --test")
        return found

    def _split(self, name: str, path: Path) -> Split | None:
        matched = [split for split in SPLITS if any(fnmatchcase(name, each) for each in getattr(self, split))]
        if len(matched) > 1:
            raise DataError(f"{path}: matched by the patterns of {' and '.join(matched)}; a video is of one split")
        return matched[0] if matched else None


def frames_of_video(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video file or a folder of images, uint8 RGB (H, W, 3)."""
    for frame in iter_video(path):
        yield frame.permute(1, 2, 0).numpy()


def frame_number(file: Path) -> int:
    """The number that an image's name ends in, ``image_0042.jpg`` -> 42; DataError where there is none."""
    match = re.search(r"(\d{1,9})$", file.stem)
    if match is None:
        raise DataError(f"{file}: its name ends in no number; frames are numbered, such as image_0042.jpg")
    return int(match[1])
