"""Folders that are either whole or not there: written under another name, flushed to disk, renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that becomes ``path`` when the block ends, and vanishes when it fails.

    Raises:
        FileExistsError: ``path`` exists and ``replace`` is False.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        flush(draft)
        if path.exists():
            _swap(draft, path)
        else:
            draft.rename(path)
        _flush_one(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, path: Path) -> None:
    """A folder with content cannot be renamed over, so the old one steps aside first."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    draft.rename(path)
    shutil.rmtree(old)


def flush(folder: Path) -> None:
    """Force every file in ``folder``, and the folder itself, to the disk."""
    for path in folder.rglob("*"):
        _flush_one(path)
    _flush_one(folder)


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which is never seen half-written."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text)
    _flush_one(draft)
    draft.replace(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
