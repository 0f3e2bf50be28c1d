"""masked_attention3d against scaled_dot_product_attention, FlexAttention and the same formula in PyTorch.

    python benchmarks/ops/bench_masked_attention3d.py [--save] [--device cuda]

A contender whose result or gradients are wrong ends the run without a figure. Everyone is given the same mask:
scaled_dot_product_attention (SDPA) as a dense tensor of bools, or by is_causal where the mask is that; FlexAttention as
a mask_mod of the same rules, with its block mask made before; it has no backward on the CPU. Peak memory is what the
process held at most during a call beyond its inputs and results, as the system counts it. GFLOP/s count what is visible
alone, 4 d a pair forward and 10 d backward; the matrix product beside them is torch's own of 1024 x 1024 matrices.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
import gpu
import harness

from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.mask import RULES
from vpfast.ops.masked_attention3d.register import backends

Call = Callable[[], tuple[Tensor, ...]]
Grid = tuple[int, int, int]
MATRIX = 1024


@dataclass
class Case:
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
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.mask.name}{window}, {self.grid}, {self.heads} x {self.dim}{dtype}, {kind}"

    def queries(self) -> Tensor:
        return torch.arange(self.length)[-self.decode :]

    def flops(self) -> int:
        return visible_pairs(self.mask, self.grid, self.decode) * self.heads * self.dim * (14 if self.backward else 4)

    def draw(self) -> list[Tensor]:
        """q, k, v and a gradient of the output."""
        shape = (1, self.heads, self.length, self.dim)
        drawn = [torch.randn(shape).to(self.dtype) for _ in range(4)]
        return [drawn[0][:, :, -self.decode :], *drawn[1:]]


@cache
def visible_pairs(mask: Mask3d, grid: Grid, decode: int) -> int:
    queries = torch.arange(math.prod(grid))[-decode:]
    return sum(int(mask.visible(grid, rows).sum()) for rows in queries.split(1024))


ISSUED = [Mask3d("raster"), Mask3d("eq6"), Mask3d("separable"), Mask3d("past_frames"), Mask3d("raster", (2, 3, 3))]
CASES = (
    *(Case(mask, backward=backward) for mask in ISSUED for backward in (False, True)),
    *(Case(Mask3d("raster"), dtype=torch.bfloat16, backward=backward) for backward in (False, True)),
    *(Case(Mask3d("raster"), (20, 16, 16), dim=16, backward=backward) for backward in (False, True)),
    *(Case(Mask3d(name), decode=count) for name in ("raster", "eq6") for count in (1, 16)),
    Case(Mask3d("raster"), (30, 32, 32), backward=True),
)
LARGEST_DENSE = 8192  # positions: beyond, a dense mask or its scores do not fit


# --- contenders -------------------------------------------------------------------------------------------------------


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Call]:
    """Each returns (out,), or (out, grad_q, grad_k, grad_v)."""
    if case.decode:
        return decoders(case, q, k, v)
    leaves = [tensor.clone().requires_grad_(case.backward) for tensor in (q, k, v)]

    def step(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        def run() -> tuple[Tensor, ...]:
            out = attention(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad)) if case.backward else (out,)

        return run

    grid, mask = case.grid, case.mask
    calls = {"vpfast": step(lambda q, k, v: masked_attention3d(q, k, v, grid, mask))}
    if mask == Mask3d("raster"):
        calls["SDPA is_causal"] = step(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))
    if case.length <= LARGEST_DENSE:
        dense = mask.visible(grid)
        calls["SDPA dense mask"] = step(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense))
        scale = case.dim**-0.5
        calls["eager"] = step(lambda q, k, v: reference.masked_attention3d(q, k, v, grid, mask, scale)[0])
        if not case.backward:
            calls["FlexAttention, compiled"] = step(flexible(case))
    return calls


def decoders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    grid, mask, positions = case.grid, case.mask, case.queries()
    dense, scale = mask.visible(grid, positions), case.dim**-0.5
    calls: dict[str, Call] = {
        "vpfast": lambda: (masked_attention3d_decode(q, k, v, grid, positions, mask),),
        "SDPA dense mask": lambda: (scaled_dot_product_attention(q, k, v, attn_mask=dense),),
        "eager": lambda: (reference.masked_attention3d_decode(q, k, v, positions, grid, mask, scale),),
    }
    if mask == Mask3d("raster") and case.decode == 1:  # the last position sees all there is
        calls["SDPA, no mask"] = lambda: (scaled_dot_product_attention(q, k, v),)
    return calls


def flexible(case: Case, device: str = "cpu") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention under the rules of the case's mask."""
    _, height, width = case.grid
    frame, rule = height * width, RULES[case.mask.name]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = rule(j // frame, j % frame, i // frame, i % frame)
        places = ((p // frame, p % frame // width, p % width) for p in (i, j))
        for one, other, radius in zip(*places, case.mask.radii, strict=True):
            if radius >= 0:
                seen = seen & ((one - other).abs() <= radius)
        return seen

    # Compiled, the block mask is made without the whole mask in memory; on a CPU that takes longer than it saves.
    made = {"device": device, "_compile": device != "cpu"}
    blocks = create_block_mask(sees, None, None, case.length, case.length, **made)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


# --- correctness ------------------------------------------------------------------------------------------------------


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The reference in float64, head by head. Too large for that, SDPA tells what is right."""
    if case.length > LARGEST_DENSE:
        return list(contenders(case, q, k, v, grad)["SDPA is_causal"]())
    scale, heads = case.dim**-0.5, []
    for one in zip(*(tensor.double().split(1, 1) for tensor in (q, k, v, grad)), strict=True):
        if case.decode:
            rows = reference.masked_attention3d_decode(*one[:3], case.queries(), case.grid, case.mask, scale)
            heads.append((rows,))
            continue
        out, lse = reference.masked_attention3d(*one[:3], case.grid, case.mask, scale)
        heads.append((out,))
        if case.backward:
            gradients = reference.masked_attention3d_backward(one[3], *one[:3], out, lse, case.grid, case.mask, scale)
            heads[-1] = (out, *gradients)
    return [torch.cat(parts, 1) for parts in zip(*heads, strict=True)]


def check(case: Case, name: str, found: tuple[Tensor, ...], right: list[Tensor]) -> None:
    """What a query that sees nothing gets, SDPA leaves open: only vpfast is held to 0."""
    limit = 1e-5 if case.dtype == torch.float32 else 2e-2
    for got, want in zip(found, right, strict=True):
        got = got.double() if name == "vpfast" else got.double().nan_to_num()
        error = ((got - want).norm() / want.norm()).item()
        if not error < limit:
            raise SystemExit(
                f"{case.title}: {name} is wrong (relative error {error:.1e}, limit {limit:.0e}): no figures"
            )


# --- figures ----------------------------------------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> list[dict]:
    given = case.draw()
    torch.compiler.reset()
    calls, right = contenders(case, *given), exact(case, *given)
    memory = {}
    for name, call in calls.items():
        check(case, name, call(), right)
        memory[name] = harness.peak_memory(call)
    del right
    square = torch.randn(MATRIX, MATRIX).to(case.dtype)
    calls["matrix product"] = lambda: (square @ square,)
    flops = {name: 2 * MATRIX**3 if name == "matrix product" else case.flops() for name in calls}
    return [
        {"case": case.title, "who": name, "flops": flops[name], "peak_memory": memory.get(name), **vars(timing)}
        for name, timing in harness.time_side_by_side(calls, seconds).items()
    ]


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        own = next(r["p50"] for r in rows if (r["case"], r["who"]) == (row["case"], "vpfast"))
        memory = row["peak_memory"]
        lines.append(
            [
                row["case"],
                row["who"],
                f"{row['p50']:.3f}",
                f"{row['p20']:.3f}-{row['p80']:.3f}",
                f"{row['cold']:.3f}",
                "" if row["who"] == "matrix product" else f"{row['p50'] / own:.1f}",
                f"{row['flops'] / row['p50'] / 1e6:.0f}",
                "" if memory is None else f"{memory / 2**20:.0f}",
            ]
        )
    header = ["case", "who", "ms", "p20-p80", "first of a burst", "times vpfast's", "GFLOP/s", "peak MB beyond results"]
    return harness.markdown_table(header, lines)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

LONG = (30, 32, 32)
GPU_CASES = tuple(
    Case(Mask3d(name), LONG, dim=dim, backward=backward, dtype=torch.bfloat16)
    for dim in (16, 32)
    for name in ("raster", "eq6")
    for backward in (False, True)
)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
ROWS = 64  # queries whose results are looked at in float64


@dataclass
class Problem:
    """Inputs on a device. Queries that see nothing get no gradient, and in ``dense`` see themselves: SDPA leaves open
    what becomes of them."""

    case: Case
    device: str

    def __post_init__(self) -> None:
        case = self.case
        shape = (1, case.heads, case.length, case.dim)
        self.q, self.k, self.v, self.grad = (torch.randn(shape, device=self.device).to(case.dtype) for _ in range(4))
        every = torch.arange(case.length, device=self.device)
        self.causal = case.mask == Mask3d("raster")
        self.dense = None if self.causal else case.mask.visible(case.grid, every)
        if self.dense is not None:
            blind = ~self.dense.any(1)
            self.dense[blind, every[blind]] = True
            self.grad = self.grad.masked_fill(blind[:, None], 0)

    def step(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype | None = None) -> Call:
        inputs = [tensor.to(dtype or self.case.dtype) for tensor in (self.q, self.k, self.v)]
        leaves = [tensor.requires_grad_(self.case.backward) for tensor in (each.detach() for each in inputs)]
        grad = self.grad.to(leaves[0].dtype)

        def run() -> tuple[Tensor, ...]:
            out = attention(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad)) if self.case.backward else (out,)

        return run

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=self.dense, is_causal=self.causal)

    def sdpa_by(self, backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return self.sdpa(q, k, v)

        return attend

    def contenders(self) -> dict[str, Call]:
        case = self.case
        calls = gpu.by_backend(
            backends, self.device, self.step(lambda q, k, v: masked_attention3d(q, k, v, case.grid, case.mask))
        )
        given = "is_causal" if self.causal else "dense mask"
        calls |= {f"SDPA {name}, {given}": self.step(self.sdpa_by(backend)) for name, backend in SDPA.items()}
        if not self.causal and not (self.device == "cpu" and case.backward):
            calls["FlexAttention, compiled"] = self.step(flexible(case, self.device))
        return calls

    def checker(self) -> Callable[[str, tuple[Tensor, ...]], None]:
        """Rows of the output in float64; gradients beside those of SDPA in float32."""
        case = self.case
        rows = torch.randint(case.length, (ROWS,), device=self.device)
        exact = [tensor.double() for tensor in (self.q[:, :, rows], self.k, self.v)]
        out = reference.masked_attention3d_decode(*exact, rows, case.grid, case.mask, case.dim**-0.5)
        seen = case.mask.visible(case.grid, rows).any(1)[:, None]
        gradients = self.step(self.sdpa, torch.float32)()[1:] if case.backward else ()

        def check(name: str, found: tuple[Tensor, ...]) -> None:
            got = found[0][:, :, rows]
            pairs = [(got if name.startswith("vpfast") else got.masked_fill(~seen, 0), out)]
            for what, want in [*pairs, *zip(found[1:], gradients, strict=True)]:
                error = gpu.relative_error(what, want)
                if not error < 2e-2:
                    raise SystemExit(f"{case.title}: {name} is wrong (relative error {error:.1e}): no figures")

        return check

    def bars(self, rows: list[dict]) -> list[gpu.Bar]:
        title = self.case.title
        own = gpu.median(rows, title, "vpfast")
        best = min((row["p50"] for row in rows if row["who"].startswith("SDPA")), default=None)
        if self.causal:
            return [gpu.Bar(f"{title}, times faster than SDPA's best backend", gpu.ratio(best, own), 1.5)]
        flexible = gpu.median(rows, title, "FlexAttention, compiled")
        return [
            gpu.Bar(f"{title}, times faster than compiled FlexAttention", gpu.ratio(flexible, own), 2),
            gpu.Bar(f"{title}, times faster than SDPA with a mask", gpu.ratio(best, own), 2.5),
        ]


def measure_on_gpu(case: Case, device: str) -> tuple[list[dict], list[gpu.Bar], list[str]]:
    torch.compiler.reset()
    problem = Problem(case, device)
    running, refused = gpu.checked(problem.contenders(), problem.checker())
    rows = gpu.rows_of(case.title, gpu.time_calls(running, device), flops=case.flops())
    return rows, problem.bars(rows), [f"{case.title}: {line}" for line in refused]


def on_gpu(options: argparse.Namespace) -> None:
    rows, bars, refused = [], [], []
    for case in GPU_CASES:
        if options.only not in case.title:
            continue
        found = measure_on_gpu(replace(case, grid=(3, 4, 4)) if options.rehearse else case, gpu.device_of(options))
        rows, bars, refused = rows + found[0], bars + found[1], refused + found[2]
    gpu.report("masked_attention3d", rows, bars, refused, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the record under benchmarks/results/")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each comparison")
    parser.add_argument("--only", default="", help="the cases whose title contains this")
    parser.add_argument("--at-most", type=int, help="so many frames, rows and columns, to see that it runs")
    gpu.add_options(parser)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.device == "cuda":
        on_gpu(arguments)
        return
    harness.allocator("recycled")
    rows = []
    for case in CASES:
        if arguments.only not in case.title:
            continue
        T, H, W = (min(size, arguments.at_most or size) for size in case.grid)
        rows += measure(replace(case, grid=(T, H, W)), arguments.seconds)
    machine = harness.machine()
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = f"Batch 1. Median of interleaved calls, allocation of the outputs counted. {told}."
    text = f"# masked_attention3d\n\n{how}\n\n{table(rows)}"
    print(text)
    if arguments.save:
        harness.save("masked_attention3d_cpu", {"machine": machine, "rows": rows}, text)


if __name__ == "__main__":
    main()
