"""Reading one video: a file that FFmpeg decodes (through PyAV), or a folder of images."""

import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpfast.data._files import natural_key, open_regular
from vpfast.data._images import MAX_PIXELS, read_image, reason
from vpfast.data.errors import VideoError
from vpfast.data.resize import Fit, Size, parse_size, resize_frames, to_grey

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})

# Containers that hold video and nothing else. Left to itself FFmpeg also "plays" text files as terminal art, and
# follows playlists to other files and to the network.
_CONTAINERS = (
    "avi,mov,mp4,m4v,matroska,webm,gif,apng,mpeg,mpegts,mpegvideo,h264,hevc,ivf,obu,ogg,flv,asf,mjpeg,dv,mxf,nut,"
    "yuv4mpegpipe,rawvideo"
)

_FASTEST = 1000  # frames a second; where files say more, it is the clock of their time stamps

# They hold no duration: FFmpeg guesses it from time stamps, which may jump, or from the bit rate.
_DURATION_GUESSED = frozenset({"mpeg", "mpegts", "mpegvideo", "h264", "hevc", "mjpeg", "obu", "dv"})


def read_video(
    path: str | os.PathLike[str],
    size: Size = None,
    channels: int = 3,
    start: int = 0,
    count: int | None = None,
    fit: Fit = "squash",
    at_least: int | None = None,
) -> Tensor:
    """Read a video file or a folder of images: uint8 (T, C, H, W), RGB or grey.

    Frames are returned as they are stored; a variable frame rate is not corrected. A rotation in the file's metadata,
    as phones write it, is applied if it is a multiple of 90 degrees. Images of a folder are in natural order,
    ``frame2`` before ``frame10``.

    Args:
        path: video file (avi, mp4, mov, mkv, webm, gif, ...) or folder with png, jpg, bmp, ... images.
        size: ``None`` keeps the video's own size; an int is the side of a square; else (height, width).
        channels: 3 for RGB as FFmpeg's ``rgb24``; 1 for grey, its luma (BT.601) or, in a grey video, its channel 0.
        start, count: the first frame, from 0, and how many; ``None`` takes all that follow.
        fit: how frames of other proportions are resized to ``size``: ``"squash"``, or ``"crop"`` to the centre.
        at_least: the least number of frames, fewer are an error; by default ``count``, or 1 without one.

    Raises:
        VideoError: missing, unreadable, empty, damaged, cut off, no video in it, fewer frames than asked; names the
            file.
        ValueError: arguments out of their range.
        ImportError: without PyAV (or Pillow, for images); says what to install.
    """
    if start < 0 or any(number is not None and number < 1 for number in (count, at_least)):
        raise ValueError(
            "start must be at least 0, count and at_least at least 1 or None, "
            f"got start={start}, count={count}, at_least={at_least}"
        )
    needed = at_least or count or 1
    stop = None if count is None else start + count
    seen, frames = 0, []
    for seen, frame in enumerate(islice(iter_video(path, size, channels, fit), stop), start=1):
        if seen > start:
            frames.append(frame)
    if len(frames) < needed:
        raise VideoError(f"{path}: has {seen} frames; {needed} from frame {start} on were asked (frames count from 0)")
    return torch.stack(frames)


def iter_video(
    path: str | os.PathLike[str], size: Size = None, channels: int = 3, fit: Fit = "squash"
) -> Iterator[Tensor]:
    """The frames of :func:`read_video` one at a time, uint8 (C, H, W): memory does not grow with the video."""
    target = parse_size(size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels}")
    path = Path(path)
    source = _images_of_folder(path) if os.path.isdir(path) else _frames_of_file(path)
    for rgb in _of_one_size(source):
        frame = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0)
        frame = to_grey(frame) if channels == 1 else frame
        frame = frame if target is None else resize_frames(frame, target, fit)
        yield frame.squeeze(0).contiguous()


def frame_rate(path: str | os.PathLike[str]) -> float | None:
    """How many frames a second a video file is shown at; None where it does not say, and of a folder of images.

    Raises:
        VideoError: not a video that can be read; names the file.
        ImportError: without PyAV.
    """
    path = Path(path)
    if path.is_dir():
        return None
    av = _import_av()
    _check_file(path)
    try:
        with _open(path) as container:
            rate = _video_stream(container, path).guessed_rate  # the average counts no time for the last frame
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a video that can be decoded ({reason(error, path)})") from error
    return float(rate) if rate and rate <= _FASTEST else None


def iter_images(files: Iterable[Path]) -> Iterator[NDArray[np.uint8]]:
    """Image files as the frames of one video, uint8 RGB (H, W, 3). VideoError names one that cannot be read or differs
    in size from the first."""
    return _of_one_size((file, read_image(file)) for file in files)


def images_in(folder: Path) -> list[Path]:
    """Image files right inside a folder, in natural order; hidden files are left out."""
    names = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
    return [folder / name for name in sorted(names, key=natural_key) if not name.startswith(".")]


def _images_of_folder(folder: Path) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    try:
        files = images_in(folder)
    except OSError as error:
        raise VideoError(f"{folder}: cannot be read ({error.strerror})") from error
    if not files:
        raise VideoError(f"{folder}: a folder without images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for file in files:
        yield file, read_image(file)


def _of_one_size(frames: Iterable[tuple[Path, NDArray[np.uint8]]]) -> Iterator[NDArray[np.uint8]]:
    first: tuple[int, ...] | None = None
    for index, (name, rgb) in enumerate(frames):
        first = first or rgb.shape
        if rgb.shape != first:
            raise VideoError(
                f"{name}: frame {index} is {rgb.shape[0]}x{rgb.shape[1]} (height x width), the frames before it are "
                f"{first[0]}x{first[1]}; one video needs one size"
            )
        yield rgb


def _frames_of_file(path: Path) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    av = _import_av()
    _check_file(path)
    decoded = 0
    ended = None  # the last frame's end, in the stream's time base
    announced: _Announced | None = None
    try:
        with _open(path) as container:
            stream = _video_stream(container, path)
            if container.format.name == "gif":
                _check_gif(path)
            # else much damage is painted over in silence, and a header's word is enough for a frame of any size
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise VideoError(f"{path}: frame {decoded} is damaged; copy or encode the file again")
                decoded += 1
                yield path, _upright(frame)
                if frame.pts is not None:
                    ended = float((frame.pts + (frame.duration or 0) - (stream.start_time or 0)) * stream.time_base)
            announced = _announced(container, stream)
            if "mp4" in container.format.name.split(","):
                _check_index(path, stream, decoded)
    except (av.FFmpegError, OSError) as error:
        where = f" after {decoded} frames" if decoded else ""
        why = reason(error, path)
        if isinstance(error, av.error.ArgumentError):  # what FFmpeg calls a frame above the limit
            why += f"; frames of up to {MAX_PIXELS} pixels are read"
        raise VideoError(f"{path}: not a video that can be decoded{where}, or a damaged one ({why})") from error
    if decoded == 0:
        raise VideoError(f"{path}: holds a video stream without a single frame")
    if announced is not None and ended is not None:
        _check_complete(path, announced, decoded, ended)


def _open(path: Path) -> Any:
    """The file as a container of FFmpeg's."""
    return _import_av().open(
        f"file:{path}",
        options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)},
        metadata_errors="replace",
    )


class _Announced(NamedTuple):
    """What a file says of its own length, and the shares of it that are suspect and too little."""

    seconds: float
    warn_below: float
    refuse_below: float


def _announced(container: Any, stream: Any) -> _Announced | None:
    kinds = set(container.format.name.split(","))
    if "avi" in kinds and stream.frames:  # the header's count; the duration would follow from what is there
        return _Announced(float(stream.frames * stream.time_base), 0.995, 0.98)
    if stream.duration:
        return _Announced(float(stream.duration * stream.time_base), 0.95, 0 if kinds & _DURATION_GUESSED else 0.9)
    if kinds & {"matroska", "webm"} and container.duration and len(container.streams) == 1:
        return _Announced(container.duration / 1e6, 0.995, 0.98)  # the longest stream's: here the only one's
    return None


def _check_complete(path: Path, announced: _Announced, decoded: int, ended: float) -> None:
    expected = announced.seconds * (decoded - 1) / decoded  # the last frame's duration may be unknown
    share = ended / announced.seconds
    message = f"{path}: ends after {decoded} frames, {share:.1%} of the time announced; was it cut off?"
    if ended < announced.refuse_below * expected:
        raise VideoError(message)
    if ended < announced.warn_below * expected:
        warnings.warn(message, stacklevel=5)  # past the generators, to who called read_video


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video needs PyAV: pip install 'vpfast[cli]'") from error
    module: ModuleType = av
    return module


def _check_file(path: Path) -> None:
    """Tell apart what FFmpeg would lump together: missing, not a file, empty, not permitted."""
    try:
        with open_regular(path) as file:
            if not file.read(1):
                raise VideoError(f"{path}: an empty file (0 bytes)")
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error


def _check_index(path: Path, stream: Any, decoded: int) -> None:
    """Does every frame that the index tells of lie within the file? FFmpeg plays one that was cut off in silence."""
    end, size = max((entry.pos + entry.size for entry in stream.index_entries), default=0), path.stat().st_size
    if end > size:
        raise VideoError(
            f"{path}: ends after {decoded} frames, it was cut off: its index tells of {end} bytes and it has {size}; "
            "copy the file again"
        )


def _check_gif(path: Path) -> None:
    """Walk over the blocks to the trailer: FFmpeg plays a GIF that was cut off as one with fewer frames."""
    with open(path, "rb") as file:

        def take(count: int) -> bytes:
            data = file.read(count)
            if len(data) < count:
                raise VideoError(
                    f"{path}: a GIF that is cut off, it ends at offset {file.tell()} without a trailer; "
                    "copy or make the file again"
                )
            return data

        def skip_colours(flags: int) -> None:
            if flags & 0x80:
                take(3 << (flags & 7) + 1)

        skip_colours(take(13)[10])
        while (kind := take(1)[0]) != 0x3B:
            if kind == 0x2C:  # an image
                skip_colours(take(9)[8])
            elif kind != 0x21:  # an extension
                raise VideoError(
                    f"{path}: a damaged GIF, no block can start with 0x{kind:02X} (offset {file.tell() - 1})"
                )
            take(1)  # the extension's label, or the size of the image's codes
            while size := take(1)[0]:
                take(size)


def _video_stream(container: Any, path: Path) -> Any:
    # The cover picture of a song is a video stream to FFmpeg.
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.__class__.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams})
        raise VideoError(f"{path}: holds no video stream (only {', '.join(kinds) or 'nothing that can be decoded'})")
    if streams[0].codec_context is None:
        raise VideoError(f"{path}: its video is of a kind that FFmpeg cannot decode, or the file is damaged")
    return streams[0]


def _upright(frame: Any) -> NDArray[np.uint8]:
    """uint8 (H, W, 3), turned as the file's display matrix asks; ``rotation`` counts degrees counter-clockwise."""
    rgb: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    quarter_turns = frame.rotation / 90
    if quarter_turns % 4 and quarter_turns.is_integer():
        rgb = np.ascontiguousarray(np.rot90(rgb, int(quarter_turns)))
    return rgb
