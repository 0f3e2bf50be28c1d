"""What is recorded as CUDA graphs beside the same work launched kernel by kernel: ``vpfast bench graphs``."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vpfast
from vpfast.benchmarks.models.bench_mspn import EAGER, PSNR, by_reference, first_step_check, plainly_trained, psnr
from vpfast.benchmarks.models.bench_sampler import LATENT
from vpfast.benchmarks.models.bench_sampler import SMALL as SMALL_LATENT
from vpfast.benchmarks.problem import (
    OWN,
    Bar,
    Benchmark,
    Call,
    Case,
    Place,
    Problem,
    Row,
    WrongResultError,
    hold,
    median,
    ratio,
)
from vpfast.models import MSPN, GraphedStep, MSPNConfig, SHRVQVAEConfig, STPixelCNN
from vpfast.models.mspn import captured, pixel_loss
from vpfast.models.shrvqvae import sample
from vpfast.models.shrvqvae.captured import CapturablePrior

OVERLAPPED = f"{OWN}, levels overlapped"
LAUNCHED = f"{OWN}, kernel by kernel"


# --- predicting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicting:
    """``horizon`` frames of ``side`` x ``side`` from as many, in bfloat16; the bar: milliseconds on an H200."""

    preset: str
    batch: int
    most_ms: float | None = None
    horizon: int = 10
    side: int = 64

    @property
    def title(self) -> str:
        frames = f"{self.horizon} -> {self.horizon} frames of {self.side}x{self.side}"
        return f"{self.preset}, {frames}, B = {self.batch}, bfloat16"

    def problem(self, place: Place) -> Problem:
        horizon, side = (2, 16) if place.small else (self.horizon, self.side)
        torch.manual_seed(0)
        model = MSPN(MSPNConfig.preset("compact" if place.small else self.preset)).eval().to(place.device)
        frames = torch.rand(self.batch, horizon, model.config.in_channels, side, side, device=place.device)
        half = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        right = by_reference(model.predict, frames, horizon)()
        eager = by_reference(half.predict, frames.bfloat16(), horizon)
        calls: dict[str, Call] = {OWN: predicted(vpfast.optimize(model, torch.bfloat16), frames, horizon)}
        if place.device == "cuda":
            made = captured.optimize_mspn(model, torch.bfloat16, overlap=True)
            calls[OVERLAPPED] = predicted(made, frames, horizon)
            launched = captured.optimize_mspn(model, torch.bfloat16)
            calls[LAUNCHED] = lambda: (without_gradients(launched._future, frames, horizon),)
        calls[EAGER] = lambda: (eager().float(),)

        def check(name: str, found: tuple[Tensor, ...]) -> None:
            alike = psnr(found[0], right)
            if not alike > PSNR:
                raise WrongResultError(f"{name} is wrong (PSNR {alike:.1f} dB, limit {PSNR:g} dB)")

        def finish(rows: list[Row]) -> Sequence[Bar]:
            if self.most_ms is None or place.small:
                return ()
            return [Bar(self.title, median(rows, OWN), self.most_ms, " ms", at_most=True)]

        return Problem(calls, check, dtype=torch.bfloat16, finish=finish)


def predicted(model: Any, frames: Tensor, horizon: int) -> Call:
    return lambda: (model.predict(frames, horizon),)


def without_gradients(work: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.no_grad():
        return work(*arguments)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A step on 10 + 10 frames of 64x64: forward, backward and Adam, in float32."""

    preset: str
    batch: int
    faster: float

    @property
    def title(self) -> str:
        return f"training step, {self.preset}, 10 + 10 frames of 64x64, B = {self.batch}"

    def problem(self, place: Place) -> Problem:
        context, side = (2, 16) if place.small else (10, 64)
        torch.manual_seed(0)
        model = MSPN(MSPNConfig.preset("compact" if place.small else self.preset)).to(place.device)
        frames = torch.rand(self.batch, 2 * context, 1, side, side, device=place.device)
        models = {name: copy.deepcopy(model) for name in (OWN, EAGER)}
        step = graphed if place.device == "cuda" else plainly_trained
        calls: dict[str, Call] = {
            OWN: step(models[OWN], frames, context, context),
            EAGER: plainly_trained(models[EAGER], frames, context, context),
        }
        check = first_step_check(model, models, frames, context, context)

        def finish(rows: list[Row]) -> Sequence[Bar]:
            if place.small:
                return ()
            faster = ratio(median(rows, EAGER), median(rows, OWN))
            return [Bar(f"{self.title}, times faster than eager", faster, self.faster)]

        return Problem(calls, check, finish=finish)


def graphed(model: MSPN, frames: Tensor, context: int, horizon: int) -> Call:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    step = GraphedStep(model, lambda clips: pixel_loss(model(clips[:, :context], horizon=horizon), clips))

    def run() -> tuple[Tensor, ...]:
        loss = step(frames)
        optimizer.step()
        return (loss,)

    return run


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """The codes of ``horizon`` frames from 10, one clip, float32."""

    preset: str
    horizon: int

    @property
    def title(self) -> str:
        return f"sampling, {self.preset}, 10 -> {self.horizon} frames, B = 1"

    def problem(self, place: Place) -> Problem:
        size = SMALL_LATENT if place.small else LATENT[self.preset]
        torch.manual_seed(0)
        prior = STPixelCNN(SHRVQVAEConfig.preset(self.preset)).eval().to(place.device)
        codes = torch.randint(prior.config.codebook_size, (1, 10, *size, prior.config.layers), device=place.device)
        recorded = CapturablePrior(prior) if place.device == "cuda" else prior
        right = sample(prior, codes, self.horizon)
        calls: dict[str, Call] = {
            OWN: lambda: (sample(recorded, codes, self.horizon),),
            LAUNCHED: lambda: (sample(prior, codes, self.horizon),),
        }

        def check(name: str, found: tuple[Tensor, ...]) -> None:
            """The same kernels on the same numbers."""
            hold(name, "share of codes that differ", float((found[0] != right).double().mean()), 1e-9)

        def finish(rows: list[Row]) -> Sequence[Bar]:
            for row in rows:
                row["position_us"] = row["p50_ms"] * 1e3 / (self.horizon * size[0] * size[1])
            return ()

        return Problem(calls, check, finish=finish)


CASES: tuple[Predicting | Training | Sampling, ...] = (
    Predicting("released-mnist", 1, most_ms=5.0),
    Predicting("released-mnist", 4),
    Predicting("released-default", 1),
    Training("released-mnist", 1, faster=5.0),
    Training("compact", 8, faster=5.0),
    Sampling("mnist-3x4", 2),
    Sampling("kth-3x8", 1),
)
REHEARSED = (CASES[0], CASES[3], CASES[5])

BENCHMARK = Benchmark(
    name="graphs",
    about="MSPN's clips and training steps and S-HR-VQVAE's sampler as CUDA graphs, beside the same work without",
    note=(
        "Random weights. `kernel by kernel` is the work that is recorded, launched by Python; eager is the model in "
        "channels_last and bfloat16 (training: as it is made, in float32) with PyTorch's operators. A sampled clip "
        "holds its context's pass and its own recording. In a rehearsal nothing is recorded."
    ),
    cases=lambda place: [Case(each.title, each.problem) for each in (REHEARSED if place.small else CASES)],
    places=("cuda",),
)
