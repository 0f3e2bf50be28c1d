"""The three operators on a GPU, by every backend: small cases for a memory checker, repeatability, 2^31 elements.

    python benchmarks/gpu_cases.py small|repeatable|large [--device cuda] [--elements 2147483648]

The reference tells what is right. Prints a line a case and what is wrong with it; the exit status is 1 where anything
is.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vpfast
from vpfast.ops import Mask3d, codeword_search, codeword_search_train, edlstm_gates, masked_attention3d
from vpfast.ops import masked_attention3d_decode as decode
from vpfast.ops.codeword_search.register import backends as search_backends
from vpfast.ops.edlstm_gates.register import backends as gates_backends
from vpfast.ops.masked_attention3d.register import backends as attention_backends

Call = Callable[[], tuple[Tensor, ...]]
Case = tuple[str, Any, Call]  # what it is called, who serves it, and the call

BYTES_OF_GATES = 2 * (
    3 * 4 + 5
)  # an element of the cell, forward and backward: gates, their gradient, a copy; five maps
BYTES_OF_SEARCH = 2 * 2 * 8 + 3 * 8 + 8  # a vector of 8: in, out, codes, and what Triton keeps of each


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Drawn on the CPU: under a memory checker only the operators are to run on the GPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(shape).encode()))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def with_gradients(function: Callable[..., Any], leaves: list[Tensor]) -> Call:
    """Outputs, and the gradients of those that have one, for gradients of one."""

    def call() -> tuple[Tensor, ...]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [out for out in outputs if out.requires_grad]
        found = torch.autograd.grad(given, inputs, [torch.ones_like(out) for out in given], allow_unused=True)
        return (*(out.detach() for out in outputs), *(gradient for gradient in found if gradient is not None))

    return call


# --- small cases ------------------------------------------------------------------------------------------------------


def gates_case(batch: int, channels: int, size: tuple[int, ...], dtype: torch.dtype, layout: Any, device: str) -> Case:
    gates = randn((batch, 4 * channels, *size), dtype, device).contiguous(memory_format=layout)
    c_prev = randn((batch, channels, *size), dtype, device).contiguous(memory_format=layout)
    name = f"edlstm_gates {tuple(gates.shape)} {dtype} {layout}"
    return name, gates_backends, with_gradients(edlstm_gates, [gates, c_prev])


def search_case(
    vectors: int, dim: int, size: int, layers: int, strict: bool, dtype: torch.dtype, device: str
) -> Iterator[Case]:
    z = randn((vectors, dim), dtype, device)
    rows = [size ** (i + 1) if strict else size for i in range(layers)]
    codebooks = [0.5**i * randn((count, dim), dtype, device) for i, count in enumerate(rows)]
    name = f"({vectors}, {dim}) {dtype}, {layers} layers of {size}, {'a tree' if strict else 'no tree'}"

    def train(z: Tensor, *codebooks: Tensor) -> tuple[Tensor, ...]:
        return tuple(codeword_search_train(z, codebooks, strict))

    yield f"codeword_search {name}", search_backends, lambda: codeword_search(z, codebooks, strict)
    yield f"codeword_search_train {name}", search_backends, with_gradients(train, [z, *codebooks])


def attention_case(
    mask: Mask3d, grid: tuple[int, int, int], heads: int, dim: int, dtype: torch.dtype, device: str
) -> Iterator[Case]:
    length = grid[0] * grid[1] * grid[2]
    q, k, v = (randn((1, heads, length, dim), dtype, device).roll(turn) for turn in range(3))
    name = f"{mask.name} {mask.window or ''} {grid}, {heads} x {dim} {dtype}"
    some = torch.tensor([length - 1, length // 2, length // 3], device=device)
    few = q[:, :, :3]
    yield (
        f"masked_attention3d {name}",
        attention_backends,
        with_gradients(lambda q, k, v: masked_attention3d(q, k, v, grid, mask), [q, k, v]),
    )
    yield f"masked_attention3d_decode {name}", attention_backends, lambda: (decode(few, k, v, grid, some, mask),)


def small_cases(device: str) -> Iterator[Case]:
    """Odd sizes, where lanes stand out of range, and even ones, where wide accesses are taken."""
    plain, last = torch.contiguous_format, torch.channels_last
    for dtype in (torch.float32, torch.bfloat16):
        yield gates_case(2, 16, (8, 8), dtype, plain, device)
        yield gates_case(2, 16, (8, 8), dtype, last, device)
        yield gates_case(3, 5, (7, 3), dtype, plain, device)
        yield gates_case(3, 5, (7, 3), dtype, last, device)
        yield from search_case(300, 8, 8, 3, True, dtype, device)
        yield from search_case(77, 5, 3, 2, False, dtype, device)
        yield from search_case(61, 64, 100, 1, True, dtype, device)
        for mask in (Mask3d("raster"), Mask3d("eq6"), Mask3d("separable", (1, 2, None))):
            yield from attention_case(mask, (3, 5, 7), 2, 16, dtype, device)
        yield from attention_case(Mask3d("raster_strict"), (2, 8, 8), 1, 32, dtype, device)
        yield from attention_case(Mask3d("past_frames"), (2, 3, 3), 2, 40, dtype, device)


def wrong_by(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest relative error of a result; infinite where codes differ in more than near-ties explain."""
    worst = 0.0
    for got, want in zip(found, wanted, strict=True):
        if not got.is_floating_point():
            error = 0.0 if (got != want).double().mean() < 0.01 else float("inf")
        else:
            error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def unlike(call: Call, wanted: tuple[Tensor, ...], limit: float) -> str | None:
    return above(limit, wrong_by(call(), wanted))


def small(device: str) -> Iterator[str]:
    for name, serving, call in small_cases(device):
        with vpfast.backend("reference"):
            wanted = call()
        limit = 5e-2 if "bfloat16" in name else 1e-3
        for backend in served(serving, device):
            yield told(f"{backend}: {name}", tried(backend, unlike, call, wanted, limit))


# --- repeatability ----------------------------------------------------------------------------------------------------


def larger_cases(device: str, elements: int) -> Iterator[Case]:
    """Enough for many blocks, whose order then differs from run to run."""
    side = 8 if elements < 2**20 else 64
    for dtype in (torch.float32, torch.bfloat16):
        yield gates_case(4, 64 if side == 64 else 4, (side, side), dtype, torch.channels_last, device)
        yield from search_case(side**3, 8, 8, 3, True, dtype, device)
        yield from search_case(side**2, 64, 512 if side == 64 else 16, 1, True, dtype, device)
        for mask in (Mask3d("raster"), Mask3d("eq6")):
            yield from attention_case(mask, (4, side // 4, side // 4), 2, 32, dtype, device)


def unlike_itself(call: Call, device: str) -> str | None:
    first = [out.clone() for out in call()]
    poison = torch.full((2**22,), float("nan"), device=device)  # memory that was freed holds something else
    del poison
    apart = [k for k, (a, b) in enumerate(zip(first, call(), strict=True)) if not torch.equal(a, b)]
    return f"results {apart} differ bit by bit" if apart else None


def repeatable(device: str, elements: int) -> Iterator[str]:
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for name, serving, call in larger_cases(device, elements):
            for backend in served(serving, device):
                mode = ", deterministic algorithms" if deterministic else ""
                yield told(f"{backend}: {name}{mode}", tried(backend, unlike_itself, call, device))
    torch.use_deterministic_algorithms(False)


# --- beyond 2^31 elements ---------------------------------------------------------------------------------------------


def large(device: str, elements: int) -> Iterator[str]:
    yield from large_gates(device, elements)
    yield from large_search(device, elements)


def drawn_there(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()


def enough_memory(device: str, wanted: int) -> str | None:
    if device == "cpu":
        return None
    free = torch.cuda.mem_get_info()[0]
    return None if free > wanted else f"not run: needs {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def large_gates(device: str, elements: int) -> Iterator[str]:
    """The batch's first, last and middle maps, alone: no element depends on another map."""
    channels, size = 64, (64, 64)
    batch = elements // (4 * channels * size[0] * size[1]) + 3
    name = f"edlstm_gates ({batch}, {4 * channels}, {size[0]}, {size[1]}) bfloat16"
    without = enough_memory(device, BYTES_OF_GATES * batch * channels * size[0] * size[1])
    if without:
        yield told(name, without)
        return
    gates = drawn_there((batch, 4 * channels, *size), device)
    c_prev = drawn_there((batch, channels, *size), device)
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [tensor.contiguous(memory_format=layout) for tensor in (gates, c_prev)]
        for backend in served(gates_backends, device):
            yield told(f"{backend}: {name} {layout}", tried(backend, gates_unlike_alone, inputs))


def gates_unlike_alone(inputs: list[Tensor]) -> str | None:
    found, worst, batch = with_gradients(edlstm_gates, inputs)(), 0.0, len(inputs[0])
    for at in (0, batch // 2, batch - 2, batch - 1):
        with vpfast.backend("reference"):
            wanted = with_gradients(edlstm_gates, [tensor[at : at + 1].float() for tensor in inputs])()
        worst = max(worst, wrong_by(tuple(out[at : at + 1] for out in found), wanted))
    return above(1e-2, worst)


def large_search(device: str, elements: int) -> Iterator[str]:
    """The first, last and middle vectors, alone: no code depends on another vector."""
    N, D, some = elements // 8 + 1000, 8, 4096
    name = f"codeword_search ({N}, {D}) bfloat16, 3 layers of 8"
    without = enough_memory(device, BYTES_OF_SEARCH * N)
    if without:
        yield told(name, without)
        return
    z = drawn_there((N, D), device)
    codebooks = [0.5**i * randn((8 ** (i + 1), D), torch.float32, device) for i in range(3)]
    for backend in served(search_backends, device):
        yield told(f"{backend}: {name}", tried(backend, search_unlike_alone, z, codebooks, some))


def search_unlike_alone(z: Tensor, codebooks: list[Tensor], some: int) -> str | None:
    quantized, indices = codeword_search(z, codebooks)
    for start in (0, len(z) // 2, len(z) - some):
        part = slice(start, start + some)
        alone = codeword_search(z[part].clone(), codebooks)
        wrong = int((alone[1] != indices[part]).sum() + (alone[0] != quantized[part]).sum())
        if wrong:
            return f"from vector {start} on {wrong} results are not those of {some} vectors alone"
        with vpfast.backend("reference"):
            exact = codeword_search(z[part].double(), [codebook.double() for codebook in codebooks])[1]
        if (exact != indices[part]).double().mean() > 1e-3:
            return f"from vector {start} on the codes are not those of a search in float64"
    return None


# --- running them -----------------------------------------------------------------------------------------------------


def served(serving: Any, device: str) -> list[str]:
    return [name for name in ("native", "triton") if serving.serves(name, device)]


def tried(backend: str, look: Callable[..., str | None], *arguments: Any) -> str | None:
    """What ``look`` finds wrong under that backend, or the error it raised: other cases are looked at all the same."""
    try:
        with vpfast.backend(backend):  # type: ignore[arg-type]
            return look(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def above(limit: float, error: float) -> str | None:
    return None if error < limit else f"relative error {error:.1e}, not {limit:.0e}"


def told(name: str, wrong: str | None) -> str:
    return f"ok     {name}" if wrong is None else f"WRONG  {name}: {wrong}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("small", "repeatable", "large"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, default=2**31, help="of the large tensors")
    arguments = parser.parse_args()
    if arguments.what == "small":
        lines = small(arguments.device)
    else:
        lines = (repeatable if arguments.what == "repeatable" else large)(arguments.device, arguments.elements)
    count = wrong = 0
    for line in lines:
        count, wrong = count + 1, wrong + line.startswith("WRONG")
        print(line, flush=True)
    print(f"{count} cases, {wrong} wrong")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
