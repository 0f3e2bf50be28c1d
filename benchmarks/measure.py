"""From cases to rows: look whether results are right, then let contenders take turns."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vpfast.benchmarks import gpu, harness
from vpfast.benchmarks.growth import slopes
from vpfast.benchmarks.problem import (
    OWN,
    Bar,
    Benchmark,
    Call,
    Case,
    Growth,
    OwnCase,
    Place,
    Problem,
    Row,
    WrongResultError,
    in_words,
    median,
)

COPY, PRODUCT = "copy", "matrix product"
MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product is the measure of arithmetic."""
MOST_COPIED = 2**28  # bytes; beyond, the rate of a copy no longer changes
SLOPE_MARGIN = 0.1  # that a slope may be above that of theory
GROWTH_SHARE = 0.25  # of the seconds of a case, for each size of a growth


def of_benchmark(
    benchmark: Benchmark,
    place: Place,
    seconds: float,
    chosen: Sequence[str] = (),
    growth: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[list[Row], list[Bar], bool]:
    """The rows and bars of the cases and growths whose titles contain one of ``chosen``, all of them if it is empty,
    and whether Ctrl-C came before the last of them was measured. Without ``growth`` of the cases alone.

    ``tell`` hears the title of each before it begins.

    Raises:
        WrongResultError: a contender's result is wrong; the message names the case.
        ValueError: no title contains what was chosen; the message lists the titles.
        KeyboardInterrupt: Ctrl-C came before any of it was measured.
    """
    rows: list[Row] = []
    bars: list[Bar] = []
    try:
        for title, work in _chosen(benchmark, place, seconds, chosen, growth):
            tell(title)
            try:
                found_rows, found_bars = work()
            except WrongResultError as error:
                raise WrongResultError(f"{title}: {error}") from error
            rows += found_rows
            bars += found_bars
    except KeyboardInterrupt:
        if not rows:
            raise
        return rows, bars, True
    return rows, bars, False


Work = Callable[[], tuple[list[Row], list[Bar]]]


def _chosen(
    benchmark: Benchmark, place: Place, seconds: float, chosen: Sequence[str], growing: bool = True
) -> Iterable[tuple[str, Work]]:
    works: dict[str, Work] = {}
    for case in benchmark.cases(place):
        works[case.title] = _work(case, place, seconds)
    for growth in benchmark.growth(place) if growing else ():
        works[growth.name] = lambda growth=growth: _of_growth(growth, place, seconds)  # type: ignore[misc]
    for text in chosen:
        if not any(text in title for title in works):
            raise ValueError(f"--case {text}: {benchmark.name} has no such case; there are: {'; '.join(works)}")
    return [(title, work) for title, work in works.items() if not chosen or any(text in title for text in chosen)]


def titles(benchmark: Benchmark, place: Place) -> list[str]:
    """Of all cases and growths."""
    return [title for title, _ in _chosen(benchmark, place, 0.0, ())]


def _work(case: Case | OwnCase, place: Place, seconds: float) -> Work:
    if isinstance(case, OwnCase):
        return lambda: case.measure(place, seconds)
    return lambda: of_case(case, place, seconds)


def _of_growth(growth: Growth, place: Place, seconds: float) -> tuple[list[Row], list[Bar]]:
    """The rows of all sizes; the slopes of vpfast's time and memory are not to be above those of theory."""
    rows = []
    for size, case in growth.cases.items():
        found, _ = of_case(case, place, seconds * GROWTH_SHARE, floors=False)
        rows += [{**row, "growth": growth.name, "over": growth.over, "size": size} for row in found]
    fits = {fit["of"]: fit["slope"] for fit in slopes(rows) if fit["contender"] == OWN}
    bars = [
        Bar(f"{growth.name}, slope of {of}", fits[of], wanted + SLOPE_MARGIN, "", at_most=True)
        for of, wanted in growth.expected.items()
        if of in fits and not place.small
    ]
    return rows, bars


def of_case(case: Case, place: Place, seconds: float, floors: bool = True) -> tuple[list[Row], list[Bar]]:
    """The rows of one case, a contender each. ``floors``: with what the machine does at best, and the shares of it.

    Raises:
        WrongResultError: a contender's result is wrong.
    """
    if not place.gpu:
        harness.allocator(case.memory)
    torch.manual_seed(0)
    torch.compiler.reset()
    problem = case.prepare(place)
    running, peaks, slow = looked_at(problem, place)
    best = _floors(problem, place, running) if floors else {}
    calls = {**{name: floor.call for name, floor in best.items()}, **running}
    timings: Any = (
        gpu.time_calls(calls, place.device, seconds) if place.gpu else harness.time_side_by_side(calls, seconds, slow)
    )
    rows: list[Row] = [{"case": case.title, "contender": name, **asdict(timing)} for name, timing in timings.items()]
    _add_work(rows, problem, best)
    for row in rows:
        if (peak := peaks.get(row["contender"])) is not None:
            row["peak_bytes"] = peak
        row.update(problem.figures.get(row["contender"], {}))
    bars = list(problem.finish(rows))
    _add_ratios(rows, problem)
    rows += [{"case": case.title, "contender": name, "absent": why} for name, why in problem.absent.items()]
    return rows, bars


def looked_at(problem: Problem, place: Place) -> tuple[dict[str, Call], dict[str, int | None], set[str]]:
    """The contenders whose results were looked at and are right, what memory each takes beyond its results, and which
    of them are slow.

    A peer that does not run here is told in ``problem.absent``; vpfast has to run.
    """
    running: dict[str, Call] = {}
    peaks: dict[str, int | None] = {}
    slow = set()
    for name, call in problem.contenders.items():
        try:
            found = call()
        except Exception as error:
            if name.startswith(OWN):
                raise
            problem.absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        problem.check(name, found)
        del found
        running[name] = call
        began = time.perf_counter()  # of the second call: the first one may have compiled
        peaks[name] = gpu.peak_memory(call) if place.device == "cuda" else harness.peak_memory(call)
        if time.perf_counter() - began > harness.SLOW_SECONDS:
            slow.add(name)
    return running, peaks, slow


@dataclass(frozen=True)
class _Floor:
    """What the machine does at best, timed in the same run."""

    call: Call
    moved: int | None = None
    flops: int | None = None


def _floors(problem: Problem, place: Place, running: Iterable[str]) -> dict[str, _Floor]:
    floors = {}
    if problem.moved is not None:
        moved = min(problem.moved, MOST_COPIED)
        source = torch.empty(max(moved // 8, 1))
        if not place.gpu:
            source.normal_()  # memory that is there
        call: Call = gpu.copying(moved, place.device) if place.gpu else lambda: (source.clone(),)
        floors[COPY] = _Floor(call, moved=8 * len(source))
    if problem.flops is not None:
        size = 64 if place.small else MATRIX[place.device]
        for dtype in dict.fromkeys(problem.dtypes.get(name, problem.dtype) for name in running):
            square = torch.randn(size, size, device=place.device).to(dtype)
            product: Call = lambda square=square: (square @ square,)  # type: ignore[misc]  # noqa: E731
            floors[_product(dtype)] = _Floor(product, flops=2 * size**3)
    return floors


def _product(dtype: torch.dtype) -> str:
    return f"{PRODUCT}, {in_words(dtype)}"


def is_floor(contender: str) -> bool:
    """Is this what the machine does at best, and no contender?"""
    return contender == COPY or contender.startswith(PRODUCT)


def _add_work(rows: list[Row], problem: Problem, floors: Mapping[str, _Floor]) -> None:
    """Bytes and operations, their rates, and the shares of what the machine did at best in the same run."""
    for row in rows:
        name = row["contender"]
        if name in problem.helpers:
            row["helper"] = True
            continue
        done = floors.get(name, _Floor(lambda: (), problem.moved, problem.flops))
        if done.moved is not None:
            row |= {"bytes": done.moved, "gb_s": done.moved / row["p50_ms"] / 1e6}
        if done.flops is not None:
            row |= {"flops": done.flops, "tflop_s": done.flops / row["p50_ms"] / 1e9}
    found = {row["contender"]: row for row in rows}
    for row in rows:
        if COPY in found and "gb_s" in row:
            row["copy_share"] = row["gb_s"] / found[COPY]["gb_s"]
        name = row["contender"]
        product = name if is_floor(name) else _product(problem.dtypes.get(name, problem.dtype))
        if product in found and "tflop_s" in row:
            row["matmul_share"] = row["tflop_s"] / found[product]["tflop_s"]


def _add_ratios(rows: list[Row], problem: Problem) -> None:
    """``ratio``: a contender's median over that of vpfast; above 1 vpfast is the faster one."""
    own = median(rows, OWN)
    for row in rows:
        alone = is_floor(row["contender"]) or row["contender"] in problem.helpers
        if own is not None and "p50_ms" in row and not alone:
            row["ratio"] = row["p50_ms"] / own
