"""Any folder of videos as a data set of clips; each video is decoded once into a memory-mapped array."""

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vpfast.data._clips import Shape, Windows, array_bytes, as_clip, read_frames, write_frames
from vpfast.data._files import natural_key, replacing
from vpfast.data.errors import VideoError
from vpfast.data.resize import Fit, Size, parse_size
from vpfast.data.video import IMAGE_SUFFIXES, images_in, iter_video

VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"}
    | {".y4m", ".mxf", ".apng"}
)

_FORMAT = 3  # part of every cache key: a change in what is stored must not meet files of before


@dataclass(frozen=True)
class Video:
    """One decoded video: where it came from and the uint8 (frames, C, H, W) array that holds it."""

    path: Path
    array: Path
    shape: Shape

    @property
    def frames(self) -> int:
        return self.shape[0]

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        remedy = "build the data set again, which decodes what its cache lacks"
        return read_frames(self.array, self.shape, start, count, str(self.path), remedy)


class VideoFolder(Dataset[Tensor]):
    """Windows of consecutive frames from every video under a folder: float32 (length, C, H, W) in [0, 1].

    A video is a file with a video's ending (avi, mp4, mov, mkv, webm, gif, ...) or a folder that has images right
    inside it. Both are sorted by path in natural order. At construction each is decoded, resized and kept as a uint8
    ``.npy`` array in the cache, with a JSON file beside it that says what it is; later only the windows asked for are
    read. The key of the cache is the path, the time of change, the size and the options, so an altered video is
    decoded again. Several processes may build the same cache at once. Data sets pickle without their frames.

    A video too short for one window is left out with a warning.

    Args:
        root: a folder of videos, also in folders below it; or one video.
        length: frames a clip.
        size: ``None`` keeps the videos' own size, which must then be one; an int is a square; else (height, width).
        channels: 3 (RGB) or 1 (grey, see :func:`vpfast.data.read_video`).
        step: frames from the start of a window to the start of the next; default ``length``, no overlap.
        include, exclude: patterns on the path relative to ``root``, with ``/`` between its parts. ``*`` matches across
            ``/`` too: ``"*walking*"``, ``"set0[1-5]/*"``. A video needs one of ``include`` and none of ``exclude``.
        cache: folder for the decoded arrays; default ``$VPFAST_CACHE`` or ``~/.cache/vpfast``.
        fit: how frames of other proportions are resized to ``size``: ``"squash"``, or ``"crop"`` to the centre.

    Raises:
        VideoError: no such folder, a video that cannot be read, mixed sizes without ``size``, no video, no window; the
            message names the path and the numbers.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        length: int = 20,
        size: Size = None,
        channels: int = 3,
        step: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        cache: str | os.PathLike[str] | None = None,
        fit: Fit = "squash",
    ) -> None:
        if length < 1 or (step is not None and step < 1):
            raise ValueError(f"length and step must be at least 1, got length={length}, step={step}")
        self.root, self.length, self.step = Path(root), length, step or length
        target = parse_size(size)
        folder = default_cache() if cache is None else Path(cache)
        paths = find_videos(self.root, _patterns(include), _patterns(exclude))
        videos = [_decoded(path, target, channels, fit, folder) for path in paths]
        _check_one_size(videos)
        self.videos = [video for video in videos if video.frames >= length]
        if not self.videos:
            most = max(video.frames for video in videos)
            raise VideoError(
                f"{self.root}: no clip of {length} frames; found {len(videos)} "
                f"{'video' if len(videos) == 1 else 'videos, the longest'} of {most} frames"
            )
        for video in videos:
            if video.frames < length:
                warnings.warn(
                    f"{video.path}: left out, its {video.frames} frames are fewer than {length}", stacklevel=2
                )
        self._windows = Windows([video.frames for video in self.videos], length, [self.step] * len(self.videos))

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        video, start = self.locate(index)
        return as_clip(video.read(start, self.length))

    def locate(self, index: int) -> tuple[Video, int]:
        """The video that a clip comes from, and the clip's first frame in it."""
        which, start = self._windows.locate(index)
        return self.videos[which], start


def default_cache() -> Path:
    """``$VPFAST_CACHE``, else ``vpfast`` in the user's cache folder."""
    chosen = os.environ.get("VPFAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpfast"


def find_videos(root: Path, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Path]:
    """Video files and folders of images at or under ``root``, sorted; hidden ones are left out.

    Args:
        root: a folder, or one video.
        include, exclude: patterns as :mod:`fnmatch` has them on paths below ``root``; a video has to match one of
            ``include`` and none of ``exclude``.

    Raises:
        VideoError: there is none, or ``root`` cannot be read.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except OSError as error:
        raise VideoError(f"{root}: cannot be read ({error.strerror})") from error
    if not is_folder:
        return [root]
    found: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        here = Path(folder)
        files = [here / name for name in names if not name.startswith(".")]
        candidates = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            candidates.append(here)
        found += [(path.relative_to(root).as_posix(), path) for path in candidates]
    chosen = [
        (name, path)
        for name, path in found
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    ]
    if not chosen:
        raise VideoError(
            f"{root}: {len(found)} videos found, none left by include={list(include)} and exclude={list(exclude)}; "
            f"a video is a file that ends in {', '.join(sorted(VIDEO_SUFFIXES))}, or a folder of images"
        )
    return [path for _, path in sorted(chosen, key=lambda item: natural_key(item[0]))]


def _refuse_folder(error: OSError) -> None:
    raise VideoError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check_one_size(videos: Sequence[Video]) -> None:
    first = videos[0]
    for video in videos:
        if video.shape[2:] != first.shape[2:]:
            raise VideoError(
                f"{video.path}: {video.shape[2]}x{video.shape[3]} (height x width), but {first.path} is "
                f"{first.shape[2]}x{first.shape[3]}; give a size to bring all videos to"
            )


def _decoded(path: Path, size: tuple[int, int] | None, channels: int, fit: Fit, folder: Path) -> Video:
    """The video's array in the cache, made if it is not there."""
    source = {"path": str(path.resolve()), "stamp": stamp(path)}
    options = {"size": size, "channels": channels, "fit": fit, "format": _FORMAT}
    key = hashlib.sha256(json.dumps([source, options]).encode()).hexdigest()[:20]
    array, index = folder / f"{path.stem[:60]}-{key}.npy", folder / f"{path.stem[:60]}-{key}.json"
    known = _known_shape(array, index)
    if known is not None:
        return Video(path, array, known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shape = _store(path, size, channels, fit, array)
        with replacing(index) as file:
            file.write(json.dumps({**source, **options, "shape": shape}, indent=2).encode() + b"\n")
    except OSError as error:
        raise VideoError(f"{folder}: cannot keep the frames of {path} there ({error}); choose another cache") from error
    return Video(path, array, shape)


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, time of change and size of every file that makes up the video."""
    try:
        files = images_in(path) if os.path.isdir(path) else [path]
        facts = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error
    return [(name, fact.st_mtime_ns, fact.st_size) for name, fact in facts]


def _known_shape(array: Path, index: Path) -> Shape | None:
    """The shape that the index gives, provided that the array is as long as that needs."""
    try:
        frames, channels, height, width = json.loads(index.read_text())["shape"]
        complete = array.stat().st_size == array_bytes((frames, channels, height, width))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (frames, channels, height, width) if complete else None


def _store(path: Path, size: tuple[int, int] | None, channels: int, fit: Fit, array: Path) -> Shape:
    with replacing(array) as file:
        return write_frames(file, iter_video(path, size, channels, fit))
