"""Frames to GIF and MP4."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpfast.visual._frames import Pixels, temporary_for, to_pixels

_GIF_CLOCK = 100  # GIF counts hundredths of a second; viewers take less than two of them for ten
_CHUNK = 1 << 14
_FRAMES_AT_ONCE = 32
_EXACT = 64  # palette entries for the commonest colours: median cut averages even the paper's white away
_BT709 = 1


def write_gif(path: str | os.PathLike[str], frames: Tensor, fps: float = 10) -> None:
    """Write an endlessly looping GIF.

    One palette for the whole clip, so that still parts do not flicker: the very colours where there are at most 256
    (any grey clip), else the commonest and a median cut of the rest.

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey.
        fps: frames a second, in (0, 50]; GIF rounds each frame's time to hundredths of a second.

    Raises:
        TypeError, ValueError: frames or ``fps`` that cannot be written.
        ImportError: without PyAV and Pillow; says what to install.
    """
    _check_fps(fps, most=50)
    av = _import_av()
    palette, colours, entries = _palette(frames)
    options = {"loop": "0", "final_delay": str(round(_GIF_CLOCK / fps))}
    with temporary_for(path) as temporary, av.open(str(temporary), "w", format="gif", options=options) as container:
        stream = container.add_stream("gif", rate=_GIF_CLOCK)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "pal8"
        stream.codec_context.time_base = Fraction(1, _GIF_CLOCK)
        for number, image in enumerate(image for pixels in _chunks(frames) for image in pixels):
            indices = entries[np.searchsorted(colours, _pack(image[None])[0])]
            frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
            frame.time_base = Fraction(1, _GIF_CLOCK)
            frame.pts = round(number * _GIF_CLOCK / fps)
            frame.duration = round((number + 1) * _GIF_CLOCK / fps) - frame.pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_mp4(path: str | os.PathLike[str], frames: Tensor, fps: float = 10) -> None:
    """Write an MP4 that plays everywhere: H.264 (yuv420p, BT.709), or MPEG-4 where FFmpeg was built without libx264.

    Odd sizes are made even, which the pixel format asks for, by repeating the last row or column.

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey.
        fps: frames a second, above 0.

    Raises:
        TypeError, ValueError: frames or ``fps`` that cannot be written.
        ImportError: without PyAV; says what to install.
    """
    with growing_mp4(path, fps) as write:
        for part in _parts(frames):
            write(part)


@contextmanager
def growing_mp4(path: str | os.PathLike[str], fps: float = 10) -> Iterator[Callable[[Tensor], None]]:
    """The file of :func:`write_mp4` from frames as they come, which are not kept: yields what appends some to it.

    That takes (T, C, H, W), all of one size. The file is at ``path`` when the block ends well, whole; there is none,
    or still the old one, when it fails, or no frame came.

    Raises:
        TypeError, ValueError, ImportError: as :func:`write_mp4`.
        ValueError: frames of another size than those before.
    """
    _check_fps(fps, most=1000)
    av = _import_av()
    with (
        temporary_for(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        film = _Mp4(container, Fraction(fps).limit_denominator(1001))
        yield film.write
        film.end()


class _Mp4:
    """The one stream of an MP4 that is being written. Its size is that of the first frame."""

    def __init__(self, container: Any, rate: Fraction) -> None:
        self._container, self._rate = container, rate
        self._stream: Any = None
        self._size: tuple[int, ...] = ()

    def write(self, frames: Tensor) -> None:
        pixels = to_pixels(frames)
        size = pixels.shape[1:3]
        if self._stream is None:
            self._stream, self._size = self._begin(size), size
        if size != self._size:
            raise ValueError(
                f"frames are {size[0]}x{size[1]} (height x width), those before {self._size[0]}x{self._size[1]}"
            )
        odd = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
        for image in pixels:
            frame = _import_av().VideoFrame.from_ndarray(np.pad(image, odd, mode="edge"), format="rgb24")
            self._container.mux(self._stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))

    def end(self) -> None:
        if self._stream is None:
            raise ValueError("there must be at least one frame in a film, got none")
        self._container.mux(self._stream.encode(None))

    def _begin(self, size: tuple[int, ...]) -> Any:
        h264 = "libx264" in _import_av().codecs_available
        options = {"crf": "18", "preset": "medium"} if h264 else {"qscale": "2"}
        stream = self._container.add_stream("libx264" if h264 else "mpeg4", rate=self._rate, options=options)
        stream.height, stream.width = size[0] + size[0] % 2, size[1] + size[1] % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = _BT709
        return stream


def _parts(frames: Tensor) -> Iterator[Tensor]:
    """A few frames at a time: what is kept on disk and mapped into memory is never all there."""
    for start in range(0, max(len(frames), 1), _FRAMES_AT_ONCE):  # no frame at all is refused like any other shape
        yield frames[start : start + _FRAMES_AT_ONCE]


def _chunks(frames: Tensor) -> Iterator[Pixels]:
    """:func:`_parts` as pixels."""
    return map(to_pixels, _parts(frames))


def _palette(frames: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.uint8]]:
    """The (256, 4) palette, alpha first; all colours of the clip, packed and sorted; and the entry that each takes."""
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255
    colours, counts = _count_colours(frames)
    if len(colours) <= 256:
        palette[: len(colours), 1:] = _unpack(colours)
        return palette, colours, np.arange(len(colours), dtype=np.uint8)

    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("writing a GIF in colour needs Pillow: pip install 'vpfast[cli]'") from error
    sample = to_pixels(frames[np.linspace(0, len(frames) - 1, min(16, len(frames))).astype(int)])
    cut = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(256 - _EXACT, Image.Quantize.MEDIANCUT)
    chosen = np.frombuffer(bytes(cut.getpalette() or ()), np.uint8).reshape(-1, 3)[: 256 - _EXACT]
    commonest = _unpack(colours[np.argsort(-counts, kind="stable")[:_EXACT]])
    chosen = np.concatenate([commonest, chosen])
    palette[: len(chosen), 1:] = chosen
    # Each colour takes the nearest entry, undithered: enlarged pixels would show the grain, moving frames its flicker.
    entries = torch.from_numpy(chosen).float()
    wanted = torch.from_numpy(_unpack(colours)).float()
    parts = [torch.cdist(wanted[i : i + _CHUNK], entries).argmin(dim=1) for i in range(0, len(wanted), _CHUNK)]
    return palette, colours, torch.cat(parts).numpy().astype(np.uint8)


def _count_colours(frames: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The colours of a clip, packed and sorted, and how many pixels have each."""
    colours, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for pixels in _chunks(frames):
        found, times = np.unique(_pack(pixels), return_counts=True)
        colours, places = np.unique(np.concatenate([colours, found]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, times]), len(colours)).astype(np.int64)
    return colours, counts


def _pack(pixels: Pixels) -> NDArray[np.uint32]:
    packed: NDArray[np.uint32] = (pixels.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(3, dtype=np.uint32)
    return packed


def _unpack(colours: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return (colours[:, None] >> np.array([16, 8, 0], np.uint32) & 255).astype(np.uint8)


def _check_fps(fps: float, most: float) -> None:
    if not (math.isfinite(fps) and 0 < fps <= most):
        raise ValueError(f"fps must be above 0 and at most {most:g}, got {fps}")


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("writing GIF and MP4 needs PyAV: pip install 'vpfast[cli]'") from error
    module: ModuleType = av
    return module
