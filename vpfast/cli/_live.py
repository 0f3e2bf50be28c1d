"""``vpfast predict --live``: a video frame by frame, as a camera would give it, and after each frame what comes next.

Nothing here grows with the number of frames but the film, and some bytes a frame for its index.
"""

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vpfast import Stream, optimize
from vpfast.cli._out import check_out_file
from vpfast.cli._video import fit_of, frame_size
from vpfast.data.video import frame_rate, iter_video
from vpfast.metrics import EXACT_PSNR
from vpfast.models import MSPN, SHRVQVAE
from vpfast.models.shrvqvae.shrvqvae import CONTEXT
from vpfast.training import TrainConfig
from vpfast.training.checkpoint import read_weights
from vpfast.training.device import pick_device
from vpfast.training.recipes import BASELINE, MODEL, counted
from vpfast.training.signals import caught_signals
from vpfast.visual import beside, growing_mp4

FPS = 10
"""Frames a second of a film that does not say."""


def run(options: Any) -> int:
    """Look and predict until the video ends; returns 0, or 128 + the number of the signal that ended it.

    A signal ends it between two frames, and what was seen until then is told and kept. Nothing is left behind where
    something fails.
    """
    if options.out is not None:
        if options.out.suffix.lower() != ".mp4":
            raise ValueError(f"--out {options.out}: must end in .mp4 with --live, which writes one film as frames come")
        check_out_file(options.out, options.force)
    model, trained = read_weights(options.weights, MSPN, SHRVQVAE)
    assert isinstance(model, MSPN | SHRVQVAE)
    context = _context(options.context, model, trained)
    rate = options.fps or frame_rate(options.video) or FPS
    size, fit, channels = frame_size(options.size, trained), fit_of(trained), model.config.in_channels
    frames = Frames(
        lambda: iter_video(options.video, size, channels, fit),
        options.loop,
        options.frames,
        rate if options.pace else None,
    )
    device = pick_device(options.device)
    fast = optimize(model.to(device), torch.bfloat16 if options.bfloat16 else None)
    watcher = Watcher(Stream(fast, context), options.horizon, device)
    with caught_signals() as caught, film(options.out, rate, options.horizon) as show:
        watcher.watch(frames, show, caught)
    told = {
        "video": str(options.video),
        "frames": watcher.looked,
        "missed": frames.missed,
        "horizon": options.horizon,
        **({} if context is None else {"context": context}),
        "device": device.type,
        **watcher.told(),
        "out": None if options.out is None else str(options.out),
        "stopped_by": signal.Signals(caught[0]).name if caught else None,
    }
    print(json.dumps(told, indent=2) if options.json else _page(told))
    return 128 + caught[0] if caught else 0


def _context(asked: int | None, model: MSPN | SHRVQVAE, trained: TrainConfig | None) -> int | None:
    """How many frames are remembered one by one; None of a model that has all of them in a state of one size."""
    if isinstance(model, SHRVQVAE):
        return asked or (trained.context if trained else CONTEXT)
    if asked is not None:
        raise ValueError(
            f"--context {asked} does not go with --live and an MSPN, which has its part of every frame in one state"
        )
    return None


class Frames:
    """The frames of a video, uint8 (C, H, W), one by one.

    Args:
        read: begins the video at its start.
        loop: begin it again where it ends, without end.
        count: how many frames to read in all; None: all that there are.
        rate: give so many a second, and let go those that the next has overtaken before anyone asked for them; None:
            each as soon as it is asked for.

    Attributes:
        missed: how many were let go.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Tensor]],
        loop: bool = False,
        count: int | None = None,
        rate: float | None = None,
    ) -> None:
        self._read, self._loop, self._rate = read, loop, rate
        self.count, self.missed = count, 0

    def __iter__(self) -> Iterator[Tensor]:
        begun = None
        for number, frame in enumerate(islice(self._each(), self.count)):
            if self._rate is not None:
                now = time.perf_counter()
                begun = now if begun is None else begun
                early = begun + number / self._rate - now
                if early <= -1 / self._rate:
                    self.missed += 1
                    continue
                time.sleep(max(0.0, early))
            yield frame

    def _each(self) -> Iterator[Tensor]:
        yield from self._read()
        while self._loop:
            yield from self._read()


class Latencies:
    """Quantiles of durations to one percent, in constant memory: each bin is 1 % wider than the one before."""

    _SHORTEST, _LONGEST, _RATIO = 1e-6, 1e4, 1.01

    def __init__(self) -> None:
        self._counts = np.zeros(math.ceil(math.log(self._LONGEST / self._SHORTEST, self._RATIO)), np.int64)
        self._worst = 0.0

    def add(self, seconds: float) -> None:
        place = int(math.log(max(seconds, self._SHORTEST) / self._SHORTEST, self._RATIO))
        self._counts[min(place, len(self._counts) - 1)] += 1
        self._worst = max(self._worst, seconds)

    def quantile(self, share: float) -> float:
        """So many seconds or less is what ``share`` of all took, of which there is at least one."""
        upto = np.cumsum(self._counts)
        place = int(np.searchsorted(upto, share * upto[-1]))
        return self._worst if share == 1 else min(float(self._SHORTEST * self._RATIO ** (place + 0.5)), self._worst)


class Errors:
    """Means over frames of MSE and PSNR, as the protocol ``default`` of ``vpfast.metrics`` has them."""

    def __init__(self) -> None:
        self.frames, self._mse, self._psnr = 0, 0.0, 0.0

    def add(self, prediction: Tensor, real: Tensor) -> None:
        """Two (C, H, W) in [0, 1]."""
        mse = float((prediction - real).double().square().mean())
        self.frames += 1
        self._mse += mse
        self._psnr += -10 * math.log10(max(mse, 10 ** (-EXACT_PSNR / 10)))

    def told(self) -> dict[str, float]:
        return {"mse": self._mse / self.frames, "psnr": self._psnr / self.frames}


Show = Callable[[int, Tensor | None, Tensor | None], None]
"""Takes the number of a frame, the frame (C, H, W) and what had been predicted of it, each where there is one."""


@contextmanager
def film(path: Path | None, rate: float, horizon: int) -> Iterator[Show]:
    """What writes frames, beside what had been predicted of them, to a film that is whole when the block ends well."""
    if path is None:
        yield lambda number, truth, prediction: None
        return
    predicted = f", predicted {counted(horizon, 'frame')} before"
    with growing_mp4(path, rate) as write:

        def show(number: int, truth: Tensor | None, prediction: Tensor | None) -> None:
            note = f"frame {number}" + ("" if prediction is None else predicted)
            write(beside({"truth": truth, MODEL: prediction}, MODEL, note).unsqueeze(0))

        yield show


class _Ahead(NamedTuple):
    """A frame as it was predicted, and the last one known then."""

    prediction: Tensor
    last: Tensor


class Watcher:
    """Predicts after each frame, and holds what came against what had been predicted of it.

    Attributes:
        looked: how many frames it has seen.
    """

    def __init__(self, stream: Stream[Any], horizon: int, device: torch.device) -> None:
        self._stream, self._horizon, self._device = stream, horizon, device
        self._latencies, self._errors = Latencies(), {MODEL: Errors(), BASELINE: Errors()}
        self._waiting: deque[_Ahead] = deque()
        self._seconds = 0.0
        self.looked = 0

    def watch(self, frames: Frames, show: Show, caught: list[int]) -> None:
        """Look at all frames, or until a signal is caught, and show at the end what has not come any more."""
        begun = time.perf_counter()
        with tqdm(desc="live", unit="frame", total=frames.count, disable=None, leave=False) as bar:
            for frame in frames:
                self._look(frame, show)
                if not bar.disable:
                    p50, p99 = (_ms(self._latencies.quantile(share)) for share in (0.5, 0.99))
                    bar.set_postfix_str(f"p50 {p50}, p99 {p99}", refresh=False)
                bar.update()
                if caught:
                    break
        self._seconds = time.perf_counter() - begun
        for number, ahead in enumerate(self._waiting, start=self.looked + 1):
            show(number, None, ahead.prediction)

    def _look(self, frame: Tensor, show: Show) -> None:
        """uint8 (C, H, W)"""
        begun = time.perf_counter()
        real = frame.float().div(255)
        prediction = self._predict(real.to(self._device)).float().clamp(0, 1).cpu()
        self._latencies.add(time.perf_counter() - begun)
        self.looked += 1
        foretold = None
        if len(self._waiting) == self._horizon:
            foretold, last = self._waiting.popleft()
            self._errors[MODEL].add(foretold, real)
            self._errors[BASELINE].add(last, real)
        show(self.looked, real, foretold)
        self._waiting.append(_Ahead(prediction, real))

    def _predict(self, frame: Tensor) -> Tensor:
        following = self._stream.push(frame)
        return following if self._horizon == 1 else self._stream.rollout(self._horizon)[-1]

    def told(self) -> dict[str, Any]:
        """What there is to tell of one frame or more, in plain values."""
        shares = {"p50": 0.5, "p99": 0.99, "longest": 1.0}
        measured = {name: each.told() for name, each in self._errors.items() if each.frames}
        return {
            "seconds": self._seconds,
            "frames_per_second": self.looked / self._seconds,
            "latency_ms": {name: 1e3 * self._latencies.quantile(share) for name, share in shares.items()},
            "frames_measured": self._errors[MODEL].frames,
            "errors": measured,
        }


def _page(told: dict[str, Any]) -> str:
    """What was seen, how fast, and how well it was predicted, in lines."""
    horizon = told["horizon"]
    which = "the next one" if horizon == 1 else f"the one {horizon} further on"
    ended = f", until {told['stopped_by']}" if told["stopped_by"] else ""
    missed = f", {told['missed']} more missed" if told["missed"] else ""
    film = f": {told['out']}" if told["out"] else ""
    seen = f"{counted(told['frames'], 'frame')} of {told['video']}{ended}{missed}"
    lines = [f"{seen}, {which} predicted after each{film}"]
    p50, p99, longest = (_ms(each / 1e3) for each in told["latency_ms"].values())
    lines.append(
        f"latency {p50} (p50), {p99} (p99), {longest} (longest); {told['frames_per_second']:.1f} frames a second, "
        "reading and measuring included"
    )
    if told["errors"]:
        lines += ["", f"| mean of {counted(told['frames_measured'], 'frame')} | MSE | PSNR (dB) |", "|---|---:|---:|"]
        lines += [f"| {name} | {each['mse']:.5f} | {each['psnr']:.2f} |" for name, each in told["errors"].items()]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
