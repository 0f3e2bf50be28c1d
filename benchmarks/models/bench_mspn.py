"""MSPN's prediction and training step beside the same network in eager PyTorch and compiled: ``vpfast bench mspn``."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vpfast
from vpfast.benchmarks.models._convolutions import alone, convolutions_of, flops_of
from vpfast.benchmarks.problem import (
    OWN,
    Bar,
    Benchmark,
    Call,
    Case,
    Growth,
    Place,
    Problem,
    Row,
    WrongResultError,
    hold,
    median,
    ratio,
)
from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss

HALF = f"{OWN}, bfloat16"
EAGER, COMPILED = "eager", "torch.compile, frozen"
CONVOLUTIONS = "its convolutions, each alone"
STEP_LIMIT = 5e-2  # Adam's first step is the gradients' signs, and those of some near 0 are rounding's
HALF_LOSS_LIMIT, HALF_STEP_LIMIT = 1e-2, 0.3  # the same in bfloat16: more signs are rounding's
LIMIT = 1e-4  # of the difference between predictions in float32, in parts of their range
PSNR = 40.0  # of a prediction in bfloat16 beside the same in float32
CONVOLUTION_SECONDS = 10.0  # for all convolutions of a network, each alone


@dataclass(frozen=True)
class Setting:
    """``context`` frames of ``side`` x ``side`` are looked at, ``horizon`` predicted. The bars: how many times faster
    than eager in float32 and in bfloat16 it was asked to be."""

    preset: str
    batch: int
    context: int = 10
    horizon: int = 10
    side: int = 64
    bar: float | None = None
    half_bar: float | None = None

    @property
    def title(self) -> str:
        frames = f"{self.context} -> {self.horizon} frames of {self.side}x{self.side}"
        return f"{self.preset}, {frames}, B = {self.batch}"

    def network(self, place: Place) -> MSPN:
        torch.manual_seed(0)
        return lively("compact" if place.small else self.preset).to(place.device)

    def case(self) -> Case:
        return Case(self.title, lambda place: predicting(self, place))

    def plain_case(self) -> Case:
        """Without compiling, half precision and bars."""

        def prepare(place: Place) -> Problem:
            return predicting(self, place, peers=(EAGER,))

        return Case(self.title, prepare)


SETTINGS = (
    Setting("released-mnist", 1, bar=1.8, half_bar=3.0),
    Setting("released-mnist", 4, bar=1.6, half_bar=2.5),
    Setting("released-default", 1, bar=2.0, half_bar=3.5),
)
SMALL = Setting("compact", 1, 2, 2, 16)


def lively(preset: str) -> MSPN:
    """An MSPN with random weights that keep the size of what passes: as PyTorch draws them, predictions hardly move."""
    model = MSPN(MSPNConfig.preset(preset)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1.0)
    return model


def has_bfloat16(place: Place) -> bool:
    """Has the processor instructions for it? Imitated it takes ten times as long."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return place.device != "cpu" or mkldnn


# --- predicting -------------------------------------------------------------------------------------------------------


def predicting(setting: Setting, place: Place, peers: Sequence[str] = (EAGER, COMPILED, HALF)) -> Problem:
    peers = [peer for peer in peers if peer != HALF or has_bfloat16(place)]
    model = setting.network(place)
    shape = (setting.batch, setting.context, model.config.in_channels, setting.side, setting.side)
    frames, horizon = torch.rand(shape, device=place.device), setting.horizon
    fast = vpfast.optimize(model)
    calls: dict[str, Call] = {OWN: lambda: (fast.predict(frames, horizon),)}
    if HALF in peers:
        half = vpfast.optimize(model, dtype=torch.bfloat16)
        calls[HALF] = lambda: (half.predict(frames, horizon),)
    eager = by_reference(model.predict, frames, horizon)
    calls[EAGER] = lambda: (eager(),)
    if COMPILED in peers:
        compiled = by_reference(frozen(model), frames, horizon)
        calls[COMPILED] = lambda: (compiled(),)

    convolutions = convolutions_of(model, lambda: model.predict(frames[:, :1], 0))
    steps = setting.context + horizon
    flops = flops_of(convolutions) * steps
    figures: dict[str, dict[str, Any]] = {}
    right = eager()

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        if name == HALF:
            figures[name] = {"psnr_db": psnr(found[0], right)}
            if not figures[name]["psnr_db"] > PSNR:
                raise WrongResultError(f"{name} is wrong (PSNR {figures[name]['psnr_db']:.1f} dB, limit {PSNR:g} dB)")
            return
        hold(name, "largest difference", float((found[0] - right).abs().max()) / spread(right), LIMIT)

    def finish(rows: list[Row]) -> Sequence[Bar]:
        if COMPILED not in peers:
            return ()
        bars: list[Bar] = []
        for name, dtype in ((OWN, torch.float32), (HALF, torch.bfloat16))[: 1 + (HALF in peers)]:
            seconds = 0.01 if place.small else CONVOLUTION_SECONDS
            took = alone(convolutions, dtype, place, seconds) * steps
            row = next(row for row in rows if row["contender"] == name)
            row |= {"convolutions_ms": took, "convolutions_share": took / row["p50_ms"]}
            rate = {"flops": flops, "tflop_s": flops / took / 1e9}
            kind = CONVOLUTIONS if name == OWN else f"{CONVOLUTIONS}, bfloat16"
            rows.append({"case": setting.title, "contender": kind, "p50_ms": took, **rate})
            bars += asked(setting, place, rows, row)
        return bars

    return Problem(calls, check, None, flops, dtypes={HALF: torch.bfloat16}, figures=figures, finish=finish)


def asked(setting: Setting, place: Place, rows: Sequence[Row], row: Row) -> Iterator[Bar]:
    """What was asked for beforehand of one row of vpfast's."""
    title, half = f"{setting.title}, {row['contender']}", row["contender"] == HALF
    if place.gpu:
        if half and setting.preset == "released-mnist" and setting.batch == 1:
            yield Bar(title, row["p50_ms"], 5.0, " ms", at_most=True)
        return
    wanted = setting.half_bar if half else setting.bar
    if wanted is not None:
        yield Bar(f"{title}, times faster than eager", ratio(median(rows, EAGER), row["p50_ms"]), wanted)
        yield Bar(f"{title}, of the rate of its convolutions alone", row["convolutions_share"], 0.8, "")
        if not half:
            yield Bar(f"{title}, times faster than torch.compile", ratio(median(rows, COMPILED), row["p50_ms"]), 1.0)


def by_reference(predict: Callable[[Tensor, int], Tensor], frames: Tensor, horizon: int) -> Callable[[], Tensor]:
    """With the operators in plain PyTorch."""

    def run() -> Tensor:
        with vpfast.backend("reference"), torch.no_grad():
            return predict(frames, horizon)

    return run


def frozen(model: MSPN) -> Callable[[Tensor, int], Tensor]:
    """``predict`` with compiled steps whose weights are constants, which the compiler lays out as it likes."""
    own = copy.deepcopy(model)
    with torch._inductor.config.patch(freezing=True):
        peek, step = torch.compile(own.peek), torch.compile(own.step)

    def predict(frames: Tensor, horizon: int) -> Tensor:
        batch, length, _, height, width = frames.shape
        state, made = own.init_state(batch, height, width), []
        with torch._inductor.config.patch(freezing=True):
            for time in range(length + horizon):
                prediction, state = peek(state)
                made.append(prediction)
                _, state = step(frames[:, time] if time < length else prediction, state)
        return torch.stack(made[length:], 1)

    return predict


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, where the data range is that of ``wanted``: predictions of untrained networks are small."""
    return float(-10 * ((found.double() - wanted.double()) / spread(wanted)).square().mean().log10())


def spread(picture: Tensor) -> float:
    """From the lowest to the highest value."""
    return float(picture.max() - picture.min())


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSetting:
    """A step on ``batch`` clips: forward, backward and Adam, as `vpfast train` takes it and as PyTorch alone does."""

    preset: str
    batch: int
    bar: float

    @property
    def title(self) -> str:
        return f"training step, {self.preset}, 10 + 10 frames of 64x64, B = {self.batch}"

    def case(self) -> Case:
        return Case(self.title, lambda place: training(self, place))


TRAINING = (TrainingSetting("compact", 8, 1.5), TrainingSetting("released-mnist", 1, 1.5))


def first_step_check(
    model: MSPN, models: dict[str, MSPN], frames: Tensor, context: int, horizon: int
) -> Callable[[str, tuple[Tensor, ...]], None]:
    """Holds the first step of each of ``models``, its loss and the weights after it, against that of ``model``.

    Of bfloat16 the loss, and where the step goes.
    """
    trained = copy.deepcopy(model)
    right_loss = float(plainly_trained(trained, frames, context, horizon)()[0])
    before, right = weights_of(model), weights_of(trained)

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        off, step, of_right = abs(float(found[0]) / right_loss - 1), weights_of(models[name]) - before, right - before
        if name == HALF:
            hold(name, "relative difference of the loss", off, HALF_LOSS_LIMIT)
            aside = 1 - float(torch.cosine_similarity(step, of_right, dim=0))
            hold(name, "1 - cosine of the steps", aside, HALF_STEP_LIMIT)
            return
        hold(name, "relative difference of the loss", off, 1e-4)
        hold(name, "relative difference of the step", float((step - of_right).norm() / of_right.norm()), STEP_LIMIT)

    return check


def training(setting: TrainingSetting, place: Place) -> Problem:
    context, horizon, side, batch = (2, 2, 32, 2) if place.small else (10, 10, 64, setting.batch)
    torch.manual_seed(0)
    model = MSPN(MSPNConfig.preset("compact" if place.small else setting.preset)).to(place.device)
    frames = torch.rand(batch, context + horizon, 1, side, side, device=place.device)
    models = {name: copy.deepcopy(model) for name in (OWN, HALF, EAGER)}
    calls: dict[str, Call] = {OWN: as_trained(models[OWN], frames, context, horizon, "fp32")}
    if has_bfloat16(place):
        calls[HALF] = as_trained(models[HALF], frames, context, horizon, "bf16")
    calls[EAGER] = plainly_trained(models[EAGER], frames, context, horizon)
    check = first_step_check(model, models, frames, context, horizon)

    def finish(rows: list[Row]) -> Sequence[Bar]:
        wanted, eager = 5.0 if place.gpu else setting.bar, median(rows, EAGER)
        return [
            Bar(f"{setting.title}, {name}, times faster than eager", ratio(eager, median(rows, contender)), wanted)
            for name, contender in (("float32", OWN), ("bfloat16", HALF))
            if contender in calls
        ]

    # Two products of the same size backward for each one forward.
    flops = 3 * flops_of(convolutions_of(model, lambda: model.predict(frames[:, :1], 0))) * (context + horizon)
    return Problem(calls, check, None, flops, finish=finish)


def as_trained(model: MSPN, frames: Tensor, context: int, horizon: int, precision: Literal["fp32", "bf16"]) -> Call:
    """The update of `vpfast train` with the layout that it takes."""
    from vpfast.training.config import DataConfig, TrainConfig
    from vpfast.training.device import lay_out
    from vpfast.training.engine import accelerator
    from vpfast.training.recipes import recipe_of
    from vpfast.training.update import Context

    data = DataConfig(size=frames.shape[-1])
    config = TrainConfig(
        data=data,
        context=context,
        horizon=horizon,
        batch_size=len(frames),
        val_every=0,
        precision=precision,
        device="auto" if frames.is_cuda else "cpu",
    )
    lay_out(model, config)
    recipe = recipe_of(model)
    update = recipe.update(Context(model, recipe.trained(model), config, accelerator(config), recipe))

    def run() -> tuple[Tensor, ...]:
        return (torch.tensor(update(frames, 0)["loss"]),)

    return run


def plainly_trained(model: MSPN, frames: Tensor, context: int, horizon: int) -> Call:
    """The same step of plain modules in the layout that they are made in."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> tuple[Tensor, ...]:
        with vpfast.backend("reference"):
            optimizer.zero_grad()
            loss = pixel_loss(model(frames[:, :context], horizon=horizon), frames)
            loss.backward()
            optimizer.step()
        return (loss.detach(),)

    return run


def weights_of(model: nn.Module) -> Tensor:
    """All in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(place: Place) -> list[Case]:
    settings = (SMALL,) if place.small else SETTINGS
    return [*(setting.case() for setting in settings), *(setting.case() for setting in TRAINING)]


def growth(place: Place) -> list[Growth]:
    preset, side = ("compact", 16) if place.small else ("released-mnist", 64)
    over = {
        "batch": {size: Setting(preset, size, 2, 3, side) for size in (1, 2, 4, 8)},
        "pixels of a frame": {
            size**2: Setting(preset, 1, 2, 3, size) for size in (side // 2, side, 2 * side, 4 * side)
        },
        "horizon + 1 frame seen": {size: Setting(preset, 1, 1, size - 1, side) for size in (2, 4, 8, 16, 32)},
    }
    return [
        Growth(f"{preset}, prediction", name, {size: each.plain_case() for size, each in sizes.items()}, {"time": 1.0})
        for name, sizes in over.items()
    ]


BENCHMARK = Benchmark(
    name="mspn",
    about="MSPN end to end: prediction by vpfast.optimize and a training step, beside eager PyTorch and torch.compile",
    note=(
        "Random weights: PSNR and differences are in parts of the range of eager's prediction. Eager and compiled are "
        "plain modules in NCHW with the gating in PyTorch's operators, compiled step by step with freezing. Operations "
        "are those of the convolutions. `its convolutions, each alone`: the time of all steps' convolutions where each "
        "distinct one is called alone, in channels_last with packed weights, in the same run; the share is of their "
        "rate. Training in bfloat16 is autocast, with weights in float32. Denormal numbers count as zero."
    ),
    cases=cases,
    growth=growth,
)
