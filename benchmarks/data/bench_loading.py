"""Does a prepared set feed a network? Its loader on one core, beside MSPN on another; and its memory:
``vpfast bench loading``.

A set of random frames, RGB, 64x64, is prepared in a temporary folder, two gigabytes of it, and a small grey one. Then,
at the same time: one process on the first core goes through its loader in batches of 16 clips of 20 frames, shuffled,
again and again; one on the second core trains MSPN's `released-mnist` on batches of that size, 10 real frames and 10
fed back, the gradients of four parts added up, and then only predicts with it. The loader's clips are compared with
what was prepared before anything is timed. Needs two cores.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vpfast.benchmarks import harness
from vpfast.benchmarks.problem import Bar, Benchmark, OwnCase, Place, Row, WrongResultError
from vpfast.data import MovingDigits, PreparedClips
from vpfast.data.prepare import prepare
from vpfast.data.resize import to_grey
from vpfast.data.sets.source import Recording
from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss

BATCH, CONTEXT, HORIZON, SIDE = 16, 10, 10, 64
LENGTH = CONTEXT + HORIZON
PART = 4  # clips whose gradients are added up to a batch's: 16 at a time hold 17 GB
FRAMES = 500  # of a recording
WANTED = 3.0  # times the clips that training takes
GIGABYTES, SMALL_GIGABYTES = 2.0, 0.02
BESIDE = "clips from a loader on one core, beside MSPN on another"
SPACE = "memory of preparing a set, and of reading it"

Frames = NDArray[np.uint8]


def frames_of(seed: int) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


def read(seed: int) -> Iterator[Frames]:
    yield from frames_of(seed)


@dataclass(frozen=True)
class Noise:
    """Recordings of nothing, to be prepared as any set is."""

    count: int = 1
    channels: Literal[1, 3] = 3
    name: str = "noise"
    size: tuple[int, int] = (SIDE, SIDE)
    fit: Literal["squash", "crop"] = "squash"

    def recordings(self, src: Path) -> list[Recording]:
        return [Recording(f"{seed:06}", "train", src, partial(read, seed)) for seed in range(self.count)]


def check_clips(clips: PreparedClips) -> None:
    """Raise WrongResultError where the loader's clips are not what was prepared."""
    for index in (0, len(clips) // 2, len(clips) - 1):
        entry, start = clips.locate(index)
        frames = torch.from_numpy(frames_of(int(entry.name))[start : start + LENGTH]).permute(0, 3, 1, 2)
        if not torch.equal(clips[index], to_grey(frames).float().div(255)):
            raise WrongResultError(f"clip {index} of the loader is not what was prepared")


# --- memory -----------------------------------------------------------------------------------------------------------


def prepared(folder: Path, gigabytes: float) -> tuple[int | None, int | None, int]:
    """Bytes held at most while a set is prepared, and while all of it is read once; and bytes of the set."""
    recordings = max(1, round(gigabytes * 1e9 / (FRAMES * SIDE * SIDE * 3)))
    folder.mkdir()
    (folder / "nothing").touch()

    def prepare_all() -> tuple[torch.Tensor, ...]:
        prepare(Noise(recordings), folder / "nothing", folder / "set")
        return ()

    def read_all() -> tuple[torch.Tensor, ...]:
        seen = sum(len(batch) for batch in DataLoader(PreparedClips(folder / "set", length=LENGTH), BATCH))
        if seen != recordings * (FRAMES // LENGTH):
            raise WrongResultError(f"{seen} clips read of {recordings * (FRAMES // LENGTH)}")
        return ()

    preparing, reading = harness.peak_memory(prepare_all), harness.peak_memory(read_all)
    return preparing, reading, sum(path.stat().st_size for path in (folder / "set").rglob("*.npy"))


def memory(place: Place, seconds: float) -> tuple[list[Row], list[Bar]]:
    """Of a set and of a hundredth of it; a first small one warms up."""
    gigabytes = SMALL_GIGABYTES if place.small else GIGABYTES
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, share in (("warm-up", 0.01), ("a hundredth", 0.01), ("all", 1.0)):
            preparing, reading, size = prepared(Path(folder) / name.replace(" ", "-"), share * gigabytes)
            if name == "warm-up":
                continue
            for what, peak in (("preparing", preparing), ("reading", reading)):
                about = {"case": SPACE, "contender": f"vpfast, {what} {name} ({size / 1e6:.0f} MB)"}
                rows.append({**about, "bytes": size, "peak_bytes": peak})
    return rows, []


# --- speed ------------------------------------------------------------------------------------------------------------


def end_with(parent: BaseProcess) -> None:
    """Leave when that process has ended."""
    parent.join()
    os._exit(1)


def consume(core: int, small: bool, begun: Event, ended: Event, results: Any) -> None:
    """Train and predict on one core, on batches that are there already; ends with the process that asked for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MSPN(MSPNConfig.preset("compact" if small else "released-mnist"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    clips = torch.rand(BATCH, LENGTH, 1, SIDE, SIDE)

    def train() -> None:
        optimizer.zero_grad()
        for part in clips.split(PART):
            pixel_loss(model(part[:, :CONTEXT], horizon=HORIZON), part).backward()
        optimizer.step()

    @torch.no_grad()
    def predict() -> None:
        model.predict(clips[:, :CONTEXT], horizon=HORIZON)

    predict()
    begun.set()
    for name, work in (("training", train), ("predicting", predict)):
        results.put((name, harness.seconds_of(work) * 1e3 / BATCH))
    ended.set()


def batch_times(loaders: Mapping[str, Dataset[torch.Tensor]], until: Callable[[], bool]) -> dict[str, list[float]]:
    """Milliseconds a clip, batch by batch, by loaders in this process, shuffled, a second each by turns."""
    times: dict[str, list[float]] = {name: [] for name in loaders}
    while not until() or min(map(len, times.values())) < 2:
        for name, clips in loaders.items():
            began = start = time.perf_counter()
            for batch in DataLoader(clips, BATCH, shuffle=True):
                now = time.perf_counter()
                times[name].append((now - start) * 1e3 / len(batch))
                start = now
                if now > began + 1:
                    break
    return times


def side_by_side(
    loaders: Mapping[str, Dataset[torch.Tensor]], small: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds a clip of the loaders on the first core while MSPN works on the second, and of MSPN."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        raise ValueError("loading needs two cores, one for the loader and one for the network; this process has one")
    first, second = sorted(cores)[:2]
    context = multiprocessing.get_context("spawn")
    begun, ended, results = context.Event(), context.Event(), context.Queue()
    worker = context.Process(target=consume, args=(second, small, begun, ended, results), daemon=True)
    worker.start()
    os.sched_setaffinity(0, {first})
    torch.set_num_threads(1)
    while not begun.wait(1):
        if not worker.is_alive():
            raise RuntimeError("the process that trains has ended")
    times = batch_times(loaders, lambda: ended.is_set() or not worker.is_alive())
    used = dict(results.get(timeout=60) for _ in range(2))
    worker.join()
    os.sched_setaffinity(0, cores)
    return times, used


def speed(place: Place, seconds: float) -> tuple[list[Row], list[Bar]]:
    gigabytes = SMALL_GIGABYTES if place.small else GIGABYTES
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder) / "all", gigabytes)
        prepare(Noise(10, channels=1), Path(folder) / "all/nothing", Path(folder) / "grey")
        loaders: dict[str, Dataset[torch.Tensor]] = {
            "vpfast, prepared in grey": PreparedClips(Path(folder) / "grey", length=LENGTH),
            "vpfast, prepared in RGB, all of it, read as grey": PreparedClips(
                Path(folder) / "all/set", length=LENGTH, channels=1
            ),
            "vpfast, digits generated as they are asked for": MovingDigits(count=10_000, length=LENGTH, size=SIDE),
        }
        for clips in list(loaders.values())[:2]:
            assert isinstance(clips, PreparedClips)
            check_clips(clips)
        times, used = side_by_side(loaders, place.small)
    rows: list[Row] = []
    for name, measured in times.items():
        timing = asdict(harness.timing_of(measured, measured))
        del timing["first_ms"]
        rows.append({"case": BESIDE, "contender": name, **timing})
    rows += [{"case": BESIDE, "contender": f"MSPN, {name}", "p50_ms": took} for name, took in used.items()]
    for row in rows:
        row["clips_s"] = 1e3 / row["p50_ms"]
    slowest = max(row["p50_ms"] for row in rows if row["contender"] in loaders)
    if place.small:
        return rows, []
    fastest = min(used.values())
    return rows, [Bar("the slowest loader, clips for each that MSPN takes", fastest / slowest, WANTED)]


BENCHMARK = Benchmark(
    name="loading",
    about="Does a prepared set feed a network? Clips of 20 frames of 64x64 from a loader, and what memory that takes",
    note=(
        "Milliseconds a clip, of batches of 16. The loader works on one core while MSPN's `released-mnist` trains on "
        "batches of 16, and then predicts, on another. The set holds 2 GB."
    ),
    cases=lambda place: [OwnCase(SPACE, memory), OwnCase(BESIDE, speed)],
    places=("cpu",),
)
