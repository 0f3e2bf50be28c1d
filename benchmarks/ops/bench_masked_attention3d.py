"""masked_attention3d against scaled_dot_product_attention, FlexAttention and the same formula in PyTorch:
``vpfast bench masked_attention3d``.

Everyone is given the same mask: scaled_dot_product_attention (SDPA) as a dense tensor of bools, or by is_causal where
the mask is that; FlexAttention as a mask_mod of the same rules, with its block mask made before; it has no backward on
the CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vpfast.benchmarks import gpu
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
    hold,
    in_words,
    median,
    ratio,
    relative_error,
)
from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.mask import RULES
from vpfast.ops.masked_attention3d.register import backends

Grid = tuple[int, int, int]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One mask on one grid, batch 1; ``decode`` is how many of the last positions are attended from, 0 for all."""

    mask: Mask3d
    grid: Grid = (10, 16, 16)
    heads: int = 4
    dim: int = 32
    backward: bool = False
    decode: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    @property
    def title(self) -> str:
        kind = f"decode {self.decode}" if self.decode else "forward + backward" if self.backward else "forward"
        window = f" window {self.mask.window}" if self.mask.window else ""
        dtype = "" if self.dtype == torch.float32 else f", {in_words(self.dtype)}"
        return f"{self.mask.name}{window}, {self.grid}, {self.heads} x {self.dim}{dtype}, {kind}"

    def queries(self) -> Tensor:
        return torch.arange(self.length)[-self.decode :]

    @property
    def flops(self) -> int:
        """Of what is visible alone: 4 d a pair forward, 10 d backward."""
        return visible_pairs(self.mask, self.grid, self.decode) * self.heads * self.dim * (14 if self.backward else 4)

    @property
    def moved(self) -> int:
        """Forward: q, k, v and the output, and a float32 a query that backward needs. Backward: these read again with a
        gradient, three gradients written. Decode: what is visible of keys and values."""
        size = self.dtype.itemsize
        if self.decode:
            seen = int(self.mask.visible(self.grid, self.queries()).any(0).sum())
            return self.heads * self.dim * size * 2 * (seen + self.decode)
        line = 4 * self.dim * size + 4
        return self.heads * self.length * (line + 8 * self.dim * size + 4 if self.backward else line)

    def draw(self, device: str) -> list[Tensor]:
        """q, k, v and a gradient of the output."""
        shape = (1, self.heads, self.length, self.dim)
        drawn = [torch.randn(shape, device=device).to(self.dtype) for _ in range(4)]
        return [drawn[0][:, :, -self.decode :], *drawn[1:]]

    def case(self, peers: Sequence[str] | None = None) -> Case:
        """``peers``: those to time, all of them when None."""

        def prepare(place: Place) -> Problem:
            made = on_gpu(self, place) if place.gpu else on_cpu(self)
            if peers is not None:
                kept = (OWN, *peers, "SDPA") if place.gpu else (OWN, *peers)
                calls = made.contenders.items()
                made.contenders = {name: call for name, call in calls if name.startswith(kept)}
            return made

        return Case(self.title, prepare)


@cache
def visible_pairs(mask: Mask3d, grid: Grid, decode: int) -> int:
    """How many keys all queries see, together."""
    queries = torch.arange(math.prod(grid))[-decode:]
    return sum(int(mask.visible(grid, rows).sum()) for rows in queries.split(1024))


MASKS = [Mask3d("raster"), Mask3d("eq6"), Mask3d("separable"), Mask3d("past_frames"), Mask3d("raster", (2, 3, 3))]
SETTINGS = (
    *(Setting(mask, backward=backward) for mask in MASKS for backward in (False, True)),
    *(Setting(Mask3d("raster"), dtype=torch.bfloat16, backward=backward) for backward in (False, True)),
    *(Setting(Mask3d("raster"), (20, 16, 16), dim=16, backward=backward) for backward in (False, True)),
    *(Setting(Mask3d(name), decode=count) for name in ("raster", "eq6") for count in (1, 16)),
    Setting(Mask3d("raster"), (30, 32, 32), backward=True),
)
LONG = (30, 32, 32)
GPU_SETTINGS = tuple(
    Setting(Mask3d(name), LONG, dim=dim, backward=backward, dtype=torch.bfloat16)
    for dim in (16, 32)
    for name in ("raster", "eq6")
    for backward in (False, True)
)
LARGEST_DENSE = 8192  # positions: beyond, a dense mask or its scores do not fit
SMALL = (3, 4, 4)
FRAMES = (2, 4, 8, 16, 32)  # of a growth over positions, 16 x 16 each
FRAMES_CAUSAL = (*FRAMES, 64)

SDPA_CAUSAL, SDPA_DENSE, FLEX, EAGER = "SDPA is_causal", "SDPA dense mask", "FlexAttention, compiled", "eager"


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def on_cpu(setting: Setting) -> Problem:
    given = setting.draw("cpu")
    calls, right = contenders(setting, *given), exact(setting, *given)

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        """What a query that sees nothing gets, SDPA leaves open: only vpfast is held to 0."""
        limit = 1e-5 if setting.dtype == torch.float32 else 2e-2
        for got, want in zip(found, right, strict=True):
            got = got.double() if name.startswith(OWN) else got.double().nan_to_num()
            hold(name, "relative error", relative_error(got, want), limit)

    return Problem(calls, check, setting.moved, setting.flops, setting.dtype)


def contenders(setting: Setting, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Call]:
    """Each returns (out,), or (out, grad_q, grad_k, grad_v)."""
    if setting.decode:
        return decoders(setting, q, k, v)
    leaves = [tensor.clone().requires_grad_(setting.backward) for tensor in (q, k, v)]

    def step(attention: Attention) -> Call:
        return stepping(attention, leaves, grad, setting.backward)

    grid, mask = setting.grid, setting.mask
    calls = {OWN: step(lambda q, k, v: masked_attention3d(q, k, v, grid, mask))}
    if mask == Mask3d("raster"):
        calls[SDPA_CAUSAL] = step(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))
    if setting.length <= LARGEST_DENSE:
        dense = mask.visible(grid)
        calls[SDPA_DENSE] = step(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense))
        scale = setting.dim**-0.5
        calls[EAGER] = step(lambda q, k, v: reference.masked_attention3d(q, k, v, grid, mask, scale)[0])
        if not setting.backward:
            calls[FLEX] = step(flexible(setting))
    return calls


def stepping(attention: Attention, leaves: Sequence[Tensor], grad: Tensor, backward: bool) -> Call:
    def run() -> tuple[Tensor, ...]:
        out = attention(leaves[0], leaves[1], leaves[2])
        return (out.detach(), *torch.autograd.grad(out, leaves, grad)) if backward else (out,)

    return run


def decoders(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    grid, mask, positions = setting.grid, setting.mask, setting.queries()
    dense, scale = mask.visible(grid, positions), setting.dim**-0.5
    calls: dict[str, Call] = {
        OWN: lambda: (masked_attention3d_decode(q, k, v, grid, positions, mask),),
        SDPA_DENSE: lambda: (scaled_dot_product_attention(q, k, v, attn_mask=dense),),
        EAGER: lambda: (reference.masked_attention3d_decode(q, k, v, positions, grid, mask, scale),),
    }
    if mask == Mask3d("raster") and setting.decode == 1:  # the last position sees all there is
        calls["SDPA, no mask"] = lambda: (scaled_dot_product_attention(q, k, v),)
    return calls


def flexible(setting: Setting, device: str = "cpu") -> Attention:
    """Compiled FlexAttention under the rules of the setting's mask."""
    _, height, width = setting.grid
    frame, rule = height * width, RULES[setting.mask.name]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = rule(j // frame, j % frame, i // frame, i % frame)
        places = ((p // frame, p % frame // width, p % width) for p in (i, j))
        for one, other, radius in zip(*places, setting.mask.radii, strict=True):
            if radius >= 0:
                seen = seen & ((one - other).abs() <= radius)
        return seen

    # Compiled, the block mask is made without the whole mask in memory; on a CPU that takes longer than it saves.
    made: Any = {"device": device, "_compile": device != "cpu"}
    blocks = create_block_mask(sees, None, None, setting.length, setting.length, **made)
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def exact(setting: Setting, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The reference in float64, head by head. Too large for that, SDPA tells what is right."""
    if setting.length > LARGEST_DENSE:
        return list(contenders(setting, q, k, v, grad)[SDPA_CAUSAL]())
    scale, grid, mask = setting.dim**-0.5, setting.grid, setting.mask
    heads: list[tuple[Tensor, ...]] = []
    for q1, k1, v1, g1 in zip(*(tensor.double().split(1, 1) for tensor in (q, k, v, grad)), strict=True):
        if setting.decode:
            heads.append((reference.masked_attention3d_decode(q1, k1, v1, setting.queries(), grid, mask, scale),))
            continue
        out, lse = reference.masked_attention3d(q1, k1, v1, grid, mask, scale)
        gradients: tuple[Tensor, ...] = ()
        if setting.backward:
            gradients = reference.masked_attention3d_backward(g1, q1, k1, v1, out, lse, grid, mask, scale)
        heads.append((out, *gradients))
    return [torch.cat(parts, 1) for parts in zip(*heads, strict=True)]


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
ROWS = 64  # queries whose results are looked at in float64


@dataclass
class GpuProblem:
    """Inputs on a device. Queries that see nothing get no gradient, and in ``dense`` see themselves: SDPA leaves open
    what becomes of them."""

    setting: Setting
    device: str

    def __post_init__(self) -> None:
        setting = self.setting
        self.q, self.k, self.v, self.grad = setting.draw(self.device)
        every = torch.arange(setting.length, device=self.device)
        self.causal = setting.mask == Mask3d("raster")
        self.dense = None if self.causal else setting.mask.visible(setting.grid, every)
        if self.dense is not None:
            blind = ~self.dense.any(1)
            self.dense[blind, every[blind]] = True
            self.grad = self.grad.masked_fill(blind[:, None], 0)

    def step(self, attention: Attention, dtype: torch.dtype | None = None) -> Call:
        inputs = [tensor.to(dtype or self.setting.dtype) for tensor in (self.q, self.k, self.v)]
        leaves = [tensor.requires_grad_(self.setting.backward) for tensor in (each.detach() for each in inputs)]
        return stepping(attention, leaves, self.grad.to(leaves[0].dtype), self.setting.backward)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.dense, is_causal=self.causal)

    def sdpa_by(self, backend: SDPBackend) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return self.sdpa(q, k, v)

        return attend

    def contenders(self) -> dict[str, Call]:
        setting = self.setting
        own = self.step(lambda q, k, v: masked_attention3d(q, k, v, setting.grid, setting.mask))
        calls = gpu.by_backend(backends, self.device, own)
        given = "is_causal" if self.causal else "dense mask"
        calls |= {f"SDPA {name}, {given}": self.step(self.sdpa_by(backend)) for name, backend in SDPA.items()}
        if not self.causal and not (self.device == "cpu" and setting.backward):
            calls[FLEX] = self.step(flexible(setting, self.device))
        return calls

    def checker(self) -> Callable[[str, tuple[Tensor, ...]], None]:
        """Rows of the output in float64; gradients beside those of SDPA in float32."""
        setting = self.setting
        rows = torch.randint(setting.length, (ROWS,), device=self.device)
        q, k, v = (tensor.double() for tensor in (self.q[:, :, rows], self.k, self.v))
        out = reference.masked_attention3d_decode(q, k, v, rows, setting.grid, setting.mask, setting.dim**-0.5)
        seen = setting.mask.visible(setting.grid, rows).any(1)[:, None]
        gradients = self.step(self.sdpa, torch.float32)()[1:] if setting.backward else ()

        def check(name: str, found: tuple[Tensor, ...]) -> None:
            got = found[0][:, :, rows]
            pairs = [(got if name.startswith(OWN) else got.masked_fill(~seen, 0), out)]
            for what, want in [*pairs, *zip(found[1:], gradients, strict=True)]:
                hold(name, "relative error", relative_error(what, want), 2e-2)

        return check

    def bars(self, rows: list[Row]) -> list[Bar]:
        title = self.setting.title
        own = median(rows, OWN)
        best = min((row["p50_ms"] for row in rows if row["contender"].startswith("SDPA")), default=None)
        if self.causal:
            return [Bar(f"{title}, times faster than SDPA's best backend", ratio(best, own), 1.5)]
        return [
            Bar(f"{title}, times faster than compiled FlexAttention", ratio(median(rows, FLEX), own), 2),
            Bar(f"{title}, times faster than SDPA with a mask", ratio(best, own), 2.5),
        ]


def on_gpu(setting: Setting, place: Place) -> Problem:
    made = GpuProblem(setting, place.device)
    return Problem(made.contenders(), made.checker(), setting.moved, setting.flops, setting.dtype, finish=made.bars)


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(place: Place) -> list[Case]:
    settings = GPU_SETTINGS if place.gpu else SETTINGS
    if place.small:  # the two grids of the CPU become one
        settings = tuple(dict.fromkeys(replace(setting, grid=SMALL) for setting in settings))
    return [setting.case() for setting in settings]


def growth(place: Place) -> Iterator[Growth]:
    side = 2 if place.small else 16
    for mask, backward in ((Mask3d("raster"), True), (Mask3d("eq6"), False)):
        grids = [(frames, side, side) for frames in (FRAMES_CAUSAL if mask == Mask3d("raster") else FRAMES)]
        settings = {math.prod(grid): Setting(mask, grid, backward=backward) for grid in grids}
        peers = [SDPA_DENSE, SDPA_CAUSAL, EAGER]
        sizes = {length: setting.case(peers) for length, setting in settings.items()}
        kind = "forward + backward" if backward else "forward"
        title = f"{mask.name}, frames of {side}x{side}, 4 x 32, {kind}"
        yield Growth(title, "positions L", sizes, {"time": 2.0, "memory": 1.0})


BENCHMARK = Benchmark(
    name="masked_attention3d",
    about="Attention of a position to those before it in space and time, beside SDPA, FlexAttention and plain PyTorch",
    note=(
        "Batch 1, float32 unless said; titles give mask, grid (T, H, W), heads x components. Operations count what is "
        "visible alone, 4 d a pair forward and 10 d backward; bytes are inputs and results once. FlexAttention has no "
        "backward on the CPU; what needs a dense mask is left out beyond 8,192 positions."
    ),
    cases=cases,
    growth=lambda place: list(growth(place)),
)
