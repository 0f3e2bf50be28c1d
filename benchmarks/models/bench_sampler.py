"""Sampling of S-HR-VQVAE's codes: a forward pass for every code, the cached sampler of torch operators, vpfast's:
``vpfast bench sampler``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import vpfast
from vpfast.benchmarks.problem import (
    OWN,
    Bar,
    Benchmark,
    Call,
    Case,
    Check,
    Growth,
    Place,
    Problem,
    Row,
    hold,
    median,
    ratio,
)
from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae import sample
from vpfast.ops import Mask3d
from vpfast.ops._backend import computes_in_bfloat16

LATENT = {"mnist-3x4": (16, 16), "kth-3x8": (32, 32)}
SMALL = (3, 4)
NEAR = 1e-4
"""Logits nearer to each other than this may fall either way by rounding."""
EAGER, NAIVE = "eager", "naive"
HALF = f"{OWN}, bfloat16"

Sampler = Callable[[int], Tensor]


@dataclass(frozen=True)
class Setting:
    """``horizon`` frames from ``context``; the bars: microseconds a position, and times faster than eager."""

    preset: str
    context: int = 10
    horizon: int = 10
    batch: int = 1
    naive: bool = True
    most_us: float | None = None
    faster: float | None = None

    @property
    def title(self) -> str:
        return f"{self.preset}, {self.context} -> {self.horizon} frames, B = {self.batch}"

    def case(self) -> Case:
        return Case(self.title, lambda place: problem(self, place))


SETTINGS = (
    Setting("mnist-3x4"),
    Setting("kth-3x8", horizon=20, naive=False, most_us=100.0, faster=5.0),
)


def attention_on_keys_so_far(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], positions: Tensor, mask: Mask3d, scale: float | None = None
) -> Tensor:
    """masked_attention3d_decode of the mask "raster", of torch operators."""
    seen = int(positions[-1]) + 1
    visible = None if len(positions) == 1 else mask.visible((grid[0], grid[1], grid[2]), positions)[:, :seen]
    return F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], visible, scale=scale)


@contextmanager
def torch_operators() -> Iterator[None]:
    """Backend "reference", and attention by scaled_dot_product_attention on the keys so far."""
    with (
        vpfast.backend("reference"),
        mock.patch("vpfast.nn.masked_attention3d.masked_attention3d_decode", attention_on_keys_so_far),
    ):
        yield


def samplers(prior: STPixelCNN, codes: Tensor) -> dict[str, Sampler]:
    def eager(horizon: int) -> Tensor:
        with torch_operators():
            return sample(prior, codes, horizon)

    return {OWN: lambda horizon: sample(prior, codes, horizon), EAGER: eager}


def flops_of(config: SHRVQVAEConfig, size: tuple[int, int], context: int, horizon: int) -> int:
    """Of one clip, for the positions that are sampled: every weight of the prior once a position, a multiplication and
    an addition each, those that all depths share once a depth; and 4 d for each key that an attention sees."""
    prior = STPixelCNN(config)
    shared = sum(p.numel() for p in prior.mlp.parameters() if p.dim() > 1)
    looked_up = [*prior.embed.parameters(), *prior.parents.parameters()]
    matrices = [p for p in prior.parameters() if p.dim() > 1 and not any(p is table for table in looked_up)]
    weights = sum(p.numel() for p in matrices) + (config.layers - 1) * shared
    cells = size[0] * size[1]
    first, count = context * cells, horizon * cells
    keys = count * first + count * (count + 1) // 2  # position p of the clip sees p + 1 keys, itself among them
    attentions = len(prior.attentions) * 4 * config.prior_heads * config.prior_head_dim
    return 2 * weights * count + attentions * keys


def bytes_of(config: SHRVQVAEConfig, size: tuple[int, int], context: int, horizon: int) -> int:
    """Of one clip: keys and values, float32, read for every position that sees them."""
    count, first = horizon * size[0] * size[1], context * size[0] * size[1]
    keys = count * first + count * (count + 1) // 2
    attentions = config.prior_blocks // config.prior_attention_every
    return attentions * keys * 2 * config.prior_heads * config.prior_head_dim * 4


def problem(setting: Setting, place: Place) -> Problem:
    size = SMALL if place.small else LATENT[setting.preset]
    context, horizon = (2, 3) if place.small else (setting.context, setting.horizon)
    prior = STPixelCNN(SHRVQVAEConfig.preset(setting.preset)).eval().to(place.device)
    config = prior.config
    codes = torch.randint(config.codebook_size, (setting.batch, context, *size, config.layers), device=place.device)
    calls: dict[str, Call] = {}
    contenders = samplers(prior, codes)
    half = copy.deepcopy(prior).bfloat16()
    if not place.gpu and computes_in_bfloat16():
        contenders = {OWN: contenders[OWN], HALF: lambda horizon: sample(half, codes, horizon), **contenders}
    for name, sampler in contenders.items():
        calls[name] = lambda sampler=sampler: (sampler(horizon),)  # type: ignore[misc]
        calls[first_of(name)] = lambda sampler=sampler: (sampler(1),)  # type: ignore[misc]
    passes = forward_passes(prior, codes, horizon) if setting.naive else {}
    calls |= {f"a forward pass over {length} frames": call for length, call in passes.items()}

    def finish(rows: list[Row]) -> Sequence[Bar]:
        positions = size[0] * size[1] * setting.batch
        for row in rows:
            if (first := median(rows, first_of(row["contender"]))) is not None:
                row["position_us"] = (row["p50_ms"] - first) * 1e3 / ((horizon - 1) * positions)
        own, eager = (next(row for row in rows if row["contender"] == name) for name in (OWN, EAGER))
        if setting.naive:
            rows.append(naive(setting, rows, passes, context, horizon, positions * config.layers))
        if setting.most_us is None or place.gpu or place.small:
            return ()
        return [
            *(
                Bar(
                    f"{setting.title}, {row['contender']}, a position", row["position_us"], setting.most_us, " us", True
                )
                for row in rows
                if row["contender"] in (OWN, HALF)
            ),
            Bar(
                f"{setting.title}, a position, times faster than eager",
                ratio(eager["position_us"], own["position_us"]),
                setting.faster or 1.0,
            ),
        ]

    flops = setting.batch * flops_of(config, size, context, horizon)
    moved = setting.batch * bytes_of(config, size, context, horizon)
    helpers = frozenset(name for name in calls if name not in contenders)
    exact, nearly = likeliest(prior, codes), nearly_likeliest(half, codes)

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        (nearly if name.startswith(HALF) else exact)(name, found)

    return Problem(calls, check, moved, flops, dtypes={HALF: torch.bfloat16}, helpers=helpers, finish=finish)


def nearly_likeliest(half: STPixelCNN, codes: Tensor) -> Check:
    """In bfloat16: behind the likeliest of the same weights by no more than torch's rounding of two logits explains."""
    widened = copy.deepcopy(half).float()

    @torch.inference_mode()
    def check(name: str, found: tuple[Tensor, ...]) -> None:
        whole = torch.cat((codes, *found), 1)
        logits = widened(whole)[:, codes.shape[1] :]
        rounding = (half(whole)[:, codes.shape[1] :] - logits).abs().amax()
        behind = logits.amax(-1) - logits.gather(-1, found[0][..., None])[..., 0]
        hold(name, "a code is behind the likeliest one by", float(behind.max()), 2 * float(rounding))

    return check


def likeliest(prior: STPixelCNN, codes: Tensor) -> Check:
    """Codes must be the likeliest at every position of a forward pass over the whole clip."""

    @torch.inference_mode()
    def check(name: str, found: tuple[Tensor, ...]) -> None:
        (sampled,) = found
        if sampled.is_floating_point():  # the logits of a forward pass, which is what is held to
            return
        logits = prior(torch.cat((codes, sampled), 1))[:, codes.shape[1] :]
        behind = logits.amax(-1) - logits.gather(-1, sampled[..., None])[..., 0]
        hold(name, "a code is behind the likeliest one by", float(behind.max()), NEAR)

    return check


def first_of(name: str) -> str:
    """What the contender is called that samples the first frame alone, which the context's time belongs to."""
    return f"{name}, the first frame alone"


def forward_passes(prior: STPixelCNN, codes: Tensor, horizon: int) -> dict[int, Call]:
    """By the number of frames: one pass over clips that end with a frame that is to be sampled."""
    batch, context, *rest = codes.shape
    passes: dict[int, Call] = {}
    for length in sorted({context + 1, context + horizon, *(context + horizon * part // 3 for part in (1, 2))}):
        clip = torch.randint(prior.config.codebook_size, (batch, length, *rest), device=codes.device)

        @torch.inference_mode()
        def one(clip: Tensor = clip) -> tuple[Tensor, ...]:
            return (prior(clip),)

        passes[length] = one
    return passes


def naive(
    setting: Setting, rows: Sequence[Row], passes: Mapping[int, Call], context: int, horizon: int, codes: int
) -> Row:
    """A forward pass for each of ``codes`` codes of every frame: some passes are timed, the rest interpolated."""
    known = {length: median(rows, f"a forward pass over {length} frames") or 0.0 for length in passes}
    total = 0.0
    for length in range(context + 1, context + horizon + 1):
        after = min(k for k in known if k >= length)
        before = max((k for k in known if k <= length), default=after)
        share = (length - before) / (after - before) if after > before else 0.0
        total += (known[before] + share * (known[after] - known[before])) * codes
    return {"case": setting.title, "contender": NAIVE, "p50_ms": total, "extrapolated": True}


def growth(place: Place) -> Iterator[Growth]:
    preset, context = "mnist-3x4", 10
    height, width = SMALL if place.small else LATENT[preset]
    settings = {horizon * height * width: Setting(preset, context, horizon) for horizon in (1, 2, 4, 8, 16)}
    sizes = {positions: growing(setting) for positions, setting in settings.items()}
    yield Growth(f"{preset}, from {context} frames", "positions sampled", sizes, {"time": 1.0})


def growing(setting: Setting) -> Case:
    """The two samplers alone, of all frames."""

    def prepare(place: Place) -> Problem:
        prior = STPixelCNN(SHRVQVAEConfig.preset(setting.preset)).eval().to(place.device)
        size = SMALL if place.small else LATENT[setting.preset]
        shape = (setting.batch, setting.context, *size, prior.config.layers)
        codes = torch.randint(prior.config.codebook_size, shape, device=place.device)
        whole = samplers(prior, codes)
        calls: dict[str, Call] = {
            name: lambda sampler=sampler: (sampler(setting.horizon),)  # type: ignore[misc]
            for name, sampler in whole.items()
        }
        return Problem(calls, likeliest(prior, codes))

    return Case(setting.title, prepare)


BENCHMARK = Benchmark(
    name="sampler",
    about="Sampling S-HR-VQVAE's codes position by position, beside the same sampler of PyTorch's operators",
    note=(
        "float32 where nothing else is said; weights and codes are random, which costs what trained ones cost. "
        "`eager` is the cached sampler with torch's operators alone. A position's time is that of all frames but the "
        "first one, whose time holds the context's too, for each position in them. `naive` is a forward pass for every "
        "code: passes are timed on clips that end with the frame being sampled, for several of those frames, and "
        "interpolated between. Bytes are keys and values read, counted as float32; in bfloat16 half as many are."
    ),
    cases=lambda place: [setting.case() for setting in SETTINGS],
    growth=lambda place: list(growth(place)),
)
