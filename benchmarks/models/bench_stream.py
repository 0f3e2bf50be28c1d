"""A frame in, the next one out: the time that a camera loop waits: ``vpfast bench stream``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vpfast
from vpfast.benchmarks.models.bench_mspn import lively, spread
from vpfast.benchmarks.models.bench_sampler import torch_operators
from vpfast.benchmarks.problem import OWN, Benchmark, Call, Case, Place, Problem, hold
from vpfast.models import MSPN, SHRVQVAE, SHRVQVAEConfig

EAGER = "eager"
CONTEXT = 10  # frames after which an S-HR-VQVAE begins to forget, and a frame costs what it costs from then on
LIMIT = 1e-3  # of the difference of a pixel, in parts of the range of the predictions
UNLIKE = {MSPN: 1e-9, SHRVQVAE: 0.05}
"""Share of pixels that may differ: where a code falls the other way by rounding, those around it do."""

MODELS: dict[str, tuple[Callable[[bool], Any], int]] = {
    "MSPN released-mnist": (lambda small: lively("compact" if small else "released-mnist"), 64),
    "MSPN compact": (lambda small: lively("compact"), 64),
    "S-HR-VQVAE mnist-3x4": (lambda small: SHRVQVAE(SHRVQVAEConfig.preset("mnist-3x4")), 64),
}


class Camera:
    """Endless frames: a few, again and again."""

    def __init__(self, model: Any, frames: Tensor) -> None:
        self.stream, self.frames, self.at = vpfast.Stream(model), frames, 0

    def push(self) -> Tensor:
        frame = self.frames[self.at % len(self.frames)]
        self.at += 1
        return self.stream.push(frame)


def problem(name: str, place: Place) -> Problem:
    made, side = MODELS[name]
    side = 16 if place.small else side
    torch.manual_seed(0)
    model = made(place.small).eval().to(place.device)
    frames = torch.rand(2 * CONTEXT, model.config.in_channels, side, side, device=place.device)

    def eager() -> tuple[Tensor, ...]:
        with torch_operators():
            return (plain.push(),)

    with torch_operators():
        plain = Camera(model, frames)
        right = [plain.push() for _ in range(CONTEXT + 1)]
    own = Camera(vpfast.optimize(model), frames)
    found = [own.push() for _ in range(CONTEXT + 1)]

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        """The predictions of the first frames are those of eager PyTorch."""
        if name != OWN:
            return
        wanted = torch.stack(right)
        apart = (torch.stack(found) - wanted).abs() > LIMIT * spread(wanted)
        hold(name, "share of pixels that differ", float(apart.double().mean()), UNLIKE[type(model)])

    calls: dict[str, Call] = {OWN: lambda: (own.push(),), EAGER: eager}
    return Problem(calls, check, figures={OWN: {"tail": True}, EAGER: {"tail": True}})


def cases(place: Place) -> list[Case]:
    return [Case(f"a frame, {name}", lambda place, name=name: problem(name, place)) for name in MODELS]  # type: ignore[misc]


BENCHMARK = Benchmark(
    name="stream",
    about="vpfast.Stream: from a frame pushed to the prediction of the next, beside the same model in eager PyTorch",
    note=(
        "float32, random weights, B = 1, frames of 64x64, after the first 11 frames; an S-HR-VQVAE remembers 10. p99 "
        "is of all calls but the first of a burst. Streamed is what vpfast.optimize makes of it."
    ),
    cases=cases,
)
