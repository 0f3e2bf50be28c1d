"""What a table of a paper is made of: which numbers it holds, of which clips, and what it prints."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Quantity:
    """A number that a report has, and how a table prints it.

    Attributes:
        metric: its name in :class:`vpfast.metrics.Report`, or ``parameters``, of the model.
        heading: over its column.
        digits: after the point.
        scale: what the table prints is so many times the number.
    """

    metric: str
    heading: str
    digits: int
    scale: float = 1.0


@dataclass(frozen=True)
class Part:
    """A data set of a table, and how far it is predicted: what one evaluation fills in.

    Attributes:
        key: names it on the command line.
        dataset, clips: whose clips, and which of them, with the size of the frames, in words.
        context, horizon: real frames, predicted frames.
    """

    key: str
    dataset: str
    clips: str
    context: int
    horizon: int


@dataclass(frozen=True)
class Cell:
    """A mean over the predicted frames ``first`` .. ``last`` of a part, counted from 1; over all unless told."""

    part: str
    quantity: Quantity
    first: int = 1
    last: int | None = None


@dataclass(frozen=True)
class Line:
    """One of the lines that a method has: what is written before its numbers, beside the method's name."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Row:
    """A printed line: method and further labels; its numbers, as printed; by which protocol, where that is known."""

    labels: tuple[str, ...]
    values: tuple[str, ...]
    protocol: str | None


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name: on the command line.
        caption, source: what it says it is, in our words, and where it is printed.
        protocol: by which its own rows were measured, or which comes nearest where that is not known.
        parts: in the order of printing. Those of one data set are measured together.
        labels, columns: headings, without those that ``Line.labels`` fill where there are none.
        lines: of each method.
        rows: as printed.
        slips: what is wrong in print, by method and column; ``notes`` say why.
        notes: what a reader must know to compare.
    """

    name: str
    caption: str
    source: str
    protocol: str
    parts: tuple[Part, ...]
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    rows: tuple[Row, ...]
    slips: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class Known(NamedTuple):
    """By which protocol a method's numbers were measured, as its released code shows, and how its LPIPS differs."""

    protocol: str
    lpips: str = ""


PROTOCOL_OF = {
    "MSPN": Known("mspn"),
    "PPNet": Known("mspn"),
    "PredRNN": Known("predrnn"),
    "PredRNN++": Known("predrnn"),
    "PredRNN-V2": Known("predrnn"),
    "SimVP": Known("simvp"),
    "Conv-TT-LSTM": Known("openstl", "LPIPS fed [0, 1]"),
    "LMC-Memory": Known("openstl", "LPIPS fed [0, 1]"),
    "VPTR": Known("vptr"),
}
"""By the method's name. Whoever is missing has released no code that shows it, or none that was read."""


def printed_rows(text: str, more_labels: int = 0) -> tuple[Row, ...]:
    """Rows from lines ``method | label | ... | number number ...``; a method left out is that of the line before."""
    rows: list[Row] = []
    for line in text.strip().splitlines():
        *labels, numbers = (part.strip() for part in line.split("|"))
        if len(labels) != 1 + more_labels:
            raise ValueError(f"{line!r} has {len(labels)} labels, must have {1 + more_labels}")
        known = PROTOCOL_OF.get(bare_name(labels[0]))
        rows.append(Row(tuple(labels), tuple(numbers.split()), known.protocol if known else None))
    return tuple(rows)


def bare_name(method: str) -> str:
    """``SimVP`` of ``SimVP [62]``, ``MSPN`` of ``MSPN (ours)``."""
    return method.partition(" [")[0].partition(" (")[0]


def columns(*groups: tuple[str, Iterable[Cell]]) -> tuple[str, ...]:
    """Headings of cells below headings of groups of them."""
    return tuple(f"{group} {cell.quantity.heading}".strip() for group, cells in groups for cell in cells)
