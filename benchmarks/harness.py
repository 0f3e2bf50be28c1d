"""Side-by-side timing: bursts of calls, contender after contender, so that what disturbs one disturbs all."""

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def allocator(mode: str) -> None:
    """Decide where large results come from, which for a memory-bound operator is half of its time.

    "recycled": glibc keeps what is freed and hands it out again, as in a loop that has warmed up. "fresh": every large
    tensor is new memory from the system, a page fault every 4 KB. Left alone, glibc mixes the two by its history, and
    each contender's figure would depend on who ran before.
    """
    trim_threshold, mmap_threshold = -1, -3
    large = 2**30 if mode == "recycled" else 2**17
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(mmap_threshold, large) and libc.mallopt(trim_threshold, large)):
        raise OSError("glibc refused mallopt")


@dataclass
class Timing:
    """Milliseconds a call: 20th, 50th and 80th percentile in a row, and the median of the first after other work."""

    p20: float
    p50: float
    p80: float
    cold: float


BURST, BURST_SECONDS = 20, 0.5


def time_side_by_side(contenders: dict[str, Callable[[], Any]], seconds: float = 6.0) -> dict[str, Timing]:
    """Bursts of `BURST` calls, contender after contender, round after round, for about ``seconds`` after a warm-up.

    What disturbs one disturbs all. The first call of a burst finds the caches full of another contender's data: it is
    kept apart, as `cold`. A slow contender's burst ends early, after two calls at the soonest. Results are dropped at
    once.
    """
    for call in contenders.values():
        stop = time.perf_counter() + BURST_SECONDS
        for k in range(3):
            if k < 1 or time.perf_counter() < stop:
                call()
    warm: dict[str, list[float]] = {name: [] for name in contenders}
    cold: dict[str, list[float]] = {name: [] for name in contenders}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(cold.values()))) < 3:
        for name, call in contenders.items():
            burst_began = time.perf_counter()
            for k in range(BURST):
                start = time.perf_counter()
                if k >= 2 and start - burst_began > BURST_SECONDS:
                    break
                call()
                (warm if k else cold)[name].append((time.perf_counter() - start) * 1e3)
    result = {}
    for name, measured in warm.items():
        cuts = statistics.quantiles(measured, n=10)
        result[name] = Timing(cuts[1], statistics.median(measured), cuts[7], statistics.median(cold[name]))
    return result


def peak_memory(call: Callable[[], Any]) -> int | None:
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
    return held("VmHWM") - before - sum(t.nbytes for t in result)


def available_memory() -> int:
    """Bytes that the system could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure by."""
    import vpfast

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    try:
        revision = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=RESULTS, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vpfast": vpfast.__version__,
        "commit": revision,
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def save(name: str, record: dict[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Keep ``record`` as FOLDER/NAME.json and ``markdown`` as FOLDER/NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown + "\n")
