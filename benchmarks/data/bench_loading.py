"""Does a prepared set feed a network? Clips a second of its loader on one core, beside MSPN on another; and its memory.

    python benchmarks/data/bench_loading.py [--gigabytes 2] [--steps 1] [--save]

A set of random frames, RGB, 64x64, is prepared in a temporary folder, as many gigabytes as asked, and a small grey one.
Then, at the same time: one process on the first core goes through its loader in batches of 16 clips of 20 frames,
shuffled, again and again; one on the second core trains MSPN's `released-mnist` on batches of that size, 10 real frames
and 10 fed back, the gradients of four parts added up, and then only predicts with it. The loader's clips are compared
with what was prepared before anything is timed. "Generated" is the loader of moving digits, which draws each clip when
it is asked for; the two take turns. Peak memory is what the process held at most while it prepared, and while it read
every clip once, beyond what it held before; for a hundredth of the set and for all of it. Needs two cores.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

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
WANTED = 3.0


def frames_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


def read(seed: int) -> Iterator[np.ndarray]:
    yield from frames_of(seed)


@dataclass(frozen=True)
class Noise:
    name, size, fit = "noise", (SIDE, SIDE), "squash"
    count: int = 1
    channels: int = 3

    def recordings(self, src: Path) -> list[Recording]:
        return [Recording(f"{seed:06}", "train", src, partial(read, seed)) for seed in range(self.count)]


def check_clips(clips: PreparedClips) -> None:
    for index in (0, len(clips) // 2, len(clips) - 1):
        entry, start = clips.locate(index)
        frames = torch.from_numpy(frames_of(int(entry.name))[start : start + LENGTH]).permute(0, 3, 1, 2)
        assert torch.equal(clips[index], to_grey(frames).float().div(255)), "the loader's clips are not those prepared"


def memory(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Bytes held at most while a set is prepared, and while all of it is read once."""
    recordings = max(1, round(gigabytes * 1e9 / (FRAMES * SIDE * SIDE * 3)))
    (folder / "nothing").touch()

    def prepare_all() -> list[torch.Tensor]:
        prepare(Noise(recordings), folder / "nothing", folder / "set")
        return []

    def read_all() -> list[torch.Tensor]:
        seen = sum(len(batch) for batch in DataLoader(PreparedClips(folder / "set", length=LENGTH), BATCH))
        assert seen == recordings * (FRAMES // LENGTH)
        return []

    preparing, reading = harness.peak_memory(prepare_all), harness.peak_memory(read_all)
    size = sum(path.stat().st_size for path in (folder / "set").rglob("*.npy"))
    return {"bytes": size, "peak_preparing": preparing, "peak_reading": reading}


def consume(core: int, steps: int, begun: Event, ended: Event, results: Any) -> None:
    """Train and predict on one core, on batches that are there already; ends with the process that asked for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MSPN(MSPNConfig.preset("released-mnist"))
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
    for name, work in (("trained", train), ("predicted", predict)):
        began = time.perf_counter()
        for _ in range(steps):
            work()
        results.put((name, BATCH * steps / (time.perf_counter() - began)))
    ended.set()


def clips_a_second(loaders: dict[str, Dataset[torch.Tensor]], until: Callable[[], bool]) -> dict[str, float]:
    """By loaders in this process, shuffled, one after another for a second each."""
    seen, taken = dict.fromkeys(loaders, 0), dict.fromkeys(loaders, 0.0)
    while not until():
        for name, clips in loaders.items():
            began = time.perf_counter()
            for batch in DataLoader(clips, BATCH, shuffle=True):
                seen[name] += len(batch)
                if time.perf_counter() > began + 1:
                    break
            taken[name] += time.perf_counter() - began
    return {name: seen[name] / taken[name] for name in loaders}


def side_by_side(loaders: dict[str, Dataset[torch.Tensor]], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Clips a second of the loaders on the first core while MSPN works on the second, and of MSPN."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    context = multiprocessing.get_context("spawn")
    begun, ended, results = context.Event(), context.Event(), context.Queue()
    worker = context.Process(target=consume, args=(second, steps, begun, ended, results), daemon=True)
    worker.start()
    os.sched_setaffinity(0, {first})
    torch.set_num_threads(1)
    while not begun.wait(1):
        assert worker.is_alive(), "the process that trains has ended"
    loaded = clips_a_second(loaders, lambda: ended.is_set() or not worker.is_alive())
    used = dict(results.get(timeout=60) for _ in range(2))
    worker.join()
    return loaded, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=1, help="batches to train on, and to predict from")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    machine = harness.machine()  # now: the process is about to be tied to one core
    with tempfile.TemporaryDirectory() as folder:
        spaces = {}
        for name, gigabytes in (("warm-up", args.gigabytes / 100), ("a hundredth", args.gigabytes / 100)):
            (Path(folder) / name).mkdir()
            spaces[name] = memory(Path(folder) / name, gigabytes)
        (Path(folder) / "all").mkdir()
        spaces["all"] = memory(Path(folder) / "all", args.gigabytes)
        spaces.pop("warm-up")
        prepare(Noise(10, channels=1), Path(folder) / "all/nothing", Path(folder) / "grey")
        loaders = {
            "prepared in grey": PreparedClips(Path(folder) / "grey", length=LENGTH),
            "prepared in RGB, all of it, read as grey": PreparedClips(
                Path(folder) / "all/set", length=LENGTH, channels=1
            ),
            "generated": MovingDigits(count=10_000, length=LENGTH, size=SIDE),
        }
        for clips in list(loaders.values())[:2]:
            check_clips(clips)
        loaded, used = side_by_side(loaders, args.steps)
    text = report(machine, spaces, loaded, used)
    print(text)
    if args.save:
        record = {"machine": machine, "memory": spaces, "loaded": loaded, "used": used}
        harness.save("loading_cpu", record, text)
    assert min(loaded.values()) >= WANTED * max(used.values()), "the loader is too slow"


def report(
    machine: dict[str, Any], spaces: dict[str, dict[str, Any]], loaded: dict[str, float], used: dict[str, float]
) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    speed = [
        [name, f"{rate:.0f}", *(cell for each in used.values() for cell in (f"{each:.3f}", f"{rate / each:.0f}x"))]
        for name, rate in loaded.items()
    ]
    space = [
        [
            name,
            *(f"{each[key] / 1e6:.1f}" for key in ("bytes", "peak_preparing", "peak_reading")),
        ]
        for name, each in spaces.items()
    ]
    columns = [f"MSPN {name}, clips/s" if not fed else "times as many" for name in used for fed in (False, True)]
    return "\n".join(
        [
            "# Loading clips beside MSPN, 64x64, batches of 16 clips of 20 frames\n",
            f"The loader on one core, `released-mnist` on another, at the same time. {facts}.\n",
            harness.markdown_table(["loader", "clips/s", *columns], speed),
            "\nMB that one process holds at most beyond what it held before:\n",
            harness.markdown_table(["set", "MB", "preparing it", "reading all of it"], space),
        ]
    )


if __name__ == "__main__":
    main()
