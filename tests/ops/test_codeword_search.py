"""The ladder of codeword_search: formula, exactness, ties, gradients, layouts, compilation.

Its training form has a ladder of its own, test_codeword_search_train.py, where memory is too; what both refuse is in
test_codeword_search_refusals.py.
"""

import math

import pytest
import torch
import torch._dynamo.testing
from codebooks import (
    CASES,
    DTYPES,
    assert_codes_of_a_float64_search,
    assert_error_at_most_twice,
    codes_term_by_term,
    exact,
    inputs,
    native,
    rows,
    strided_cases,
    tied_but_for_rounding,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpfast
from vpfast.ops import _native, codeword_search
from vpfast.ops.codeword_search import reference

# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict_tree", [True, False])
def test_reference_is_the_paper_equation(strict_tree):
    M, n = 3, 3
    z, codebooks = inputs(20, 4, M, n, strict_tree, torch.float64)
    quantized, indices = reference.codeword_search(z, codebooks, strict_tree)
    for v, vector in enumerate(z.tolist()):
        path, residual = 0, vector
        for layer, codebook in enumerate(codebooks):
            choice = codebook[path * M : path * M + M].tolist() if strict_tree else codebook.tolist()
            k = min(range(M), key=lambda j: math.dist(residual, choice[j]))
            assert indices[v, layer] == k
            residual = [x - e for x, e in zip(residual, choice[k], strict=True)]
            path = path * M + k
        assert quantized[v].tolist() == pytest.approx([x - r for x, r in zip(vector, residual, strict=True)], abs=1e-14)


def test_reference_backward_is_the_derivative_of_reference():
    z, codebooks = inputs(30, 4, 3, 2, dtype=torch.float64)
    codebooks = [codebook.requires_grad_() for codebook in codebooks]
    quantized, indices = reference.codeword_search(z, codebooks)
    grad = torch.randn_like(quantized)
    want = torch.autograd.grad(quantized, codebooks, grad)
    found = reference.codeword_search_backward(grad, indices, [codebook.detach() for codebook in codebooks])
    torch.testing.assert_close(tuple(found), want, rtol=1e-12, atol=1e-14)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_those_of_a_float64_search(isa, poisoned, case, dtype, codebook_dtype):
    strict_tree = case[-1]
    ours, theirs, truth = [], [], []
    for seed in range(4):
        z, codebooks = inputs(*case, dtype, codebook_dtype, seed)
        quantized, indices = codeword_search(z, codebooks, strict_tree)
        assert (quantized.shape, quantized.dtype) == (z.shape, dtype)
        assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)
        ours.append(quantized)
        codewords = reference.chosen_codewords(indices, codebooks, strict_tree, reference.working_dtype(z))
        theirs.append(torch.stack(codewords).sum(0).to(dtype))
        truth.append(sum(reference.chosen_codewords(indices, codebooks, strict_tree, torch.float64)))
    assert_error_at_most_twice(ours, theirs, truth, reference.working_dtype(z))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("case", [CASES[0], (64, 64, 300, 1, False)], ids=str)
def test_squares_may_underflow_or_overflow_float32(isa, case, scale):
    z, codebooks = inputs(*case)
    z, codebooks = z * scale, [codebook * scale for codebook in codebooks]
    quantized, indices = codeword_search(z, codebooks, case[-1])
    assert_codes_of_a_float64_search(indices, z, codebooks, case[-1])
    assert quantized.isfinite().all()


@pytest.mark.parametrize("offset", [10.0, 1e4])
@pytest.mark.parametrize("size", [8, 700])
def test_vectors_far_from_the_origin_and_close_together(isa, size, offset):
    """|a|^2 - 2 a b + |b|^2 in float32 alone would cancel: here distances are far smaller than the vectors."""
    z, codebooks = inputs(300, 8, size, 1)
    z, codebooks = z + offset, [codebook + offset for codebook in codebooks]
    _, indices = codeword_search(z, codebooks)
    assert_codes_of_a_float64_search(indices, z, codebooks, True)


@pytest.mark.parametrize("scale", [30, 1e4, 1e15])
@pytest.mark.parametrize("case", [(300, 8, 8, 3, True), (300, 8, 2, 6, True), (200, 16, 300, 2, False)], ids=str)
def test_codewords_that_went_astray(isa, case, scale):
    z, codebooks = inputs(*case)
    for codebook in codebooks:
        codebook[::5] *= scale
    _, indices = codeword_search(z, codebooks, case[-1])
    assert_codes_of_a_float64_search(indices, z, codebooks, case[-1])


@pytest.mark.parametrize("strict_tree", [True, False])
def test_residuals_far_smaller_than_the_vectors(isa, strict_tree):
    """Each layer a thousand times finer than the one before."""
    z, codebooks = inputs(400, 8, 8, 3, strict_tree)
    codebooks = [codebook * 500.0**-layer for layer, codebook in enumerate(codebooks)]
    codewords = [codebook[torch.randint(len(codebook), (400,))] for codebook in codebooks[: 1 if strict_tree else 3]]
    z = sum(codewords) + z * 1e-6
    _, indices = codeword_search(z, codebooks, strict_tree)
    assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)


@pytest.mark.parametrize(
    ("vectors", "dim", "size"),
    [(33, 4, 65536), (50, 64, 4096), (9, 512, 4096), (40, 8, 512), (40, 7, 1021), (5, 511, 259)],
)
def test_large_flat_codebooks(isa, vectors, dim, size):
    z, codebooks = inputs(vectors, dim, size, 1)
    quantized, indices = codeword_search(z, codebooks, strict_tree=False)
    assert_codes_of_a_float64_search(indices, z, codebooks, False)
    assert torch.equal(quantized, codebooks[0][indices[:, 0]])
    assert all(torch.equal(a, b) for a, b in zip(codeword_search(z, codebooks), (quantized, indices), strict=True))


def test_a_tree_of_sixteen_layers(isa):
    z, codebooks = inputs(200, 3, 2, 16)
    _, indices = codeword_search(z, codebooks)
    assert_codes_of_a_float64_search(indices, z, codebooks, True)


@given(
    data=st.data(),
    dtypes=st.sampled_from(DTYPES),
    vectors=st.one_of(st.sampled_from([0, 1, 15, 16, 17, 33]), st.integers(0, 70)),
    dim=st.one_of(st.sampled_from([1, 8, 16, 512]), st.integers(1, 80)),
    layers=st.integers(1, 16),
    strict_tree=st.booleans(),
)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one set for all examples
def test_any_size_and_stride(isa, data, dtypes, vectors, dim, layers, strict_tree):
    most = int(3000 ** (1 / layers)) if strict_tree else 70
    M = data.draw(st.integers(2, max(2, most)))
    layers = min(layers, 11) if strict_tree else layers
    z, codebooks = inputs(vectors, dim, M, layers, strict_tree, *dtypes, seed=data.draw(st.integers(0, 1000)))

    def lay_out(t):
        """The same numbers, with gaps and in either order of dims."""
        gaps = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
        rows, columns = t.shape
        if data.draw(st.booleans()):
            stored = t.new_zeros(columns * gaps[1], rows * gaps[0]).t()
        else:
            stored = t.new_zeros(rows * gaps[0], columns * gaps[1])
        view = stored[:: gaps[0], :: gaps[1]]
        view.copy_(t)
        return view

    quantized, indices = codeword_search(lay_out(z), [lay_out(codebook) for codebook in codebooks], strict_tree)
    assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)
    assert (quantized.shape, quantized.dtype) == (z.shape, z.dtype)
    codewords = reference.chosen_codewords(indices, codebooks, strict_tree, reference.working_dtype(z))
    eps = torch.finfo(z.dtype).eps
    torch.testing.assert_close(quantized, sum(codewords).to(z.dtype), rtol=4 * eps, atol=4 * eps)


# --- ties and what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("size", "layers", "strict_tree"), [(8, 3, True), (2, 9, True), (37, 2, False), (600, 1, False)]
)
def test_ties_take_the_lowest_index(isa, size, layers, strict_tree, dtype, codebook_dtype):
    """Small whole numbers: every distance is exact in any arithmetic, and most are shared."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-2, 3, (500, 3), generator=generator).to(dtype)
    codebooks = [
        torch.randint(-2, 3, (count, 3), generator=generator).to(codebook_dtype)
        for count in rows(size, layers, strict_tree)
    ]
    _, indices = codeword_search(z, codebooks, strict_tree)
    _, wanted = reference.codeword_search(*exact(z, codebooks), strict_tree)
    assert torch.equal(indices, wanted)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize(("dim", "size", "copies"), [(8, 8, 3), (8, 512, 2), (64, 700, 6), (5, 2, 9)])
def test_of_equal_codewords_the_first_is_taken(isa, choice, dim, size, copies):
    z, (codebook,) = inputs(200, dim, size, 1)
    repeated = codebook.repeat(copies, 1)
    with vpfast.backend(choice):
        _, wanted = codeword_search(z, [codebook])
        for given_codebook in (repeated, repeated.t().contiguous().t()):
            _, indices = codeword_search(z, [given_codebook])
            assert torch.equal(indices, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [(70, 8, 8, 3, True), (70, 8, 2, 9, True), (70, 64, 300, 2, False), (70, 5, 3, 2, True)], ids=str
)
def test_vectors_that_are_not_finite(isa, case, dtype):
    z, codebooks = inputs(*case, dtype)
    finite = codeword_search(z, codebooks, case[-1])
    bad = torch.tensor([0, 17, 30, 69])
    z[0, 0], z[17, -1], z[30, 2], z[69] = math.nan, math.inf, -math.inf, math.nan
    quantized, indices = codeword_search(z, codebooks, case[-1])
    assert quantized[bad].isnan().all()
    assert (indices[bad] == 0).all()
    good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
    assert torch.equal(quantized[good], finite[0][good])
    assert torch.equal(indices[good], finite[1][good])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("size", "layers", "strict_tree"), [(8, 2, True), (2, 6, True), (300, 1, False), (9, 3, False)]
)
def test_codewords_that_are_not_finite_never_win(isa, size, layers, strict_tree, worst, dtype):
    z, codebooks = inputs(100, 6, size, layers, strict_tree, dtype)
    for codebook in codebooks:
        codebook[::2, 3] = worst
    quantized, indices = codeword_search(z, codebooks, strict_tree)
    assert (indices % 2 == 1).all()
    assert quantized.isfinite().all()
    assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree)


@pytest.mark.parametrize("worst", [math.nan, math.inf])
@pytest.mark.parametrize(("size", "layers", "strict_tree"), [(8, 3, True), (300, 2, False)])
def test_where_no_codeword_is_finite_the_first_is_taken(isa, size, layers, strict_tree, worst):
    z, codebooks = inputs(50, 6, size, layers, strict_tree)
    codebooks[0][:, 2] = worst
    quantized, indices = codeword_search(z, codebooks, strict_tree)
    assert (indices == 0).all()
    assert not quantized[:, 2].isfinite().any()
    assert quantized[:, :2].isfinite().all()


@pytest.mark.parametrize("worst", [math.nan, -math.inf])
@pytest.mark.parametrize("case", [(97, 6, 8, 3, True), (97, 6, 2, 5, True), (97, 6, 2, 5, False)], ids=str)
def test_layers_before_one_that_is_not_finite(isa, case, worst):
    z, codebooks = inputs(*case)
    _, whole = codeword_search(z, codebooks, case[-1])
    for layer in range(case[3]):
        broken = [torch.full_like(c, worst) if i == layer else c for i, c in enumerate(codebooks)]
        _, indices = codeword_search(z, broken, case[-1])
        assert torch.equal(indices[:, :layer], whole[:, :layer])
        assert (indices[:, layer:] == 0).all()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "dim", "size", "layers", "strict_tree"), [(9, 3, 3, 2, True), (9, 3, 4, 3, False), (0, 2, 2, 2, True)]
)
def test_gradcheck_of_the_codebooks(vectors, dim, size, layers, strict_tree):
    z, codebooks = inputs(vectors, dim, size, layers, strict_tree, torch.float64)

    def quantize(*codebooks):
        return codeword_search(z, codebooks, strict_tree)[0]

    assert torch.autograd.gradcheck(quantize, [codebook.requires_grad_() for codebook in codebooks])


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_backward_error_is_at_most_twice_that_of_the_reference(isa, poisoned, case, dtype, codebook_dtype):
    strict_tree = case[-1]
    ours, theirs, truth = [], [], []
    for seed in range(3):
        z, codebooks = inputs(*case, dtype, codebook_dtype, seed)
        indices = codeword_search(z, codebooks, strict_tree)[1]
        grad = torch.randn_like(z)
        ours += torch.ops.vpfast.codeword_search_backward(grad, indices, codebooks, strict_tree)
        theirs += reference.codeword_search_backward(grad, indices, codebooks, strict_tree)
        truth += reference.codeword_search_backward(grad.double(), indices, exact(z, codebooks)[1], strict_tree)
    assert all(a.dtype == codebook_dtype and a.shape == b.shape for a, b in zip(ours, truth, strict=True))
    assert_error_at_most_twice(ours, theirs, truth, reference.working_dtype(z))


def test_vectors_get_no_gradient():
    z, codebooks = inputs(20, 4, 3, 2)
    quantized, indices = codeword_search(z.requires_grad_(), [codebook.requires_grad_() for codebook in codebooks])
    assert not indices.requires_grad
    quantized.sum().backward()  # the sum gives a stride-0 gradient
    assert z.grad is None
    counts = torch.bincount(indices[:, 0], minlength=3).float()
    torch.testing.assert_close(codebooks[0].grad, counts[:, None].expand(-1, 4))


def test_one_codebook_alone_needs_a_gradient():
    z, codebooks = inputs(20, 4, 3, 2)
    codebooks[1].requires_grad_()
    codeword_search(z, codebooks)[0].sum().backward()
    assert codebooks[0].grad is None
    assert codebooks[1].grad.sum() == pytest.approx(80)


def test_second_derivative_is_a_named_error():
    z, codebooks = inputs(20, 4, 3, 2)
    grad = torch.ones_like(z).requires_grad_()
    quantized, _ = codeword_search(z, [codebook.requires_grad_() for codebook in codebooks])
    first = torch.autograd.grad(quantized, codebooks, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first[0].sum().backward()


def test_reference_backend_is_twice_differentiable():
    z, codebooks = inputs(8, 3, 2, 2, dtype=torch.float64)
    with vpfast.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *codebooks: codeword_search(z, codebooks)[0], [codebook.requires_grad_() for codebook in codebooks]
        )


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_forward_mode_and_function_transforms(choice):
    z, codebooks = inputs(12, 4, 3, 2, dtype=torch.float64)
    tangents = tuple(map(torch.randn_like, codebooks))

    def quantize(*codebooks):
        return codeword_search(z, codebooks)[0]

    with vpfast.backend(choice):
        value, found = torch.func.jvp(quantize, tuple(codebooks), tangents)
        _, of_z = torch.func.jvp(lambda z: codeword_search(z, codebooks)[0], (z,), (torch.ones_like(z),))
        batched = torch.func.vmap(codeword_search, (0, None))(z.view(3, 4, 4), codebooks)
        gradient = torch.func.grad(lambda codebook: quantize(codebook, codebooks[1]).sum())(codebooks[0])
    indices = codeword_search(z, codebooks)[1]
    torch.testing.assert_close(value, quantize(*codebooks))
    torch.testing.assert_close(found, sum(reference.chosen_codewords(indices, tangents, True, torch.float64)))
    assert (of_z == 0).all()
    torch.testing.assert_close(batched[0].view(12, 4), value)
    assert torch.equal(batched[1].view(12, 2), indices)
    torch.testing.assert_close(gradient, reference.codeword_search_backward(torch.ones_like(z), indices, codebooks)[0])


# --- what PyTorch expects of an operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", strided_cases())
def test_strides(isa, poisoned, case):
    z = strided_cases()[case]
    for M, n, strict_tree in ((4, 3, True), (50, 2, False)):
        _, codebooks = inputs(1, 6, M, n, strict_tree)
        turned = [codebook.t().contiguous().t() for codebook in codebooks]
        wanted = codeword_search(z.contiguous(), codebooks, strict_tree)
        assert_codes_of_a_float64_search(wanted[1], z, codebooks, strict_tree)
        for given_codebooks in (codebooks, turned):
            found = codeword_search(z, given_codebooks, strict_tree)
            assert all(t.is_contiguous() for t in found)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        grad = z.flip(0).t().contiguous().t()
        given_grads = (grad, grad[:1].expand(z.shape) if len(z) else grad)
        for given_grad in given_grads:
            gradients = torch.ops.vpfast.codeword_search_backward(given_grad, found[1], turned, strict_tree)
            want = reference.codeword_search_backward(given_grad, found[1], turned, strict_tree)
            torch.testing.assert_close(gradients, want)
            assert all(t.is_contiguous() for t in gradients)


@pytest.mark.parametrize("case", [(200, 8, 8, 3, True), (200, 64, 300, 2, False)], ids=str)
def test_a_vector_does_not_depend_on_its_place(isa, case):
    z, codebooks = inputs(*case)
    whole = codeword_search(z, codebooks, case[-1])
    for part in (slice(3, 190), slice(77, 78)):
        alone = codeword_search(z[part], codebooks, case[-1])
        assert all(torch.equal(w[part], a) for w, a in zip(whole, alone, strict=True))


@native
@pytest.mark.parametrize("case", [*CASES, (500, 64, 1000, 1, False)], ids=str)
def test_every_isa_agrees_to_the_bit(case):
    assert_every_isa_agrees(*inputs(*case), case[-1])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "size", "strict_tree"), [(2, 2, True), (8, 8, True), (13, 4, True), (40, 70, False)])
def test_ties_but_for_rounding_are_decided_term_by_term(isa, dim, size, strict_tree, dtype):
    """As they are by CUDA and Triton: which is the least tells in what order squares were added, and how rounded."""
    z, codebooks = tied_but_for_rounding(60, dim, size, strict_tree, dtype)
    assert torch.equal(codeword_search(z, codebooks, strict_tree)[1], codes_term_by_term(z, codebooks, strict_tree))


@native
def test_every_isa_agrees_beyond_the_resolution_of_float64():
    """Of codewords this short the distances in float64 are equal; the scores in float32 are not."""
    z, (codebook,) = inputs(500, 8, 40, 1)
    codebook[1::2] = codebook[::2] * (1 + 1e-5)
    assert_every_isa_agrees(z, [codebook * 1e-12], False)


def assert_every_isa_agrees(z, codebooks, strict_tree):
    results = []
    try:
        for name in ("plain", "avx2", "avx512"):
            try:
                _native.extension.select_isa(name)
            except ValueError:
                continue
            results.append(codeword_search(z, codebooks, strict_tree))
    finally:
        _native.extension.select_isa("auto")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("choice", "dynamic"), [("auto", False), ("auto", True), ("reference", True)])
def test_compile_fullgraph(choice, dynamic):
    def quantize(z, codebooks):
        with vpfast.backend(choice):
            quantized, indices = codeword_search(z * 2, codebooks)
        return quantized + 1, indices

    torch.compiler.reset()
    compiled = torch.compile(quantize, fullgraph=True, dynamic=dynamic)
    for N in (9, 16, 40):
        z, codebooks = inputs(N, 4, 3, 2)
        ours = [codebook.clone().requires_grad_() for codebook in codebooks]
        theirs = [codebook.clone().requires_grad_() for codebook in codebooks]
        found, want = compiled(z, ours), quantize(z, theirs)
        assert torch.equal(found[1], want[1])
        torch.testing.assert_close(found[0], want[0])
        found[0].square().sum().backward()
        want[0].square().sum().backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_autocast_searches_in_float32(choice, dtype, codebook_dtype):
    z, codebooks = inputs(30, 4, 3, 2, True, dtype, codebook_dtype)
    codebooks = [codebook.requires_grad_() for codebook in codebooks]
    with vpfast.backend(choice), torch.autocast("cpu", torch.bfloat16):
        quantized, indices = codeword_search(z, codebooks)
    assert quantized.dtype == torch.float32
    want = reference.codeword_search(z.float(), [codebook.float() for codebook in codebooks])
    torch.testing.assert_close((quantized, indices), want)
    quantized.sum().backward()
    assert codebooks[0].grad.dtype == codebook_dtype
