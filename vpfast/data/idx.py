"""The idx format of MNIST, plain or gzipped, read with distrust.

Layout: two zero bytes, one byte of type (0x08: unsigned byte), one byte of dimensions n, then n big-endian uint32
sizes, then the values. A header is believed only as far as the bytes behind it go.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from vpfast.data._files import open_regular
from vpfast.data.errors import DataError

MAX_BYTES = 1 << 30
"""Unpacked values above this are refused: the largest digit sets hold half of it."""

_UNSIGNED_BYTE = 0x08
_MAX_GZIP_RATIO = 1032  # deflate cannot pack tighter, so a small file cannot hold what a boastful header says
_CHUNK = 1 << 20


def read_idx(path: str | os.PathLike[str], ndim: int = 3) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes with ``ndim`` dimensions: uint8, of the shape that its header says.

    gzip is known by its first bytes, whatever the name. Memory never exceeds what the file really holds.

    Raises:
        DataError: missing, unreadable, truncated or damaged, of another format, type or rank, with values too many or
            too few; the message names the file and the offset (in the unpacked stream, where it is gzipped).
    """
    path = Path(path)
    try:
        with open_regular(path) as raw:
            packed_bytes = os.fstat(raw.fileno()).st_size
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if is_gzip:
                with gzip.GzipFile(fileobj=raw) as stream:
                    return _read(stream, path, ndim, most=packed_bytes * _MAX_GZIP_RATIO)
            return _read(raw, path, ndim, most=packed_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged gzip data ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, ndim: int, most: int) -> NDArray[np.uint8]:
    shape = _read_header(stream, path, ndim)
    start, wanted = 4 + 4 * ndim, math.prod(shape)
    if wanted > min(MAX_BYTES, most - start):
        raise DataError(
            f"{path}: the header (offset 4) promises {' x '.join(map(str, shape))} = {wanted} values, more than the "
            f"{'limit of ' + str(MAX_BYTES) if most - start > MAX_BYTES else 'file can hold'}"
        )
    values = bytearray()
    while len(values) < wanted:
        chunk = stream.read(min(_CHUNK, wanted - len(values)))
        if not chunk:
            raise DataError(
                f"{path}: ends at offset {start + len(values)}; its header promises {wanted} values, "
                f"{len(values)} are there"
            )
        values += chunk
    if stream.read(1):  # reading past the last value also makes gzip verify its checksum
        raise DataError(f"{path}: more data at offset {start + wanted}, where its header says that it ends")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_header(stream: IO[bytes] | gzip.GzipFile, path: Path, ndim: int) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) < 4:
        raise DataError(f"{path}: {len(magic)} bytes long, an idx file has at least 4")
    if magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or magic[3] != ndim:
        raise DataError(
            f"{path}: offset 0 reads {magic.hex(' ')}, an idx file of unsigned bytes with {ndim} dimensions starts "
            f"with 00 00 08 {ndim:02x}"
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"{path}: ends at offset {4 + len(sizes)}, inside its header of {4 + 4 * ndim} bytes")
    shape: tuple[int, ...] = struct.unpack(f">{ndim}I", sizes)
    if 0 in shape:
        raise DataError(f"{path}: dimension {shape.index(0)} (offset {4 + 4 * shape.index(0)}) is 0; nothing to read")
    return shape
