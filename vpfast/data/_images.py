"""Pictures into RGB arrays by Pillow, which is told what it may open and for how much."""

import os
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vpfast.data._files import open_regular
from vpfast.data.errors import VideoError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26
"""A frame above this is refused before its pixels are allocated: 8192x8192, twice an 8K film."""

# Left to itself Pillow also opens what runs a program (EPS) or is a film.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")

_MAX_SCANS = 100  # a progressive JPEG goes over the whole picture for each; encoders make ten or so
_CHUNK = 1 << 20


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """A picture file as uint8 RGB (H, W, 3), upright as its EXIF says; of 16 bits the high 8.

    Raises:
        VideoError: missing, empty, damaged, cut off, no picture of a kind that is read, or too large; names the file.
        ImportError: without Pillow; says what to install.
    """
    _require_pillow()
    from PIL import ImageOps

    try:
        with open_regular(path) as data:
            if not data.read(1):
                raise ValueError("an empty file, 0 bytes")
            data.seek(0)
            with open_image(data) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged image makes Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        raise VideoError(f"{path}: not an image that can be read ({reason(error, path)})") from error


def open_image(
    data: BinaryIO, formats: tuple[str, ...] = _FORMATS, size: tuple[int, int] | None = None
) -> "Image.Image":
    """A picture whose header alone has been read and found harmless; ``size`` is the (width, height) that it must have.

    Raises:
        ValueError: larger than it should be, or made to take for ever; and whatever Pillow raises on damaged data.
        ImportError: without Pillow; says what to install.
    """
    _require_pillow()
    from PIL import Image

    image = Image.open(data, formats=formats)
    width, height = image.size
    if size is not None and image.size != size:
        raise ValueError(f"it is {width}x{height} pixels, not {size[0]}x{size[1]}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
    if image.format == "JPEG" and (scans := _scans(data)) > _MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than the limit of {_MAX_SCANS}")
    return image


def to_rgb(image: "Image.Image") -> NDArray[np.uint8]:
    """Decode: uint8 (H, W, 3); of 16 bits the high 8."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def reason(error: Exception, path: str | os.PathLike[str]) -> str:
    """What went wrong, without the number and the path that the error text repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).replace(os.fspath(path), os.path.basename(path)).strip()


def _scans(data: BinaryIO) -> int:
    """How often the marker that opens a scan occurs; in coded pixels it cannot."""
    here = data.tell()
    data.seek(0)
    count, last = 0, b""
    while chunk := data.read(_CHUNK):
        count += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:]
    data.seek(here)
    return count


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'vpfast[cli]'") from error
