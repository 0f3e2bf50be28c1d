"""The record of a run: one JSON format for every benchmark, and the page of tables made of it.

A record holds ``format``, ``name``, ``device``, ``rehearsed``, ``stopped``, ``machine``, ``seconds``, ``rows``,
``slopes`` and ``bars``. A row has a ``case`` and a ``contender``, and either ``absent``, why it was not timed, or
milliseconds a call (``p20_ms``, ``p50_ms``, ``p80_ms``, ...) and, as far as they are known: ``bytes`` and ``flops``
that the case needs, ``gb_s`` and ``tflop_s`` made of them, ``copy_share`` and ``matmul_share`` of what a copy and a
matrix product reached in the same run, ``peak_bytes`` of memory beyond inputs and results, and ``ratio``, its time in
vpfast's.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpfast._files import write_file
from vpfast.benchmarks.growth import slopes
from vpfast.benchmarks.problem import Bar, Benchmark, Place, Row

FORMAT = 1
Record = dict[str, Any]


def make(
    benchmark: Benchmark,
    place: Place,
    machine: Mapping[str, Any],
    seconds: float,
    rows: Sequence[Row],
    bars: Sequence[Bar],
    stopped: bool = False,
) -> Record:
    """The record of what was measured; ``stopped`` before all of it was."""
    return {
        "format": FORMAT,
        "name": benchmark.name,
        "about": benchmark.about,
        "note": benchmark.note,
        "device": "cuda" if place.gpu else "cpu",
        "rehearsed": place.small,
        "stopped": stopped,
        "seconds": seconds,
        "machine": dict(machine),
        "rows": list(rows),
        "slopes": slopes(rows),
        "bars": [str(bar) for bar in bars],
    }


def stem(record: Record) -> str:
    """The name of its files without their endings, such as ``edlstm_gates_cpu``; another one for a run that was
    stopped, whose record is not to take the place of a whole one.
    """
    gpu = record["machine"].get("gpu")
    device = record["device"] if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{record['name']}_{device}" + ("_stopped" if record.get("stopped") else "")


def write(record: Record, folder: Path) -> Path:
    """Keep it in ``folder`` as JSON and as markdown; returns the JSON file."""
    path = folder / f"{stem(record)}.json"
    write_file(path, json.dumps(record, indent=1) + "\n")
    write_file(path.with_suffix(".md"), page(record) + "\n")
    return path


def read(path: Path) -> Record:
    """The record in a JSON file.

    Raises:
        FileNotFoundError, ValueError: none there, or something else; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a record is a JSON file that `vpfast bench --out` wrote")
    try:
        record = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format", "none") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: not a record of `vpfast bench` in format {FORMAT} (found {found}); measure it again")
    if (wrong := _what_is_wrong(record)) is not None:
        raise ValueError(f"{path}: not a whole record: {wrong}")
    return record


def _what_is_wrong(record: Record) -> str | None:
    for key, kind in (("name", str), ("device", str), ("machine", dict), ("rows", list), ("slopes", list)):
        if not isinstance(record.get(key), kind):
            return f"{key} is missing, or no {kind.__name__}"
    for number, row in enumerate(record["rows"]):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("case", "contender")):
            return f"row {number} has no case or no contender"
        for key, value in row.items():
            measured = key.endswith("_ms") or (key == "peak_bytes" and value is not None)
            if measured and not (_is_number(value) and value >= 0):
                return f"{key} of row {number} is {value!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- the page ---------------------------------------------------------------------------------------------------------

Cell = Callable[[Row], str]


def _number(key: str, form: str, scale: float = 1.0) -> Cell:
    return lambda row: "" if row.get(key) is None else format(row[key] * scale, form)


def _rate(key: str, share: str, scale: float) -> Cell:
    def cell(row: Row) -> str:
        if row.get(key) is None:
            return ""
        of_best = "" if row.get(share) is None or row[share] == 1 else f" ({row[share]:.0%})"
        return f"{three_digits(row[key] * scale)}{of_best}"

    return cell


def three_digits(value: float) -> str:
    """Three digits at least, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _milliseconds(row: Row) -> str:
    if "absent" in row:
        return f"not run: {row['absent']}"
    if "p50_ms" not in row:
        return ""
    return three_digits(row["p50_ms"]) + (" (extrapolated)" if row.get("extrapolated") else "")


def _spread(row: Row) -> str:
    return f"{three_digits(row['p20_ms'])}-{three_digits(row['p80_ms'])}" if row.get("p20_ms") is not None else ""


COLUMNS: dict[str, Cell] = {
    "contender": lambda row: row["contender"],
    "ms": _milliseconds,
    "p20-p80": _spread,
    "p99": lambda row: three_digits(row["p99_ms"]) if row.get("tail") else "",
    "first of a burst": lambda row: three_digits(row["first_ms"]) if row.get("first_ms") is not None else "",
    "in a row": lambda row: three_digits(row["in_a_row_ms"]) if row.get("in_a_row_ms") is not None else "",
    "times vpfast's": _number("ratio", ".2f"),
    "GB/s (of the copy's)": _rate("gb_s", "copy_share", 1.0),
    "GFLOP/s (of the product's)": _rate("tflop_s", "matmul_share", 1e3),
    "of its convolutions' rate": _number("convolutions_share", ".0%"),
    "us a position": _number("position_us", ".1f"),
    "PSNR, dB": _number("psnr_db", ".1f"),
    "clips/s": _number("clips_s", ".3g"),
    "peak MB": _number("peak_bytes", ".1f", 1e-6),
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def table(rows: Sequence[Row]) -> str:
    """A line a row; columns that nobody fills are left out."""
    cells = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    filled = {title: column for title, column in cells.items() if any(column)}
    return markdown_table(list(filled), list(zip(*filled.values(), strict=True)))


def page(record: Record) -> str:
    """The record as markdown: a table a case, then growth, then bars."""
    told = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    rehearsed = "**A rehearsal, with sizes that only show that it runs.** " if record["rehearsed"] else ""
    stopped = "**Stopped before all of it was measured.** " if record.get("stopped") else ""
    how = f"{rehearsed}{stopped}{record['note']} {_how(record['device'])} {told}."
    lines = [f"# {record['name']}", "", f"{record['about']}.", "", how, ""]
    rows = [row for row in record["rows"] if "growth" not in row]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [f"## {case}", "", table([row for row in rows if row["case"] == case]), ""]
    grown = [row for row in record["rows"] if "growth" in row]
    for name in dict.fromkeys(row["growth"] for row in grown):
        lines += [f"## {name[0].upper()}{name[1:]}", "", _growth_table(record, name), ""]
    lines += [f"{bar}  " for bar in record["bars"]]
    return "\n".join(lines).rstrip()


def _how(device: str) -> str:
    if device == "cuda":
        return (
            "Medians on the GPU, between events, inputs not in its caches; `in a row` is a call's share of several by "
            "the clock, with what the host takes. Allocation of the results counted. Peak memory beyond inputs and "
            "results."
        )
    return (
        "Medians of calls in bursts, contenders by turns, allocation of the results counted; `first of a burst` is the "
        "call after others went through the caches. Peak memory is the process's, beyond inputs and results."
    )


def _growth_table(record: Record, name: str) -> str:
    """Sizes across, time and memory of each contender down, and the slopes."""
    rows = [row for row in record["rows"] if row.get("growth") == name and "p50_ms" in row]
    sizes = sorted({row["size"] for row in rows})
    found = {(row["contender"], row["size"]): row for row in rows}
    fits = {(fit["contender"], fit["of"]): fit for fit in record["slopes"] if fit["growth"] == name}
    lines = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        for of, key, unit, scale in (("time", "p50_ms", "ms", 1.0), ("memory", "peak_bytes", "MB", 1e-6)):
            values = [found.get((contender, size), {}).get(key) for size in sizes]
            if all(value is None for value in values):
                continue
            fit = fits.get((contender, of))
            slope = "" if fit is None else f"{fit['slope']:.2f} ± {fit['error']:.2f}"
            cells = ["" if value is None else three_digits(value * scale) for value in values]
            lines.append([contender, f"{of}, {unit}", *cells, slope])
    over = rows[0]["over"] if rows else "size"
    return markdown_table(["contender", over, *map(str, sizes), "slope"], lines)
