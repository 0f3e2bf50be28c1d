"""A record as PNGs: bars by contender, a roofline, and growth on log-log axes.

Lines differ in colour (those of Okabe and Ito, which colour-blind readers tell apart too) and in marks, and have their
names beside them.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vpfast._files import new_file
from vpfast.benchmarks.measure import COPY, PRODUCT, is_floor
from vpfast.benchmarks.problem import OWN, Row
from vpfast.benchmarks.record import Record, stem, three_digits
from vpfast.visual._grid import figure_class

INK, GREY, GRID = "#1f2937", "#6b7280", "#e5e7eb"
OWN_COLOUR, OTHER_COLOUR = "#0072B2", "#B0B7C3"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("s", "^", "D", "v", "P", "X")
DPI = 130
_PANEL_W, _BAR_H, _COLUMNS = 6.6, 0.27, 2  # inches: a panel of bars, and a bar with the space around it
_LABELS_W, _VALUES_W = 2.15, 1.25
_GROWTH_W, _GROWTH_H = 4.3, 3.0


def write_all(record: Record, folder: Path) -> list[Path]:
    """The pictures that this record can give, in ``folder``; returns their paths."""
    pictures: dict[str, Callable[[Record], Any]] = {"": bars, "_roofline": roofline, "_growth": growth}
    written = []
    for ending, draw in pictures.items():
        figure = draw(record)
        if figure is not None:
            path = folder / f"{stem(record)}{ending}.png"
            with new_file(path, replace=True) as draft:
                figure.savefig(draft, format="png")
            written.append(path)
    return written


# --- bars -------------------------------------------------------------------------------------------------------------


def bars(record: Record) -> Any:
    """Milliseconds of every contender, a panel a case, on logarithmic scales; None without timings."""
    rows = [row for row in record["rows"] if "growth" not in row and row.get("p50_ms") and not row.get("helper")]
    rows = [row for row in rows if not row["contender"].startswith(PRODUCT)]  # of other work than the case's
    cases = {case: _sorted([row for row in rows if row["case"] == case]) for case in _unique(rows, "case")}
    if not cases:
        return None
    titles = {case: textwrap.wrap(case, 78) for case in cases}
    heights = {case: 0.62 + 0.17 * len(titles[case]) + _BAR_H * len(found) for case, found in cases.items()}
    columns = _balanced(heights, min(_COLUMNS, len(cases)))
    top = 0.9
    width, height = _PANEL_W * len(columns), top + max(sum(heights[case] for case in column) for column in columns)
    figure = figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")
    _headline(figure, record, "milliseconds a call; less is better", width, height)
    key = "medians; black: 20th to 80th percentile; in brackets: times vpfast's"
    key += "; hatched: a copy at its best" if any(is_floor(row["contender"]) for row in rows) else ""
    key += "; ≈: extrapolated" if any(row.get("extrapolated") for row in rows) else ""
    figure.text(0.15 / width, 1 - 0.62 / height, key, va="center", color=GREY, fontsize=8.5)
    for number, column in enumerate(columns):
        y = top
        for case in column:
            below = y + 0.12 + 0.17 * len(titles[case])
            axes_h = _BAR_H * len(cases[case])
            place = (number * _PANEL_W + _LABELS_W, below, _PANEL_W - _LABELS_W - _VALUES_W, axes_h)
            x = (number * _PANEL_W + 0.15) / width
            figure.text(x, 1 - (y + 0.05) / height, "\n".join(titles[case]), va="top", color=INK, fontsize=8.5)
            _panel_of_bars(figure.add_axes(_fraction(place, width, height)), cases[case])
            y += heights[case]
    return figure


def _panel_of_bars(axes: Any, rows: Sequence[Row]) -> None:
    values = [row["p50_ms"] for row in rows]
    low = 10 ** (math.floor(math.log10(min(values))) - 0.15)
    high = max(max(max(values), *(row.get("p80_ms") or 0.0 for row in rows)) * 1.15, low * 12)
    for at, row in enumerate(rows):
        own = row["contender"].startswith(OWN)
        colour = OWN_COLOUR if own else OTHER_COLOUR
        hatch = "////" if is_floor(row["contender"]) else None
        face = "white" if hatch else colour
        axes.barh(at, row["p50_ms"] - low, left=low, height=0.72, color=face, edgecolor=GREY if hatch else face)
        if hatch:
            axes.patches[-1].set(hatch=hatch, edgecolor="#9aa3af", linewidth=0.6)
        if row.get("p20_ms") is not None:
            axes.plot((row["p20_ms"], row["p80_ms"]), (at, at), color=INK, linewidth=1.2, solid_capstyle="butt")
        label = ("≈ " if row.get("extrapolated") else "") + three_digits(row["p50_ms"])
        label += f"  {_times(row['ratio'])}" if row.get("ratio") and row["contender"] != OWN else ""
        weight = "bold" if own else "normal"
        axes.text(1.02, at, label, va="center", color=INK, fontsize=8, fontweight=weight, transform=_beside(axes))
    axes.set(xscale="log", xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    _in_plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(rows)), [_short(row["contender"], 30) for row in rows], fontsize=8, color=INK)
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _times(ratio: float) -> str:
    return f"({ratio:.1f}x)" if ratio < 100 else f"({ratio:,.0f}x)"


def _beside(axes: Any) -> Any:
    """x as a share of the axes, y in bars."""
    return axes.get_yaxis_transform()


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """vpfast's first, what the machine does at best last, the fastest first."""

    def order(row: Row) -> tuple[bool, bool, float]:
        return is_floor(row["contender"]), not row["contender"].startswith(OWN), row["p50_ms"]

    return sorted(rows, key=order)


def _balanced(heights: dict[str, float], count: int) -> list[list[str]]:
    """The cases in so many columns of about one height, in order."""
    columns: list[list[str]] = [[]]
    share, filled = sum(heights.values()) / count, 0.0
    for case, height in heights.items():
        if filled + height / 2 > share * len(columns) and len(columns) < count and columns[-1]:
            columns.append([])
        columns[-1].append(case)
        filled += height
    return columns


# --- roofline ---------------------------------------------------------------------------------------------------------


def roofline(record: Record) -> Any:
    """Rate over operations a byte under what a copy and matrix products reached; None where no row knows both."""
    rows = [row for row in record["rows"] if "growth" not in row and row.get("tflop_s") and row.get("bytes")]
    rows = [row for row in rows if not is_floor(row["contender"])]
    cases = _unique(rows, "case")
    floors = [row for row in record["rows"] if is_floor(row["contender"]) and "p50_ms" in row]
    copy = max((row["gb_s"] for row in floors if row["contender"] == COPY), default=None)
    if not cases or copy is None:
        return None
    key_lines = [line for number, case in enumerate(cases, 1) for line in _numbered(number, case)]
    width, height = 11.5, max(5.2, 1.3 + 0.165 * len(key_lines))
    figure = figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")
    _headline(
        figure, record, "rate over operations a byte, beneath what this machine reached in the same run", width, height
    )
    axes = figure.add_axes(_fraction((0.85, 0.85, 5.9, min(height, 6.6) - 1.5), width, height))
    _roofs(axes, rows, floors, copy)
    _points(axes, rows, cases)
    _in_plain_numbers(axes.xaxis)
    _in_plain_numbers(axes.yaxis)
    axes.set_xlabel("operations a byte that must move (FLOP/B)", color=GREY, fontsize=9)
    axes.set_ylabel("operations a second (GFLOP/s)", color=GREY, fontsize=9)
    _plain(axes)
    figure.text(7.0 / width, 1 - 0.85 / height, "\n".join(key_lines), va="top", color=INK, fontsize=8, linespacing=1.35)
    return figure


def _roofs(axes: Any, rows: Sequence[Row], floors: Sequence[Row], copy: float) -> None:
    products: dict[str, float] = {}
    for row in floors:
        if row["contender"].startswith(PRODUCT):
            products[row["contender"]] = max(products.get(row["contender"], 0.0), row["tflop_s"] * 1e3)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    rates = [row["tflop_s"] * 1e3 for row in rows]
    ridges = [rate / copy for rate in products.values()]
    low, high = min(*intensities, *ridges, 1e9) / 3, max(*intensities, *ridges, 1e-9) * 4
    peak = max(products.values(), default=copy * high)
    end = min(peak / copy, high)
    axes.plot((low, end), (low * copy, end * copy), color=INK, linewidth=1.4)
    axes.text(low * 1.25, low * copy * 0.95, f"copy, {copy:.3g} GB/s", color=INK, fontsize=8, va="top")
    for name, rate in products.items():
        axes.plot((min(rate / copy, high), high), (rate, rate), color=INK, linewidth=1.4)
        axes.text(
            high / 1.1, rate * 1.06, f"{name}, {rate:,.0f} GFLOP/s", color=INK, fontsize=8, va="bottom", ha="right"
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(rates) / 2, max(peak, *rates) * 2.2))


def _points(axes: Any, rows: Sequence[Row], cases: Sequence[str]) -> None:
    """vpfast's with the numbers of their cases; others small and grey."""
    for row in rows:
        x, y = row["flops"] / row["bytes"], row["tflop_s"] * 1e3
        if row["contender"] != OWN:
            axes.plot(x, y, "o", color=OTHER_COLOUR, markersize=3.5, zorder=2)
            continue
        axes.plot(x, y, "o", color=OWN_COLOUR, markersize=6, zorder=3)
    for x, y, names in _gathered([row for row in rows if row["contender"] == OWN], cases):
        axes.annotate(names, (x, y), (5, 4), textcoords="offset points", color=OWN_COLOUR, fontsize=8, zorder=4)
    for name, colour, size in (
        ("vpfast, by the number of its case", OWN_COLOUR, 6),
        ("other contenders", OTHER_COLOUR, 3.5),
    ):
        axes.plot([], [], "o", color=colour, markersize=size, label=name)
    axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=INK)


def _gathered(rows: Sequence[Row], cases: Sequence[str]) -> list[tuple[float, float, str]]:
    """Points with their numbers; of points on top of each other one has the numbers of all."""
    places: list[tuple[float, float, list[int]]] = []
    for row in rows:
        x, y, number = row["flops"] / row["bytes"], row["tflop_s"] * 1e3, cases.index(row["case"]) + 1
        for other_x, other_y, numbers in places:
            if abs(math.log(x / other_x)) < 0.2 and abs(math.log(y / other_y)) < 0.25:
                numbers.append(number)
                break
        else:
            places.append((x, y, [number]))
    return [(x, y, _runs(numbers)) for x, y, numbers in places]


def _runs(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _numbered(number: int, case: str) -> list[str]:
    first, *others = textwrap.wrap(case, 62)
    return [f"{number:>2}  {first}", *(f"      {line}" for line in others)]


# --- growth -----------------------------------------------------------------------------------------------------------


def growth(record: Record) -> Any:
    """Time and memory over size, log-log, with the fitted slopes beside the lines; None without a growth."""
    rows = [row for row in record["rows"] if "growth" in row]
    names = _unique(rows, "growth")
    panels = [
        (name, of, key)
        for name in names
        for of, key in (("time", "p50_ms"), ("memory", "peak_bytes"))
        if any(row.get(key) for row in rows if row["growth"] == name)
    ]
    if not panels:
        return None
    others = [name for name in _unique(rows, "contender") if name != OWN]
    styles = {OWN: {"color": OWN_COLOUR, "marker": "o", "linewidth": 2.2}}
    for number, name in enumerate(others):
        styles[name] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "linewidth": 1.3}
    per_row = {name: sum(panel[0] == name for panel in panels) for name in names}
    right = 2.3
    width = 2 * (_GROWTH_W + right)
    height = 0.75 + len(names) * (_GROWTH_H + 1.0)
    figure = figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")
    _headline(figure, record, "how time and memory grow; slopes of least squares on these axes", width, height)
    for row_number, name in enumerate(names):
        y = 0.75 + row_number * (_GROWTH_H + 1.0)
        figure.text(0.15 / width, 1 - (y + 0.05) / height, _short(name, 110), va="top", color=INK, fontsize=9.5)
        own_panels = [panel for panel in panels if panel[0] == name]
        for column, (_, of, key) in enumerate(own_panels[: per_row[name]]):
            x = column * (_GROWTH_W + right) + 0.85
            axes = figure.add_axes(_fraction((x, y + 0.35, _GROWTH_W - 0.85, _GROWTH_H), width, height))
            _panel_of_growth(axes, record, name, of, key, styles)
    return figure


def _panel_of_growth(
    axes: Any, record: Record, name: str, of: str, key: str, styles: dict[str, dict[str, Any]]
) -> None:
    rows = [row for row in record["rows"] if row.get("growth") == name and row.get(key)]
    fits = {fit["contender"]: fit for fit in record["slopes"] if fit["growth"] == name and fit["of"] == of}
    scale = 1.0 if of == "time" else 1e-6
    ends = {}
    for contender in _unique(rows, "contender"):
        points = sorted((row["size"], row[key] * scale) for row in rows if row["contender"] == contender)
        style = styles[contender]
        axes.plot(
            *zip(*points, strict=True), linestyle="none", marker=style["marker"], color=style["color"], markersize=4.5
        )
        label = contender
        if (fit := fits.get(contender)) is not None:
            sizes = points[0][0], points[-1][0]
            line = [scale * math.exp(fit["intercept"]) * size ** fit["slope"] for size in sizes]
            axes.plot(sizes, line, color=style["color"], linewidth=style["linewidth"], alpha=0.75)
            label = f"{contender}: slope {fit['slope']:.2f}"
        ends[label] = (points[-1], style["color"])
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_xlim()
    ticks = sorted({row["size"] for row in rows})
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    _in_plain_numbers(axes.yaxis)
    axes.set_xlabel(rows[0]["over"], color=GREY, fontsize=9)
    axes.set_ylabel("time, ms" if of == "time" else "memory beyond inputs and results, MB", color=GREY, fontsize=9)
    _plain(axes)
    _label_ends(axes, ends)
    grown = [row for row in record["rows"] if row.get("growth") == name and row.get(key) is not None]
    nothing = [
        who for who in _unique(grown, "contender") if not any(row[key] for row in grown if row["contender"] == who)
    ]
    if nothing:
        text = f"{', '.join(nothing)}: nothing at any size"
        axes.text(0.03, 0.04, text, color=INK, fontsize=8, transform=axes.transAxes)


def _label_ends(axes: Any, ends: dict[str, tuple[tuple[float, float], str]]) -> None:
    """Names to the right of the last points, moved apart where they would meet."""
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    step = (top - bottom) * 0.062
    at = float("-inf")
    places = {}
    for label, ((_, value), _) in sorted(ends.items(), key=lambda each: each[1][0][1]):
        at = max(math.log(value), at + step)
        places[label] = at
    over = max(at - top, 0.0)
    for label, ((_, value), colour) in ends.items():
        y = (places[label] - over - bottom) / (top - bottom)
        end = (math.log(value) - bottom) / (top - bottom)
        axes.plot((1.0, 1.03), (end, y), color=colour, linewidth=0.8, transform=axes.transAxes, clip_on=False)
        weight = "bold" if label.startswith(OWN) else "normal"
        axes.text(
            1.04,
            y,
            _short(label, 36),
            va="center",
            color=colour,
            fontsize=8,
            fontweight=weight,
            transform=axes.transAxes,
        )


# --- all --------------------------------------------------------------------------------------------------------------


def _headline(figure: Any, record: Record, what: str, width: float, height: float) -> None:
    machine = record["machine"]
    threads = machine.get("threads")
    where = machine.get("gpu") or f"{machine.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"
    rehearsed = "REHEARSAL, small sizes. " if record["rehearsed"] else ""
    facts = f"{rehearsed}{where}, torch {machine.get('torch')}, vpfast {machine.get('commit')}, {machine.get('date')}"
    title = f"{record['name']}: {what}"
    figure.text(0.15 / width, 1 - 0.2 / height, title, va="center", color=INK, fontsize=12, fontweight="bold")
    figure.text(0.15 / width, 1 - 0.45 / height, facts, va="center", color=GREY, fontsize=8.5)


def _fraction(
    place: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float]:
    """Left, top, width and height in inches from the top left corner -> as matplotlib has it."""
    x, y, w, h = place
    return x / width, 1 - (y + h) / height, w / width, h / height


def _in_plain_numbers(axis: Any) -> None:
    """A logarithmic axis told without exponents, at 1, 2 and 5 where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def _plain(axes: Any) -> None:
    """Pale lines behind, two sides of the frame, small figures."""
    axes.tick_params(labelsize=8, labelcolor=GREY, color=GRID, which="both")
    axes.tick_params(axis="y", labelcolor=GREY)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _unique(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
