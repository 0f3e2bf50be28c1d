"""codeword_search against the same formula in PyTorch, torch.cdist, vector-quantize-pytorch and faiss:
``vpfast bench codeword_search``.

vector-quantize-pytorch and faiss are not needed: ``pip install vector-quantize-pytorch faiss-cpu`` adds them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vpfast.benchmarks import gpu, harness
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
    relative_error,
)
from vpfast.ops import CodewordSearchTraining, codeword_search, codeword_search_train
from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.register import backends

CHECKED = 4096
AT_MOST_MS = 0.030  # of the first case on a GPU
PEER, FAISS = "vector-quantize-pytorch", "faiss ResidualQuantizer"

Train = Callable[[Tensor, Sequence[Tensor]], CodewordSearchTraining]


@dataclass(frozen=True)
class Setting:
    """So many vectors, and so many layers of so many codewords below each one of the layer before, or of one codebook a
    layer."""

    title: str
    vectors: int
    dim: int
    size: int
    layers: int
    train: bool = False
    strict_tree: bool = True

    def draw(self, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
        """Normal vectors; codewords halve from layer to layer, as residuals do."""
        rows = [self.size ** (layer + 1) if self.strict_tree else self.size for layer in range(self.layers)]
        codebooks = [torch.randn(count, self.dim, device=device) * 0.5**layer for layer, count in enumerate(rows)]
        return torch.randn(self.vectors, self.dim, device=device), codebooks

    @property
    def moved(self) -> int:
        """Vectors read, quantized ones and codes written; backward reads vectors, codes and a gradient, writes one."""
        search = 2 * 4 * self.dim + 8 * self.layers
        return self.vectors * (search + (3 * 4 * self.dim + 8 * self.layers if self.train else 0))

    @property
    def flops(self) -> int:
        """A product with every codeword that a vector is compared with. Training: residuals and errors of every layer,
        once more backward, and the sums over vectors."""
        search = self.layers * self.size * 2 * self.dim
        return self.vectors * (search + (6 * self.layers * self.dim + self.dim if self.train else 0))

    @property
    def bytes_of_eager(self) -> int:
        """Differences, their squares and, below a parent, the codewords: as many as a vector is compared with."""
        return 4 * self.vectors * self.size * self.dim * (2 if self.layers == 1 else 3)

    def case(self, *, compiled: bool = True) -> Case:
        title = f"{self.title}; ({self.vectors}, {self.dim})"
        return Case(title, lambda place: problem(self, place, title, compiled))


SETTINGS = (
    Setting("KTH 3x8: 3 layers of 8", 245_760, 8, 8, 3),
    Setting("KTH 9x2: 9 layers of 2", 245_760, 8, 2, 9),
    Setting("KTH 1x512: a codebook of 512", 245_760, 8, 512, 1),
    Setting("a codebook of 4096", 32_768, 64, 4096, 1),
    Setting("no tree: 3 layers of one codebook of 8", 245_760, 8, 8, 3, strict_tree=False),
    Setting("KTH 3x8, training forward + backward", 245_760, 8, 8, 3, train=True),
)
GPU_SETTINGS = (
    Setting("KTH 3x8: 3 layers of 8", 2**20, 8, 8, 3),
    Setting("KTH 9x2: 9 layers of 2", 2**20, 8, 2, 9),
    Setting("KTH 1x512: a codebook of 512", 2**20, 8, 512, 1),
    Setting("a codebook of 4096", 2**18, 64, 4096, 1),
    Setting("KTH 3x8, training forward + backward", 2**20, 8, 8, 3, train=True),
)
COMPILED_ON_GPU = (GPU_SETTINGS[0].title, GPU_SETTINGS[-1].title)  # each takes the compiler long
VECTORS = (2**10, 2**12, 2**14, 2**16, 2**18)


# --- contenders -------------------------------------------------------------------------------------------------------


def search_contenders(setting: Setting, z: Tensor, codebooks: list[Tensor]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that run, each of which returns (quantized, indices) or (indices,), and why the others do not."""
    plain = reference.codeword_search
    compiled = torch.compile(plain)
    tree = setting.strict_tree
    calls: dict[str, Call] = {
        OWN: lambda: codeword_search(z, codebooks, tree),
        "torch.compile": lambda: compiled(z, codebooks, tree),
        "eager": lambda: plain(z, codebooks, tree),
    }
    if tree and setting.layers > 1:
        return calls, {}  # nothing public searches a tree
    if setting.layers == 1:
        calls["cdist, argmin"] = lambda: (torch.cdist(z, codebooks[0]).argmin(1, keepdim=True),)
    peers = {
        PEER: ("vector_quantize_pytorch", "vector-quantize-pytorch", vector_quantize),
        FAISS: ("faiss", "faiss-cpu", faiss_quantizer),
    }
    absent = {
        name: f"not installed: pip install {package}"
        for name, (module, package, _) in peers.items()
        if importlib.util.find_spec(module) is None
    }
    calls |= {name: peer(z, codebooks) for name, (_, _, peer) in peers.items() if name not in absent}
    return calls, absent


def vector_quantize(z: Tensor, codebooks: list[Tensor]) -> Call:
    """The forward pass of vector-quantize-pytorch in evaluation, given our codebooks."""
    package: Any = importlib.import_module("vector_quantize_pytorch")
    size, dim = codebooks[0].shape
    if len(codebooks) == 1:
        module = package.VectorQuantize(dim=dim, codebook_size=size)
        module.codebook = codebooks[0]
    else:
        module = package.ResidualVQ(dim=dim, codebook_size=size, num_quantizers=len(codebooks))
        for layer, codebook in zip(module.layers, codebooks, strict=True):
            layer.codebook = codebook
    module.eval().to(z.device)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            quantized, indices, _ = module(z[None])
        return quantized[0], indices[0].reshape(len(z), -1)

    return forward


def faiss_quantizer(z: Tensor, codebooks: list[Tensor]) -> Call:
    """faiss's ResidualQuantizer, greedy and given our codebooks: codes packed by bits, unpacked here. On the CPU."""
    faiss: Any = importlib.import_module("faiss")
    size, dim = codebooks[0].shape
    bits = size.bit_length() - 1
    quantizer = faiss.ResidualQuantizer(dim, len(codebooks), bits)
    quantizer.max_beam_size = 1
    quantizer.train_type = faiss.ResidualQuantizer.Skip_codebook_tables
    faiss.copy_array_to_vector(torch.cat(codebooks).cpu().numpy().ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = z.cpu().numpy()

    def search() -> tuple[Tensor]:
        packed = torch.from_numpy(quantizer.compute_codes(rows)).long()
        whole = (packed << torch.arange(0, 8 * packed.shape[1], 8)).sum(1, keepdim=True)
        return ((whole >> torch.arange(0, bits * len(codebooks), bits)) & (size - 1),)

    return search


def train_contenders(z: Tensor, codebooks: list[Tensor], grad_quantized: Tensor) -> dict[str, Call]:
    """Each returns every output and every gradient of Eq. 4-5 with all betas 0.25."""
    leaves = [t.clone().requires_grad_() for t in (z, *codebooks)]

    def step(train: Train) -> tuple[Tensor, ...]:
        found = train(leaves[0], leaves[1:])
        commitment = 0.25 * (found.commitment_losses.sum() + found.commitment_losses[-1])
        loss = found.codebook_losses.sum() + found.combined_loss + commitment
        gradients = torch.autograd.grad((found.quantized, loss), leaves, (grad_quantized, torch.ones_like(loss)))
        return (*(t.detach() for t in found), *gradients)

    compiled = torch.compile(reference.training)
    return {
        OWN: lambda: step(codeword_search_train),
        "torch.compile": lambda: step(compiled),
        "eager": lambda: step(reference.training),
    }


# --- correctness ------------------------------------------------------------------------------------------------------


def check_codes(
    name: str, indices: Tensor, z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True, limit: float = 1e-6
) -> None:
    """Of vectors spread over the batch: no codeword may be farther than the nearest by more than rounding explains.

    Raises:
        WrongResultError: one is.
    """
    some = slice(None, None, max(1, len(z) // CHECKED))
    exact = [codebook.double() for codebook in codebooks]
    size = len(codebooks[0])
    if indices.shape != (len(z), len(codebooks)) or int(indices.min()) < 0 or int(indices.max()) >= size:
        raise WrongResultError(f"{name} is wrong (codes are not in 0..{size - 1}, or {tuple(indices.shape)} of them)")
    for vectors, codes in zip(z[some].double().split(128), indices[some].split(128), strict=True):
        residuals = reference.residuals(vectors, codes, exact, strict_tree=strict_tree)
        rows = reference.chosen_rows(codes, exact, strict_tree=strict_tree)
        for xi, row, codebook in zip(residuals, rows, exact, strict=False):
            choice = codebook.unflatten(0, (-1, size))[row // size]
            nearest = (xi[:, None] - choice).square().sum(2).amin(1)
            excess = ((xi - codebook[row]).square().sum(1) / nearest - 1).max().item()
            hold(name, "a codeword farther than the nearest by", excess, limit)


def check_training(name: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    limit = 1e-4 if name.startswith(OWN) else 1e-2  # in float32 alone, near-ties go to another codeword
    for got, want in zip(found, exact, strict=True):
        if got.is_floating_point():
            hold(name, "relative error", relative_error(got, want), limit)


# --- cases ------------------------------------------------------------------------------------------------------------


def problem(setting: Setting, place: Place, title: str, compiled: bool) -> Problem:
    z, codebooks = setting.draw(place.device)
    exact: tuple[Tensor, ...] = ()
    absent: dict[str, str] = {}
    if setting.train:
        grad = torch.randn_like(z)
        calls = train_contenders(z, codebooks, grad)
        exact = train_contenders(z.double(), [codebook.double() for codebook in codebooks], grad.double())["eager"]()
    else:
        calls, absent = search_contenders(setting, z, codebooks)
    limited = 2**34 if place.gpu else harness.available_memory()
    if setting.bytes_of_eager > limited:
        del calls["eager"]
        absent["eager"] = f"left out: it needs {setting.bytes_of_eager / 1e9:.0f} GB"
    if not compiled:
        del calls["torch.compile"]
    if place.gpu:
        calls = gpu.by_backend(backends, place.device, calls.pop(OWN)) | calls

    def check(name: str, found: tuple[Tensor, ...]) -> None:
        # In float32 alone, or by |z|^2 - 2 z e + |e|^2, a codeword may be chosen that is a little farther.
        limit = 1e-6 if name.startswith(OWN) else 1e-3
        check_codes(name, found[1 if len(found) > 1 else 0], z, codebooks, setting.strict_tree, limit)
        if setting.train:
            check_training(name, found, exact)

    def finish(rows: list[Row]) -> Sequence[Bar]:
        if not place.gpu or setting.title != GPU_SETTINGS[0].title:
            return ()
        return [Bar(title, median(rows, OWN), AT_MOST_MS, " ms", at_most=True)]

    return Problem(calls, check, setting.moved, setting.flops, absent=absent, finish=finish)


def cases(place: Place) -> Iterator[Case]:
    for setting in GPU_SETTINGS if place.gpu else SETTINGS:
        compiled = not place.gpu or setting.title in COMPILED_ON_GPU
        yield (small(setting) if place.small else setting).case(compiled=compiled)


def small(setting: Setting) -> Setting:
    return replace(setting, vectors=500, size=min(setting.size, 16))


def growth(place: Place) -> Iterator[Growth]:
    for setting in (SETTINGS[0], SETTINGS[2]):
        few = small(setting) if place.small else setting
        counts = (64, 128, 256, 512) if place.small else VECTORS
        sizes = {count: replace(few, vectors=count).case(compiled=False) for count in counts}
        yield Growth(setting.title, "vectors N", sizes, {"time": 1.0, "memory": 0.0})


BENCHMARK = Benchmark(
    name="codeword_search",
    about="The nearest codewords of every layer in one pass, beside PyTorch, vector-quantize-pytorch and faiss",
    note=(
        "float32, (N, D) vectors. Bytes: vectors read, quantized vectors and codes written; operations: a product with "
        "every codeword that a vector is compared with. `cdist, argmin` and faiss give codes alone; faiss's quantizer "
        "is greedy (a beam of 1) and has no trees."
    ),
    cases=lambda place: list(cases(place)),
    growth=lambda place: list(growth(place)),
)
