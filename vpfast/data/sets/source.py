"""What a data set offers in order to be prepared: its recordings, each with a function that yields its frames."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpfast.data._clips import Anchor
from vpfast.data.moving_digits import Split
from vpfast.data.resize import Fit

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A dataclass field with a help text: a source's field is an option of ``vpfast data prepare``."""
    made: T = field(default=default, metadata={"help": text})
    return made


@dataclass(frozen=True)
class Recording:
    """One film: consecutive frames from one source, all of one split. No clip crosses from one into another.

    Args:
        name: unique in its set, ``/`` between its parts, such as ``walking/person07_walking_d2``; sorts the set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        source: the file or folder that the frames come from; a change in it has the recording prepared again.
        read: yields the frames in order, uint8 RGB (H, W, 3) of one size, a few in memory at a time. Raises
            :class:`~vpfast.data.DataError` that names file and place. It must pickle: ``functools.partial`` of a
            function at the top of a module.
        fps: frames a second, where the source says.
        step: frames from one window to the next, where the set's rules ask for one.
        anchor: which frame its windows are counted from: the first, or backwards from the last.
        tags: facts about the recording, kept in the index: person, action, camera.
    """

    name: str
    split: Split
    source: Path
    read: Callable[[], Iterator[NDArray[np.uint8]]]
    fps: float | None = None
    step: int | None = None
    anchor: Anchor = "start"
    tags: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """A data set in its own files. Implementations are frozen dataclasses; each field, made by :func:`option`, is an
    option of ``vpfast data prepare NAME``, and those besides the four below are kept in the index.

    ``name`` is what the command line calls it. ``size`` is (H, W) of the prepared frames and ``fit`` how others are
    brought to it, by :func:`vpfast.data.resize_frames`. ``channels`` is 3 for RGB, or 1 for grey as
    :func:`vpfast.data.to_grey` makes it.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def fit(self) -> Fit: ...

    @property
    def channels(self) -> Literal[1, 3]: ...

    def recordings(self, src: Path) -> list[Recording]:
        """Every recording under ``src``, sorted by name in natural order.

        Raises:
            DataError: not this set, or a part of it is missing or damaged; names the path and what was expected.
        """
        ...


def tagged(**tags: Any) -> dict[str, str]:
    """Facts as texts, without those that are None."""
    return {key: str(value) for key, value in tags.items() if value is not None}
