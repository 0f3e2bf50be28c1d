"""The ladder of codeword_search's training form: losses, statistics, gradients, what PyTorch expects, memory."""

import math

import pytest
import torch
from codebooks import CASES, DTYPES, assert_error_at_most_twice, exact, inputs, native, strided_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import peak_of

import vpfast
from vpfast.ops import codeword_search, codeword_search_train
from vpfast.ops.codeword_search import reference

SMALL = [(40, 5, 4, 3, True), (40, 5, 2, 5, True), (40, 5, 4, 3, False), (40, 5, 30, 1, False)]
FORMS = [(strict_tree, attached) for strict_tree in (True, False) for attached in (True, False)]


def require_grad(z, codebooks):
    """Copies that ask for a gradient, flat: (z, *codebooks)."""
    return [t.detach().clone().requires_grad_() for t in (z, *codebooks)]


def total(found, seed=0):
    """Every differentiable output in one number, each part weighted at random."""
    generator = torch.Generator().manual_seed(seed)
    parts = (found.quantized, found.codebook_losses, found.commitment_losses, found.combined_loss)
    return sum((torch.rand(t.shape, generator=generator, dtype=torch.float64) * t).sum() for t in parts)


def gradients(z, codebooks, strict_tree, attached, backend="auto"):
    leaves = require_grad(z, codebooks)
    with vpfast.backend(backend):
        found = codeword_search_train(leaves[0], leaves[1:], strict_tree, attached)
    return torch.autograd.grad(total(found), leaves)


# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_losses_and_statistics_are_those_of_the_paper(case):
    """Eq. 4-5 vector by vector."""
    M, strict_tree = case[2], case[-1]
    z, codebooks = inputs(*case, torch.float64)
    found = codeword_search_train(z, codebooks, strict_tree)
    losses = [0.0] * len(codebooks)
    counts = [torch.zeros(len(codebook)) for codebook in codebooks]
    sums = [torch.zeros_like(codebook) for codebook in codebooks]
    for v in range(len(z)):
        xi, path = z[v], 0
        for layer, codebook in enumerate(codebooks):
            row = path * M + found.indices[v, layer].item()
            counts[layer][row] += 1
            sums[layer][row] += xi
            xi = xi - codebook[row]
            losses[layer] += xi.square().sum().item()
            path = row if strict_tree else 0
    torch.testing.assert_close(found.codebook_losses, torch.tensor(losses, dtype=torch.float64))
    assert torch.equal(found.commitment_losses, found.codebook_losses)
    torch.testing.assert_close(found.combined_loss, found.commitment_losses[-1])
    assert torch.equal(found.counts, torch.cat(counts).double())
    torch.testing.assert_close(found.sums, torch.cat(sums))
    assert all(torch.equal(a, b) for a, b in zip(codeword_search(z, codebooks, strict_tree), found, strict=False))


@pytest.mark.parametrize(("strict_tree", "attached"), FORMS)
def test_reference_backward_is_the_derivative_of_the_losses(strict_tree, attached):
    """Each loss alone, by the weights it stands for, against PyTorch's derivative of Eq. 4-5 with stop-gradients."""
    z, codebooks = inputs(30, 4, 3, 3, strict_tree, torch.float64)
    n = len(codebooks)
    leaves = require_grad(z, codebooks)
    found = reference.training(leaves[0], leaves[1:], strict_tree, attached)
    for i in range(n):
        none_z, none_codebooks = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        own, commitment, combined = none_codebooks.clone(), none_codebooks.clone(), none_codebooks.clone()
        own[i, i] = -2
        commitment[:i, i] = -2 if attached else 0
        combined[:, -1] = -2
        losses = {
            found.codebook_losses[i]: (none_z, own),
            found.commitment_losses[i]: (none_z.index_fill(0, torch.tensor(i), 2), commitment),
            found.combined_loss: (none_z, combined),
        }
        for loss, weights in losses.items():
            want = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            rest = (z, found.indices, codebooks, found.counts, found.sums, strict_tree)
            grad_z, grad_codebooks = reference.codeword_search_train_backward(None, *weights, *rest)
            torch.testing.assert_close((grad_z, *grad_codebooks), want, rtol=1e-12, atol=1e-13)


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_the_reference(isa, poisoned, case, dtype, codebook_dtype):
    """Errors, counts, sums, the gradient of z and those of all codebooks, each kind over several draws."""
    n, strict_tree = case[3:]
    kinds = [([], [], []) for _ in range(5)]
    for seed in range(6):
        z, codebooks = inputs(*case, dtype, codebook_dtype, seed)
        working = reference.working_dtype(z)
        weights = torch.randn(z.shape).to(dtype), torch.randn(n).to(working), torch.randn(n, n).triu().to(working)

        indices, *ours = torch.ops.vpfast.codeword_search_train(z, codebooks, strict_tree)[1:]
        z_, codebooks_ = exact(z, codebooks)
        theirs = reference.statistics(z, indices, codebooks, strict_tree)
        truth = reference.statistics(z_, indices, codebooks_, strict_tree)
        assert [t.dtype for t in ours] == [working] * 3

        given_ours = (z, indices, codebooks, *ours[1:], strict_tree)
        given_truth = (z_, indices, codebooks_, *truth[1:], strict_tree)
        ours += torch.ops.vpfast.codeword_search_train_backward(*weights, *given_ours)
        theirs += reference.codeword_search_train_backward(*weights, *given_ours)
        truth += reference.codeword_search_train_backward(*(w.double() for w in weights), *given_truth)
        assert [t.dtype for t in (ours[3], *ours[4])] == [dtype] + [codebook_dtype] * n
        for kind, results in zip(kinds, zip(ours, theirs, truth, strict=True), strict=True):
            for kept, result in zip(kind, results, strict=True):
                kept += result if isinstance(result, list) else [result]
    for kind in kinds:
        assert_error_at_most_twice(*kind, working)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("attached", [True, False])
def test_gradients_are_those_of_the_plain_formula(case, attached):
    z, codebooks = inputs(*case, torch.float64)
    found = gradients(z, codebooks, case[-1], attached)
    want = gradients(z, codebooks, case[-1], attached, "reference")
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "codebook_dtype"), DTYPES)
def test_gradients_have_the_types_of_what_they_are_for(dtype, codebook_dtype):
    z, codebooks = inputs(40, 5, 4, 2, True, dtype, codebook_dtype)
    found = gradients(z, codebooks, True, True)
    assert [g.dtype for g in found] == [dtype, codebook_dtype, codebook_dtype]
    want = gradients(z, codebooks, True, True, "reference")
    eps = max(torch.finfo(t).eps for t in (dtype, codebook_dtype))
    torch.testing.assert_close(found, want, rtol=4 * eps, atol=100 * eps)


@given(
    data=st.data(),
    vectors=st.integers(0, 40),
    dim=st.sampled_from([1, 2, 7, 8, 33]),
    layers=st.integers(1, 6),
    form=st.sampled_from(FORMS),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one set for all examples
def test_any_size(isa, data, vectors, dim, layers, form):
    size = data.draw(st.integers(2, max(2, int(800 ** (1 / layers)))))
    z, codebooks = inputs(vectors, dim, size, layers, form[0], torch.float64)
    found = codeword_search_train(z, codebooks, *form)
    with vpfast.backend("reference"):
        want = codeword_search_train(z, codebooks, *form)
    torch.testing.assert_close(tuple(found), tuple(want), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients(z, codebooks, *form), gradients(z, codebooks, *form, "reference"))


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [(500, 6, 4, 3, True), (500, 6, 2, 7, True)], ids=str)
def test_statistics_agree_along_the_tree(isa, case):
    """What chose a codeword chose one below it, and brought there what that codeword had left over."""
    z, codebooks = inputs(*case, torch.float64)
    found = codeword_search_train(z, codebooks)
    sizes = [len(codebook) for codebook in codebooks]
    counts, sums = found.counts.split(sizes), found.sums.split(sizes)
    assert counts[0].sum() == len(z)
    torch.testing.assert_close(sums[0].sum(0), z.sum(0), rtol=1e-10, atol=1e-11)
    for layer in range(len(codebooks) - 1):
        left_over = sums[layer] - counts[layer][:, None] * codebooks[layer]
        assert torch.equal(counts[layer + 1].view(-1, case[2]).sum(1), counts[layer])
        torch.testing.assert_close(sums[layer + 1].view(-1, case[2], 6).sum(1), left_over, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", [(500, 6, 4, 3, True), (500, 6, 2, 7, True)], ids=str)
def test_every_gradient_of_a_tree_follows_from_its_leaves(case):
    """For a row of layer j the sum of xi^i over its vectors is, over the leaves below it, their sum of final residuals
    plus their count times the codewords of layers i + 1 to n on the path: no other pass over the vectors."""
    z, codebooks = inputs(*case, torch.float64)
    M, n = case[2:4]
    found = codeword_search_train(z, codebooks)
    sizes = [len(codebook) for codebook in codebooks]
    leaf_counts = found.counts.split(sizes)[-1][:, None]
    below = [
        found.sums.split(sizes)[-1] - leaf_counts * codebooks[-1]
    ]  # of each leaf the sum of xi^n, then xi^(n-1), ...
    for layer in range(n - 1, 0, -1):
        on_the_path = codebooks[layer].repeat_interleave(M ** (n - 1 - layer), 0)
        below.insert(0, below[0] + leaf_counts * on_the_path)
    weights = torch.randn(n, n, dtype=torch.float64).triu()
    leaves = torch.einsum("ji,ild->jld", weights, torch.stack(below))
    from_leaves = [per_leaf.view(size, -1, 6).sum(1) for per_leaf, size in zip(leaves, sizes, strict=True)]
    _, per_vector = torch.ops.vpfast.codeword_search_train_backward(
        None, weights[0], weights, z, found.indices, codebooks, found.counts, found.sums, True
    )
    torch.testing.assert_close(from_leaves, per_vector, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", [(70, 8, 8, 3, True), (70, 8, 2, 6, True), (70, 64, 300, 2, False)], ids=str)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_vectors_that_are_not_finite_are_counted_nowhere(isa, case, choice):
    z, codebooks = inputs(*case)
    bad = torch.tensor([0, 17, 30, 69])
    good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
    with vpfast.backend(choice):
        finite = codeword_search_train(z[good], codebooks, case[-1])
        z[0, 0], z[17, -1], z[30, 2], z[69] = math.nan, math.inf, -math.inf, math.nan
        found = codeword_search_train(z, codebooks, case[-1])
        one = codeword_search_train(z[17:18], codebooks, case[-1])
    for losses in (found[2:5], one[2:5]):
        assert all(loss.isnan().all() for loss in losses)
    assert torch.equal(found.counts, finite.counts)
    torch.testing.assert_close(found.sums, finite.sums)
    assert (one.counts == 0).all()
    assert (one.sums == 0).all()
    assert found.quantized[bad].isnan().all()
    assert (found.indices[bad] == 0).all()
    assert torch.equal(found.quantized[good], finite.quantized)


def test_no_vectors_cost_nothing():
    leaves = require_grad(*inputs(0, 4, 3, 2))
    found = codeword_search_train(leaves[0], leaves[1:])
    assert all((t == 0).all() for t in found[2:])
    grads = torch.autograd.grad(total(found), leaves)
    assert all((g == 0).all() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_losses():
    """Where a stop-gradient hides nothing: the combined loss in the codebooks; with one layer, each loss in what it is
    for."""
    z, codebooks = inputs(9, 3, 3, 2, dtype=torch.float64)
    _, *leaves = require_grad(z, codebooks)
    assert torch.autograd.gradcheck(lambda *c: codeword_search_train(z, c).combined_loss, leaves)
    z, codebook = require_grad(z, codebooks[:1])
    assert torch.autograd.gradcheck(lambda c: codeword_search_train(z.detach(), [c]).codebook_losses, codebook)
    assert torch.autograd.gradcheck(lambda z: codeword_search_train(z, [codebook.detach()]).commitment_losses, z)


def test_straight_through_is_the_identity():
    z, *codebooks = require_grad(*inputs(30, 4, 3, 2))
    found = codeword_search_train(z, codebooks)
    grad = torch.randn_like(z)
    of_z, *of_codebooks = torch.autograd.grad(found.quantized, (z, *codebooks), grad, allow_unused=True)
    assert torch.equal(of_z, grad)
    assert of_codebooks == [None, None]


@pytest.mark.parametrize("which", ["codebook_losses", "commitment_losses", "combined_loss"])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_gradient_of_one_loss_alone(which, choice):
    leaves = require_grad(*inputs(30, 4, 3, 2))
    with vpfast.backend(choice):
        found = codeword_search_train(leaves[0], leaves[1:])
    grads = torch.autograd.grad(getattr(found, which).sum(), leaves, materialize_grads=True)
    reached = [bool((g != 0).any()) for g in grads]
    assert reached == ([True, False, False] if which == "commitment_losses" else [False, True, True])


def test_attached_commitment_reaches_the_codewords_before():
    leaves = require_grad(*inputs(30, 4, 3, 3))
    found = codeword_search_train(leaves[0], leaves[1:], attached=True)
    for layer in range(3):
        grads = torch.autograd.grad(found.commitment_losses[layer], leaves, retain_graph=True, materialize_grads=True)
        assert [bool((g != 0).any()) for g in grads[1:]] == [j < layer for j in range(3)]


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_statistics_and_codes_have_no_gradient(choice):
    leaves = require_grad(*inputs(30, 4, 3, 2))
    with vpfast.backend(choice):
        found = codeword_search_train(leaves[0], leaves[1:])
    asks = {name for name, t in found._asdict().items() if t.requires_grad}
    assert asks == {"quantized", "codebook_losses", "commitment_losses", "combined_loss"}


@pytest.mark.parametrize("which", ["z", "codebooks"])
def test_only_one_of_both_needs_a_gradient(which):
    z, codebooks = inputs(30, 4, 3, 2)
    leaves = [z] if which == "z" else codebooks
    for leaf in leaves:
        leaf.requires_grad_()
    found = codeword_search_train(z, codebooks)
    (found.quantized.sum() + found.codebook_losses.sum() + found.commitment_losses.sum()).backward()
    assert [t.grad is not None for t in (z, *codebooks)] == [t.requires_grad for t in (z, *codebooks)]


def test_changing_a_codebook_before_backward_is_refused():
    """As an average kept of the codebooks would, and the commitment's gradient would be another's."""
    z, codebooks = inputs(30, 4, 3, 2)
    found = codeword_search_train(z.requires_grad_(), codebooks)
    codebooks[0].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.commitment_losses.sum().backward()


def test_second_derivative_is_a_named_error():
    leaves = require_grad(*inputs(20, 4, 3, 2))
    found = codeword_search_train(leaves[0], leaves[1:])
    (first,) = torch.autograd.grad(found.commitment_losses.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_the_search_operator_alone_refuses_a_gradient_by_name():
    leaves = require_grad(*inputs(20, 4, 3, 2))
    errors = torch.ops.vpfast.codeword_search_train(leaves[0], leaves[1:], True)[2]
    with pytest.raises(RuntimeError, match=r"call vpfast\.ops\.codeword_search_train"):
        errors.sum().backward()


def test_reference_backend_is_twice_differentiable():
    z, *codebooks = require_grad(*inputs(8, 3, 2, 2, dtype=torch.float64))

    def losses(*codebooks):
        return codeword_search_train(z.detach(), codebooks).combined_loss

    with vpfast.backend("reference"):
        assert torch.autograd.gradgradcheck(losses, codebooks)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_forward_mode_and_function_transforms(choice):
    z, codebooks = inputs(12, 4, 3, 2, dtype=torch.float64)
    with vpfast.backend(choice):
        plain = codeword_search_train(z, codebooks)
        gradient = torch.func.grad(lambda c: codeword_search_train(z, [c, codebooks[1]]).combined_loss)(codebooks[0])
        _, tangent = torch.func.jvp(lambda z: tuple(codeword_search_train(z, codebooks)), (z,), (torch.ones_like(z),))
        batched = torch.func.vmap(codeword_search_train, (0, None))(z.view(3, 4, 4), codebooks)
    weights = torch.zeros(2, dtype=z.dtype), torch.tensor([[0, -2.0], [0, 0]], dtype=z.dtype)
    want = reference.codeword_search_train_backward(
        None, *weights, z, plain.indices, codebooks, plain.counts, plain.sums
    )
    torch.testing.assert_close(gradient, want[1][0])
    assert (tangent[0] == 1).all()
    torch.testing.assert_close(batched.quantized.view(12, 4), plain.quantized)
    torch.testing.assert_close(batched.commitment_losses.sum(0), plain.commitment_losses)
    torch.testing.assert_close(batched.sums.sum(0), plain.sums)


# --- what PyTorch expects of an operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", strided_cases())
@pytest.mark.parametrize("strict_tree", [True, False])
def test_strides(isa, poisoned, case, strict_tree):
    z = strided_cases()[case]
    codebooks = inputs(1, 6, 4, 3, strict_tree)[1]
    turned = [codebook.t().contiguous().t() for codebook in codebooks]
    found = codeword_search_train(z, turned, strict_tree)
    assert all(t.is_contiguous() for t in found)
    want = codeword_search_train(z.contiguous(), codebooks, strict_tree)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    torch.testing.assert_close(
        gradients(z, turned, strict_tree, True), gradients(z.contiguous(), codebooks, strict_tree, True)
    )
    rest = (found.indices, codebooks, found.counts, found.sums, strict_tree)
    weights = torch.randn(3), torch.randn(3, 3).tril().t()
    results = []
    for grad, z_given in ((z.flip(0), z.contiguous()), (z.flip(0).t().contiguous().t(), z)):
        grad_z, grads = torch.ops.vpfast.codeword_search_train_backward(grad, *weights, z_given, *rest)
        results.append((grad_z, *grads))
    assert all(t.is_contiguous() for t in results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_codes_as_the_search_alone(isa, case):
    z, codebooks = inputs(*case)
    found = codeword_search_train(z, codebooks, case[-1])
    assert all(torch.equal(a, b) for a, b in zip(codeword_search(z, codebooks, case[-1]), found, strict=False))


@pytest.mark.parametrize(("choice", "dynamic"), [("auto", False), ("auto", True), ("reference", True)])
def test_compile_fullgraph(choice, dynamic):
    def step(z, codebooks):
        with vpfast.backend(choice):
            return codeword_search_train(z * 2, codebooks, attached=True)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for vectors in (9, 40):
        given_inputs = inputs(vectors, 4, 3, 2)
        ours, theirs = require_grad(*given_inputs), require_grad(*given_inputs)
        found, want = compiled(ours[0], ours[1:]), step(theirs[0], theirs[1:])
        torch.testing.assert_close(tuple(found), tuple(want))
        assert [t.requires_grad for t in found] == [t.requires_grad for t in want]
        total(found).backward()
        total(want).backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_autocast_searches_in_float32(choice, dtype, codebook_dtype):
    leaves = require_grad(*inputs(30, 4, 3, 2, True, dtype, codebook_dtype))
    with vpfast.backend(choice), torch.autocast("cpu", torch.bfloat16):
        found = codeword_search_train(leaves[0], leaves[1:])
    plain = codeword_search_train(leaves[0].detach().float(), [codebook.detach().float() for codebook in leaves[1:]])
    torch.testing.assert_close(tuple(found), tuple(plain))
    grads = torch.autograd.grad(total(found), leaves)
    assert [g.dtype for g in grads] == [dtype, codebook_dtype, codebook_dtype]


# --- memory ----------------------------------------------------------------------------------------------------------


def training_step(z, codebooks, strict_tree):
    leaves = [t.detach().requires_grad_() for t in (z, *codebooks)]
    found = codeword_search_train(leaves[0], leaves[1:], strict_tree)
    loss = found.codebook_losses.sum() + found.commitment_losses.sum() + found.combined_loss
    return (*found, *torch.autograd.grad((loss, found.quantized), leaves, (torch.ones(()), z)))


@native
@pytest.mark.parametrize(
    "case",
    [(245760, 8, 8, 3, True), (245760, 8, 2, 9, True), (245760, 8, 512, 1, False), (32768, 64, 4096, 1, False)],
    ids=str,
)
@pytest.mark.parametrize("search", [codeword_search, codeword_search_train, training_step])
def test_memory_beyond_inputs_and_outputs(case, search):
    z, codebooks = inputs(*case)
    search(z[:1000], codebooks, case[-1])
    assert peak_of(lambda: search(z, codebooks, case[-1])) < 32 * 2**20
