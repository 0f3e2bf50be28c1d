"""codeword_search against the same formula in PyTorch, torch.cdist and vector-quantize-pytorch.

    python benchmarks/ops/bench_codeword_search.py [--save] [--device cuda]

Float32. A contender that returns a codeword that is not the nearest ends the run without a figure. Peak memory is what
the process held at most during a call beyond its inputs and results, as the system counts it. Output allocation is part
of every figure, with memory that is recycled. The copy clones as many bytes as a search must move: vectors read,
quantized vectors and codes written. torch.cdist with argmin gives codes alone. vector-quantize-pytorch is not needed;
`pip install vector-quantize-pytorch` adds it.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import gpu
import harness

from vpfast.ops import CodewordSearchTraining, codeword_search, codeword_search_train
from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.register import backends


@dataclass
class Case:
    """So many vectors, and so many layers of so many codewords below each one of the layer before."""

    title: str
    vectors: int
    dim: int
    size: int
    layers: int
    train: bool = False

    def draw(self, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
        """Normal vectors; codewords halve from layer to layer, as residuals do."""
        rows = [self.size ** (layer + 1) for layer in range(self.layers)]
        codebooks = [torch.randn(count, self.dim, device=device) * 0.5**layer for layer, count in enumerate(rows)]
        return torch.randn(self.vectors, self.dim, device=device), codebooks

    def bytes_moved(self) -> int:
        return self.vectors * (2 * 4 * self.dim + 8 * self.layers)

    def bytes_of_eager(self) -> int:
        """Differences, their squares and, below a parent, the codewords: as many as a vector is compared with."""
        return 4 * self.vectors * self.size * self.dim * (2 if self.layers == 1 else 3)


CASES = (
    Case("KTH 3x8: 3 layers of 8", 245_760, 8, 8, 3),
    Case("KTH 9x2: 9 layers of 2", 245_760, 8, 2, 9),
    Case("KTH 1x512: a codebook of 512", 245_760, 8, 512, 1),
    Case("a codebook of 4096", 32_768, 64, 4096, 1),
    Case("KTH 3x8, training forward + backward", 245_760, 8, 8, 3, train=True),
)
CHECKED = 4096

Call = Callable[[], tuple[Tensor, ...]]
Train = Callable[[Tensor, Sequence[Tensor]], CodewordSearchTraining]


def search_contenders(case: Case, z: Tensor, codebooks: list[Tensor]) -> dict[str, Call]:
    """Each returns (quantized, indices) or (indices,)."""
    compiled = torch.compile(reference.codeword_search)
    calls: dict[str, Call] = {
        "vpfast": lambda: codeword_search(z, codebooks),
        "torch.compile": lambda: compiled(z, codebooks),
        "eager": lambda: reference.codeword_search(z, codebooks),
    }
    if case.layers == 1:
        calls["cdist, argmin"] = lambda: (torch.cdist(z, codebooks[0]).argmin(1, keepdim=True),)
        peer = vector_quantize(codebooks[0])
        if peer is not None:
            calls["vector-quantize-pytorch"] = lambda: peer(z)
    return calls


def vector_quantize(codebook: Tensor) -> Call | None:
    """The forward pass of vector-quantize-pytorch in evaluation, given our codebook; None where it is not installed."""
    try:
        package = importlib.import_module("vector_quantize_pytorch")
    except ImportError:
        return None
    module = package.VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    module.codebook = codebook

    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            quantized, indices, _ = module(z[None])
        return quantized[0], indices[0, :, None]

    return forward


def train_contenders(z: Tensor, codebooks: list[Tensor], grad_quantized: Tensor) -> dict[str, Call]:
    """Each returns every output and every gradient of Eq. 4-5 with all betas 0.25."""
    leaves = [t.clone().requires_grad_() for t in (z, *codebooks)]

    def step(train: Train, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = train(leaves[0], leaves[1:])
        commitment = 0.25 * (found.commitment_losses.sum() + found.commitment_losses[-1])
        loss = found.codebook_losses.sum() + found.combined_loss + commitment
        gradients = torch.autograd.grad((found.quantized, loss), leaves, (grad_quantized, torch.ones_like(loss)))
        return (*(t.detach() for t in found), *gradients)

    compiled = torch.compile(reference.training)
    return {
        "vpfast": lambda: step(codeword_search_train, leaves),
        "torch.compile": lambda: step(compiled, leaves),
        "eager": lambda: step(reference.training, leaves),
    }


def check_codes(name: str, indices: Tensor, z: Tensor, codebooks: list[Tensor]) -> None:
    """Of vectors spread over the batch: no codeword may be farther than the nearest by more than rounding explains."""
    some = slice(None, None, max(1, len(z) // CHECKED))
    exact = [codebook.double() for codebook in codebooks]
    limit = 1e-6 if name == "vpfast" else 1e-3  # float32 alone, or by |z|^2 - 2 z e + |e|^2
    size = len(codebooks[0])
    for vectors, codes in zip(z[some].double().split(128), indices[some].split(128), strict=True):
        residuals = reference.residuals(vectors, codes, exact, strict_tree=True)
        rows = reference.chosen_rows(codes, exact, strict_tree=True)
        for xi, row, codebook in zip(residuals, rows, exact, strict=False):
            choice = codebook.unflatten(0, (-1, size))[row // size]
            nearest = (xi[:, None] - choice).square().sum(2).amin(1)
            excess = ((xi - codebook[row]).square().sum(1) / nearest - 1).max().item()
            if not excess <= limit:
                raise SystemExit(f"{name} is wrong (a codeword {excess:.1e} farther, limit {limit:.0e}): no figures")


def check_training(name: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    limit = 1e-4 if name == "vpfast" else 1e-2  # in float32 alone, near-ties go to another codeword
    for got, want in zip(found, exact, strict=True):
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if got.is_floating_point() and not error < limit:
            raise SystemExit(f"{name} is wrong (relative error {error:.1e}, limit {limit:.0e}): no figures")


def measure(case: Case, seconds: float) -> list[dict]:
    z, codebooks = case.draw()
    torch.compiler.reset()
    grad = torch.randn_like(z)
    calls = train_contenders(z, codebooks, grad) if case.train else search_contenders(case, z, codebooks)
    rows = [{"case": case.title, "who": "eager", "left_out": f"it needs {case.bytes_of_eager() / 1e9:.0f} GB"}]
    if case.bytes_of_eager() > harness.available_memory():
        del calls["eager"]
    else:
        rows.clear()

    exact: tuple[Tensor, ...] = ()
    if case.train:
        exact = train_contenders(z.double(), [codebook.double() for codebook in codebooks], grad.double())["eager"]()
    memory = {}
    for name, call in calls.items():
        found = call()
        check_codes(name, found[1 if len(found) > 1 else 0], z, codebooks)
        if case.train:
            check_training(name, found, exact)
        del found
        memory[name] = harness.peak_memory(call)
    source = torch.randn(case.bytes_moved() // 8)
    for name, timing in harness.time_side_by_side({"copy": source.clone, **calls}, seconds).items():
        figures = {"bytes": case.bytes_moved(), "peak_memory": memory.get(name), **vars(timing)}
        rows.append({"case": case.title, "vectors": case.vectors, "dim": case.dim, "who": name, **figures})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "left_out" in row:
            lines.append([row["case"], row["who"], f"left out: {row['left_out']}", "", "", "", ""])
            continue
        own = next(r["p50"] for r in rows if (r["case"], r["who"]) == (row["case"], "vpfast"))
        memory = row["peak_memory"]
        lines.append(
            [
                f"{row['case']}; ({row['vectors']}, {row['dim']})",
                row["who"],
                f"{row['p50']:.2f}",
                f"{row['p20']:.2f}-{row['p80']:.2f}",
                f"{row['cold']:.2f}",
                f"{row['p50'] / own:.1f}",
                "" if memory is None else f"{memory / 2**20:.0f}",
            ]
        )
    header = ["case", "who", "ms", "p20-p80", "first of a burst", "times vpfast's", "peak MB beyond inputs and results"]
    return harness.markdown_table(header, lines)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_CASES = (
    Case("KTH 3x8: 3 layers of 8", 2**20, 8, 8, 3),
    Case("KTH 9x2: 9 layers of 2", 2**20, 8, 2, 9),
    Case("KTH 1x512: a codebook of 512", 2**20, 8, 512, 1),
    Case("a codebook of 4096", 2**18, 64, 4096, 1),
    Case("KTH 3x8, training forward + backward", 2**20, 8, 8, 3, train=True),
)
COMPILED = ("KTH 3x8: 3 layers of 8", "KTH 3x8, training forward + backward")  # each takes the compiler long
AT_MOST_MS = 0.030


def gpu_contenders(case: Case, z: Tensor, codebooks: list[Tensor], grad: Tensor) -> dict[str, Call]:
    calls = train_contenders(z, codebooks, grad) if case.train else search_contenders(case, z, codebooks)
    vpfast = gpu.by_backend(backends, z.device.type, calls.pop("vpfast"))
    if case.title not in COMPILED:
        del calls["torch.compile"]
    if case.bytes_of_eager() > 2**34:
        del calls["eager"]
    return vpfast | calls


def measure_on_gpu(case: Case, device: str) -> tuple[list[dict], list[gpu.Bar], list[str]]:
    z, codebooks = case.draw(device)
    torch.compiler.reset()
    grad = torch.randn_like(z)
    exact: tuple[Tensor, ...] = ()
    if case.train:
        exact = train_contenders(z.double(), [codebook.double() for codebook in codebooks], grad.double())["eager"]()

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        name = name.partition(",")[0] if name.startswith("vpfast") else name
        check_codes(name, found[1 if len(found) > 1 else 0], z, codebooks)
        if case.train:
            check_training(name, found, exact)

    running, refused = gpu.checked(gpu_contenders(case, z, codebooks, grad), check)
    timings = gpu.time_calls({"copy": gpu.copying(case.bytes_moved(), device), **running}, device)
    title = f"{case.title}; ({case.vectors}, {case.dim})"
    rows = gpu.rows_of(title, timings, **({} if case.train else {"bytes": case.bytes_moved()}))
    if case is not GPU_CASES[0]:
        return rows, [], refused
    return rows, [gpu.Bar(title, gpu.median(rows, title, "vpfast"), AT_MOST_MS, " ms", at_most=True)], refused


def on_gpu(options: argparse.Namespace) -> None:
    rows, bars, refused = [], [], []
    for case in GPU_CASES:
        if options.rehearse:
            case.vectors, case.size = 500, min(case.size, 16)
        found = measure_on_gpu(case, gpu.device_of(options))
        rows, bars, refused = rows + found[0], bars + found[1], refused + found[2]
    gpu.report("codeword_search", rows, bars, refused, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the record under benchmarks/results/")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each comparison")
    parser.add_argument("--at-most", type=int, help="so many vectors a case, to see that it runs")
    gpu.add_options(parser)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.device == "cuda":
        on_gpu(arguments)
        return
    harness.allocator("recycled")
    rows = []
    for case in CASES:
        case.vectors = min(case.vectors, arguments.at_most or case.vectors)
        rows += measure(case, arguments.seconds)
    machine = harness.machine()
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = f"Median of interleaved calls, allocation of the outputs counted. {told}."
    text = f"# codeword_search, float32\n\n{how}\n\n{table(rows)}"
    print(text)
    if arguments.save:
        harness.save("codeword_search_cpu", {"machine": machine, "rows": rows}, text)


if __name__ == "__main__":
    main()
