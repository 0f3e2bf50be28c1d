"""Numbers over time as one PNG, a panel for every quantity: how a training run went, how far predictions go wrong."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpfast.visual._frames import temporary_for
from vpfast.visual._grid import figure_class

_INK, _GREY, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#4b5563")
_WIDTH, _TALL, _LOW = 11.0, 2.7, 1.7  # inches: of the picture, and the height of the first panel and of the others
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.75, 0.25, 0.8, 0.4, 0.7
_COLUMNS = 3
_DENSE = 60  # from so many values on a line is drawn through their means, the values themselves pale behind it
_POINTS = 120  # of that line
_DECADE = 10.0  # between the smallest and the largest value, beyond which a scale is logarithmic
_LEGEND = 8
_PANEL_W, _PANEL_H, _ABOVE, _BELOW = 4.5, 2.0, 0.34, 0.42  # inches: of an error's axes and labels
_SAMPLE, _CHARACTER = 0.75, 0.085  # of a line in the legend, and at the most, on average, of a letter beside it
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MARKED = 20  # marks on a line, at the most twice as many


class Series(NamedTuple):
    """Values at steps; both one-dimensional and equally long. What is not finite is left out."""

    steps: ArrayLike
    values: ArrayLike


def write_curves(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Series]],
    title: str = "",
    linear: frozenset[str] = frozenset(),
    dpi: int = 110,
) -> None:
    """Write a PNG with a panel for every quantity over the steps of a run; the first is as wide as the picture.

    Many values are drawn pale, and through them the means of neighbours. A panel whose values are all positive and
    spread over more than a factor of ten has a logarithmic scale.

    Args:
        panels: name -> its lines by their names; the name of a single line is not shown.
        title: of the picture.
        linear: names of panels that never have a logarithmic scale.
        dpi: dots an inch; the picture is 11 inches wide.

    Raises:
        ValueError: no finite value in any panel, or steps and values that differ in number; names the line.
        ImportError: without matplotlib; says what to install.
    """
    figure_type = figure_class()
    drawn = {name: lines for name, given in panels.items() if (lines := _finite(name, given))}
    if not drawn:
        raise ValueError("there must be at least one finite value to draw, got none")
    rows = 1 + -(-(len(drawn) - 1) // _COLUMNS)
    height = _TOP + _TALL + (rows - 1) * (_GAP + _LOW) + _BOTTOM
    figure = figure_type(figsize=(_WIDTH, height), dpi=dpi, facecolor="white")
    figure.text(0.2 / _WIDTH, 1 - 0.25 / height, title, va="center", color=_INK, fontsize=12, fontweight="bold")
    last = max(steps[-1] for lines in drawn.values() for steps, _ in lines.values())
    for number, (name, lines) in enumerate(drawn.items()):
        x, y, w, h = _place(number)
        axes = figure.add_axes((x / _WIDTH, 1 - (y + h) / height, w / _WIDTH, h / height))
        axes.set_xlim(0, last * 1.01 + 1)
        _panel(axes, name, lines, name not in linear)
        if number == 0:
            axes.set_xlabel("step", color=_GREY, fontsize=8, loc="right", labelpad=1)
    with temporary_for(path) as temporary:
        figure.savefig(temporary, format="png")


def write_frame_curves(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    first: int = 1,
    title: str = "",
    quiet: Collection[str] = (),
    dpi: int = 130,
) -> None:
    """Write a PNG with a panel for every metric over the frames of a clip, and in each a line for every model.

    Lines differ in colour and in marks. What is not finite is left out.

    Args:
        panels: heading of a metric -> name of a model -> its values at the frames ``first``, ``first`` + 1, ...
        first: the number of the first frame.
        title: of the picture.
        quiet: names of lines to be grey and dashed: what the others are held to.
        dpi: dots an inch; two panels beside each other are 9 inches wide.

    Raises:
        ValueError: no finite value in any panel.
        ImportError: without matplotlib; says what to install.
    """
    figure_type = figure_class()
    drawn = {}
    for heading, given in panels.items():
        series = {name: Series(first + np.arange(len(values)), values) for name, values in given.items()}
        if lines := _finite(heading, series):
            drawn[heading] = lines
    if not drawn:
        raise ValueError("there must be at least one finite value to draw, got none")
    names = list(dict.fromkeys(name for lines in drawn.values() for name in lines))
    styles = _styles(names, quiet)
    columns = min(2, len(drawn))
    rows, row_h = -(-len(drawn) // columns), _ABOVE + _PANEL_H + _BELOW
    top = 0.12 + (0.28 if title else 0)
    beside = max(1, min(len(names), int((columns * _PANEL_W - 0.4) / (_SAMPLE + _CHARACTER * max(map(len, names))))))
    legend_h = 0.24 * -(-len(names) // beside) + 0.06
    width, height = columns * _PANEL_W, top + legend_h + rows * row_h
    figure = figure_type(figsize=(width, height), dpi=dpi, facecolor="white")
    if title:
        figure.text(0.15 / width, 1 - 0.22 / height, title, va="center", color=_INK, fontsize=11, fontweight="bold")
    for number, (heading, lines) in enumerate(drawn.items()):
        row, column = divmod(number, columns)
        x, y = column * _PANEL_W + 0.6, top + legend_h + row * row_h + _ABOVE
        axes = figure.add_axes((x / width, 1 - (y + _PANEL_H) / height, (_PANEL_W - 0.8) / width, _PANEL_H / height))
        for name, (steps, values) in lines.items():
            each = max(1, len(values) // _MARKED)
            axes.plot(steps, values, markersize=3.5, linewidth=1.5, label=name, markevery=each, **styles[name])
        axes.set_title(heading, loc="left", color=_INK, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("frame", color=_GREY, fontsize=8, loc="right", labelpad=1)
        _plain(axes)
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [handles[name] for name in names],
        names,
        ncols=beside,
        fontsize=9,
        frameon=False,
        labelcolor=_INK,
        loc="upper left",
        bbox_to_anchor=(0.4 / width, 1 - top / height),
        borderaxespad=0,
    )
    with temporary_for(path) as temporary:
        figure.savefig(temporary, format="png")


def _styles(names: Sequence[str], quiet: Collection[str]) -> dict[str, Any]:
    """How each line is drawn."""
    styles, number = {}, 0
    for name in names:
        if name in quiet:
            styles[name] = {"color": _GREY, "linestyle": "--"}
            continue
        styles[name] = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKS[number % len(_MARKS)]}
        number += 1
    return styles


def _place(number: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of a panel in inches, from the top left corner."""
    if number == 0:
        return _LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _TALL
    row, column = divmod(number - 1, _COLUMNS)
    cell = (_WIDTH - _RIGHT) / _COLUMNS
    return _LEFT + column * cell, _TOP + _TALL + _GAP + row * (_LOW + _GAP), cell - _LEFT, _LOW


def _finite(panel: str, lines: Mapping[str, Series]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    kept = {}
    for name, series in lines.items():
        steps, values = np.asarray(series.steps, np.float64), np.asarray(series.values, np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(f"{panel}, {name}: as many values as steps expected, got {values.shape} and {steps.shape}")
        fine = np.isfinite(steps) & np.isfinite(values)
        if fine.any():
            kept[name] = (steps[fine], values[fine])
    return kept


def _panel(axes: Any, name: str, lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], may_be_log: bool) -> None:
    smooth = {label: _means(steps, values) for label, (steps, values) in lines.items()}
    shown = np.concatenate([values for _, values in smooth.values()])
    everything = np.concatenate([values for _, values in lines.values()])
    if may_be_log and everything.min() > 0 and shown.max() > _DECADE * shown.min():
        axes.set_yscale("log")
    for number, (label, (steps, values)) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dense = len(values) >= _DENSE
        if dense:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.7, rasterized=True)
        mark = "o" if len(values) <= 25 else None
        axes.plot(*smooth[label], color=colour, linewidth=1.6, marker=mark, markersize=3, label=label)
    axes.set_title(name, loc="left", color=_INK, fontsize=10)
    if len(lines) == 1:
        axes.set_title(f"last {shown[-1]:.4g}", loc="right", color=_GREY, fontsize=8)
    elif len(lines) <= _LEGEND:
        axes.legend(fontsize=7, frameon=False, labelcolor=_GREY, loc="best")
    _plain(axes)


def _plain(axes: Any) -> None:
    """Pale lines behind, two sides of the frame, small figures."""
    axes.tick_params(labelsize=8, labelcolor=_GREY, color=_GRID, which="both")
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def _means(steps: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The means of equal runs of neighbours, at their middle; all values where there are few."""
    if len(values) < _DENSE:
        return steps, values
    parts = min(_POINTS, len(values) // 5)
    means = [np.array([part.mean() for part in np.array_split(each, parts)]) for each in (steps, values)]
    return means[0], means[1]
