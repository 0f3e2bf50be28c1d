"""Pictures in rows and columns with headings, captions and a colour bar, as a PNG."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpfast.visual._frames import temporary_for

INK, PALE, QUIET = "#1f2937", "#e5e7eb", "#6b7280"

_CELL, _GAP = 1.3, 0.07  # inches: the side of a square picture (others get its area), and the space between two
_LINE, _SMALL, _MARGIN, _BAR = 0.19, 0.15, 0.12, 1.2
_CHARACTER = 0.062  # at the most, on average, of a line in small type


class Cell(NamedTuple):
    """A picture, uint8 (H, W, 3), and a note below it."""

    image: NDArray[np.uint8]
    caption: str = ""


@dataclass(frozen=True)
class Column:
    """A heading, a smaller line below it, and the cells from top to bottom."""

    title: str
    note: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Bar:
    """What colours mean: uint8 (N, 3) from left to right, and the words at the two ends."""

    colours: NDArray[np.uint8]
    low: str
    high: str


def figure_class() -> Any:
    """matplotlib's Figure.

    Raises:
        ImportError: it is not installed; says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing this picture needs matplotlib: pip install 'vpfast[cli]'") from error
    return Figure


def write_grid(
    path: str | os.PathLike[str], columns: Sequence[Column], row_names: Sequence[str], bar: Bar | None, dpi: int
) -> None:
    """Write the columns side by side as a PNG, the first one, what the others are made of, set apart by a wider gap."""
    figure_type = figure_class()
    height, width = columns[0].cells[0].image.shape[:2]
    cell_h, cell_w = _CELL * (height / width) ** 0.5, _CELL * (width / height) ** 0.5
    captioned = any(cell.caption for column in columns for cell in column.cells)
    row_h = cell_h + (_LINE + 0.03 if captioned else _GAP)
    top = _MARGIN + _LINE + (_SMALL if any(column.note for column in columns) else 0) + 0.05
    left = _MARGIN + (0.1 + 0.075 * max(map(len, row_names)) if any(row_names) else 0)
    column_w = max(cell_w, _CHARACTER * max(len(text) for column in columns for text in (column.title, column.note)))
    bar_w = _BAR + 2 * _CHARACTER * max(len(bar.low), len(bar.high)) + 0.2 if bar else 0
    xs = [left + index * (column_w + _GAP) + (2 * _GAP if index else 0) for index in range(len(columns))]
    total_w = max(xs[-1] + column_w, bar_w + _MARGIN) + _MARGIN
    total_h = top + len(row_names) * row_h + (0.32 if bar else 0) + 0.03
    figure = figure_type(figsize=(total_w, total_h), dpi=dpi, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """Text at inches from the top left corner."""
        figure.text(x / total_w, 1 - y / total_h, text, **{"ha": "center", "va": "center", "color": INK, **style})

    def picture(x: float, y: float, w: float, h: float, image: NDArray[np.uint8], **kind: Any) -> None:
        axes = figure.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=PALE, linewidth=0.6)
        axes.imshow(image, interpolation="nearest", **kind)

    for x, column in zip(xs, columns, strict=True):
        middle = x + column_w / 2
        write(middle, _MARGIN + _LINE / 2, column.title, fontsize=10)
        write(middle, _MARGIN + _LINE + _SMALL / 2, column.note, fontsize=7, color=QUIET)
        for row, cell in enumerate(column.cells):
            y = top + row * row_h
            picture(middle - cell_w / 2, y, cell_w, cell_h, cell.image)
            write(middle, y + cell_h + _LINE / 2, cell.caption, fontsize=8, color=QUIET)
    for row, name in enumerate(row_names):
        write(left - 0.08, top + row * row_h + cell_h / 2, name, fontsize=8, color=QUIET, ha="right")
    if bar is not None:
        y, start, end = total_h - 0.24, (total_w - _BAR) / 2, (total_w + _BAR) / 2
        picture(start, y, _BAR, 0.1, bar.colours[None], aspect="auto")
        write(start - 0.08, y + 0.05, bar.low, fontsize=7, color=QUIET, ha="right")
        write(end + 0.08, y + 0.05, bar.high, fontsize=7, color=QUIET, ha="left")
    with temporary_for(path) as temporary:
        figure.savefig(temporary, format="png")


def colour_map(name: str) -> NDArray[np.uint8]:
    """256 colours of one of matplotlib's maps: uint8 (256, 3)."""
    figure_class()
    from matplotlib import colormaps

    colours: NDArray[np.uint8] = (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return colours
