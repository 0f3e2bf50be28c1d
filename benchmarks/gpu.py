"""Timing on a GPU, and the record of it: what the benchmarks share when they are given `--device cuda`.

A call is timed by events on the stream, after writes of far more than the second-level cache holds: its inputs are in
memory, and the host, whose own time is measured apart, is ahead of the GPU. `--rehearse` goes the same way on a CPU,
with small sizes and the clock, to see that it runs.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import vpfast

FLUSHED = 2**30  # bytes written between two calls, three times over
MOST_ROUNDS = 100

Call = Callable[[], Any]


@dataclass
class GpuTiming:
    """Milliseconds a call: 20th, 50th and 80th percentile on the GPU with cold caches; and in a row, by the clock."""

    p20: float
    p50: float
    p80: float
    in_a_row: float


@dataclass
class Bar:
    """What was asked for beforehand; ``value`` is None where it could not be measured."""

    what: str
    value: float | None
    wanted: float
    unit: str = "x"
    at_most: bool = False

    def __str__(self) -> str:
        asked = f"wanted at {'most' if self.at_most else 'least'} {self.wanted:g}{self.unit}"
        if self.value is None:
            return f"bar: {self.what}: {asked}: not measured, not met"
        met = self.value <= self.wanted if self.at_most else self.value >= self.wanted
        return f"bar: {self.what}: {self.value:.2f}{self.unit}, {asked}: {'met' if met else 'not met'}"


def by_backend(backends: Any, device: str, call: Call) -> dict[str, Call]:
    """``call`` as "vpfast", by the backend that is taken unless told otherwise, and by each other one that serves."""

    def by(name: str) -> Call:
        def run() -> Any:
            with vpfast.backend(name):
                return call()

        return run

    first = backends.select(device)
    others = [name for name in ("native", "triton") if name != first and backends.serves(name, device)]
    return {"vpfast": by(first), **{f"vpfast, {name}": by(name) for name in others}}


def checked(contenders: dict[str, Call], check: Callable[[str, Any], None]) -> tuple[dict[str, Call], list[str]]:
    """The contenders that run, each looked at once, and why the others do not. vpfast has to run."""
    running, refused = {}, []
    for name, call in contenders.items():
        try:
            found = call()
        except Exception as error:
            if name.startswith("vpfast"):
                raise
            refused.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        check(name, found)
        running[name] = call
    return running, refused


def time_calls(contenders: dict[str, Call], device: str, seconds: float = 1.0) -> dict[str, GpuTiming]:
    """Contender after contender, round after round, for about ``seconds`` and 10 to 100 rounds."""
    clock = _Clock() if device == "cpu" else _Events()
    for call in contenders.values():
        for _ in range(3):
            call()
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    stop = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= 10 and time.perf_counter() > stop:
            break
        for name, call in contenders.items():
            measured[name].append(clock(call))
    cuts = {name: statistics.quantiles(values, n=10) for name, values in measured.items()}
    return {
        name: GpuTiming(cut[1], cut[4], cut[7], _in_a_row(contenders[name], device, 20 if cut[4] < 5 else 3))
        for name, cut in cuts.items()
    }


def _in_a_row(call: Call, device: str, count: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / count


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class _Events:
    def __init__(self) -> None:
        self.scratch = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class _Clock:
    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


def copying(moved: int, device: str) -> Call:
    """A copy within the device that reads and writes ``moved`` bytes in all."""
    source = torch.empty(max(moved // 8, 1), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def rows_of(case: str, timings: dict[str, GpuTiming], **figures: Any) -> list[dict[str, Any]]:
    return [{"case": case, "who": name, **figures, **asdict(timing)} for name, timing in timings.items()]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def median(rows: Sequence[dict[str, Any]], case: str, who: str) -> float | None:
    return next((row["p50"] for row in rows if (row["case"], row["who"]) == (case, who)), None)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


# --- the record -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        own, copy = median(rows, row["case"], "vpfast"), median(rows, row["case"], "copy")
        lines.append(
            [
                row["case"],
                row["who"],
                f"{row['p50']:.4f}",
                f"{row['p20']:.4f}-{row['p80']:.4f}",
                f"{row['in_a_row']:.4f}",
                "" if own is None or row["who"] == "copy" else f"{row['p50'] / own:.2f}",
                f"{row['bytes'] / row['p50'] / 1e6:.0f}" if "bytes" in row else "",
                "" if copy is None or row["who"] == "copy" else f"{copy / row['p50']:.0%}",
                f"{row['flops'] / row['p50'] / 1e9:.1f}" if "flops" in row else "",
            ]
        )
    header = ["case", "who", "ms", "p20-p80", "in a row", "times vpfast's", "GB/s", "of the copy", "TFLOP/s"]
    return harness.markdown_table(header, lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="with --device cuda: keep the record in this folder")
    parser.add_argument(
        "--rehearse", action="store_true", help="with --device cuda: small, on a CPU, to see that it runs"
    )


def machine(device: str) -> dict[str, Any]:
    told = harness.machine()
    if device != "cpu":
        found = torch.cuda.get_device_properties(0)
        told |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda}
    try:
        import triton

        told["triton"] = triton.__version__
    except ImportError:
        told["triton"] = None
    return told


def report(op: str, rows: Sequence[dict[str, Any]], bars: Sequence[Bar], refused: Sequence[str], options: Any) -> None:
    """Print the record; keep it in ``options.out``, or under results/ with ``options.save``."""
    device = device_of(options)
    told = machine(device)
    how = (
        "Medians on the GPU, between events, inputs not in its caches; `in a row` is a call's share of several by "
        "the clock, with what the host takes. Allocation of the results counted."
    )
    by = ", ".join(f"{key} {value}" for key, value in told.items())
    text = [f"# {op} on {told.get('gpu', 'a CPU, rehearsed')}", "", f"{how} {by}.", "", table(rows), ""]
    text += [*(f"{bar}  " for bar in bars), *(f"not run: {line}  " for line in refused)]
    print("\n".join(text))
    folder = options.out or (harness.RESULTS if options.save else None)
    if folder is None or device == "cpu":
        return
    name = f"{op}_{re.sub(r'[^a-z0-9]+', '-', told['gpu'].lower())}"
    record = {"machine": told, "rows": list(rows), "bars": [str(bar) for bar in bars], "refused": list(refused)}
    harness.save(name, record, "\n".join(text), folder)


def device_of(options: Any) -> str:
    return "cpu" if options.rehearse else "cuda"
