"""Folders and files that are either whole or not there: written under another name, flushed to disk, then renamed.

All parts of the package write this way. What is half-written has a hidden name that ends in ``.partial``.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def new_folder(path: Path, replace: bool | Collection[str] = False) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that becomes ``path`` when the block ends, and vanishes when it fails.

    Args:
        path: the folder to make.
        replace: whether an existing one may go; names allow it where the old folder holds nothing but those.

    Raises:
        FileExistsError: ``path`` cannot be made, or exists and may not be replaced.
    """
    if (reason := refusal(path, replace)) is not None:
        raise FileExistsError(f"{path} {reason}")
    path = _absolute(path)
    _make(path.parent)
    draft = _hidden(path, "partial")
    draft.mkdir()
    try:
        yield draft
        _flush(*draft.rglob("*"), draft)
        if path.exists():
            _swap(draft, path)
        else:
            draft.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refusal(path: Path, replace: bool | Collection[str] = False) -> str | None:
    """Why :func:`new_folder` cannot make ``path``, as the end of a sentence; None if it can.

    ``replace`` given as names are paths relative to ``path`` with ``/``, folders among them listed too.
    """
    path = _absolute(path)
    if path == path.parent:
        return "is the root of all folders, which cannot be replaced"
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        return f"cannot be made: {above} is a file"
    if not _writable(above):
        return f"cannot be made: no permission to write in {above}"
    if not os.path.lexists(path):
        return None
    if not path.is_dir():
        return "exists already and is not a folder"
    if replace is False:
        return "exists already"
    if path == Path.cwd():
        return "is the current folder, which cannot be replaced"
    if replace is not True:
        for inside in path.rglob("*"):
            name = inside.relative_to(path).as_posix()
            if name not in replace:
                return f"cannot be replaced: {name} in it is not of vpfast's making; move it away, or choose another"
    return None


def _swap(draft: Path, path: Path) -> None:
    """A folder with content cannot be renamed over, so the old one steps aside first, and back where that was all."""
    aside = _hidden(path, "old")
    aside.mkdir()
    old = aside / path.name
    try:
        path.rename(old)
        draft.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


@contextmanager
def new_file(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields the path of a file to write, which becomes ``path`` when the block ends and vanishes when it fails.

    It ends as ``path`` does, for writers that go by that. Two processes may write the same file at once: each has a
    draft of its own, and the last to end wins.

    Raises:
        FileExistsError: ``path`` cannot be written, or exists and may not be replaced.
    """
    if (reason := file_refusal(path, replace)) is not None:
        raise FileExistsError(f"{path} {reason}")
    draft = _hidden(path, f"partial{path.suffix}")
    try:
        yield draft
        _flush(draft)
        draft.replace(path)
        _flush(path.absolute().parent)
    finally:
        draft.unlink(missing_ok=True)


def file_refusal(path: Path, replace: bool = False) -> str | None:
    """Why :func:`new_file` cannot make ``path``, as the end of a sentence; None if it can."""
    if path.is_dir():
        return "is a folder, must be a file"
    if path.exists() and not path.is_file():  # which would be replaced by one, /dev/null too
        return "is a device or a pipe, must be a file"
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"cannot be written: there is no folder {folder}"
    if not _writable(folder):
        return f"cannot be written: no permission to write in {folder}"
    return "exists already" if os.path.lexists(path) and not replace else None


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which is never seen half-written."""
    with new_file(path, replace=True) as draft:
        draft.write_text(text)


def remove_file(path: Path) -> None:
    """Take the file ``path`` away for good."""
    path.unlink()
    _flush(path.absolute().parent)


def clear_up(folder: Path) -> None:
    """Undo in ``folder`` what was under way when a process was killed: drafts go, and what had stepped aside for a
    draft that never came returns."""
    for aside in folder.glob(".*.old"):
        for old in aside.iterdir():
            if not (folder / old.name).exists():
                old.rename(folder / old.name)
        shutil.rmtree(aside)
    for draft in folder.glob(".*.partial*"):
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink()


def unwritable(path: Path) -> str | None:
    """Why nothing can be written to the folder ``path``, made where it is missing, as the end of a sentence."""
    place = next(folder for folder in (_absolute(path), *_absolute(path).parents) if folder.exists())
    return None if _writable(place) else f"cannot be written: no permission to write in {place}"


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _absolute(path: Path) -> Path:
    """With a name of its own, which ``.`` has not, and without following a link to another place."""
    return Path(os.path.abspath(path))


def _hidden(path: Path, ending: str) -> Path:
    """A name beside ``path`` that nobody else has."""
    return path.with_name(f".{path.name}.{uuid4().hex}.{ending}")


def _make(folder: Path) -> None:
    """Make a folder and those above it, each entered for good in the one above."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _flush(*(each.parent for each in missing))


def _flush(*paths: Path) -> None:
    """Force files, and the names in folders, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
