"""Caltech Pedestrian (Dollár, Wojek, Schiele and Perona, CVPR 2009): 11 sets of films from a car, 640x480, 30 fps."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from vpfast.data._files import natural_key, walk
from vpfast.data.errors import DataError
from vpfast.data.moving_digits import Split
from vpfast.data.norpix import iter_seq, read_seq_header
from vpfast.data.resize import Fit
from vpfast.data.sets.source import Recording, option, tagged

_SET = re.compile(r"set(0[0-9]|10)")
_VIDEO = re.compile(r"V[0-9]{3}")
_FIRST_TEST_SET = 6


@dataclass(frozen=True)
class Caltech:
    """``setNN/VNNN.seq``, in any depth below ``src``. Sets 00-05 train and 06-10 test, as the set's authors divide
    them; of each of the first, the videos named in ``val_videos`` are held apart.
    """

    name: ClassVar[str] = "caltech"
    size: tuple[int, int] = option((128, 160), "height and width of the prepared frames, [H, W]")
    fit: Fit = option("crop", "frames of another aspect ratio: squash, or crop to the centre")
    channels: Literal[1, 3] = option(3, "3 keeps RGB, 1 makes grey")
    every: int = option(1, "keep each n-th frame; PredNet and who compares with it take 3, which leaves 10 fps")
    val_videos: tuple[str, ...] = option(
        ("V000",), "videos of each of the sets 00-05 held apart for validation; [] holds none"
    )

    def recordings(self, src: Path) -> list[Recording]:
        """Named ``setNN/VNNN``."""
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if odd := [name for name in self.val_videos if not _VIDEO.fullmatch(name)]:
            raise ValueError(f"val_videos: {odd} given, must be names such as V000")
        found: dict[str, Path] = {}
        for path in _seq_files(src):
            name = f"{path.parent.name}/{path.stem}"
            if name in found:
                raise DataError(f"{path}: {name} is there twice, {found[name]} is another; keep one of them")
            found[name] = path
        return [self._recording(name, found[name]) for name in sorted(found, key=natural_key)]

    def _recording(self, name: str, path: Path) -> Recording:
        folder, video = name.split("/")
        fps = read_seq_header(path).fps
        return Recording(
            name,
            self._split(int(folder[3:]), video),
            path,
            partial(iter_seq, path, self.every),
            fps=fps and fps / self.every,
            tags=tagged(set=folder[3:]),
        )

    def _split(self, number: int, video: str) -> Split:
        if number >= _FIRST_TEST_SET:
            return "test"
        return "val" if video in self.val_videos else "train"


def _seq_files(src: Path) -> list[Path]:
    found: list[Path] = []
    others: list[Path] = []
    for folder, _, names in walk(src):
        for path in (folder / name for name in names if name.lower().endswith(".seq")):
            known = _SET.fullmatch(folder.name) and _VIDEO.fullmatch(path.stem)
            (found if known else others).append(path)
    if others:
        raise DataError(f"{min(others)}: not one of Caltech Pedestrian's, set00 to set10/VNNN.seq; move it away")
    if not found:
        raise DataError(f"{src}: no video of Caltech Pedestrian, setNN/VNNN.seq (set00 to set10), in it or below")
    return found
