"""KTH actions (Schuldt, Laptev and Caputo, ICPR 2004): 25 persons, 6 actions, 4 conditions, 160x120 at 25 fps."""

# ruff: noqa: RUF009 - option() makes a dataclass field

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from vpfast.data._clips import Anchor
from vpfast.data._files import natural_key, walk
from vpfast.data.errors import DataError
from vpfast.data.moving_digits import Split
from vpfast.data.resize import Fit
from vpfast.data.sets.folder import frame_number, frames_of_video
from vpfast.data.sets.source import Recording, option, tagged
from vpfast.data.video import images_in, iter_images

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
FPS = 25.0
LIST_NAMES = ("00sequences.txt", "sequences.txt")

_STEM = re.compile(r"person(?P<person>\d\d)_(?P<action>[a-z]+)_d(?P<condition>[1-4])")
_LINE = re.compile(rf"(?P<stem>{_STEM.pattern})\s+(?:frames\s+(?P<ranges>[\d,\s-]+)|\*missing\*)")
_RANGE = re.compile(r"\s*(\d{1,9})-(\d{1,9})\s*")

Run = tuple[int, int]
"""First and last frame of a run, counted from 1 as the official list and PredRNN's file names do."""


class _Film(NamedTuple):
    """One film of the set: the video, or PredRNN's folder of its frames."""

    path: Path
    stem: str
    person: int
    action: str
    condition: str


@dataclass(frozen=True)
class KTH:
    """Official layout: ``personNN_ACTION_dM_uncomp.avi`` in any depth below ``src``, and ``00sequences.txt``, the list
    of the frames that show a person. PredRNN's: folders of that name, each with ``image_XXXX.jpg``, whose numbers have
    gaps where frames without a person were taken out.

    A recording is a run of frames without a gap, so that no clip jumps. Ranges of the list that touch or overlap, as
    several of the official one do, make one run. Persons 1-16 train and 17-25 test, as in the literature on
    prediction (not as the official list divides them for recognition); of the first, ``val_persons`` are held apart.
    """

    name: ClassVar[str] = "kth"
    size: tuple[int, int] = option((128, 128), "height and width, [H, W]; MSPN's released code has [96, 128]")
    fit: Fit = option("squash", "frames of another aspect ratio: squash, or crop to the centre")
    channels: Literal[1, 3] = option(3, "3 keeps RGB, 1 makes grey")
    sequences: bool = option(True, "keep only the frames that 00sequences.txt lists; PredRNN's folders need no list")
    stride: Literal["predrnn"] | None = option(
        None, "predrnn: windows as PredRNN takes them, 3 frames apart in jogging and running, else without overlap"
    )
    val_persons: tuple[int, ...] = option((15, 16), "persons of 1 to 16 held apart for validation; [] holds none")

    def recordings(self, src: Path) -> list[Recording]:
        """Named ``ACTION/personNN_ACTION_dM/FIRST-LAST``, or without the range for a whole film."""
        if outside := sorted(set(self.val_persons) - set(range(1, 17))):
            raise ValueError(f"val_persons: {outside} given, must be of 1 to 16; 17 to 25 are the test split")
        films = _films(src)
        listed = None
        if self.sequences and any(film.path.is_file() for film in films):
            listed = read_sequences(_find_list(src))
            _tell_missing(src, listed, films)
        made = [each for film in films for each in self._of_film(film, listed)]
        return sorted(made, key=lambda recording: natural_key(recording.name))

    def _of_film(self, film: _Film, listed: dict[str, list[Run]] | None) -> Iterator[Recording]:
        step, anchor = self._windows(film.action)
        tags = tagged(person=f"{film.person:02}", action=film.action, condition=film.condition)
        name, read = f"{film.action}/{film.stem}", partial(frames_of_video, film.path)
        whole = Recording(name, self._split(film.person), film.path, read, FPS, step, anchor, tags)
        if film.path.is_dir():
            for files in _runs_of_images(film.path):
                run = frame_number(files[0]), frame_number(files[-1])
                yield _part(whole, run, partial(iter_images, tuple(files)))
        elif listed is None:
            yield whole
        elif film.stem not in listed:
            raise DataError(f"{film.path}: not in the list of sequences; --sequences false takes whole films")
        else:
            for run in listed[film.stem]:
                yield _part(whole, run, partial(_frames_of_run, film.path, run))

    def _split(self, person: int) -> Split:
        if person > 16:
            return "test"
        return "val" if person in self.val_persons else "train"

    def _windows(self, action: str) -> tuple[int | None, Anchor]:
        """PredRNN walks backwards from the last frame of a run, so its windows end there."""
        if self.stride is None:
            return None, "start"
        return (3 if action in ("jogging", "running") else None), "end"


def read_sequences(path: Path) -> dict[str, list[Run]]:
    """The runs of frames that the official list gives each film, such as ``person01_boxing_d1``.

    Raises:
        DataError: not such a list, or a line about a person that does not read as one; names the line.
    """
    try:
        lines = path.read_text(encoding="ascii", errors="strict").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as KTH's list of sequences ({error})") from error
    listed: dict[str, list[Run]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.startswith("person"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        ranges = [_RANGE.fullmatch(each) for each in (match["ranges"] or "").split(",")] if match else []
        if match is None or (match["ranges"] and not all(ranges)) or match["stem"] in listed:
            raise DataError(
                f"{path}: line {number} reads {line[:80]!r}, expected a film once and its frames as 1-95, 96-185"
            )
        runs = [(int(each[1]), int(each[2])) for each in ranges if each]
        if any(not 1 <= first <= last for first, last in runs):
            raise DataError(f"{path}: line {number} has a range that counts backwards or from 0: {line[:80]!r}")
        if runs:
            listed[match["stem"]] = _joined(runs)
    if not listed:
        raise DataError(f"{path}: lists no sequence, expected lines such as 'person01_boxing_d1 frames 1-95, 96-185'")
    return listed


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Sorted runs, one made of those that touch or overlap."""
    joined: list[Run] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _find_list(src: Path) -> Path:
    for name in LIST_NAMES:
        if (src / name).is_file():
            return src / name
    raise DataError(
        f"{src}: holds no {LIST_NAMES[0]}, KTH's list of the frames that show a person; put it there, or "
        "--sequences false takes whole films, frames of empty fields included"
    )


def _tell_missing(src: Path, listed: Collection[str], films: Iterable[_Film]) -> None:
    there = {film.stem for film in films}
    if missing := [stem for stem in listed if stem not in there]:
        warn(
            f"{src}: {len(missing)} of the {len(listed)} films that the list of sequences has are not there, such as "
            f"{missing[0]}",
            stacklevel=2,
        )


def _films(src: Path) -> list[_Film]:
    """Every film below ``src``, each once."""
    if not src.is_dir():
        raise DataError(f"{src}: no such folder; expected KTH's films, ACTION/personNN_ACTION_dM_uncomp.avi")
    found: dict[str, _Film] = {}
    for here, subfolders, names in walk(src):
        candidates = [here / name for name in names if name.lower().endswith(".avi")]
        if _STEM.match(here.name) and not candidates and not subfolders:
            candidates = [here]
        for film in map(_film, candidates):
            if film.stem in found:
                raise DataError(f"{film.path}: the same film as {found[film.stem].path}; keep one of them")
            found[film.stem] = film
    if not found:
        raise DataError(
            f"{src}: holds none of KTH's films; expected ACTION/personNN_ACTION_dM_uncomp.avi, or folders of that name "
            "with image_XXXX.jpg"
        )
    return list(found.values())


def _film(path: Path) -> _Film:
    match = re.fullmatch(rf"({_STEM.pattern})(_uncomp)?(\.avi)?", path.name, re.IGNORECASE)
    if match is None or match["action"] not in ACTIONS or not 1 <= int(match["person"]) <= 25:
        raise DataError(
            f"{path}: not the name of one of KTH's films, personNN_ACTION_dM_uncomp.avi with persons 01 to 25 and an "
            f"action of {', '.join(ACTIONS)}; move it out of the folder"
        )
    return _Film(path, match[1], int(match["person"]), match["action"], match["condition"])


def _part(whole: Recording, run: Run, read: Callable[[], Iterator[NDArray[np.uint8]]]) -> Recording:
    return replace(whole, name=f"{whole.name}/{run[0]:04}-{run[1]:04}", read=read)


def _runs_of_images(folder: Path) -> Iterator[list[Path]]:
    """The images of a folder, divided where a number is missing between two."""
    run: list[Path] = []
    for file in images_in(folder):
        number = frame_number(file)
        if run and number == frame_number(run[-1]):
            raise DataError(f"{file}: frame {number} is there twice, {run[-1].name} is it too")
        if run and number != frame_number(run[-1]) + 1:
            yield run
            run = []
        run.append(file)
    if not run:
        raise DataError(f"{folder}: a film's folder without images")
    yield run


def _frames_of_run(path: Path, run: Run) -> Iterator[NDArray[np.uint8]]:
    """The official list promises a few frames that a film may not have; those are told, no more than those forgiven."""
    first, last = run
    count = 0
    for frame in islice(frames_of_video(path), first - 1, last):
        count += 1
        yield frame
    if count == 0:
        raise DataError(f"{path}: ends before frame {first}, where the list of sequences has frames {first}-{last}")
    if count < last - first + 1:
        warn(f"{path}: ends with frame {first + count - 1}, the list of sequences goes on to {last}", stacklevel=2)
