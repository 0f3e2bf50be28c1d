"""KITTI raw (Geiger, Lenz, Stiller and Urtasun, IJRR 2013): drives around Karlsruhe, colour pictures at 10 fps."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vpfast.data._files import natural_key, walk
from vpfast.data.errors import DataError, VideoError
from vpfast.data.moving_digits import Split
from vpfast.data.resize import Fit
from vpfast.data.sets.source import Recording, option, tagged
from vpfast.data.video import images_in, iter_images

FPS = 10.0

_CAMERAS = ("image_02", "image_03")

Category = Literal["city", "residential", "road"]

# Drives of each day, as the set's site files them. Those of campus, person and calibration are in none.
_DRIVES: dict[Category, dict[str, str]] = {
    "city": {
        "2011_09_26": "1 2 5 9 11 13 14 17 18 48 51 56 57 59 60 84 91 93 95 96 104 106 113 117",
        "2011_09_28": "1 2",
        "2011_09_29": "26 71",
    },
    "residential": {
        "2011_09_26": "19 20 22 23 35 36 39 46 61 64 79 86 87",
        "2011_09_30": "18 20 27 28 33 34",
        "2011_10_03": "27 34",
    },
    "road": {
        "2011_09_26": "15 27 28 29 32 52 70 101",
        "2011_09_29": "4",
        "2011_09_30": "16",
        "2011_10_03": "42 47",
    },
}

CATEGORIES: dict[str, Category] = {
    f"{day}_drive_{int(number):04}": category
    for category, days in _DRIVES.items()
    for day, numbers in days.items()
    for number in numbers.split()
}
"""Category of each of the 61 drives that PredNet takes."""

# PredNet (Lotter, Kreiman and Cox, ICLR 2017) drew them once; process_kitti.py of its code has the names.
_VAL = {"2011_09_26_drive_0005"}
_TEST = {"2011_09_26_drive_0104", "2011_09_26_drive_0079", "2011_09_26_drive_0070"}

_DRIVE = re.compile(r"(?P<drive>[0-9]{4}_[0-9]{2}_[0-9]{2}_drive_[0-9]{4})_sync")


@dataclass(frozen=True)
class KITTI:
    """``DATE/DATE_drive_NNNN_sync/image_0N/data/NNNNNNNNNN.png``, in any depth below ``src``.

    Divided as PredNet does: the drives of the categories city, residential and road, of which one validates, one of
    each tests and the other 57 train. Drives of other categories, and folders whose name is not a drive's (or a drive's
    that is not rectified, ``..._extract``), go to ``others``.

    ``fit`` = crop is PredNet's resizing and centre crop. MSPN's released code takes the centre 1024 columns to 256x128
    (width by height): ``--size [128,256] --fit squash --columns 1024``.
    """

    name: ClassVar[str] = "kitti"
    size: tuple[int, int] = option((128, 160), "height and width, [H, W]; MSPN's released code has [128, 256]")
    fit: Fit = option("crop", "frames of another aspect ratio: crop to the centre, or squash")
    channels: Literal[1, 3] = option(3, "3 keeps RGB, 1 makes grey")
    camera: Literal["image_02", "image_03"] = option("image_03", "left or right colour camera; PredNet takes the right")
    columns: int | None = option(
        None, "keep so many centre columns before resizing; MSPN's released code 1024, with --fit squash"
    )
    others: Split | None = option(None, "split of drives that PredNet leaves out; null leaves them out here too")

    def recordings(self, src: Path) -> list[Recording]:
        """Named ``CATEGORY/DATE_drive_NNNN``, or ``other/...``."""
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1 or null, got {self.columns}")
        folders = _folders(src, self.camera)
        made: dict[str, Recording] = {}
        for folder in folders:
            drive, category = _drive(folder)
            split = self._split(drive)
            if split is None:
                continue
            name = f"{category or 'other'}/{drive}"
            if name in made:
                raise DataError(f"{folder}: {name} is there twice, {made[name].source} is another; keep one of them")
            read = partial(_frames, folder, self.columns)
            tags = tagged(category=category, camera=self.camera)
            made[name] = Recording(name, split, folder, read, fps=FPS, tags=tags)
        if not made:
            raise DataError(
                f"{src}: none of its {len(folders)} drives ({_drive(folders[0])[0]}, ...) is of the categories city, "
                "residential and road; --others train, val or test takes them all the same"
            )
        return [made[name] for name in sorted(made, key=natural_key)]

    def _split(self, drive: str) -> Split | None:
        if drive not in CATEGORIES:
            return self.others
        return "val" if drive in _VAL else "test" if drive in _TEST else "train"


def _folders(src: Path, camera: str) -> list[Path]:
    """Every ``CAMERA/data`` under ``src``."""
    found: list[Path] = []
    elsewhere: set[str] = set()
    for folder, _, _ in walk(src):
        if folder.name == "data" and folder.parent.name == camera:
            found.append(folder)
        elif folder.name == "data" and folder.parent.name in _CAMERAS:
            elsewhere.add(folder.parent.name)
    if not found:
        hint = f"; there are {', '.join(sorted(elsewhere))}: give --camera" if elsewhere else ""
        raise DataError(
            f"{src}: no drive of KITTI raw, DATE_drive_NNNN_sync/{camera}/data/NNNNNNNNNN.png, in it or below{hint}"
        )
    return found


def _drive(folder: Path) -> tuple[str, Category | None]:
    """Name and category of the drive whose pictures lie in ``folder``."""
    holder = folder.parent.parent.name
    match = _DRIVE.fullmatch(holder)
    drive = match["drive"] if match else holder
    return drive, CATEGORIES.get(drive)


def _frames(folder: Path, columns: int | None) -> Iterator[NDArray[np.uint8]]:
    for frame in iter_images(_numbered(folder)):
        if columns is None:
            yield frame
            continue
        width = frame.shape[1]
        if width < columns:
            raise VideoError(f"{folder}: its pictures are {width} pixels wide, fewer than columns={columns}")
        left = (width - columns) // 2
        yield frame[:, left : left + columns]


def _numbered(folder: Path) -> Sequence[Path]:
    """The pictures in order; their names are numbers of which none is missing."""
    try:
        files = images_in(folder)
    except OSError as error:
        raise VideoError(f"{folder}: cannot be read ({error.strerror})") from error
    if not files:
        raise VideoError(f"{folder}: a drive without pictures")
    before: int | None = None
    for file in files:
        if not re.fullmatch(r"[0-9]{1,10}", file.stem):
            raise VideoError(f"{file}: not named as KITTI's pictures are, by a number of ten digits")
        number = int(file.stem)
        if before is not None and number != before + 1:
            missing = f"{before + 1:010}" + (f" to {number - 1:010}" if number > before + 2 else "")
            raise VideoError(f"{folder}: picture {missing} is missing before {file.name}; unpack the drive again")
        before = number
    return files
