"""A table of a paper with what was measured below it, as markdown and as plain values for JSON."""

from collections.abc import Sequence
from typing import Any

from vpfast.training.tables.measured import Entry, MeasuredRow, measured_rows
from vpfast.training.tables.printed import PROTOCOL_OF, Cell, Row, Table, bare_name

OTHER, UNKNOWN, SLIP = "†", "‡", "§"


def to_dict(table: Table, entries: Sequence[Entry], protocol: str) -> dict[str, Any]:
    """Plain numbers, lists and strings, ready for JSON; null where a table has no number.

    ``rows`` is the table, the paper's rows and ours in one form; ``measured`` what ours are made of.
    """
    headings = [*table.labels, *table.columns]
    rows = [
        _row_dict(headings, "paper", row.labels, [_value(text) for text in row.values], row.protocol, protocol)
        for row in table.rows
    ]
    rows += [
        _row_dict(headings, "vpfast", row.labels, list(row.numbers), row.protocol, protocol)
        for row in measured_rows(table, entries)
    ]
    return {
        "table": table.name,
        "caption": table.caption,
        "source": table.source,
        "protocol": protocol,
        "columns": headings,
        "rows": rows,
        "slips": [{"method": method, "column": column} for method, column in table.slips],
        "measured": [entry.to_dict() for entry in entries],
        "notes": list(table.notes),
    }


def _row_dict(
    headings: list[str],
    origin: str,
    labels: tuple[str, ...],
    numbers: list[float | None],
    protocol: str | None,
    ours: str,
) -> dict[str, Any]:
    """``comparable``: whether the protocol is that of the rows measured here; null where it is not known."""
    comparable = None if protocol is None else protocol == ours
    cells = dict(zip(headings, [*labels, *numbers], strict=True))
    return {"from": origin, "protocol": protocol, "comparable": comparable, "cells": cells}


def _value(text: str) -> float | None:
    if text in ("-", "×"):
        return None
    return float(text) if not text.endswith("M") else round(float(text[:-1]) * 1_000_000)


def markdown(table: Table, entries: Sequence[Entry], protocol: str) -> str:
    """The page: the table, what its marks mean, on what both sides were measured, and what a reader must know."""
    measured = measured_rows(table, entries)
    headings = [*table.labels, *table.columns, "Protocol"]
    lines = [f"# {table.caption}", ""]
    brackets = " Numbers in brackets are that paper's references." if "[" in str(table.rows) else ""
    lines += [f"Printed in {table.source}.{brackets}", ""]
    lines += [_line(headings), _line(["---"] * len(table.labels) + ["---:"] * len(table.columns) + ["---"])]
    lines += [_line(_printed_cells(table, row, protocol)) for row in table.rows]
    lines += [_line(_measured_cells(table, row, protocol)) for row in measured]
    lines += ["", *_legend(table, measured, protocol), "", *_conditions(table, entries)]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mark(protocol: str | None, ours: str) -> str:
    return f" {UNKNOWN}" if protocol is None else "" if protocol == ours else f" {OTHER}"


def _printed_cells(table: Table, row: Row, ours: str) -> list[str]:
    method, *labels = row.labels
    known = PROTOCOL_OF.get(bare_name(method))
    but = f", but {known.lpips}" if known and known.lpips and "lpips" in _metrics(table) else ""
    how = "not known" if row.protocol is None else f"{row.protocol}{but}"
    values = [
        f"{value} {SLIP}" if (method, column) in table.slips else value
        for column, value in zip(table.columns, row.values, strict=True)
    ]
    return [method + _mark(row.protocol, ours), *labels, *values, how]


def _measured_cells(table: Table, row: MeasuredRow, ours: str) -> list[str]:
    method, *labels = row.labels
    cells = next(line.cells for line in table.lines if line.labels == row.labels[1 : 1 + len(line.labels)])
    numbers = [_number(cell, number) for cell, number in zip(cells, row.numbers, strict=True)]
    return [f"**{method}**{_mark(row.protocol, ours)}", *labels, *numbers, row.protocol]


def _metrics(table: Table) -> set[str]:
    return {cell.quantity.metric for line in table.lines for cell in line.cells}


def _number(cell: Cell, number: float | None) -> str:
    if number is None:
        return "."
    if cell.quantity.metric == "parameters":
        return f"**{number / 1e6:.{cell.quantity.digits}f}M**"
    return f"**{round(number, cell.quantity.digits) + 0.0:.{cell.quantity.digits}f}**"  # + 0.0: no -0.000


def _legend(table: Table, measured: Sequence[MeasuredRow], protocol: str) -> list[str]:
    """Of the marks that are there."""
    protocols = {row.protocol for row in table.rows} | {row.protocol for row in measured}
    own = any(row.protocol == protocol for row in table.rows if "(ours)" in row.labels[0].lower())
    whose = ", the paper's own" if own else ""
    missing = any(number is None for row in measured for number in row.numbers)
    lpips = "" if "lpips" not in _metrics(table) else "; LPIPS is with `--lpips true`"
    there = {label for row in measured for label in row.labels[1:]}
    left_out = [label for line in table.lines for label in line.labels if label not in there]
    blank = {text for row in table.rows for text in row.values} & {"-", "×"}
    lines = [
        f"**Bold**: measured here by vpfast, under the protocol `{protocol}`{whose}."
        + (f" `.`: not measured here{lpips}." if missing else "")
        + (f" Not measured here: {', '.join(left_out)}{'' if missing else lpips}." if left_out else "")
        + (f" `{blank.pop()}`: not printed in the paper." if blank else "")
    ]
    if protocols - {None, protocol}:
        but = ", but for the pixel sum (MSE), which nearly does" if "mse_sum" in _metrics(table) else ""
        lines.append(
            f"{OTHER}: measured under another protocol, as that method's released code shows. Its numbers do not "
            f"compare with those under `{protocol}`{but}."
        )
    if None in protocols:
        lines.append(f"{UNKNOWN}: under which protocol it was measured is not known.")
    if table.slips:
        lines.append(f"{SLIP}: a slip in print, explained below.")
    return ["  \n".join(lines)]


def _conditions(table: Table, entries: Sequence[Entry]) -> list[str]:
    lines = ["| Clips | real → predicted frames | in the paper | here |", "|---|---|---|---|"]
    for part in table.parts:
        clips = dict.fromkeys(entry.clips for entry in entries if entry.part == part.key)
        here = "; ".join(clips) if clips else "not measured"
        lines.append(f"| {part.dataset} | {part.context} → {part.horizon} | {part.clips} | {here} |")
    return lines
