"""The CUDA kernels of codeword_search with no GPU: compiled for the host, a block's threads as fibers in turn.

See ``cuda_on_host/cuda_runtime.h`` for what that shows and what it cannot. All kernels and their host side run here, as
operators on CPU tensors; test_codeword_search_gpu.py is the ladder on a GPU.
"""

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from codebooks import (
    CASES,
    DTYPES,
    assert_codes_of_a_float64_search,
    assert_error_at_most_twice,
    codes_term_by_term,
    exact,
    inputs,
    strided_cases,
    tied_but_for_rounding,
)

from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.reference import working_dtype

ROOT = Path(__file__).parents[2]
NAMES = ("codeword_search", "codeword_search_backward", "codeword_search_train", "codeword_search_train_backward")
KIB = 1024
# Few rows: threads in turn are slow.
SMALL = [case for case in CASES if case[2] < 512 and case[3] < 16] + [(70, 3, 5, 16, False), (150, 16, 9, 2, True)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled operators as ``torch.ops.vpfast_on_host``, and what sets the GPU that is played."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, torch_root = Path(__file__).parent / "cuda_on_host", Path(torch.__file__).parent
    built = tmp_path_factory.mktemp("cuda_on_host") / "codeword_search.so"
    flags = ["-std=c++20", "-O1", "-fno-extern-tls-init", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    command = [*compiler.split(), str(folder / "codeword_search.cpp"), *flags, "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registry = torch.library.Library("vpfast_on_host", "DEF")
    for name in NAMES:
        registry.define(str(getattr(torch.ops.vpfast, name).default._schema).removeprefix("vpfast::"))
    torch.ops.load_library(str(built))
    handle = ctypes.CDLL(str(built))
    handle.configure.argtypes = [ctypes.c_bool, ctypes.c_int64, ctypes.c_int64]
    yield handle
    registry._destroy()


@pytest.fixture(params=["upwards", "downwards"])
def gpu(library, request):
    """``torch.ops.vpfast_on_host`` with threads in either order; call ``gpu.play`` for less shared memory."""

    def play(shared_memory=227 * KIB, multiprocessors=3):
        library.configure(request.param == "downwards", shared_memory, multiprocessors)

    play()
    operators = torch.ops.vpfast_on_host
    operators.play = play
    return operators


# --- the search ------------------------------------------------------------------------------------------------------


def assert_searched(gpu, z, codebooks, strict_tree):
    """Codes of a float64 search, and the exact sums of their codewords that plain PyTorch forms in the same order."""
    quantized, indices = gpu.codeword_search(z, codebooks, strict_tree)
    assert (quantized.shape, quantized.dtype, quantized.is_contiguous()) == (z.shape, z.dtype, True)
    assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)
    codewords = reference.chosen_codewords(indices, codebooks, strict_tree, working_dtype(z))
    total = codewords[0].clone()
    for codeword in codewords[1:]:
        total += codeword
    torch.testing.assert_close(quantized, reference.finish(total, z), rtol=0, atol=0, equal_nan=True)
    return indices


# 4 KiB hold no codebook of these: they go by tiles, and trees by walking.
@pytest.mark.parametrize("shared_memory", [227, 4])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_codes_are_those_of_a_float64_search(gpu, poisoned, case, shared_memory):
    gpu.play(shared_memory * KIB)
    for dtype, codebook_dtype in DTYPES if shared_memory == 227 else (DTYPES[0], DTYPES[1], DTYPES[5]):
        z, codebooks = inputs(*case, dtype, codebook_dtype)
        assert_searched(gpu, z, codebooks, case[-1])


@pytest.mark.parametrize("multiprocessors", [1, 200])
@pytest.mark.parametrize("case", [(140, 40, 300, 1, True), (40, 20, 1000, 2, False), (300, 8, 3000, 1, False)], ids=str)
def test_tiles_of_any_split(gpu, case, multiprocessors):
    gpu.play(16 * KIB, multiprocessors)
    z, codebooks = inputs(*case)
    assert_searched(gpu, z, codebooks, case[-1])


@pytest.mark.parametrize("shared_memory", [227, 4])
@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("size", [2, 6, 140])
def test_ties_take_the_lowest_index(gpu, size, strict_tree, shared_memory):
    gpu.play(shared_memory * KIB)
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-2, 3, (100, 3), generator=generator).float()
    codebooks = [
        torch.randint(-2, 3, (count, 3), generator=generator).float()
        for count in ([size, size**2] if strict_tree else [size, size])
    ]
    wanted = reference.codeword_search(*exact(z, codebooks), strict_tree)[1]
    assert torch.equal(gpu.codeword_search(z, codebooks, strict_tree)[1], wanted)


@pytest.mark.parametrize("shared_memory", [227, 4])
@pytest.mark.parametrize(("dim", "size", "strict_tree"), [(2, 2, True), (8, 8, True), (13, 4, True), (40, 70, False)])
def test_ties_but_for_rounding_are_decided_as_on_the_cpu(gpu, dim, size, strict_tree, shared_memory):
    gpu.play(shared_memory * KIB)
    for dtype in (torch.float32, torch.float64):
        z, codebooks = tied_but_for_rounding(60, dim, size, strict_tree, dtype)
        wanted = codes_term_by_term(z, codebooks, strict_tree)
        assert torch.equal(gpu.codeword_search(z, codebooks, strict_tree)[1], wanted)


@pytest.mark.parametrize("shared_memory", [227, 4])
@pytest.mark.parametrize("case", [(200, 8, 8, 3, True), (100, 8, 2, 6, True), (150, 16, 130, 2, False)], ids=str)
def test_numbers_of_every_size(gpu, case, shared_memory):
    """Astray codewords, distances far smaller than the vectors, squares beyond float32 at either end."""
    gpu.play(shared_memory * KIB)
    z, codebooks = inputs(*case)
    astray = [codebook.clone() for codebook in codebooks]
    for codebook in astray:
        codebook[::5] *= 1e4
    assert_searched(gpu, z, astray, case[-1])
    assert_searched(gpu, z[:50] + 100, [codebooks[0] + 100, *codebooks[1:]], case[-1])
    for scale in (1e-30, 1e-15, 1e15, 1e20):
        assert_searched(gpu, z[:20] * scale, [codebook * scale for codebook in codebooks], case[-1])


@pytest.mark.parametrize("shared_memory", [227, 4])
@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("size", [2, 5])
def test_what_is_not_finite_never_wins(gpu, size, strict_tree, shared_memory):
    gpu.play(shared_memory * KIB)
    z, codebooks = inputs(90, 6, size, 3, strict_tree)
    z[0, 0], z[17, -1], z[30, 2], z[69] = math.nan, math.inf, -math.inf, math.nan
    codebooks[1][1, 2], codebooks[1][-1, 0] = math.nan, math.inf
    quantized, indices = gpu.codeword_search(z, codebooks, strict_tree)
    expected, codes = torch.ops.vpfast.codeword_search(z, codebooks, strict_tree)
    assert torch.equal(indices, codes)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=0, equal_nan=True)
    codebooks[1][:] = math.nan  # nothing left to take
    quantized, indices = gpu.codeword_search(z, codebooks, strict_tree)
    assert (indices[:, 1:] == 0).all()
    assert quantized.isnan().all()


@pytest.mark.parametrize("shared_memory", [227, 2])
@pytest.mark.parametrize("name", strided_cases())
def test_every_stride(gpu, name, shared_memory):
    gpu.play(shared_memory * KIB)
    z = strided_cases()[name]
    _, codebooks = inputs(1, 6, 4, 2)
    assert_searched(gpu, z, codebooks, True)


def test_rows_of_eight_at_any_distance(gpu):
    """Whole rows are read in pieces of 16 bytes where they can be."""
    _, codebooks = inputs(1, 8, 4, 2)
    stored = torch.randn(50 * 12 + 1)
    for offset, row in ((0, 8), (0, 12), (1, 8), (0, 9), (0, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            assert_searched(gpu, stored.to(dtype)[offset:].as_strided((50, 8), (row, 1)), codebooks, True)


def test_codebooks_that_start_anywhere(gpu):
    gpu.play(4 * KIB)
    z, (codebook,) = inputs(50, 20, 40, 1)
    moved = torch.zeros(801)[1:].view(40, 20).copy_(codebook)
    assert_searched(gpu, z, [moved], True)


def test_leave_for_shared_memory_is_given_once(gpu):
    """Codebooks of 50 to 200 KiB, the largest neither first nor last, on one GPU and on another: no launch takes back
    what another thread's may be about to use, and each GPU gives leave of its own."""
    for shared_memory in (227, 210, 227):
        gpu.play(shared_memory * KIB)
        for size in (1000, 2000, 4000, 1500):
            z, codebooks = inputs(40, 8, size, 1)
            assert_searched(gpu, z, codebooks, False)
        for dim in (20000, 50000, 15000):
            z, codebooks = inputs(3, dim, 3, 2)
            assert_searched(gpu, z, codebooks, True)


# --- statistics and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_statistics(gpu, poisoned, case):
    for dtype, codebook_dtype in DTYPES[:2] + DTYPES[3:5]:
        z, codebooks = inputs(*case, dtype, codebook_dtype)
        with_infinity = torch.cat((z, torch.full_like(z[:1], math.inf)))
        _, indices, errors, counts, sums = gpu.codeword_search_train(with_infinity, codebooks, case[-1])
        assert errors.isnan().all()
        _, indices, errors, _, _ = gpu.codeword_search_train(z, codebooks, case[-1])
        truth = reference.statistics(z.double(), indices, exact(z, codebooks)[1], case[-1])
        plain = reference.statistics(z, indices, codebooks, case[-1])
        assert torch.equal(counts.double(), truth[1])  # of finite vectors alone
        assert_error_at_most_twice([sums], [plain[2]], [truth[2]], sums.dtype)
        assert_error_at_most_twice([errors], [plain[0]], [truth[0]], sums.dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients(gpu, poisoned, case):
    strict_tree, layers = case[-1], case[3]
    for dtype, codebook_dtype in DTYPES[:2] + DTYPES[3:5]:
        z, codebooks = inputs(*case, dtype, codebook_dtype)
        working = working_dtype(z)
        _, indices, _, counts, sums = gpu.codeword_search_train(z, codebooks, strict_tree)
        grad = torch.randn(z.shape[::-1]).to(dtype).t()
        found = gpu.codeword_search_backward(grad, indices, codebooks, strict_tree)
        truth = reference.codeword_search_backward(grad.double(), indices, exact(z, codebooks)[1], strict_tree)
        plain = reference.codeword_search_backward(grad, indices, codebooks, strict_tree)
        assert [g.dtype for g in found] == [codebook_dtype] * layers
        assert_error_at_most_twice(found, plain, truth, codebook_dtype)

        weights = torch.randn(layers, dtype=working), torch.randn(layers, layers, dtype=working).triu()
        if layers > 1:
            weights[1][0, -1] = 0  # kernels leave such residuals out
        for given in (grad, None):
            rest = (z, indices, codebooks, counts, sums, strict_tree)
            grad_z, found = gpu.codeword_search_train_backward(given, *weights, *rest)
            wide = (z.double(), indices, exact(z, codebooks)[1], counts, sums, strict_tree)
            truth_z, truth = reference.codeword_search_train_backward(given, *(w.double() for w in weights), *wide)
            plain_z, plain = reference.codeword_search_train_backward(given, *weights, *rest)
            assert_error_at_most_twice([grad_z], [plain_z], [truth_z], dtype)
            assert_error_at_most_twice(found, plain, truth, codebook_dtype)


@pytest.mark.parametrize("rows", [2, 1500])
def test_sums_of_many_vectors(gpu, rows):
    """Runs that go through many pieces and levels, one and two passes of the sort, and rows that nobody chose."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(rows, (9000, 1), generator=generator) // 3
    grad = torch.randn(9000, 3, generator=generator)
    codebooks = [torch.zeros(rows, 3)]
    (found,) = gpu.codeword_search_backward(grad, indices, codebooks, False)
    (truth,) = reference.codeword_search_backward(grad.double(), indices, [codebooks[0].double()], False)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


def test_sums_go_by_chunks(gpu):
    """More vectors than are sorted at once: at this dim 4,096."""
    grad = torch.ones(4200, 1).expand(4200, 8192)
    indices = (torch.arange(4200) % 7 // 6)[:, None]
    (found,) = gpu.codeword_search_backward(grad, indices, [torch.zeros(2, 8192)], False)
    assert (found[0] == 3600).all()
    assert (found[1] == 600).all()


def test_a_code_outside_its_codebook_makes_its_gradients_nan(gpu):
    """On a GPU nobody can wait for a refusal; nothing is read out of bounds."""
    z, codebooks = inputs(20, 4, 3, 2)
    _, indices, _, counts, sums = gpu.codeword_search_train(z, codebooks, True)
    indices[5, 1] = 3
    row = indices[5, 0] * 3
    leaves = gpu.codeword_search_backward(torch.ones_like(z), indices, codebooks, True)[1]
    assert leaves[row].isnan().all()
    assert leaves.isnan().sum() == 4
    weights = torch.ones(2), torch.ones(2, 2)
    grad_z, _ = gpu.codeword_search_train_backward(None, *weights, z, indices, codebooks, counts, sums, True)
    assert grad_z.isnan().any(1).nonzero().flatten().tolist() == [5]


def test_no_vectors(gpu):
    for strict_tree in (True, False):
        z, codebooks = inputs(0, 4, 3, 2, strict_tree)
        quantized, indices, errors, counts, sums = gpu.codeword_search_train(z, codebooks, strict_tree)
        assert (quantized.shape, indices.shape) == ((0, 4), (0, 2))
        assert not any(t.any() for t in (errors, counts, sums))
        weights = torch.ones(2), torch.ones(2, 2)
        grads = gpu.codeword_search_train_backward(z, *weights, z, indices, codebooks, counts, sums, strict_tree)[1]
        grads += gpu.codeword_search_backward(z, indices, codebooks, strict_tree)
        assert not any(g.any() for g in grads)


def test_what_does_not_fit_is_refused(gpu):
    z, codebooks = inputs(5, 4, 3, 2)
    with pytest.raises(RuntimeError, match="layer 2 must be"):
        gpu.codeword_search(z, [codebooks[0], codebooks[0]], True)
    with pytest.raises(RuntimeError, match="indices must be int64"):
        gpu.codeword_search_backward(z, torch.zeros(5, 2, dtype=torch.int32), codebooks, True)


@pytest.mark.parametrize("name", ["grad_quantized", "indices", "codebooks", "weights_z", "counts", "sums"])
def test_a_tensor_on_another_device_is_refused(gpu, name):
    """Of meta in the place of another GPU."""
    z, codebooks = inputs(5, 4, 3, 2)
    _, indices, _, counts, sums = gpu.codeword_search_train(z, codebooks, True)
    weights = {"weights_z": torch.ones(2), "weights_codebooks": torch.ones(2, 2)}
    given = {"grad_quantized": z, **weights, "z": z, "indices": indices, "codebooks": codebooks}
    given |= {"counts": counts, "sums": sums, "strict_tree": True}
    moved = given[name]
    given[name] = [moved[0], moved[1].to("meta")] if name == "codebooks" else moved.to("meta")
    told = "a codebook" if name == "codebooks" else name
    with pytest.raises(RuntimeError, match=f"codeword_search: z is on cpu and {told} on meta; move one of them"):
        gpu.codeword_search_train_backward(**given)
    if name in ("indices", "codebooks"):
        with pytest.raises(RuntimeError, match=f"grad_quantized is on cpu and {told} on meta; move one of them"):
            gpu.codeword_search_backward(z, given["indices"], given["codebooks"], True)
    if name == "codebooks":
        with pytest.raises(RuntimeError, match="z is on cpu and a codebook on meta; move one of them"):
            gpu.codeword_search(z, given["codebooks"], True)
