"""Small helpers around files: an order people expect, and files that are either whole or not there."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which ``frame2`` comes before ``frame10``; the name itself settles ``01`` against ``1``."""
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in pieces], name


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling for writing; it takes the place of ``path`` in one step when the block ends well.

    Two processes may do so at once: each writes a file of its own and the last rename wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
