"""One HTML file with tables, curves and clips that play: it holds all that it shows and loads nothing."""

import base64
import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from vpfast.visual import _svg
from vpfast.visual._frames import Pixels, check_rows, temporary_for
from vpfast.visual._sheet import Sheet, sheet, signed

_LONGEST = 256  # pixels, of a frame's longer side in the page
_MOST = 8_000_000  # pixels, of all frames of a clip: what a phone still decodes
_ENLARGED = 128  # pixels, below which a page shows them as squares
_TRUTH = "truth"
_FAINTEST = 0.01  # the least error that is shown at full strength


@dataclass(frozen=True)
class Table:
    """A table of words and numbers, rows by name; the cells ``best``, (row, column) from 0, are highlighted."""

    caption: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str | float]]
    best: Collection[tuple[int, int]] = ()


@dataclass(frozen=True)
class Curves:
    """Heading of a metric -> name of a model -> its values at the frames ``first``, ``first`` + 1, ...

    ``quiet`` names the baselines, which are drawn grey and dashed.
    """

    panels: Mapping[str, Mapping[str, Sequence[float]]]
    first: int = 1
    quiet: Collection[str] = ()


@dataclass(frozen=True)
class Clip:
    """A real clip (T, C, H, W) and, by name, predictions of its last k frames, (k, C, H, W) each.

    Float in [0, 1] or uint8, RGB or grey. ``notes``: a few words beside some of the names.
    """

    name: str
    truth: Tensor
    made: Mapping[str, Tensor]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """What :func:`write_page` writes, from top to bottom.

    ``lead``: a sentence below the title. ``clips``: all equally long and of one size, the first ``context`` frames of
    each given to the models; they play at ``fps`` frames a second. ``facts``: how it all was made.
    """

    title: str
    lead: str
    tables: Sequence[Table]
    curves: Curves
    clips: Sequence[Clip]
    context: int
    fps: float
    facts: Mapping[str, str]


def write_page(path: str | os.PathLike[str], page: Page) -> None:
    """Write a page that opens from a file, without a network, on a phone as on a screen, in light and dark.

    Errors are shown as :func:`vpfast.visual.write_strip` does: prediction minus truth, mean over channels, red where
    too bright, blue where too dark, at full strength where as large as the largest error in the page. Frames whose
    longer side is above 256 pixels, and those of clips beyond 8 million pixels in all, are shown smaller.

    Raises:
        TypeError, ValueError: clips that cannot be shown together; names the clip. Curves without a finite value.
        ImportError: without Pillow or matplotlib; says what to install.
    """
    style, script = ((files("vpfast.visual") / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n',
        f"<title>{escape(page.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n",
        f"<header>\n<h1>{escape(page.title)}</h1>\n<p>{escape(page.lead)}</p>\n</header>\n",
        *map(_table, page.tables),
        *_curves(page.curves),
        *_clips(page),
        *_facts(page.facts),
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
    ]
    with temporary_for(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = []
    for number, (name, cells) in enumerate(table.rows.items()):
        words = [escape(cell) if isinstance(cell, str) else _svg.number(cell) for cell in cells]
        shown = "".join(
            f"<td><strong>{each}</strong></td>" if (number, at) in table.best else f"<td>{each}</td>"
            for at, each in enumerate(words)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>\n')
    caption = escape(table.caption)
    return (
        f"<figure>\n<figcaption>{caption}</figcaption>\n"
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0">\n<table>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table>\n</div>\n</figure>\n"
    )


def _curves(curves: Curves) -> Iterator[str]:
    """Legend, charts, and the same numbers as tables."""
    panels = {heading: lines for heading, lines in curves.panels.items() if _any_finite(lines)}
    if not panels:
        raise ValueError("there must be at least one finite value to draw, got none")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    style = _svg.styles(names, curves.quiet)
    yield '<section>\n<h2>Frame by frame</h2>\n<ul class="legend">\n'
    for name in names:
        yield f"<li>{_svg.sample(style[name])} {escape(name)}</li>\n"
    yield '</ul>\n<div class="charts">\n'
    for heading, lines in panels.items():
        drawn = _svg.chart(heading, lines, style, curves.first)
        yield f"<figure>\n<figcaption>{escape(heading)}</figcaption>\n{drawn}\n</figure>\n"
    yield "</div>\n<details>\n<summary>The numbers behind the curves</summary>\n"
    for heading, lines in panels.items():
        by_frame = enumerate(zip_longest(*lines.values()), curves.first)
        rows = {str(at): ["" if each is None else each for each in values] for at, values in by_frame}
        yield _table(Table(f"{heading} by frame", list(lines), rows))
    yield "</details>\n</section>\n"


def _any_finite(lines: Mapping[str, Sequence[float]]) -> bool:
    return any(math.isfinite(value) for values in lines.values() for value in values)


def _clips(page: Page) -> Iterator[str]:
    """Every clip, and what plays them all at once."""
    if not page.clips:
        return
    shown = [_checked(clip, page.context) for clip in page.clips]
    shapes = {pixels[_TRUTH].shape[:3] for pixels, _ in shown}
    if len(shapes) > 1:
        raise ValueError(f"clips must be equally long and of one size, got (T, H, W) of {sorted(shapes)}")
    steps, height, width = shapes.pop()
    size = _size(steps, height, width)
    limit = max([_FAINTEST, *(float(np.abs(error).max()) for _, errors in shown for error in errors.values())])
    kind = "pixels" if max(size) < _ENLARGED else "smooth"
    yield f'<section class="clips {kind}" data-steps="{steps}" data-context="{page.context}" data-fps="{page.fps:g}">\n'
    yield f"<h2>Clips</h2>\n<p>{_told(page.context, steps)} Below what a model made lies its error: "
    yield '<span class="red">red</span> where it is too bright, <span class="blue">blue</span> where it is too dark; '
    yield f'full colour stands for {limit:.0%} of the way from black to white.</p>\n<div class="grid">\n'
    for clip, (pixels, errors) in zip(page.clips, shown, strict=True):
        yield f'<article>\n<h3>{escape(clip.name)}</h3>\n<div class="screens">\n'
        truth = _screen(sheet(_shrunk(pixels[_TRUTH], size)), f"{clip.name}, what really happened", _TRUTH)
        yield _column(_TRUTH, "real frames", truth)
        for name, error in errors.items():
            made = _screen(sheet(_shrunk(pixels[name], size)), f"{clip.name}, {name}", "made")
            wrong = sheet(signed(_resized(error, size), limit))
            yield _column(
                name, clip.notes.get(name, ""), made + _screen(wrong, f"{clip.name}, error of {name}", "error")
            )
        yield "</div>\n</article>\n"
    yield (
        '</div>\n<div class="controls" hidden>\n<button type="button">Pause</button>\n'
        f'<input type="range" min="0" max="{steps - 1}" value="0" aria-label="Frame">\n'
        '<output aria-live="off"></output>\n</div>\n</section>\n'
    )


def _checked(clip: Clip, context: int) -> tuple[dict[str, Pixels], dict[str, NDArray[np.float32]]]:
    """The truth and what was made as pixels, and how far the latter is from the former, (k, H, W) in [-1, 1]."""
    if _TRUTH in clip.made:
        raise ValueError(f"{clip.name}: what a model made cannot be called {_TRUTH!r}")
    pixels, steps = check_rows({_TRUTH: clip.truth, **clip.made}, context)
    truth = pixels[_TRUTH].astype(np.float32)
    if len(truth) < steps:
        raise ValueError(f"{clip.name}: the truth has {len(truth)} frames, fewer than the {steps} that a model made")
    return pixels, {name: (pixels[name] - truth[-len(pixels[name]) :]).mean(axis=3) / 255 for name in clip.made}


def _column(name: str, note: str, screens: str) -> str:
    return f"<figure>\n<figcaption>{escape(name)} <small>{escape(note)}</small></figcaption>\n{screens}</figure>\n"


def _told(context: int, steps: int) -> str:
    """What plays, in a sentence."""
    if context == 0 or context == steps:
        return f"{steps} frames, in a loop."
    return f"{steps} frames, in a loop: {context} are given, {steps - context} predicted."


def _screen(frames: Sheet, alt: str, kind: str) -> str:
    """A sheet, which without a script is shown as it is."""
    size = f'data-frames="{frames.frames}" data-columns="{frames.columns}" data-rows="{frames.rows}"'
    told = escape(f"{alt}: {frames.frames} frames")
    return f'<div class="screen {kind}" {size}><img src="{frames.address}" alt="{told}"></div>\n'


def _size(steps: int, height: int, width: int) -> tuple[int, int]:
    """Of frames in the page."""
    factor = min(1.0, _LONGEST / max(height, width), math.sqrt(_MOST / (steps * height * width)))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _shrunk(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    if pixels.shape[1:3] == size:
        return pixels
    channels = [_resized(pixels[..., channel].astype(np.float32), size) for channel in range(pixels.shape[3])]
    shrunk: Pixels = np.stack(channels, axis=3).round().astype(np.uint8)
    return shrunk


def _resized(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """(T, H, W) -> (T, *size), each pixel the mean of those that it takes the place of."""
    resized: NDArray[np.float32] = interpolate(torch.from_numpy(maps)[:, None], size, mode="area")[:, 0].numpy()
    return resized


def _facts(facts: Mapping[str, str]) -> Iterator[str]:
    if not facts:
        return
    yield "<footer>\n<details>\n<summary>How this was made</summary>\n<dl>\n"
    for name, value in facts.items():
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n"
    yield "</dl>\n</details>\n</footer>\n"
