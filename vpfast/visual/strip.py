"""A strip of frames as a PNG: truth, prediction and error, step by step."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vpfast.visual._frames import Pixels, check_rows, temporary_for

_CELL, _GAP = 0.92, 0.05  # inches: the side of a square frame (others get its area), and the space between two
_RIGHT, _BOTTOM = 0.62, 0.14
_PARTING = 0.2  # between what was given and what was predicted
_INK, _PALE, _GIVEN, _PREDICTED = "#1f2937", "#9ca3af", "#6b7280", "#2563eb"


def write_strip(
    path: str | os.PathLike[str],
    rows: Mapping[str, Tensor],
    context: int = 0,
    errors: bool = True,
    max_columns: int = 12,
    dpi: int = 150,
) -> None:
    """Write a PNG with one row a clip, one column a step, and a row of errors below each prediction.

    The error is prediction minus truth, mean over channels: red where the prediction is too bright, blue where it is
    too dark, pale where it is right; the scale, the same in every such row, reaches to the largest error shown.

    Args:
        rows: name -> (T, C, H, W), float in [0, 1] or uint8, RGB or grey, all of one frame size. The first is the
            truth that the others are compared with. A shorter clip is shown at the end of the longest.
        context: how many frames at the beginning were given to the model; set apart and named so.
        errors: whether to show the rows of errors.
        max_columns: at most so many columns; of longer clips some steps are left out evenly, the first and the last
            of what was predicted and the last that was given never.
        dpi: dots an inch; a square frame is a little under an inch wide.

    Raises:
        TypeError, ValueError: clips that cannot be shown together; names the clip.
        ImportError: without matplotlib; says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("writing a strip needs matplotlib: pip install 'vpfast[cli]'") from error
    pixels, steps = check_rows(rows, context)
    if max_columns < 2:
        raise ValueError(f"max_columns must be at least 2, got {max_columns}")
    columns = _columns(steps, context, max_columns)
    images, limit = _rows_of_images(pixels, steps, errors)

    height, width = next(iter(pixels.values())).shape[1:3]
    cell_h, cell_w = _CELL * (height / width) ** 0.5, _CELL * (width / height) ** 0.5
    top = 0.52 if context else 0.3
    margin = 0.25 + 0.09 * max(map(len, [*rows, "error"]))
    left = [margin + i * (cell_w + _GAP) + (_PARTING if 0 < context <= step else 0) for i, step in enumerate(columns)]
    total_w = left[-1] + cell_w + _RIGHT
    total_h = top + len(images) * (cell_h + _GAP) + _BOTTOM
    figure = Figure(figsize=(total_w, total_h), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def axes(x: float, y: float, w: float, h: float) -> Any:
        """Axes by inches from the top left corner."""
        return figure.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))

    last_error = None
    for number, (name, clip, is_error) in enumerate(images):
        y = top + number * (cell_h + _GAP)
        colour = _PALE if is_error else _INK
        figure.text(
            (margin - 0.1) / total_w, 1 - (y + cell_h / 2) / total_h, name, ha="right", va="center", color=colour
        )
        for x, step in zip(left, columns, strict=True):
            at = step - (steps - len(clip))
            if at < 0:
                continue
            cell = axes(x, y, cell_w, cell_h)
            cell.set_xticks([])
            cell.set_yticks([])
            for spine in cell.spines.values():
                spine.set(color="#e5e7eb", linewidth=0.6)
            if is_error:
                last_error = cell.imshow(clip[at], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            else:
                cell.imshow(clip[at], interpolation="nearest")
    _headings(figure, left, columns, context, cell_w, top)
    if last_error is not None:
        bar = figure.colorbar(last_error, cax=axes(left[-1] + cell_w + 0.12, y, 0.07, cell_h), ticks=[-limit, 0, limit])
        bar.ax.set_yticklabels([f"−{limit:.2g}", "0", f"+{limit:.2g}"])
        bar.ax.tick_params(labelsize=7, length=0, pad=2, labelcolor=_GIVEN)
        bar.outline.set_visible(False)
    with temporary_for(path) as temporary:
        figure.savefig(temporary, format="png")


def _columns(steps: int, context: int, most: int) -> list[int]:
    """The steps to show, from 0: evenly spaced over what was given and over what was predicted."""
    if steps <= most:
        return list(range(steps))
    future = steps - context
    shown_given = min(context, most - (future > 0), max(1, round(most * context / steps))) if context else 0
    shown_future = min(future, most - shown_given)
    given = np.linspace(context - 1, 0, shown_given, endpoint=shown_given > 1).round().astype(int)[::-1]
    predicted = np.linspace(context, steps - 1, shown_future).round().astype(int)
    return [*given.tolist(), *predicted.tolist()]


def _rows_of_images(
    pixels: Mapping[str, Pixels], steps: int, errors: bool
) -> tuple[list[tuple[str, NDArray[Any], bool]], float]:
    """(name, images, whether they are errors) from top to bottom, and the largest error."""
    (first, truth), *others = pixels.items()
    rows: list[tuple[str, NDArray[Any], bool]] = [(first, truth, False)]
    limit = 0.01
    for name, clip in others:
        rows.append((name, clip, False))
        if errors:
            shared = min(len(clip), len(truth))
            difference = (clip[-shared:].astype(np.float32) - truth[-shared:]).mean(axis=3) / 255
            limit = max(limit, float(np.abs(difference).max()))
            rows.append(("error", difference, True))
    return rows, limit


def _headings(figure: Any, left: list[float], columns: list[int], context: int, cell: float, top: float) -> None:
    """Step numbers, and above them a bracket over what was given and one over what was predicted."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    for x, step in zip(left, columns, strict=True):
        colour = _GIVEN if step < context else _PREDICTED if context else _INK
        at = ((x + cell / 2) / width, 1 - (top - 0.06) / height)
        figure.text(*at, str(step + 1), ha="center", va="bottom", color=colour, fontsize=9)
    groups = {"given": [x for x, s in zip(left, columns, strict=True) if s < context]}
    groups["predicted"] = left[len(groups["given"]) :]
    for (name, xs), colour in zip(groups.items(), (_GIVEN, _PREDICTED), strict=True):
        if not context or not xs:
            continue
        y = 1 - (top - 0.24) / height
        ends = [xs[0] / width, (xs[-1] + cell) / width]
        figure.add_artist(Line2D(ends, [y, y], color=colour, linewidth=1.2))
        figure.text(sum(ends) / 2, y + 0.03 / height, name, ha="center", va="bottom", color=colour, fontsize=9)
