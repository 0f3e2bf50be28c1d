"""A prepared data set: every recording decoded once into a uint8 ``.npy`` array, and ``index.json``, which lists them.

::

    index.json   {"format": 1, "name": "kth", "size": [128, 128], "channels": 3, "fit": "squash", "options": {...},
                  "recordings": [{"name": ..., "split": ..., "file": "frames/....npy", "shape": [T, C, H, W],
                                  "sha256": ..., "source": ..., "fps": ..., "step": ..., "anchor": ..., "tags": {...},
                                  "key": ...}, ...]}
    frames/      uint8 (T, C, H, W) arrays, one a recording

``vpfast data prepare`` makes one, ``vpfast data check`` reads all of it against the index.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vpfast.data._clips import Anchor, Shape, Windows, array_bytes, as_clip, read_frames
from vpfast.data._files import open_regular
from vpfast.data.errors import DataError
from vpfast.data.moving_digits import SPLITS, Split
from vpfast.data.resize import Fit, to_grey

FORMAT = 1
INDEX_NAME = "index.json"
JOURNAL_NAME = ".prepare.jsonl"
"""What a preparation under way keeps in place of the index, to go on from."""

_REMEDY = "`vpfast data check` says what else is missing, `vpfast data prepare` makes it again"


@dataclass(frozen=True)
class Entry:
    """One recording of a prepared set, as the index has it: see :class:`vpfast.data.sets.source.Recording`.

    ``file`` is relative to the set's folder, with ``/``; ``shape`` is (T, C, H, W); ``sha256`` that of the whole file;
    ``source`` relative to the folder prepared from. ``key`` changes with the source's files and with the options.
    """

    name: str
    split: Split
    file: str
    shape: Shape
    sha256: str
    source: str
    fps: float | None = None
    step: int | None = None
    anchor: Anchor = "start"
    tags: dict[str, str] = field(default_factory=dict)
    key: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Index:
    """What is in a prepared set. ``size`` is (H, W); ``options`` are those of its source."""

    name: str
    size: tuple[int, int]
    channels: int
    fit: Fit
    options: dict[str, Any]
    recordings: tuple[Entry, ...]

    def head(self) -> dict[str, Any]:
        """All but the recordings, as plain values."""
        kept = {key: getattr(self, key) for key in ("name", "channels", "fit", "options")}
        return {"format": FORMAT, **kept, "size": list(self.size)}

    def to_json(self) -> str:
        """The text of ``index.json``, a line a recording."""
        lines = ",\n".join("  " + json.dumps(entry.to_dict()) for entry in self.recordings)
        return f'{json.dumps(self.head())[:-1]}, "recordings": [\n{lines}\n]}}\n'


def read_index(root: str | os.PathLike[str]) -> Index:
    """The index of the prepared set in the folder ``root``.

    Raises:
        DataError: no such folder, no index, an index that is not one, or that names what cannot be; names the file
            and the recording.
    """
    root = Path(root)
    path = root / INDEX_NAME
    try:
        with open_regular(path) as file:
            values = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(_no_index(root)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the index of a prepared set ({error})") from error
    return _Reader(path).index(values)


def read_journal(root: Path) -> Index | None:
    """What a preparation that did not come to its end had made in ``root``; None where none is under way.

    Raises:
        DataError: a journal that is not one. A last line that was cut off is no harm.
    """
    path = root / JOURNAL_NAME
    try:
        with open_regular(path) as file:
            lines = file.read().decode().split("\n")[:-1]
        head, *entries = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as what a preparation wrote ({error}); remove it") from error
    return _Reader(path).index({**head, "recordings": entries})


def _no_index(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; `vpfast data prepare NAME --src FOLDER --out {root}` makes a prepared set"
    if (root / JOURNAL_NAME).is_file():
        return f"{root}: not yet prepared to the end; the same `vpfast data prepare` goes on where it stopped"
    return f"{root}: holds no {INDEX_NAME}, so it is not a prepared set; `vpfast data prepare` makes one"


class _Reader:
    """Plain values -> :class:`Index`, believing nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def index(self, values: Any) -> Index:
        self._require(isinstance(values, dict), "must hold keys and values")
        found = values.get("format")
        self._require(found == FORMAT, f"format {found!r} given, this vpfast reads {FORMAT}; prepare the set again")
        size = values.get("size")
        self._require(_numbers(size, 2), f"size {size!r} given, must be [H, W]")
        channels = values.get("channels")
        self._require(channels in (1, 3) and _numbers([channels], 1), f"channels {channels!r} given, must be 1 or 3")
        self._require(values.get("fit") in ("squash", "crop"), "fit must be squash or crop")
        self._require(isinstance(values.get("name"), str), "name must be a text")
        self._require(isinstance(values.get("options"), dict), "options must hold keys and values")
        self._require(isinstance(values.get("recordings"), list), "recordings must be a list")
        frame = (channels, *size)
        entries = tuple(self._entry(number, each, frame) for number, each in enumerate(values["recordings"]))
        for key in ("name", "file"):
            doubled = [each for each, times in Counter(getattr(e, key) for e in entries).items() if times > 1]
            self._require(not doubled, f"two recordings have the {key} {doubled[:1]}")
        kept = {key: values[key] for key in ("name", "channels", "fit", "options")}
        return Index(size=(size[0], size[1]), recordings=entries, **kept)

    def _entry(self, number: int, values: Any, frame: tuple[int, int, int]) -> Entry:
        where = f"recording {number}"
        self._require(isinstance(values, dict), f"{where} must hold keys and values")
        for key, fine in _FIELDS.items():
            self._require(fine(values.get(key)), f"{where}: {key} {values.get(key)!r} is none")
        shape = tuple(values["shape"])
        self._require(shape[1:] == frame, f"{where}: shape {list(shape)} is not of {list(frame)} frames")
        return Entry(**{**{key: values[key] for key in _FIELDS}, "shape": cast(Shape, shape)})

    def _require(self, fine: bool, otherwise: str) -> None:
        if not fine:
            raise DataError(f"{self.path}: {otherwise}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(value: Any, count: int) -> bool:
    fine = isinstance(value, list) and len(value) == count
    return fine and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40 for n in value)


def _inside(value: Any) -> bool:
    """A file below the set's own folder, whatever the index was given to say."""
    return _text(value) and value.endswith(".npy") and not PurePosixPath(value).is_absolute() and is_plain(value)


def is_plain(name: str) -> bool:
    """Whether a name with ``/`` between its parts stays a path below the folder that it is joined to."""
    return all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in name.split("/"))


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "name": _text,
    "split": lambda value: value in SPLITS,
    "file": _inside,
    "shape": lambda value: _numbers(value, 4),
    "sha256": lambda value: _text(value) and len(value) == 64,
    "source": _text,
    "fps": lambda value: value is None or (isinstance(value, int | float) and math.isfinite(value)),
    "step": lambda value: value is None or _numbers([value], 1),
    "anchor": lambda value: value in ("start", "end"),
    "tags": lambda value: isinstance(value, dict) and all(map(_text, value.values())),
    "key": _text,
}


class PreparedClips(Dataset[Tensor]):
    """Windows of consecutive frames from one split of a prepared set: float32 (length, C, H, W) in [0, 1].

    Only the frames of a clip are read, through a memory map. Windows are in the order of the index. Recordings that are
    too short for one are left out, and a warning says how many. The data set pickles without its frames.

    Args:
        root: the folder that ``vpfast data prepare`` wrote.
        split: ``"train"``, ``"val"`` or ``"test"``.
        length: frames a clip.
        step: frames from one window to the next; default: as the set's own rules have it for a recording, else
            ``length``, no overlap.
        channels: 3 (RGB), 1 (grey, also from a set in RGB, as :func:`vpfast.data.to_grey` makes it) or
            ``None``, as prepared.
        include, exclude: patterns on the recordings' names, ``*`` matches ``/`` too: ``"walking/*"``. A recording
            needs one of ``include`` and none of ``exclude``.

    Raises:
        DataError: not a prepared set, one whose arrays are missing or of another length than the index says, no
            recording, no window; names the folder and the numbers.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split = "train",
        length: int = 20,
        step: int | None = None,
        channels: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if length < 1 or (step is not None and step < 1):
            raise ValueError(f"length and step must be at least 1, got length={length}, step={step}")
        self.root, self.split, self.length, self.step = Path(root), split, length, step
        index = read_index(self.root)
        self.size, self.fit = index.size, index.fit
        self.channels = _channels(self.root, channels, index.channels)
        chosen = [entry for entry in index.recordings if entry.split == split and _matches(entry, include, exclude)]
        if not chosen:
            raise DataError(_nothing_chosen(self.root, index, split, include, exclude))
        self.recordings = tuple(entry for entry in chosen if entry.shape[0] >= length)
        if not self.recordings:
            most = max(entry.shape[0] for entry in chosen)
            raise DataError(
                f"{self.root}: no clip of {length} frames in its {split} split; the longest of its {len(chosen)} "
                f"recordings has {most}"
            )
        if short := len(chosen) - len(self.recordings):
            warnings.warn(
                f"{self.root}: {short} of {len(chosen)} recordings of the {split} split left out, which have fewer "
                f"than {length} frames",
                stacklevel=2,
            )
        for entry in self.recordings:
            check_length(self.root / entry.file, entry.shape)
        self._windows = Windows(
            [entry.shape[0] for entry in self.recordings],
            length,
            [step or entry.step or length for entry in self.recordings],
            [entry.anchor == "end" for entry in self.recordings],
        )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        entry, start = self.locate(index)
        frames = read_frames(self.root / entry.file, entry.shape, start, self.length, entry.name, _REMEDY)
        if self.channels == entry.shape[1]:
            return as_clip(frames)
        return to_grey(torch.from_numpy(frames)).to(torch.float32).div_(255)

    def locate(self, index: int) -> tuple[Entry, int]:
        """The recording that a clip comes from, and the clip's first frame in it."""
        which, start = self._windows.locate(index)
        return self.recordings[which], start


def check_length(array: Path, shape: Shape) -> None:
    """Raise DataError where the file is not there, or not as long as an array of ``shape`` is."""
    try:
        found = array.stat().st_size
    except OSError as error:
        raise DataError(f"{array}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if found != array_bytes(shape):
        raise DataError(
            f"{array}: {found} bytes long, must be {array_bytes(shape)} for its {list(shape)} frames; {_REMEDY}"
        )


def _channels(root: Path, asked: int | None, prepared: int) -> int:
    if asked not in (None, 1, 3):
        raise ValueError(f"channels must be 3 (RGB), 1 (grey) or None (as prepared), got {asked}")
    if asked == 3 and prepared == 1:
        raise DataError(f"{root}: was prepared in grey and asked for in RGB; prepare it again with --channels 3")
    return asked or prepared


def _matches(entry: Entry, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatchcase(entry.name, p) for p in include) and not any(fnmatchcase(entry.name, p) for p in exclude)


def _nothing_chosen(root: Path, index: Index, split: Split, include: Sequence[str], exclude: Sequence[str]) -> str:
    counts = Counter(entry.split for entry in index.recordings)
    if counts[split]:
        example = next(entry.name for entry in index.recordings if entry.split == split)
        return (
            f"{root}: none of the {counts[split]} recordings of the {split} split left by include={list(include)} and "
            f"exclude={list(exclude)}; their names are like {example}"
        )
    there = ", ".join(f"{each}: {counts[each]}" for each in SPLITS if counts[each]) or "none at all"
    return f"{root}: holds no recording of the {split} split (recordings there are, {there})"
