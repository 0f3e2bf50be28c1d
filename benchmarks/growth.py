"""How time and memory grow: straight lines on log-log axes, fitted by least squares."""

import math
from collections.abc import Sequence
from typing import Any

from vpfast.benchmarks.problem import Row

FIGURES = {"time": "p50_ms", "memory": "peak_bytes"}
LOWEST = {"time": 0.0, "memory": 1e5}
"""What is not above is left out of a fit: a few pages more or less are the allocator's."""


def fit(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """(slope, its standard error, intercept) of log(value) over log(size), all positive; three points at least.

    value = exp(intercept) size^slope.

    Raises:
        ValueError: fewer points, points at one size alone, or what is not positive.
    """
    if len(sizes) < 3 or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"a slope takes three positive points at two sizes at least, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, mean = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - middle) ** 2 for a in x)
    slope = math.fsum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean - slope * middle
    left = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(left / (len(x) - 2) / spread), intercept


def slopes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of time and memory of every contender in every growth among ``rows``, where there are three values to fit."""
    found = []
    grown = [row for row in rows if "growth" in row]
    for growth, contender in dict.fromkeys((row["growth"], row["contender"]) for row in grown):
        same = [row for row in grown if (row["growth"], row["contender"]) == (growth, contender)]
        for of, key in FIGURES.items():
            points = [(row["size"], row[key]) for row in same if (row.get(key) or 0) > LOWEST[of]]
            if len(points) < 3:
                continue
            slope, error, intercept = fit(*zip(*points, strict=True))
            found.append(
                {
                    "growth": growth,
                    "contender": contender,
                    "of": of,
                    "slope": slope,
                    "error": error,
                    "intercept": intercept,
                    "points": len(points),
                }
            )
    return found
