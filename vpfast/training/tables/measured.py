"""What was measured for a table: one entry a model and part, kept with the report that its numbers are taken from."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpfast.metrics import Report
from vpfast.training.tables.printed import Cell, Table


@dataclass(frozen=True)
class Entry:
    """One model on one part of a table.

    Attributes:
        method: what the row is called.
        labels: what the table's further labels are to say of the model, such as how it was trained.
        part: its key.
        clips: on which it was measured, in words.
        parameters: of the model; None of what is no model.
        report: its numbers.
    """

    method: str
    labels: tuple[str, ...]
    part: str
    clips: str
    parameters: int | None
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        return {**asdict(self), "labels": list(self.labels), "report": self.report.to_dict()}

    def number(self, cell: Cell) -> float | None:
        """What belongs into a cell; None where it was not measured."""
        name = cell.quantity.metric
        if name == "parameters":
            return self.parameters
        if name == "lpips" and "lpips_x100" in self.report.per_frame:
            values = [value / 100 for value in self.report.per_frame["lpips_x100"]]
        else:
            values = self.report.per_frame.get(name, [])
        chosen = values[cell.first - 1 : cell.last]
        return math.fsum(chosen) / len(chosen) * cell.quantity.scale if chosen else None


@dataclass(frozen=True)
class MeasuredRow:
    """A line of numbers below those of the paper, None where nothing was measured, and by which protocol they are."""

    labels: tuple[str, ...]
    numbers: tuple[float | None, ...]
    protocol: str


def measured_rows(table: Table, entries: Sequence[Entry]) -> list[MeasuredRow]:
    """The lines of every method, in the order of its first entry; a line that would be empty is left out.

    Of two entries of one method and part the later one counts.
    """
    methods: dict[tuple[str, tuple[str, ...], str], dict[str, Entry]] = {}
    for entry in entries:
        methods.setdefault((entry.method, entry.labels, entry.report.protocol), {})[entry.part] = entry
    rows = []
    for (method, labels, protocol), by_part in methods.items():
        for line in table.lines:
            numbers = tuple(_number(cell, by_part) for cell in line.cells)
            if any(number is not None for number in numbers):
                rows.append(MeasuredRow((method, *line.labels, *labels), numbers, protocol))
    return rows


def _number(cell: Cell, by_part: dict[str, Entry]) -> float | None:
    """Of the cell's part; what belongs to no part is of the model, and the same in all of them."""
    entry = by_part.get(cell.part) if cell.part else next(iter(by_part.values()))
    return None if entry is None else entry.number(cell)


def read_entries(path: Path, table: Table) -> list[Entry]:
    """What an earlier call measured for the same table and wrote as JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one, or of another table; names the file.
    """
    try:
        values = json.loads(path.read_text())
        name = values["table"]
        entries = [_entry(each, table) for each in values["measured"]] if name == table.name else []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no table that `vpfast evaluate --table` wrote: {error!r}") from error
    if name != table.name:
        raise ValueError(f"{path} is of the table {name}, must be of {table.name}")
    return entries


def _entry(values: dict[str, Any], table: Table) -> Entry:
    entry = Entry(**{**values, "labels": tuple(values["labels"]), "report": Report(**values["report"])})
    texts = (entry.method, entry.part, entry.clips, entry.report.protocol, *entry.labels)
    numbers = [*entry.report.mean.values(), *(each for steps in entry.report.per_frame.values() for each in steps)]
    fine = all(isinstance(each, str) for each in texts) and all(isinstance(each, int | float) for each in numbers)
    if not fine or not isinstance(entry.parameters, int | None):
        raise TypeError("a text or a number is something else")
    if entry.part not in [part.key for part in table.parts]:
        raise ValueError(f"part {entry.part!r} is none of {table.name}")
    if 1 + len(table.lines[0].labels) + len(entry.labels) != len(table.labels):
        raise ValueError(f"labels {entry.labels} do not fill {table.labels}")
    return entry
