"""Small helpers around files: an order people expect, and files that are either whole or not there."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vpfast._files import new_file
from vpfast.data.errors import DataError


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which ``frame2`` comes before ``frame10``; the name itself settles ``01`` against ``1``."""
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in pieces], name


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder from ``root`` down with the names of its folders and files, both sorted, hidden ones left out.

    Raises:
        DataError: a folder that cannot be read; names it.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), subfolders, sorted(name for name in names if not name.startswith("."))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a draft of ``path`` for writing, which takes its place in one step when the block ends well."""
    with new_file(path, replace=True) as draft, draft.open("xb") as file:
        yield file


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read, and nothing but a file: opening a pipe would wait for its writer for ever.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file
