"""Clips as single pictures with all frames in a grid: what a page plays without a codec, frame by frame, in step."""

import base64
import io
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_EXACT_BYTES = 48 * 1024  # up to so many a sheet keeps every pixel as it is
_QUALITY, _OPACITY = 88, 60  # of WebP, beyond that

RED, BLUE = (239, 68, 68), (59, 130, 246)


class Sheet(NamedTuple):
    """The frames of a clip from left to right and from top to bottom, as the address of a picture that holds itself."""

    address: str
    frames: int
    columns: int
    rows: int


def sheet(images: NDArray[np.uint8]) -> Sheet:
    """Put frames, uint8 (T, H, W, 3 or 4), the fourth channel opacity, onto one sheet.

    Small sheets keep every pixel; larger ones are WebP with losses that are hardly seen.

    Raises:
        ImportError: without Pillow; says what to install.
    """
    count, height, width, channels = images.shape
    columns = min(count, max(1, round(math.sqrt(count * height / width))))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    whole = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    kind, data = _encoded(np.ascontiguousarray(whole).reshape(rows * height, columns * width, channels))
    return Sheet(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", count, columns, rows)


def signed(errors: NDArray[np.float32], limit: float) -> NDArray[np.uint8]:
    """Errors (T, H, W) in [-1, 1] as colours, (T, H, W, 4): red above 0, blue below, the stronger the less transparent.

    Full strength is at ``limit``; what is right is not seen, on a light page as on a dark one.
    """
    strength = (np.abs(errors) / limit).clip(0, 1) * 255
    colours = np.where((errors > 0)[..., None], np.array(RED, np.uint8), np.array(BLUE, np.uint8))
    return np.concatenate([colours, strength.round().astype(np.uint8)[..., None]], axis=3)


def _encoded(image: NDArray[np.uint8]) -> tuple[str, bytes]:
    try:
        from PIL import Image, features
    except ImportError as error:
        raise ImportError("a page with clips needs Pillow: pip install 'vpfast[cli]'") from error
    picture = Image.fromarray(image)
    if not features.check("webp"):
        return "png", _saved(picture, "PNG", optimize=True)
    exact = _saved(picture, "WEBP", lossless=True, method=4)
    return "webp", exact if len(exact) <= _EXACT_BYTES else _saved(
        picture, "WEBP", quality=_QUALITY, alpha_quality=_OPACITY, method=4
    )


def _saved(picture: Any, kind: str, **options: Any) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()
