"""The ladder of codeword_search's GPU kernels, CUDA and Triton; without a GPU Triton's interpreter climbs it.

The formula and what the public functions refuse are tested in test_codeword_search*.py. Truth is the reference in
float64 on the CPU.
"""

import gc
import math

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
    rows,
    strided_cases,
    tied_but_for_rounding,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpfast
from vpfast.nn import HierarchicalResidualVQ
from vpfast.ops import _library, codeword_search, codeword_search_train
from vpfast.ops._backend import current_backend
from vpfast.ops.codeword_search import reference

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of NumPy's

FLOATS = (torch.float32, torch.float32)
# The interpreter takes half a second a training step: every case in float32, every type in some. On a GPU every case in
# every type, and with more vectors.
EXACT = [(case, types) for case in CASES for types in DTYPES if GPU or types == FLOATS or case == CASES[0]]
TRAINED = [
    (case, types)
    for case in [(50, 8, 4, 3, True), (50, 5, 3, 2, True), (40, 8, 2, 5, True), (40, 5, 40, 2, False)]
    for types in DTYPES
    if GPU or types == FLOATS or case == (50, 5, 3, 2, True)
]
LARGE = [(40000, 8, 8, 3, True), (9000, 64, 1000, 3, False), (3000, 512, 4096, 1, True)] if GPU else []


def sized(case):
    """Few vectors for the interpreter, and of sixteen layers of a tree the first nine."""
    vectors, dim, size, layers, strict_tree = case
    if GPU:
        return 7 * vectors + 3 if vectors < 1000 else vectors, dim, size, layers, strict_tree
    return min(vectors, 70 if size <= 8 else 37), dim, size, min(layers, 9) if strict_tree else layers, strict_tree


def operator(name):
    """As the chosen backend serves it."""
    return _library.operator(name, current_backend())


def on(place, z, codebooks):
    return z.to(place), [codebook.to(place) for codebook in codebooks]


def cpu(tensors):
    return [cpu(t) if isinstance(t, list | tuple) else t.cpu() for t in tensors]


def search(place, z, codebooks, strict_tree=True):
    """The codes and sums, found on `place`, with shapes and types looked at."""
    quantized, indices = codeword_search(*on(place, z, codebooks), strict_tree)
    assert quantized.device.type == place
    assert (quantized.shape, quantized.dtype) == (z.shape, z.dtype)
    assert quantized.is_contiguous()
    assert indices.is_contiguous()
    return quantized.cpu(), indices.cpu()


def assert_exact(place, z, codebooks, strict_tree=True):
    quantized, indices = search(place, z, codebooks, strict_tree)
    assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)
    codewords = reference.chosen_codewords(indices, codebooks, strict_tree, reference.working_dtype(z))
    assert torch.equal(quantized, sum(codewords).to(z.dtype))
    return indices


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "types"), [*EXACT, *((case, FLOATS) for case in LARGE)], ids=str)
def test_codes_are_those_of_a_float64_search(place, poisoned, case, types):
    case = sized(case)
    assert_exact(place, *inputs(*case, *types), case[-1])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("case", [(40, 8, 8, 2, True), (33, 16, 70, 2, False)], ids=str)
def test_squares_may_underflow_or_overflow_float32(place, case, scale):
    z, codebooks = inputs(*case)
    assert_exact(place, z * scale, [codebook * scale for codebook in codebooks], case[-1])


@pytest.mark.parametrize("offset", [10.0, 1e4])
@pytest.mark.parametrize("size", [8, 150])
def test_vectors_far_from_the_origin_and_close_together(place, size, offset):
    z, codebooks = inputs(60, 8, size, 1)
    assert_exact(place, z + offset, [codebook + offset for codebook in codebooks])


@pytest.mark.parametrize("scale", [30, 1e4, 1e15])
@pytest.mark.parametrize("case", [(60, 8, 8, 3, True), (40, 16, 140, 2, False)], ids=str)
def test_codewords_that_went_astray(place, case, scale):
    z, codebooks = inputs(*case)
    for codebook in codebooks:
        codebook[::5] *= scale
    assert_exact(place, z, codebooks, case[-1])


@pytest.mark.parametrize(("size", "strict_tree"), [(8, True), (8, False), (80, False)])
def test_residuals_far_smaller_than_the_vectors(place, size, strict_tree):
    """Each layer a thousand times finer than the one before."""
    z, codebooks = inputs(60, 8, size, 3, strict_tree)
    codebooks = [codebook * 500.0**-layer for layer, codebook in enumerate(codebooks)]
    codewords = [codebook[torch.randint(len(codebook), (60,))] for codebook in codebooks[: 1 if strict_tree else 3]]
    assert_exact(place, sum(codewords) + z * 1e-6, codebooks, strict_tree)


@pytest.mark.parametrize(("dim", "size"), [(8, 8), (16, 150)])
def test_near_ties(place, dim, size):
    """Vectors half-way between two codewords, but for the last bits of float32: float64 tells them apart, a score in
    float32 does not."""
    _, (codebook,) = inputs(1, dim, size, 1)
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(size, (200, 2), generator=generator)
    bits = torch.randint(-3, 4, (200, 1), generator=generator) * 6e-8
    ends = codebook.double()[pairs]
    z = (ends.mean(1) + bits * (ends[:, 1] - ends[:, 0])).float()
    two = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
    apart = (two.values[:, 1] - two.values[:, 0]) / two.values[:, 0]
    close = (apart > 1e-12) & (apart < 1e-6)
    assert close.sum() > 20
    _, wanted = reference.codeword_search(*exact(z, [codebook]))
    assert torch.equal(search(place, z[close], [codebook])[1], wanted[close])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "size", "strict_tree"), [(2, 2, True), (8, 8, True), (13, 4, True), (40, 70, False)])
def test_ties_but_for_rounding_are_decided_as_on_the_cpu(place, dim, size, strict_tree, dtype):
    """Which of these distances is the least tells in what order squares were added, and whether any was fused."""
    z, codebooks = tied_but_for_rounding(60, dim, size, strict_tree, dtype)
    wanted = codes_term_by_term(z, codebooks, strict_tree)
    assert dim == 2 or len(wanted[:, 1].unique()) > 2  # else any order would do
    assert torch.equal(search(place, z, codebooks, strict_tree)[1], wanted)


def test_a_whole_batch_that_no_scan_is_sure_of(place):
    """Of vectors as far from the origin as these, every score rounds to the same: all of them are decided."""
    z, codebooks = inputs(80 if place == "cpu" else 5000, 8, 4, 2)
    assert_exact(place, z + 3e5, [codebooks[0] + 3e5, codebooks[1]])


@pytest.mark.parametrize(
    ("vectors", "dim", "size"), [(5, 4, 700), (9, 100, 130), (40, 7, 257), (3, 511, 65)] + [(99, 512, 65536)] * GPU
)
def test_large_flat_codebooks(place, vectors, dim, size):
    z, codebooks = inputs(vectors, dim, size, 1)
    indices = assert_exact(place, z, codebooks, False)
    assert torch.equal(search(place, z, codebooks, True)[1], indices)


# On a GPU nearly every example is compiled first.
@settings(max_examples=25 if GPU else 6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    types=st.sampled_from(DTYPES),
    vectors=st.one_of(st.sampled_from([0, 1, 31, 32, 33]), st.integers(0, 700 if GPU else 40)),
    dim=st.one_of(st.sampled_from([1, 8, 16, 33]), st.integers(1, 50)),
    layers=st.integers(1, 16 if GPU else 6),
    strict_tree=st.booleans(),
)
def test_any_size_and_stride(place, data, types, vectors, dim, layers, strict_tree):
    layers = min(layers, 8) if strict_tree else layers
    M = data.draw(st.integers(2, max(2, int(600 ** (1 / layers))) if strict_tree else 70))
    z, codebooks = inputs(vectors, dim, M, layers, strict_tree, *types, seed=data.draw(st.integers(0, 1000)))
    gaps, turned = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), data.draw(st.booleans())

    def lay_out(t):
        """The same numbers, with gaps and in either order of dims."""
        stored = t.new_zeros([size * gap for size, gap in zip(t.shape, gaps, strict=True)][:: -1 if turned else 1])
        view = (stored.t() if turned else stored)[:: gaps[0], :: gaps[1]]
        return view.copy_(t)

    assert_exact(place, lay_out(z), [lay_out(codebook) for codebook in codebooks], strict_tree)


# --- ties and what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES if GPU else [DTYPES[0], DTYPES[1], DTYPES[5]])
@pytest.mark.parametrize(
    ("size", "layers", "strict_tree"), [(8, 3, True), (2, 6, True), (37, 2, False), (200, 1, False)]
)
def test_ties_take_the_lowest_index(place, size, layers, strict_tree, dtype, codebook_dtype):
    """Small whole numbers: every distance is exact in any arithmetic, and most are shared."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-2, 3, (90, 3), generator=generator).to(dtype)
    codebooks = [
        torch.randint(-2, 3, (count, 3), generator=generator).to(codebook_dtype)
        for count in rows(size, layers, strict_tree)
    ]
    _, wanted = reference.codeword_search(*exact(z, codebooks), strict_tree)
    assert torch.equal(search(place, z, codebooks, strict_tree)[1], wanted)


@pytest.mark.parametrize(("dim", "size", "copies"), [(8, 8, 3), (8, 100, 2), (64, 70, 3), (5, 2, 9)])
def test_of_equal_codewords_the_first_is_taken(place, dim, size, copies):
    z, (codebook,) = inputs(40, dim, size, 1)
    _, wanted = search(place, z, [codebook])
    assert torch.equal(search(place, z, [codebook.repeat(copies, 1)])[1], wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [(70, 8, 8, 2, True), (70, 12, 40, 2, False), (70, 5, 3, 2, False)], ids=str)
def test_vectors_that_are_not_finite(place, case, dtype):
    z, codebooks = inputs(*case, dtype)
    finite = search(place, z, codebooks, case[-1])
    bad = torch.tensor([0, 17, 30, 69])
    z[0, 0], z[17, -1], z[30, 2], z[69] = math.nan, math.inf, -math.inf, math.nan
    quantized, indices = search(place, z, codebooks, case[-1])
    assert quantized[bad].isnan().all()
    assert (indices[bad] == 0).all()
    good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
    assert torch.equal(quantized[good], finite[0][good])
    assert torch.equal(indices[good], finite[1][good])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("size", "layers", "strict_tree"), [(8, 2, True), (150, 1, False), (9, 3, False)])
def test_codewords_that_are_not_finite_never_win(place, size, layers, strict_tree, worst, dtype):
    z, codebooks = inputs(40, 6, size, layers, strict_tree, dtype)
    for codebook in codebooks:
        codebook[::2, 3] = worst
    indices = assert_exact(place, z, codebooks, strict_tree)
    assert (indices % 2 == 1).all()


@pytest.mark.parametrize("worst", [math.nan, -math.inf])
@pytest.mark.parametrize("case", [(37, 6, 8, 3, True), (37, 6, 2, 4, False), (9, 6, 40, 2, False)], ids=str)
def test_layers_before_one_that_is_not_finite(place, case, worst):
    z, codebooks = inputs(*case)
    _, whole = search(place, z, codebooks, case[-1])
    for layer in range(case[3]):
        broken = [torch.full_like(c, worst) if i == layer else c for i, c in enumerate(codebooks)]
        quantized, indices = search(place, z, broken, case[-1])
        assert torch.equal(indices[:, :layer], whole[:, :layer])
        assert (indices[:, layer:] == 0).all()
        assert not quantized.isfinite().any()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "types"), [*TRAINED, *((case, FLOATS) for case in [CASES[8], *LARGE] * GPU)], ids=str)
def test_error_is_at_most_twice_that_of_the_reference(place, poisoned, case, types):
    """Errors, sums, the gradient of z, those of all codebooks of either operator, each kind over several draws. Counts
    are exact."""
    case = sized(case)
    n, strict_tree = case[3:]
    kinds = [([], [], []) for _ in range(5)]
    for seed in range(3 if GPU else 1):
        z, codebooks = inputs(*case, *types, seed)
        working = reference.working_dtype(z)
        weights = torch.randn(z.shape).to(z.dtype), torch.randn(n).to(working), torch.randn(n, n).triu().to(working)

        there = on(place, z, codebooks)
        _, indices, *found = operator("codeword_search_train")(*there, strict_tree)
        assert [t.dtype for t in found] == [working] * 3
        moved = [w.to(place) for w in weights]
        grads = operator("codeword_search_train_backward")(*moved, there[0], indices, there[1], *found[1:], strict_tree)
        plain = operator("codeword_search_backward")(moved[0], indices, there[1], strict_tree)
        errors, counts, sums, (grad_z, of_losses), of_quantized = cpu([*found, grads, plain])
        indices = indices.cpu()

        for kept, (w, z_, codebooks_) in zip(
            (1, 2),
            ((weights, z, codebooks), ([w.double() for w in weights], *exact(z, codebooks))),
            strict=True,
        ):
            told = reference.statistics(z_, indices, codebooks_, strict_tree)
            pulled = reference.codeword_search_train_backward(*w, z_, indices, codebooks_, *told[1:], strict_tree)
            scattered = reference.codeword_search_backward(w[0], indices, codebooks_, strict_tree)
            for kind, result in zip(kinds, (told[0], told[2], pulled[0], pulled[1], scattered), strict=True):
                kind[kept].extend(result if isinstance(result, list) else [result])
        assert torch.equal(counts.double(), told[1])
        for kind, result in zip(kinds, (errors, sums, grad_z, of_losses, of_quantized), strict=True):
            kind[0].extend(result if isinstance(result, list) else [result])
        assert grad_z.dtype == z.dtype
        assert all(g.dtype == types[1] for g in (*of_losses, *of_quantized))
    for kind in kinds:
        assert_error_at_most_twice(*kind, working)


def total(found):
    """Every differentiable output in one number, each element with a weight of its own."""
    parts = (found.quantized, found.codebook_losses, found.commitment_losses, found.combined_loss)
    weights = [torch.linspace(0.3, 1, t.numel(), dtype=torch.float64, device=t.device).view(t.shape) for t in parts]
    return sum((w * t).sum() for w, t in zip(weights, parts, strict=True))


def gradients(z, codebooks, strict_tree, attached):
    leaves = [t.detach().clone().requires_grad_() for t in (z, *codebooks)]
    return torch.autograd.grad(total(codeword_search_train(leaves[0], leaves[1:], strict_tree, attached)), leaves)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("case", [(40, 5, 4, 3, True), (40, 5, 4, 3, False), (40, 5, 40, 1, False)], ids=str)
def test_gradients_are_those_of_the_plain_formula(place, case, attached):
    z, codebooks = inputs(*case, torch.float64)
    found = gradients(*on(place, z, codebooks), case[-1], attached)
    with vpfast.backend("reference"):
        want = gradients(z, codebooks, case[-1], attached)
    torch.testing.assert_close(cpu(found), list(want), rtol=1e-11, atol=1e-12)


def test_vectors_that_are_not_finite_are_counted_nowhere(place):
    for case in ((70, 8, 8, 2, True), (70, 8, 40, 2, False)):
        z, codebooks = inputs(*case)
        bad = torch.tensor([0, 17, 30, 69])
        good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
        finite = codeword_search_train(*on(place, z[good], codebooks), case[-1])
        z[0, 0], z[17, -1], z[30, 2], z[69] = math.nan, math.inf, -math.inf, math.nan
        found = codeword_search_train(*on(place, z, codebooks), case[-1])
        assert all(loss.isnan().all() for loss in found[2:5])
        assert torch.equal(found.counts, finite.counts)
        torch.testing.assert_close(found.sums, finite.sums)


def test_all_vectors_in_one_row(place):
    """More than fit a chunk, and no other row has any."""
    z, codebooks = inputs(130 if place == "cpu" else 100000, 4, 3, 2)
    codebooks[0][1:] += 100
    codebooks[1][1:] += 100
    found = codeword_search_train(*on(place, z, codebooks))
    want = reference.codeword_search_train(*exact(z, codebooks))
    assert found.counts.tolist() == want[3].tolist()
    assert found.counts.max() == len(z)
    torch.testing.assert_close(found.sums.cpu().double(), want[4], rtol=1e-5, atol=1e-3)


def test_no_vectors_cost_nothing(place):
    leaves = [t.requires_grad_() for t in (inputs(0, 4, 3, 2)[0].to(place), *on(place, *inputs(1, 4, 3, 2))[1])]
    quantized, indices = codeword_search(leaves[0], leaves[1:])
    assert (quantized.shape, indices.shape) == ((0, 4), (0, 2))
    assert all((g == 0).all() for g in torch.autograd.grad(quantized.sum(), leaves[1:]))
    found = codeword_search_train(leaves[0], leaves[1:])
    assert all((t == 0).all() for t in found[2:])
    assert all((g == 0).all() for g in torch.autograd.grad(total(found), leaves))


def trained(place, backends, strict_tree, **arguments):
    """Losses, codes and codebooks of a module trained for some steps, each with one of `backends`."""
    torch.manual_seed(0)
    module = HierarchicalResidualVQ(4, 4, 2, strict_tree=strict_tree, **arguments)
    codewords = torch.cat([codebook * 0.3 for codebook in inputs(1, 4, 4, 2, strict_tree)[1]])
    with torch.no_grad():
        module.codewords.copy_(codewords)
    if module.embed_avg is not None:
        module.embed_avg.copy_(codewords)
    module.to(place)
    optimizer = torch.optim.SGD(module.parameters(), 0.1) if arguments else None
    kept = []
    for step, backend in enumerate(backends):
        x = inputs(40, 4, 2, 1, seed=step)[0].to(place).requires_grad_()
        with vpfast.backend(backend):
            quantized, indices, losses = module(x)
            (losses.sum() + quantized.square().sum()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        kept.append((losses.detach(), indices, quantized.detach(), x.grad, module.codewords.detach().clone()))
    return kept


LEARN = {"learnable_codebook": True, "combined_loss": True}


@pytest.mark.parametrize(
    ("strict_tree", "arguments"), [(True, LEARN), (False, {}), *[(True, {}), (False, LEARN)] * GPU]
)
def test_a_module_trains_alike_whatever_the_backend(place, strict_tree, arguments):
    """The same codes in each step and numbers that differ by rounding, with one backend throughout, and with another in
    each step."""
    mine = current_backend()
    other = "triton" if mine == "native" else "native" if GPU else "reference"
    alone = trained(place, ["reference"] * 3, strict_tree, **arguments)
    for backends in ([mine] * 3, [mine, other, mine]):
        for found, want in zip(trained(place, backends, strict_tree, **arguments), alone, strict=True):
            assert torch.equal(found[1], want[1])
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


# --- what PyTorch expects of an operator -----------------------------------------------------------------------------


def with_its_strides(z, place):
    """On `place`; moving a view alone would make it dense."""
    if place == "cpu":
        return z
    if 0 in z.stride():
        return (z[:1] if z.stride(0) == 0 else z[:, :1]).to(place).expand(z.shape)
    room = torch.zeros(13 * z.numel() + 1, device=place)
    return room.as_strided(z.shape, z.stride(), z.storage_offset() % 4).copy_(z)


STRIDED = [
    (case, strict_tree)
    for number, case in enumerate(strided_cases())
    for strict_tree in (True, False)
    if GPU or strict_tree == number % 2
]


@pytest.mark.parametrize(("case", "strict_tree"), STRIDED)
def test_strides(place, poisoned, case, strict_tree):
    z = with_its_strides(strided_cases()[case], place)
    codebooks = [codebook.to(place) for codebook in inputs(1, 6, 4 if strict_tree else 40, 2, strict_tree)[1]]
    turned = [codebook.t().contiguous().t() for codebook in codebooks]
    found = codeword_search_train(z, turned, strict_tree)
    want = codeword_search_train(z.contiguous(), codebooks, strict_tree)
    assert all(t.is_contiguous() for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    rest = (found.indices, codebooks, found.counts, found.sums, strict_tree)
    weights = torch.randn(2, device=place), torch.randn(2, 2, device=place).tril().t()
    grad = z.flip(0).t().contiguous().t() if len(z) > 1 else z
    backward, pull = operator("codeword_search_backward"), operator("codeword_search_train_backward")
    dense = backward(grad.contiguous(), found.indices, codebooks, strict_tree)
    loose = backward(grad, found.indices, turned, strict_tree)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(dense, loose, strict=True))
    dense_z, dense = pull(grad.contiguous(), *weights, z.contiguous(), *rest)
    loose_z, loose = pull(grad, *weights, z, *rest)
    assert all(torch.equal(a, b) for a, b in zip((dense_z, *dense), (loose_z, *loose), strict=True))


@pytest.mark.parametrize("strict_tree", [True, False])
def test_a_gradient_that_is_one_number(place, strict_tree):
    """Of stride 0, as the sum of all numbers gives it."""
    z, codebooks = on(place, *inputs(30, 6, 3, 2, strict_tree))
    _, indices = codeword_search(z, codebooks, strict_tree)
    grad = torch.ones(1, 1, device=place).expand(z.shape)
    found = operator("codeword_search_backward")(grad, indices, codebooks, strict_tree)
    want = reference.codeword_search_backward(grad.cpu(), indices.cpu(), cpu(codebooks), strict_tree)
    torch.testing.assert_close(cpu(found), want)


def test_codebooks_that_lie_one_after_another_or_in_any_order(place):
    z, codebooks = on(place, *inputs(40, 6, 4, 2))
    want = codeword_search(z, codebooks)
    table = torch.cat(codebooks)
    backwards = torch.cat(codebooks[::-1])
    for given_codebooks in (table.split([4, 16]), backwards.split([16, 4])[::-1], [table[:4], codebooks[1]]):
        assert all(torch.equal(a, b) for a, b in zip(codeword_search(z, given_codebooks), want, strict=True))


@pytest.mark.parametrize(("case", "strict_tree"), [("contiguous", True), ("both", False), ("empty", True)])
def test_opcheck(place, case, strict_tree):
    z = strided_cases()[case].detach().to(place)
    codebooks = [codebook.to(place) for codebook in inputs(1, 6, 3, 2, strict_tree)[1]]
    found = codeword_search_train(z, codebooks, strict_tree)
    leaves = z.clone().requires_grad_(), [codebook.clone().requires_grad_() for codebook in codebooks]
    torch.library.opcheck(operator("codeword_search").default, (*leaves, strict_tree))
    torch.library.opcheck(operator("codeword_search_losses").default, (*leaves, strict_tree, True))
    torch.library.opcheck(operator("codeword_search_train").default, (z, codebooks, strict_tree))
    tests = ("test_schema", "test_faketensor")
    weights = torch.randn(2, device=place), torch.randn(2, 2, device=place).triu()
    rest = (z, found.indices, codebooks, found.counts, found.sums, strict_tree)
    pull = operator("codeword_search_train_backward").default
    for grad in (None, torch.randn_like(z)):
        torch.library.opcheck(pull, (grad, *weights, *rest), test_utils=tests)
    scatter = operator("codeword_search_backward").default
    torch.library.opcheck(scatter, (torch.randn_like(z), found.indices, codebooks, strict_tree), test_utils=tests)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(place, dynamic):
    def step(z, codebooks):
        quantized, indices = codeword_search(z * 2, codebooks)
        return quantized + 1, indices, codeword_search_train(z * 2, codebooks, attached=True)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="inductor" if GPU else "aot_eager")
    for vectors in (9, 40):
        given_inputs = on(place, *inputs(vectors, 4, 3, 2))
        ours, theirs = ([t.clone().requires_grad_() for t in (given_inputs[0], *given_inputs[1])] for _ in range(2))
        found, want = compiled(ours[0], ours[1:]), step(theirs[0], theirs[1:])
        torch.testing.assert_close(found[0], want[0])
        assert torch.equal(found[1], want[1])
        torch.testing.assert_close(tuple(found[2]), tuple(want[2]))
        (total(found[2]) + found[0].square().sum()).backward()
        (total(want[2]) + want[0].square().sum()).backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_autocast_searches_in_float32(place):
    for dtype, codebook_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        z, codebooks = on(place, *inputs(30, 4, 3, 2, True, dtype, codebook_dtype))
        leaves = [codebook.requires_grad_() for codebook in codebooks]
        with torch.autocast(place, torch.bfloat16):
            quantized, indices = codeword_search(z, leaves)
            found = codeword_search_train(z, leaves)
        plain = codeword_search(z.float(), [codebook.detach().float() for codebook in codebooks])
        assert quantized.dtype == found.quantized.dtype == torch.float32
        assert torch.equal(quantized, plain[0])
        assert torch.equal(indices, plain[1])
        (quantized.sum() + found.codebook_losses.sum()).backward()
        assert leaves[0].grad.dtype == codebook_dtype


@pytest.mark.parametrize("case", [(60, 8, 4, 2, True), (48, 8, 40, 2, False), *LARGE], ids=str)
def test_results_are_repeatable_and_a_vector_does_not_depend_on_its_place(place, case):
    z, codebooks = on(place, *inputs(*case))
    z[::7] += 100  # some that scans are not sure of
    results = [(*codeword_search_train(z, codebooks, case[-1]), *gradients(z, codebooks, case[-1], True)) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for part in (slice(3, 40), slice(47, 48)):
        alone = codeword_search(z[part], codebooks, case[-1])
        assert all(torch.equal(w[part], a) for w, a in zip(results[0], alone, strict=False))


def test_the_same_codes_as_the_search_alone(place):
    for case in ((50, 8, 8, 2, True), (50, 8, 40, 2, False)):
        z, codebooks = on(place, *inputs(*case))
        found = codeword_search_train(z, codebooks, case[-1])
        assert all(torch.equal(a, b) for a, b in zip(codeword_search(z, codebooks, case[-1]), found, strict=False))


def test_the_operators_refuse_what_would_read_beyond_memory(place):
    z, codebooks = on(place, *inputs(20, 4, 3, 2))
    with pytest.raises(RuntimeError, match=r"layer 2 "):
        operator("codeword_search")(z, codebooks[:1] * 2, True)
    _, indices, _, counts, sums = operator("codeword_search_train")(z, codebooks, True)
    with pytest.raises(RuntimeError, match="indices must be"):
        operator("codeword_search_backward")(z, indices[1:], codebooks, True)
    weights = torch.ones(2, device=place), torch.ones(2, 2, device=place)
    pull = operator("codeword_search_train_backward")
    with pytest.raises(RuntimeError, match="counts "):
        pull(None, *weights, z, indices, codebooks, counts[1:], sums, True)


# --- on a GPU alone --------------------------------------------------------------------------------------------------


def steps(case):
    """Inputs on the GPU, and a training step that reads them."""
    z, codebooks = on("cuda", *inputs(*case))

    def step():
        return (*codeword_search_train(z, codebooks, case[-1]), *gradients(z, codebooks, case[-1], True))

    return z, step


@needs_gpu
@pytest.mark.parametrize("case", [(20000, 8, 8, 3, True), (3000, 64, 500, 2, False)], ids=str)
def test_cuda_graph(place, case):
    z, step = steps(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    z.copy_(inputs(*case, seed=1)[0])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@needs_gpu
@pytest.mark.parametrize("case", [(20000, 8, 8, 3, True), (3000, 64, 500, 2, False)], ids=str)
def test_a_second_stream(place, case):
    z, step = steps(case)
    want = step()
    z.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        z.copy_(inputs(*case)[0])
        found = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@needs_gpu
def test_a_second_device(place):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    z, codebooks = inputs(500, 8, 8, 3)
    found = codeword_search_train(*on("cuda:1", z, codebooks))
    assert found.sums.device == torch.device("cuda:1")
    want = codeword_search_train(*on("cuda:0", z, codebooks))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, want, strict=True))


@needs_gpu
def test_nothing_waits_for_the_gpu(place):
    _, step = steps((5000, 8, 8, 3, True))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("turned", [False, True])
def test_more_than_2_to_the_31_elements(place, turned):
    vectors, dim = 2**28 + 40, 8
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    _, codebooks = on(place, *inputs(1, dim, 8, 3))
    piece = inputs(2**12, dim, 8, 1)[0].to(place)
    z = torch.empty((dim, vectors) if turned else (vectors, dim), device=place, dtype=torch.bfloat16)
    z = z.t() if turned else z
    for part in z.split(2**12):
        part.copy_(piece[: len(part)])
    quantized, indices = codeword_search(z, codebooks)
    want = codeword_search(piece.bfloat16(), codebooks)
    for part in (slice(0, 2**12), slice(2**28 - 2**12, 2**28)):
        assert torch.equal(quantized[part], want[0])
        assert torch.equal(indices[part], want[1])
    assert torch.equal(quantized[-40:], want[0][:40])
    assert torch.equal(indices[-40:], want[1][:40])
    del quantized, indices
    gc.collect()
