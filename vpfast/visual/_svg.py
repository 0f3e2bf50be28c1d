"""A line chart as SVG that takes its colours from the page around it."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

STYLES = 8
"""How many lines a page tells apart, by colour and by mark; further ones begin again."""

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_MARKED = 20  # marks on a line, at the most twice as many

_MARKS = (
    '<circle r="3"/>',
    '<path d="M-3-3h6v6h-6z"/>',
    '<path d="M0-4 3.6 2.6h-7.2z"/>',
    '<path d="M0-4 3.6 0 0 4-3.6 0z"/>',
    '<path d="M0 4 3.6-2.6h-7.2z"/>',
    '<path d="M-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z"/>',
    '<path d="M-3.6-2.2-2.2-3.6 0-1.4 2.2-3.6 3.6-2.2 1.4 0 3.6 2.2 2.2 3.6 0 1.4-2.2 3.6-3.6 2.2-1.4 0z"/>',
    '<path d="M-1.5-4h3v8h-3z"/>',
)


def styles(names: Sequence[str], quiet: Collection[str]) -> dict[str, int | None]:
    """The number of each line's style; None for a quiet one, grey and dashed."""
    loud = [name for name in names if name not in quiet]
    return {name: None if name in quiet else loud.index(name) % STYLES for name in names}


def sample(style: int | None) -> str:
    """A short piece of a line, for a legend."""
    line = '<path class="line" d="M1 6h24"/>'
    mark = "" if style is None else f'<g class="mark" transform="translate(13 6)">{_MARKS[style]}</g>'
    return f'<svg class="sample {_class(style)}" viewBox="0 0 26 12" aria-hidden="true">{line}{mark}</svg>'


def chart(heading: str, lines: Mapping[str, Sequence[float]], style: Mapping[str, int | None], first: int) -> str:
    """An ``<svg>`` of the lines over the frames ``first``, ``first`` + 1, ...; what is not finite is left out.

    It tells in words what it shows, and holds a line ``.cursor`` that a script may move to a frame: attributes
    ``data-first``, ``data-left`` and ``data-step`` of the ``<svg>`` say where the frames are.

    Raises:
        ValueError: no finite value.
    """
    finite = [value for values in lines.values() for value in values if math.isfinite(value)]
    if not finite:
        raise ValueError(f"{heading}: there must be at least one finite value to draw, got none")
    count = max(map(len, lines.values()))
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, count - 1)
    left = _LEFT if count > 1 else (_LEFT + _WIDTH - _RIGHT) / 2
    ticks = _ticks(min(finite), max(finite))
    low, high = min(ticks[0], *finite), max(ticks[-1], *finite)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{number(tick)}</text>')
    for frame in _whole_ticks(first, first + count - 1):
        x = left + (frame - first) * step
        parts.append(f'<text class="x" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}">{frame}</text>')
    parts.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}">frame</text>')
    parts.append(f'<path class="cursor" d="M0 {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for name, values in lines.items():
        points = [(left + at * step, y(value)) for at, value in enumerate(values) if math.isfinite(value)]
        path = "M" + "L".join(f"{x:.1f} {height:.1f}" for x, height in points)
        parts.append(f'<g class="{_class(style[name])}"><title>{escape(name)}</title><path class="line" d="{path}"/>')
        mark = style[name]
        if mark is not None:
            every = max(1, len(points) // _MARKED)
            spots = (f'<g transform="translate({x:.1f} {h:.1f})">{_MARKS[mark]}</g>' for x, h in points[::every])
            parts.append(f'<g class="mark">{"".join(spots)}</g>')
        parts.append("</g>")
    told = escape(f"{heading} by frame. " + "; ".join(_told(name, values, first) for name, values in lines.items()))
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}." '
        f'data-first="{first}" data-count="{count}" data-left="{left:g}" data-step="{step:.4g}">{"".join(parts)}</svg>'
    )


def _told(name: str, values: Sequence[float], first: int) -> str:
    ends = f"{name}: {number(values[0])} at frame {first}"
    return ends if len(values) < 2 else f"{ends}, {number(values[-1])} at frame {first + len(values) - 1}"


def _class(style: int | None) -> str:
    return "quiet" if style is None else f"c{style}"


def number(value: float) -> str:
    """In at least four digits, never with an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around and between two."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high)]


def _whole_ticks(low: int, high: int) -> list[int]:
    from matplotlib.ticker import MaxNLocator

    return [int(tick) for tick in MaxNLocator(7, integer=True).tick_values(low, high) if low <= tick <= high]
