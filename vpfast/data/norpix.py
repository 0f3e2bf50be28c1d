"""Norpix ``.seq``, the container of Caltech Pedestrian, read with distrust.

All little-endian. A header of 1024 bytes: uint32 0xFEED, "Norpix seq" in UTF-16; from offset 548 nine uint32 (width,
height, bits a pixel, bits a sample, bytes of a raw frame, kind of frames, number of frames, 0, bytes of a raw frame
with padding); at 584 frames a second, a float64. Then the frames: a uint32 that counts itself and the JPEG behind it,
the JPEG, and 8 bytes of time, which some writers fill up to 16. (The layout that Piotr's Computer Vision Matlab Toolbox
reads, by which the data set is published.)
"""

import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpfast.data._files import open_regular
from vpfast.data._images import MAX_PIXELS, open_image, reason, to_rgb
from vpfast.data.errors import VideoError

_HEADER_BYTES = 1024
_MAGIC = b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le")
_FIELDS = struct.Struct("<9Id")
_FIELDS_AT = 548
_SIZE = struct.Struct("<I")
_JPEG_KINDS = {102, 201}  # grey and colour
_OTHER_KINDS = {100: "raw grey", 200: "raw colour", 101: "raw Bayer", 103: "Bayer JPEG", 1: "grey PNG", 2: "colour PNG"}
_START, _END = b"\xff\xd8", b"\xff\xd9"
_LEAST_FRAME = _SIZE.size + len(_START) + len(_END)
_TRAILERS = (8, 16)


class SeqHeader(NamedTuple):
    """What a ``.seq`` file says of itself. ``frames`` is None where its recorder did not say, ``fps`` too."""

    width: int
    height: int
    frames: int | None
    fps: float | None


def read_seq_header(path: str | os.PathLike[str]) -> SeqHeader:
    """The header alone, of a file that :func:`iter_seq` can begin to read.

    Raises:
        VideoError: missing, unreadable, empty, no ``.seq``, of frames that are not JPEG, or of sizes that cannot be;
            names the file and the offset.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            return _read_header(file, path)
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from error


def iter_seq(path: str | os.PathLike[str], every: int = 1) -> Iterator[NDArray[np.uint8]]:
    """The frames of a ``.seq`` file one at a time, uint8 RGB (H, W, 3).

    With ``every`` = n the n-th frame, the 2n-th and so on; the others are not decoded, but have to be there. Memory is
    that of one frame, whatever the file says of its sizes. JPEG has no checksum: damage within the pixels of a frame
    may go unnoticed.

    Raises:
        VideoError: as :func:`read_seq_header`, and: cut off, a frame of another size or damaged, sizes of frames that
            are not so, no frame; names the file, the frame (from 0) and the offset.
        ValueError: ``every`` below 1.
        ImportError: without Pillow; says what to install.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    path = Path(path)
    try:
        with open_regular(path) as file:
            header = _read_header(file, path)
            for index, (offset, jpeg) in enumerate(_jpegs(file, header, path)):
                if (index + 1) % every == 0:
                    yield _decoded(jpeg, header, f"{path}: frame {index} (offset {offset})")
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(file: BinaryIO, path: Path) -> SeqHeader:
    head = file.read(_HEADER_BYTES)
    if not head:
        raise VideoError(f"{path}: an empty file (0 bytes)")
    if not head.startswith(_MAGIC[: len(head)]):
        found = "nothing but zeros" if not any(head) else head[:8].hex(" ")
        raise VideoError(
            f"{path}: offset 0 reads {found}; a Norpix .seq file starts with {_MAGIC[:8].hex(' ')} ..., 'Norpix seq'"
        )
    if len(head) < _HEADER_BYTES:
        raise VideoError(f"{path}: ends at offset {len(head)}, inside its header of {_HEADER_BYTES} bytes")
    (header_bytes,) = _SIZE.unpack_from(head, 32)
    if header_bytes != _HEADER_BYTES:
        raise VideoError(f"{path}: its header (offset 32) says that it has {header_bytes} bytes, not {_HEADER_BYTES}")
    width, height, _, _, _, kind, frames, _, _, fps = _FIELDS.unpack_from(head, _FIELDS_AT)
    if kind not in _JPEG_KINDS:
        raise VideoError(
            f"{path}: its frames are of kind {kind} ({_OTHER_KINDS.get(kind, 'unknown')}, offset {_FIELDS_AT + 20}); "
            "JPEG is read (102 grey, 201 colour): convert the file"
        )
    if not 0 < width * height <= MAX_PIXELS:
        raise VideoError(
            f"{path}: frames of {width}x{height} pixels (offset {_FIELDS_AT}); 1 to {MAX_PIXELS} pixels are read"
        )
    size = os.fstat(file.fileno()).st_size
    if frames * _LEAST_FRAME > size - _HEADER_BYTES:
        raise VideoError(
            f"{path}: the header (offset {_FIELDS_AT + 24}) promises {frames} frames, more than fit into its {size} "
            "bytes; was it cut off?"
        )
    return SeqHeader(width, height, frames or None, fps if math.isfinite(fps) and 0 < fps < 1e4 else None)


def _jpegs(file: BinaryIO, header: SeqHeader, path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and JPEG of every frame. The file stands behind its header."""
    size = os.fstat(file.fileno()).st_size
    offset, index, trailer = _HEADER_BYTES, 0, None
    while index < header.frames if header.frames else size - offset >= _SIZE.size:
        jpeg = _read_jpeg(file, offset, size, header, f"{path}: frame {index} (offset {offset})")
        yield offset, jpeg
        index, end = index + 1, offset + _SIZE.size + len(jpeg)
        trailer = _trailer(file, end) if trailer is None else trailer
        if trailer is None and (index < header.frames if header.frames else size - end > max(_TRAILERS)):
            raise VideoError(
                f"{path}: behind frame 0 (it ends at offset {end}) no frame starts after "
                f"{' or '.join(map(str, _TRAILERS))} bytes; was it cut off?"
            )
        offset = end + (trailer or max(_TRAILERS))
        file.seek(offset)
    if index == 0:
        raise VideoError(f"{path}: a header without a single frame; it ends at offset {size}")
    if file.read(_SIZE.size + len(_START))[_SIZE.size :] == _START:
        warnings.warn(
            f"{path}: goes on with frames at offset {offset}, behind the {index} that its header announces; left out",
            stacklevel=3,
        )


def _trailer(file: BinaryIO, end: int) -> int | None:
    """How many bytes lie between the JPEG that ends here and the next frame, None where none is found."""
    for trailer in _TRAILERS:
        file.seek(end + trailer + _SIZE.size)
        if file.read(len(_START)) == _START:
            return trailer
    return None


def _read_jpeg(file: BinaryIO, offset: int, size: int, header: SeqHeader, frame: str) -> bytes:
    word = file.read(_SIZE.size)
    if len(word) < _SIZE.size:
        raise VideoError(
            f"{frame} is missing: the file ends at offset {size} and its header promises {header.frames} frames; "
            "was it cut off?"
        )
    (length,) = _SIZE.unpack(word)
    most = 6 * header.width * header.height + (1 << 16)  # twice the raw frame, and room for headers
    if not _LEAST_FRAME <= length <= most:
        raise VideoError(
            f"{frame} says that it has {length} bytes; one of {header.width}x{header.height} has "
            f"{_LEAST_FRAME} to {most}"
        )
    if offset + length > size:
        raise VideoError(
            f"{frame} says that it has {length} bytes, but the file ends at offset {size}; was it cut off?"
        )
    jpeg = file.read(length - _SIZE.size)
    if not (jpeg.startswith(_START) and jpeg.endswith(_END)):
        raise VideoError(
            f"{frame} is no whole JPEG: its {length - _SIZE.size} bytes start with {jpeg[:2].hex(' ')} and end with "
            f"{jpeg[-2:].hex(' ')}, not with {_START.hex(' ')} and {_END.hex(' ')}"
        )
    return jpeg


def _decoded(jpeg: bytes, header: SeqHeader, frame: str) -> NDArray[np.uint8]:
    try:
        with open_image(io.BytesIO(jpeg), ("JPEG",), (header.width, header.height)) as image:
            return to_rgb(image)
    except ImportError:
        raise
    except Exception as error:  # a damaged JPEG makes Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        raise VideoError(f"{frame} is damaged ({reason(error, '')})") from error
