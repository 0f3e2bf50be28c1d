"""What a process does that runs for long: does its memory grow, is a file, a thread or a process left behind?

    python tests/soak.py [--minutes 60] [--frames 10000] [--out benchmarks/results/soak_cpu.json]

First streams of ``--frames`` frames, each in a process of its own. Then rounds of everything at once until the time is
up: training, evaluation, prediction, sampling, streaming, coding, films, loading with workers, the command line, and
input that is refused. The process is looked at between two rounds, once a minute, with nothing under way. Networks are
small: what leaks does so a call, whatever its size. Caches of other libraries that have a bound are emptied before, or
brought to it: what they take has an end, which an hour need not reach.

A line is fitted to what memory is held, without the first quarter, in which caches fill. The exit status is 1 where it
rises by more than ``MOST``, and where the last third of the time has at no moment as few files, threads and processes
as the first. The record keeps what was seen; a part that is not run (0 minutes, 0 frames) stays as it was there.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.mathtext import MathTextParser
from torch import Tensor
from torch.multiprocessing.reductions import shared_cache
from torch.utils.data import DataLoader

import vpfast
from vpfast._files import write_file
from vpfast.benchmarks.harness import machine
from vpfast.cli import main as command_line
from vpfast.data import MovingDigits, VideoFolder, read_video
from vpfast.models import MSPN, SHRVQVAE, Codes, MSPNConfig, SHRVQVAEConfig, save
from vpfast.training import DataConfig, TrainConfig, train
from vpfast.training.evaluation import evaluate
from vpfast.visual import write_gif, write_mp4

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MINUTES, FRAMES = 60.0, 10_000
SAMPLE_SECONDS = 60.0
STREAM_SAMPLES = 40
WARM_UP = 0.25  # of the samples

MEMORY = ("resident_bytes", "malloc_bytes", "python_blocks")
COUNTS = ("files", "threads", "processes", "left_files")
MOST = {
    "an hour": {"resident_bytes": 16e6, "malloc_bytes": 2e6, "python_blocks": 20_000},
    "a frame": {"resident_bytes": 100.0, "malloc_bytes": 10.0, "python_blocks": 0.1},
}
"""What may come to be held in that time. The least leak that a call can have, 16 bytes of malloc, is above it."""


# --- looking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a process holds: ``at`` so many hours or frames. ``python_blocks`` are objects of Python's own allocator,
    ``left_files`` what lies in the folder for temporary files."""

    at: float
    resident_bytes: int
    malloc_bytes: int
    python_blocks: int
    files: int
    threads: int
    processes: int
    left_files: int


_SIZES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _SIZES]


_libc = ctypes.CDLL("libc.so.6")
_libc.mallinfo2.restype = _Mallinfo


def empty_caches() -> None:
    """Those of other libraries that have a bound and fill for hours, each for what happens now and then to be new."""
    sys._clear_type_cache()  # of 4096 names, many of them copies: torch looks up "__torch_function__" by a new string
    shared_cache.free_dead_references()  # of tensors that came from workers; torch does so when there are 128
    MathTextParser._parse_cached.cache_clear()  # of 50 labels of axes, which a loss of its own gives a run


def settle_interned_strings() -> None:
    """Bring CPython's table of them to its lasting size, 4 MB more, which some rounds would do after an hour or two.

    Each string that comes and goes uses up a slot of the table. Once none is left it is made anew, for three times as
    many strings as there are.
    """
    for number in range(1_000_000):
        sys.intern(f"{number} comes and goes")


def look(at: float, temporary: Path) -> Sample:
    """At this process, once all that nobody refers to is gone and free memory is given back."""
    empty_caches()
    gc.collect()
    _libc.malloc_trim(0)
    held, process = _libc.mallinfo2(), psutil.Process()
    return Sample(
        at,
        process.memory_info().rss,
        held.uordblks + held.hblkhd,
        sys.getallocatedblocks(),
        process.num_fds(),
        process.num_threads(),
        len(process.children(recursive=True)),
        sum(1 for _ in temporary.rglob("*")),
    )


def judged(samples: Sequence[Sample], unit: str) -> dict[str, dict[str, Any]]:
    """What became of each figure; ``grew`` where it is more than it may be, beyond what its scatter explains."""
    kept = samples[round(WARM_UP * len(samples)) :]
    if len(kept) < 4:
        raise ValueError(f"a line takes 4 samples after the warm-up at least, got {len(kept)} of {len(samples)}")
    found: dict[str, dict[str, Any]] = {}
    at = np.array([sample.at for sample in kept])
    for name in MEMORY:
        values = np.array([getattr(sample, name) for sample in kept], dtype=float)
        (slope, _), covariance = np.polyfit(at, values, 1, cov=True)
        error, most = float(np.sqrt(covariance[0, 0])), MOST[unit][name]
        grew = bool(slope > most and slope > 3 * error)
        found[name] = {f"slope, {unit}": float(slope), "standard error": error, "most": most, "grew": grew}
    third = len(kept) // 3
    for name in COUNTS:
        values = [getattr(sample, name) for sample in kept]
        first, last = min(values[:third] or values[:1]), min(values[-third:] or values[-1:])
        found[name] = {"first": first, "last": last, "grew": last > first}
    return found


def as_columns(samples: Sequence[Sample]) -> dict[str, list[float]]:
    rows = [asdict(sample) for sample in samples]
    return {name: [round(row[name], 4) for row in rows] for name in rows[0]}


# --- streams ----------------------------------------------------------------------------------------------------------

CODES = {
    "preset": "mnist-3x4",
    "channels": (16, 32),
    "residual_channels": 16,
    "prior_channels": 24,
    "prior_blocks": 2,
    "prior_heads": 3,
    "prior_head_dim": 8,
    "prior_ffn": 48,
    "prior_head": 48,
}
SIDE = 32


def mspn() -> MSPN:
    torch.manual_seed(0)
    return MSPN(MSPNConfig(in_channels=1, channels=(16, 32), levels=1, hidden_channels=16)).eval()


def shrvqvae() -> SHRVQVAE:
    torch.manual_seed(0)
    fields = {key: value for key, value in CODES.items() if key != "preset"}
    made = SHRVQVAE(SHRVQVAEConfig.preset(str(CODES["preset"]), **fields))
    made.autoencoder.train()(torch.rand(64, 1, 1, SIDE, SIDE))  # the first batch spreads the codebooks
    return made.eval()


STREAMS: dict[str, Callable[[], Any]] = {
    "MSPN": mspn,
    "MSPN, optimized": lambda: vpfast.optimize(mspn()),
    "S-HR-VQVAE": shrvqvae,
}


def streamed(name: str, frames: int) -> list[Sample]:
    """Push so many frames, each in memory of its own, and look ahead now and then."""
    stream, every = vpfast.Stream(STREAMS[name]()), max(1, frames // STREAM_SAMPLES)
    generator = torch.Generator().manual_seed(1)
    samples = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(1, frames + 1):
            stream.push(torch.rand(1, SIDE, SIDE, generator=generator))
            if number % every == 0:
                stream.rollout(3)
                samples.append(look(number, Path(temporary)))
    return samples


def streams(frames: int) -> dict[str, Any]:
    record: dict[str, Any] = {"frames": frames, "machine": machine(), "of": {}}
    for name in STREAMS:
        print(f"{name}: {frames:,} frames", flush=True)
        began = time.monotonic()
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            samples = alone.submit(streamed, name, frames).result()
        seconds = round(time.monotonic() - began)
        record["of"][name] = {
            "seconds": seconds,
            "judged": judged(samples, "a frame"),
            "samples": as_columns(samples),
        }
    return record


# --- everything at once -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What is worked with. ``folder`` is a new one for each piece of work."""

    folder: Path
    films: Path
    mspn: MSPN
    fast: Any
    codes: SHRVQVAE

    @property
    def clip(self) -> Tensor:
        return torch.rand(2, 4, 1, SIDE, SIDE)


def make_scene(folder: Path) -> Scene:
    films, model = folder / "films", mspn()
    films.mkdir()
    for number, clip in enumerate(MovingDigits(split="val", length=20, count=3, size=SIDE, digit_size=16)):
        write_mp4(films / f"{number}.mp4", clip)
    return Scene(folder, films, model, vpfast.optimize(model), shrvqvae())


DATA = DataConfig(size=SIDE, digit_size=16, digits=1, clips=40)
TRAINING: dict[str, Any] = {"data": DATA, "context": 3, "horizon": 2, "steps": 4, "batch_size": 2, "workers": 2}
WATCHING: dict[str, Any] = {"device": "cpu", "val_every": 2, "val_clips": 3, "save_every": 2, "keep": 1}


def train_mspn(scene: Scene) -> None:
    network = {"channels": [16, 32], "levels": 1, "hidden_channels": 16}  # convolutions by a kernel, and by torch
    config = TrainConfig(out=str(scene.folder / "mspn"), model=network, **TRAINING, **WATCHING)
    train(config, progress=False)
    train(config, resume=True, progress=False)


def train_codes(scene: Scene) -> None:
    network = {"name": "shrvqvae", **CODES, "channels": [8, 8]}
    train(TrainConfig(out=str(scene.folder / "codes"), model=network, **TRAINING, **WATCHING), progress=False)


def measure(scene: Scene) -> None:
    clips = MovingDigits(split="test", length=5, count=4, size=SIDE, digit_size=16)
    for model in (scene.mspn, scene.codes):
        evaluate(model, clips, context=3, batch_size=2, device="cpu")


def predict(scene: Scene) -> None:
    for _ in range(5):
        for model in (scene.mspn, scene.fast, scene.codes):
            model.predict(scene.clip, horizon=3)


def optimize(scene: Scene) -> None:
    for dtype in (None, torch.bfloat16):
        vpfast.optimize(scene.mspn, dtype).predict(scene.clip, horizon=1)


def call_from_threads(scene: Scene) -> None:
    """That end after it, with whatever the kernels keep for a thread."""
    with ThreadPoolExecutor(4) as pool:
        for model in (scene.fast, scene.codes):
            list(pool.map(lambda model: model.predict(scene.clip, horizon=1), [model] * 8))


def sample(scene: Scene) -> None:
    for seed in range(5):
        scene.codes.predict(scene.clip, horizon=2, temperature=1.0, top_k=2, num_futures=2, seed=seed)


def stream(scene: Scene) -> None:
    for model in (scene.mspn, scene.fast, scene.codes):
        camera = vpfast.Stream(model)
        for _ in range(40):
            camera.push(torch.rand(1, SIDE, SIDE))
        camera.rollout(3)


def code(scene: Scene) -> None:
    for _ in range(10):
        written = scene.codes.autoencoder.encode(scene.clip).to_bytes()
        scene.codes.autoencoder.decode(Codes.from_bytes(written), layers=2)


def film(scene: Scene) -> None:
    clip = scene.clip[0]
    write_mp4(scene.folder / "clip.mp4", clip)
    write_gif(scene.folder / "clip.gif", clip)
    for path in sorted(scene.films.iterdir()):
        read_video(path)


def load(scene: Scene) -> None:
    clips = VideoFolder(scene.films, length=5, size=SIDE, channels=1, cache=scene.folder / "cache")
    for persistent in (False, True):
        loader = DataLoader(clips, 2, shuffle=True, num_workers=2, persistent_workers=persistent)
        for _ in range(2):
            for _ in loader:
                pass


def command(scene: Scene) -> None:
    weights, out = scene.folder / "weights", scene.folder / "prediction"
    save(scene.mspn, weights)
    clip = str(next(scene.films.iterdir()))
    for arguments, code in (
        (["predict", clip, "--weights", str(weights), "--horizon", "3", "--out", str(out)], 0),
        (["predict", clip, "--weights", str(scene.films)], 2),
        (["doctor"], 0),
    ):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            if (found := command_line(arguments)) != code:
                raise RuntimeError(f"vpfast {' '.join(arguments)} gave {found}: {said.getvalue()}")


def refuse(scene: Scene) -> None:
    """What is refused leaves nothing behind either."""
    camera, written = vpfast.Stream(scene.fast), scene.codes.autoencoder.encode(scene.clip).to_bytes()
    gates, cell = torch.rand(1, 8, 4), torch.rand(1, 3, 4)
    for _ in range(50):
        for wrong in (
            lambda: camera.push(torch.rand(2, SIDE, SIDE)),
            lambda: camera.push(torch.full((1, SIDE, SIDE), torch.nan)),
            lambda: Codes.from_bytes(written[:-1]),
            lambda: vpfast.ops.edlstm_gates(gates, cell),
            lambda: TrainConfig(steps=0),
            lambda: read_video(scene.folder / "none.mp4"),
        ):
            with contextlib.suppress(ValueError, TypeError, RuntimeError, OSError):
                wrong()
                raise AssertionError("what should be refused was not")


WORKS = (
    train_mspn,
    train_codes,
    measure,
    predict,
    optimize,
    call_from_threads,
    sample,
    stream,
    code,
    film,
    load,
    command,
    refuse,
)


def do(work: Callable[[Scene], None], scene: Scene) -> None:
    with tempfile.TemporaryDirectory(dir=scene.folder, prefix="round") as folder:
        work(replace(scene, folder=Path(folder)))


def soak(minutes: float) -> dict[str, Any]:
    """Round after round for so many minutes, and until there are samples enough."""
    seconds: Counter[str] = Counter()
    samples: list[Sample] = []
    rounds = 0
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary  # of this process and its workers
        try:
            scene = make_scene(Path(name))
            for work in WORKS:
                do(work, scene)
            settle_interned_strings()
            began = time.monotonic()
            while (now := time.monotonic()) < began + 60 * minutes or len(samples) < 6:
                for work in WORKS:
                    started = time.monotonic()
                    do(work, scene)
                    seconds[work.__name__] += time.monotonic() - started
                rounds += 1
                if now >= began + len(samples) * SAMPLE_SECONDS:
                    samples.append(look((time.monotonic() - began) / 3600, Path(temporary)))
                    print(f"{samples[-1].at * 60:5.1f} min, round {rounds}: {samples[-1]}", flush=True)
        finally:
            tempfile.tempdir = None
    return {
        "minutes": round(60 * samples[-1].at, 1),
        "rounds": rounds,
        "seconds": {work: round(spent) for work, spent in seconds.items()},
        "machine": machine(),
        "judged": judged(samples, "an hour"),
        "samples": as_columns(samples),
    }


# --- the record -------------------------------------------------------------------------------------------------------


def growths(record: dict[str, Any]) -> list[str]:
    """A line for each figure of the record that grew."""
    parts = {"everything at once": record["mixed"]} if "mixed" in record else {}
    parts |= record.get("streams", {}).get("of", {})
    return [
        f"{name}: {figure} grew: {', '.join(f'{key} {value:g}' for key, value in found.items() if key != 'grew')}"
        for name, part in parts.items()
        for figure, found in part["judged"].items()
        if found["grew"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of everything at once (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each stream (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_cpu.json", help="default: %(default)s")
    options = parser.parse_args()
    found = {"streams": streams(options.frames)} if options.frames else {}
    found |= {"mixed": soak(options.minutes)} if options.minutes else {}
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"name": "soak"}
    record = kept | found
    write_file(options.out, json.dumps(record) + "\n")
    told = growths(record)
    print("\n".join(told) or "nothing grew")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
