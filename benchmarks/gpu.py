"""Timing on a GPU: what is different there.

A call is timed by events on the stream, after writes of far more than the second-level cache holds: its inputs are in
memory, and the host, whose own time is measured apart, is ahead of the GPU. A rehearsal goes the same way on a CPU,
with small sizes and the clock, to see that it runs.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import vpfast
from vpfast.benchmarks.problem import OWN, Call

FLUSHED = 2**30  # bytes written between two calls, three times over
MOST_ROUNDS = 100


@dataclass
class GpuTiming:
    """Milliseconds a call: percentiles of ``calls`` calls on the GPU with cold caches; and in a row, by the clock."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    p99_ms: float
    in_a_row_ms: float
    calls: int


def by_backend(backends: Any, device: str, call: Call) -> dict[str, Call]:
    """``call`` as "vpfast", by the backend that is taken unless told otherwise, and by each other one that serves."""

    def by(name: str) -> Call:
        def run() -> Any:
            with vpfast.backend(name):  # type: ignore[arg-type]
                return call()

        return run

    first = backends.select(device)
    others = [name for name in ("native", "triton") if name != first and backends.serves(name, device)]
    return {OWN: by(first), **{f"{OWN}, {name}": by(name) for name in others}}


def time_calls(contenders: Mapping[str, Call], device: str, seconds: float = 1.0) -> dict[str, GpuTiming]:
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
    cuts = {name: statistics.quantiles(values, n=100, method="inclusive") for name, values in measured.items()}
    return {
        name: GpuTiming(
            cut[19],
            cut[49],
            cut[79],
            cut[98],
            _in_a_row(contenders[name], device, 20 if cut[49] < 5 else 3),
            len(measured[name]),
        )
        for name, cut in cuts.items()
    }


def peak_memory(call: Call) -> int:
    """Bytes that PyTorch held at most on the GPU during ``call``, beyond what it held before and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return int(max(torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in result), 0))


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

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


class _Clock:
    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


def copying(moved: int, device: str) -> Call:
    """A copy within the device that reads and writes ``moved`` bytes in all."""
    source = torch.empty(max(moved // 8, 1), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)
