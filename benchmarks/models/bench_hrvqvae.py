"""Tokenising a clip by HR-VQVAE's encoder and tree of codebooks: ``vpfast bench hrvqvae``."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vpfast
from vpfast.benchmarks.models._convolutions import convolutions_of, flops_of
from vpfast.benchmarks.ops.bench_codeword_search import check_codes
from vpfast.benchmarks.problem import OWN, Bar, Benchmark, Call, Case, Growth, Place, Problem, Row, median, ratio
from vpfast.models import HRVQVAE, SHRVQVAEConfig
from vpfast.ops.codeword_search import reference

SIDES = {"mnist-3x4": 64, "kth-3x8": 128}
EAGER, COMPILED = "eager", "torch.compile"
NEAR = 1e-3  # a codeword may be farther by so much than the nearest: the latent is float32's


@dataclass(frozen=True)
class Setting:
    preset: str
    frames: int = 20
    bar: float | None = 2.0

    @property
    def title(self) -> str:
        return f"encode, {self.preset}, {self.frames} frames of {SIDES[self.preset]}x{SIDES[self.preset]}"

    def case(self, compiled: bool = True) -> Case:
        return Case(self.title, lambda place: problem(self, place, compiled))


def problem(setting: Setting, place: Place, compiled: bool) -> Problem:
    """Random weights, codebooks that a first batch has started."""
    side = 16 if place.small else SIDES[setting.preset]
    model = HRVQVAE(SHRVQVAEConfig.preset(setting.preset)).to(place.device)
    config = model.config
    # Codebooks start from latents of other frames: a codeword that is a vector of the clip has no distance to compare.
    other, clip = torch.rand(2, 1, setting.frames, config.in_channels, side, side, device=place.device)
    with torch.no_grad():
        model.train()(other)
    model.eval()
    codebooks, tree = [codebook.detach() for codebook in model.quantizer.codebooks], config.strict_tree

    def plain(frames: Tensor) -> Tensor:
        latent = model.encoder(model._to_network(frames)).movedim(1, -1)
        _, indices = reference.codeword_search(latent.flatten(0, -2), codebooks, tree)
        return indices

    fast = torch.compile(plain)
    calls: dict[str, Call] = {
        OWN: lambda: (model.encode(clip).indices,),
        EAGER: without_gradients(lambda: plain(clip.flatten(0, 1))),
    }
    if compiled:
        calls[COMPILED] = without_gradients(lambda: fast(clip.flatten(0, 1)))

    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        latent = exact.encoder(exact._to_network(clip.flatten(0, 1).double())).movedim(1, -1).flatten(0, -2)

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        """Every code is the nearest one of the latent in float64."""
        check_codes(name, found[0].reshape(len(latent), -1), latent, codebooks, tree, NEAR)

    def finish(rows: list[Row]) -> Sequence[Bar]:
        if setting.bar is None or place.small:
            return ()
        found = ratio(median(rows, EAGER), median(rows, OWN))
        return [Bar(f"{setting.title}, times faster than eager", found, setting.bar)]

    encoder = flops_of(convolutions_of(model, without_gradients(lambda: model.encoder(clip.flatten(0, 1)))))
    search = latent.shape[0] * config.layers * config.codebook_size * 2 * config.latent_channels
    moved = clip.nbytes + latent.shape[0] * config.layers * 8
    return Problem(calls, check, moved, encoder + search, finish=finish)


def without_gradients(function: Callable[[], Tensor]) -> Call:
    """The call with the operators in plain PyTorch, its result in a tuple."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad(), vpfast.backend("reference"):
            return (function(),)

    return run


def growth(place: Place) -> list[Growth]:
    settings = {frames: Setting("kth-3x8", frames, bar=None) for frames in (5, 10, 20, 40, 80)}
    sizes = {frames: setting.case(compiled=False) for frames, setting in settings.items()}
    return [Growth("encode, kth-3x8", "frames", sizes, {"time": 1.0})]


BENCHMARK = Benchmark(
    name="hrvqvae",
    about="Frames to codes, HRVQVAE.encode, beside the same encoder and search in PyTorch's operators",
    note=(
        "float32, random weights, codebooks started by a batch. Operations are those of the encoder's convolutions and "
        "of the search; bytes are frames read and codes written."
    ),
    cases=lambda place: [Setting(preset).case() for preset in SIDES],
    growth=growth,
)
