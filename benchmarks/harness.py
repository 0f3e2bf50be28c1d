"""The clock, the memory and the machine: what is measured with."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpfast.benchmarks.problem import Call, Memory

HERE = Path(__file__).resolve().parent


def allocator(mode: Memory) -> None:
    """Decide where large results come from, which for a memory-bound operator is half of its time.

    "recycled": glibc keeps what is freed and hands it out again, as in a loop that has warmed up. "fresh": every large
    tensor is new memory from the system, a page fault every 4 KB. Left alone, glibc mixes the two by its history, and
    each contender's figure would depend on who ran before. What was kept once is not given back: "fresh" comes first.
    """
    trim_threshold, mmap_threshold = -1, -3
    large = 2**30 if mode == "recycled" else 2**17
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(mmap_threshold, large) and libc.mallopt(trim_threshold, large)):
        raise OSError("glibc refused mallopt")


@dataclass
class Timing:
    """Milliseconds a call: percentiles of ``calls`` calls in a row, and the median of the first after other work."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    p99_ms: float
    first_ms: float
    calls: int


BURST, BURST_SECONDS, SLOW_SECONDS, ROUNDS = 20, 0.5, 2.0, 3


def time_side_by_side(
    contenders: Mapping[str, Call], seconds: float = 6.0, slow: Collection[str] = ()
) -> dict[str, Timing]:
    """Bursts of `BURST` calls, contender after contender, round after round, for about ``seconds`` after a warm-up.

    What disturbs one disturbs all. The first call of a burst finds the caches full of another contender's data: it is
    kept apart, as `first_ms`. A slow contender's burst ends early, after two calls at the soonest; one that takes
    longer than `SLOW_SECONDS` is called once a round. ``slow`` are those known to, which are not warmed up. Results are
    dropped at once.
    """
    slow = {name for name, call in contenders.items() if name in slow or _warm_up(call) > SLOW_SECONDS}
    warm: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}
    stop = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < stop or rounds < ROUNDS:
        rounds += 1
        for name, call in contenders.items():
            burst_began = time.perf_counter()
            for k in range(1 if name in slow else BURST):
                start = time.perf_counter()
                if k >= 2 and start - burst_began > BURST_SECONDS:
                    break
                call()
                took = (time.perf_counter() - start) * 1e3
                if k == 0:
                    first[name].append(took)
                if k > 0 or name in slow:
                    warm[name].append(took)
    return {name: timing_of(measured, first[name]) for name, measured in warm.items()}


def _warm_up(call: Call) -> float:
    """Up to three calls; seconds of the first one."""
    began = time.perf_counter()
    call()
    took = time.perf_counter() - began
    for _ in range(2):
        if time.perf_counter() < began + BURST_SECONDS:
            call()
    return took


def timing_of(measured: Sequence[float], first: Sequence[float]) -> Timing:
    """Of milliseconds call by call, two at least, and of those of first calls."""
    cuts = statistics.quantiles(measured, n=100, method="inclusive")
    return Timing(cuts[19], statistics.median(measured), cuts[79], cuts[98], statistics.median(first), len(measured))


def peak_memory(call: Call) -> int | None:
    """Bytes that the process held at most during ``call``, beyond what it held before and the tensors returned.

    All memory counts, with what neither Python nor PyTorch knows of. None where the system does not tell.
    """
    peak_reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def held(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        peak_reset.write_text("5")
    except OSError:
        return None
    before = held("VmRSS")
    result = call()
    return max(held("VmHWM") - before - sum(t.nbytes for t in result), 0)


def available_memory() -> int:
    """Bytes that the system could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def seconds_of(call: Callable[[], object]) -> float:
    """By the clock, of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge a figure by."""
    import vpfast

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    told = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vpfast": vpfast.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        told |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda}
        try:
            import triton

            told["triton"] = triton.__version__
        except ImportError:
            told["triton"] = None
    return told


def _commit() -> str:
    """Of the checkout that this file lies in; ``unknown`` where it is installed."""
    command = ["git", "describe", "--always", "--dirty"]
    if not (HERE.parent / ".git").exists():
        return "unknown"
    try:
        return subprocess.check_output(command, cwd=HERE, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
