"""Preparing a data set: every recording decoded, resized and written once, in parallel, and from where it stopped."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vpfast.data._clips import npy_header, write_frames
from vpfast.data._files import replacing
from vpfast.data._parallel import check_workers, in_parallel
from vpfast.data.errors import DataError
from vpfast.data.prepared import (
    INDEX_NAME,
    JOURNAL_NAME,
    Entry,
    Index,
    check_length,
    is_plain,
    read_index,
    read_journal,
)
from vpfast.data.resize import LARGEST, parse_size, resize_frames, to_grey
from vpfast.data.sets.source import Recording, Source
from vpfast.data.video_folder import stamp

_CHUNK = 1 << 20
_TOLD = 5  # of many complaints


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` did: the index, how many recordings were decoded now and how many were there and whole."""

    index: Index
    decoded: int
    kept: int


@dataclass(frozen=True)
class _Job:
    """One recording to decode: where to, and what its frames are brought to."""

    recording: Recording
    entry: Entry
    out: Path
    size: tuple[int, int]
    channels: int
    fit: Any


class _Made(NamedTuple):
    entry: Entry | None
    complaint: str
    notes: list[str]


def prepare(
    source: Source,
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    workers: int = 0,
    progress: bool = False,
    force: bool = False,
    tell: Callable[[str], object] = warnings.warn,
) -> Prepared:
    """Write the set that ``source`` finds under ``src`` to the folder ``out``, for :class:`vpfast.data.PreparedClips`.

    What an earlier call with the same options left there, and is whole by its checksum, is not decoded again, unless
    its source has changed since. Recordings that cannot be read do not stop the others; the index is written when all
    are there.

    Args:
        workers: processes beside this one; 0 decodes in this one.
        progress: show a bar where stderr is a terminal.
        force: replace what was prepared in ``out`` with other options, or is damaged.
        tell: is given what the readers found worth telling of a recording that they could read, as soon as it is there:
            it is not told again by a call that goes on from there.

    Raises:
        DataError: what the source says of its files; which recordings cannot be read, and why.
        FileExistsError: ``out`` holds something else, or was prepared otherwise.
        ValueError: an option out of its range.
        OSError: a disk that is full or cannot be written.
    """
    src, out = Path(src), Path(out)
    check_workers(workers)
    head = _head(source)
    with _noting() as notes:
        recordings = _checked(source.recordings(src), src)
    _tell_all(notes, tell)
    with _locked(out), _swept(out / "frames"):
        known = _known(out, head, force)
        planned = [_plan(recording, src, head) for recording in recordings]
        bar = tqdm(
            total=len(planned), desc=f"prepare {head.name}", unit="recording", disable=None if progress else True
        )
        with bar:
            whole = _whole(planned, known, out, workers, bar)
            jobs = [
                _Job(recording, entry, out, head.size, head.channels, head.fit)
                for recording, entry in zip(recordings, planned, strict=True)
                if entry.name not in whole
            ]
            index = dataclasses.replace(head, recordings=tuple(whole.values()))
            if jobs or index != known or (out / JOURNAL_NAME).exists():
                index = _decode(jobs, index, [entry.name for entry in planned], out, workers, bar, tell)
        _remove_strays(out, index)
    return Prepared(index, len(jobs), len(whole))


def check(root: str | os.PathLike[str], workers: int = 0, progress: bool = False) -> list[str]:
    """Read every array of a prepared set against its index; what is wrong, a sentence each that names the file.

    Raises:
        DataError: there is no index, or one that cannot be read.
    """
    root = Path(root)
    index = read_index(root)
    tasks = [(root, entry) for entry in index.recordings]
    wrong = {}
    with tqdm(total=len(tasks), desc="check", unit="recording", disable=None if progress else True) as bar:
        for number, complaint in in_parallel(_complaint, tasks, workers):
            bar.update()
            if complaint:
                wrong[number] = complaint
    strays = [f"{path}: not in the index; `vpfast data prepare` clears up" for path in _strays(root, index)]
    return [wrong[number] for number in sorted(wrong)] + strays


def _head(source: Source) -> Index:
    """The index without recordings; ValueError where an option is out of its range."""
    size = parse_size(source.size)
    if size is None or max(size) > LARGEST or source.fit not in ("crop", "squash") or source.channels not in (1, 3):
        raise ValueError(
            f"size must be [H, W] of at most {LARGEST}, fit squash or crop and channels 1 or 3, got size="
            f"{source.size}, fit={source.fit}, channels={source.channels}"
        )
    options = {key: value for key, value in vars(source).items() if key not in ("name", "size", "fit", "channels")}
    return Index(source.name, size, source.channels, source.fit, json.loads(json.dumps(options)), ())


def _checked(recordings: list[Recording], src: Path) -> list[Recording]:
    if not recordings:
        raise DataError(f"{src}: nothing to prepare there")
    doubled = [name for name, times in Counter(each.name for each in recordings).items() if times > 1]
    if doubled:
        both = [str(each.source) for each in recordings if each.name == doubled[0]]
        raise DataError(f"{both[0]} and {both[1]} would both be {doubled[0]}; keep one of them")
    for each in recordings:
        if not is_plain(each.name):
            raise DataError(f"{each.source}: {each.name!r} cannot be the name of a file in the prepared set; rename it")
    return recordings


def _plan(recording: Recording, src: Path, head: Index) -> Entry:
    """The recording's entry in the index, its shape and checksum still to be found."""
    facts = [head.head(), recording.name, stamp(recording.source)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    return Entry(
        name=recording.name,
        split=recording.split,
        file=f"frames/{recording.name}.npy",
        shape=(0, head.channels, *head.size),
        sha256="",
        source=os.path.relpath(recording.source, src),
        fps=recording.fps,
        step=recording.step,
        anchor=recording.anchor,
        tags=dict(recording.tags),
        key=key,
    )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder, and keep other preparations out of it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists already and is not a folder")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise FileExistsError(f"{out}: another `vpfast data prepare` is at work there") from error
    except OSError:
        pass  # a network's file system that cannot lock a folder
    try:
        yield
    finally:
        if made and not any((out / "frames").rglob("*.npy")):
            shutil.rmtree(out)  # nothing came of it: nothing to go on from
        os.close(handle)


@contextlib.contextmanager
def _swept(frames: Path) -> Iterator[None]:
    """Without the drafts of a process that was killed, before and after."""

    def sweep() -> None:
        for draft in frames.rglob(".*"):
            if draft.is_file():
                draft.unlink(missing_ok=True)

    sweep()
    try:
        yield
    finally:
        sweep()


def _known(out: Path, head: Index, force: bool) -> Index | None:
    """What is in ``out`` of an earlier preparation with the same options; None where there is nothing to go on from."""
    try:
        before = read_journal(out) or (read_index(out) if (out / INDEX_NAME).exists() else None)
    except DataError as error:
        if force:
            return None
        raise DataError(f"{error} (--force prepares all of it again)") from error
    if before is None:
        if any(out.iterdir()):
            raise FileExistsError(f"{out} holds something that is not a prepared set; choose another folder")
        return None
    if before.head() == head.head():
        return before
    if force:
        return None
    was, asked = before.head(), head.head()
    differing = next(key for key in asked if was[key] != asked[key])
    raise FileExistsError(
        f"{out} was prepared with {differing} {was[differing]}, asked is {asked[differing]}; --force replaces it, or "
        "choose another folder"
    )


def _whole(planned: list[Entry], known: Index | None, out: Path, workers: int, bar: Any) -> dict[str, Entry]:
    """By name, the recordings that are there: from the same source, with the checksum that they were written with."""
    before = {entry.name: entry for entry in known.recordings} if known else {}
    tasks = [
        (out, dataclasses.replace(entry, shape=there.shape, sha256=there.sha256))
        for entry in planned
        if (there := before.get(entry.name)) and there.key == entry.key
    ]
    whole = {}
    for number, complaint in in_parallel(_complaint, tasks, workers):
        if not complaint:
            bar.update()
            whole[tasks[number][1].name] = tasks[number][1]
    return {entry.name: whole[entry.name] for entry in planned if entry.name in whole}


def _decode(
    jobs: list[_Job],
    index: Index,
    order: list[str],
    out: Path,
    workers: int,
    bar: Any,
    tell: Callable[[str], object],
) -> Index:
    """Decode ``jobs`` beside what ``index`` has, and write the index of all."""
    made = {entry.name: entry for entry in index.recordings}
    complaints: dict[int, str] = {}
    with _journal(out, index) as note_down:
        for number, result in in_parallel(_make, jobs, workers):
            bar.update()
            _tell_all(result.notes, tell)
            if result.entry is None:
                complaints[number] = result.complaint
            else:
                made[result.entry.name] = result.entry
                note_down(result.entry)
    if complaints:
        raise DataError(_many([complaints[number] for number in sorted(complaints)], len(order)))
    complete = dataclasses.replace(index, recordings=tuple(made[name] for name in order))
    with replacing(out / INDEX_NAME) as file:
        file.write(complete.to_json().encode())
    (out / JOURNAL_NAME).unlink()
    return complete


def _many(complaints: list[str], of: int) -> str:
    if len(complaints) == 1 == of:
        return complaints[0]
    different = list(dict.fromkeys(complaints))  # a damaged film spoils every run of frames in it
    more = f"; and {len(different) - _TOLD} more" if len(different) > _TOLD else ""
    return (
        f"{len(complaints)} of {of} recordings cannot be prepared: {'; '.join(different[:_TOLD])}{more}. The others "
        "are kept: mend or move away what is named, and the same command goes on"
    )


@contextlib.contextmanager
def _journal(out: Path, index: Index) -> Iterator[Callable[[Entry], None]]:
    """Takes the place of the index while recordings are written; the function yielded adds one to it."""
    lines = [json.dumps(index.head()), *(json.dumps(entry.to_dict()) for entry in index.recordings)]
    with replacing(out / JOURNAL_NAME) as file:
        file.write(("\n".join(lines) + "\n").encode())
    (out / INDEX_NAME).unlink(missing_ok=True)
    with open(out / JOURNAL_NAME, "a", encoding="utf-8") as journal:

        def note_down(entry: Entry) -> None:
            journal.write(json.dumps(entry.to_dict()) + "\n")
            journal.flush()

        yield note_down


def _make(job: _Job) -> _Made:
    """Decode one recording into its file."""
    array = job.out / job.entry.file
    array.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _noting() as notes, replacing(array) as file:
            shape = write_frames(file, _frames(job))
            if not shape[0]:
                raise DataError(f"{job.recording.source}: without a single frame for {job.entry.name}")
    except DataError as error:
        return _Made(None, str(error), [])
    return _Made(dataclasses.replace(job.entry, shape=shape, sha256=sha256(array)), "", notes)


@contextlib.contextmanager
def _noting() -> Iterator[list[str]]:
    """Warnings of the block become notes, there when it has ended."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield notes
    notes += [str(each.message) for each in told if issubclass(each.category, UserWarning)]


def _tell_all(notes: list[str], tell: Callable[[str], object]) -> None:
    for note in notes:
        tell(note)


def _frames(job: _Job) -> Iterator[Tensor]:
    """uint8 (C, H, W) of the set's size."""
    first: tuple[int, ...] | None = None
    for number, rgb in enumerate(job.recording.read()):
        first = first or rgb.shape
        if rgb.shape != first or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise DataError(
                f"{job.recording.source}: frame {number} of {job.entry.name} is {rgb.dtype} {list(rgb.shape)}, must be "
                f"uint8 [H, W, 3] as large as the first, {list(first)}"
            )
        yield _fitted(rgb, job)


def _fitted(rgb: NDArray[np.uint8], job: _Job) -> Tensor:
    frame = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).unsqueeze(0)
    frame = to_grey(frame) if job.channels == 1 else frame
    return resize_frames(frame, job.size, job.fit).squeeze(0).contiguous()


def sha256(path: Path) -> str:
    """The checksum of a file, a part of it in memory at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _complaint(task: tuple[Path, Entry]) -> str:
    """What is wrong with an array, "" where nothing is."""
    root, entry = task
    path = root / entry.file
    try:
        check_length(path, entry.shape)
        with open(path, "rb") as file:
            expected = npy_header(entry.shape)
            if file.read(len(expected)) != expected:
                return f"{path}: its header (offset 0) is not that of uint8 {list(entry.shape)} frames"
        return "" if sha256(path) == entry.sha256 else f"{path}: changed since it was written, by its checksum"
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"


def _strays(root: Path, index: Index) -> list[Path]:
    known = {root / entry.file for entry in index.recordings}
    return sorted(path for path in (root / "frames").rglob("*.npy") if path not in known)


def _remove_strays(out: Path, index: Index) -> None:
    """Arrays of recordings that the source no longer has, and folders that this leaves empty."""
    for path in _strays(out, index):
        path.unlink()
    for folder in sorted((out / "frames").rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
