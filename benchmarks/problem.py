"""What a benchmark is made of: its cases, who is timed on each of them, and what has to be right before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]
Check = Callable[[str, tuple[Tensor, ...]], None]
Row = dict[str, Any]
Memory = Literal["recycled", "fresh"]

OWN = "vpfast"
"""The contender whose time is the others' measure. Names that begin so are other ways through vpfast."""


class WrongResultError(Exception):
    """A contender's result is wrong: of this benchmark there are no figures."""


@dataclass(frozen=True)
class Place:
    """Where it runs. ``gpu``: timed and laid out as on a GPU, which a rehearsal on a CPU is too; ``small``: sizes that
    only show that it runs."""

    device: str = "cpu"
    gpu: bool = False
    small: bool = False


@dataclass
class Bar:
    """What was asked for beforehand; ``value`` is None where it could not be measured."""

    what: str
    value: float | None
    wanted: float
    unit: str = "x"
    at_most: bool = False

    def __str__(self) -> str:
        asked = f"wanted at {'most' if self.at_most else 'least'} {self.wanted:g}{self.unit}"
        if self.value is None:
            return f"bar: {self.what}: {asked}: not measured, not met"
        met = self.value <= self.wanted if self.at_most else self.value >= self.wanted
        return f"bar: {self.what}: {self.value:.2f}{self.unit}, {asked}: {'met' if met else 'not met'}"


@dataclass
class Problem:
    """One thing to do, and who does it.

    Attributes:
        contenders: name -> the call, which returns a tuple of tensors. The first one is ``"vpfast"``.
        check: looks at what a contender returned, raises :class:`WrongResultError`.
        moved: bytes that any implementation must read and write; a copy of as many is timed beside them.
        flops: floating-point operations needed; a matrix product is timed beside them.
        dtype: what is computed in, and the matrix product.
        dtypes: likewise of single contenders.
        absent: contenders that cannot be timed here, and why.
        helpers: calls that are timed for what follows from them, and get no rates and no ratio.
        figures: further figures of contenders, by name; a check may add some.
        finish: looks at the rows once all is timed: may add figures and rows, and returns bars.
    """

    contenders: dict[str, Call]
    check: Check
    moved: int | None = None
    flops: int | None = None
    dtype: torch.dtype = torch.float32
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    helpers: frozenset[str] = frozenset()
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    finish: Callable[[list[Row]], Sequence[Bar]] = lambda rows: ()


@dataclass(frozen=True)
class Case:
    """A problem by its title. ``memory``: where large results come from, see :func:`harness.allocator`."""

    title: str
    prepare: Callable[[Place], Problem]
    memory: Memory = "recycled"


@dataclass(frozen=True)
class OwnCase:
    """A case that is not calls taking turns: it makes its rows itself."""

    title: str
    measure: Callable[[Place, float], tuple[list[Row], list[Bar]]]


@dataclass(frozen=True)
class Growth:
    """How time and memory grow with one size.

    Attributes:
        title: what is done.
        over: what grows, such as ``"positions L"``.
        cases: size -> the case of that size.
        expected: the slopes on log-log axes that theory has at most, of ``"time"`` and ``"memory"``.
    """

    title: str
    over: str
    cases: Mapping[int, Case]
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"growth over {self.over}: {self.title}"


@dataclass(frozen=True)
class Benchmark:
    """All that is measured of one operator or model.

    Attributes:
        name: as an operator is called everywhere.
        about: one line.
        note: what a reader of the table has to know.
        cases, growth: what is measured in a place.
        places: kinds of device that it can run on.
    """

    name: str
    about: str
    note: str
    cases: Callable[[Place], Sequence[Case | OwnCase]]
    growth: Callable[[Place], Sequence[Growth]] = lambda place: ()
    places: tuple[str, ...] = ("cpu", "cuda")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def hold(name: str, what: str, error: float, limit: float) -> None:
    """Raise :class:`WrongResultError` where ``error`` is not below ``limit``, or not a number."""
    if not error < limit:
        raise WrongResultError(f"{name} is wrong ({what} {error:.1e}, limit {limit:.0e})")


def median(rows: Sequence[Row], contender: str) -> float | None:
    """Milliseconds of a contender, None where it was not timed."""
    return next((row["p50_ms"] for row in rows if row["contender"] == contender and "p50_ms" in row), None)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
