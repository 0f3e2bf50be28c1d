"""The quantizer: against the paper's equations and vector-quantize-pytorch, layouts, what PyTorch expects, refusals.

How its codebooks start, move and restart: test_hierarchical_residual_vq_codebooks.py.
"""

import copy
import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import quantizer, vectors
from torch import Tensor, nn

from vpfast.nn import HierarchicalResidualVQ


def search(z: Tensor, codebooks: Sequence[Tensor], tree: bool) -> tuple[list[int], list[Tensor]]:
    """Eq. 3 for one vector: its codes, and its codewords."""
    M, path, residual = len(codebooks[0]), 0, z
    codes, words = [], []
    for codebook in codebooks:
        choice = codebook[path * M : path * M + M] if tree else codebook
        code = int((residual - choice).square().sum(1).argmin())
        codes.append(code)
        words.append(choice[code])
        residual = residual - choice[code]
        path = path * M + code
    return codes, words


def training_loss(vq: HierarchicalResidualVQ, z: Tensor, indices: Tensor) -> Tensor:
    """Eq. 4-5 without the reconstruction, term by term in plain PyTorch, for all vectors z (N, D)."""
    reduce = torch.mean if vq.loss_reduction == "mean" else torch.sum
    total, residual = z.new_zeros(()), z
    codes = vq.get_codes_from_indices(indices)
    for code, beta in zip(codes, vq.commitment_weight, strict=True):
        if vq.learnable_codebook:
            total = total + reduce((residual.detach() - code).square())
        total = total + beta * reduce((code.detach() - residual).square())
        residual = residual - (code if vq.attached_residual else code.detach())
    if vq.combined_loss:
        if vq.learnable_codebook:
            total = total + reduce((z.detach() - codes.sum(0)).square())
        total = total + vq.combined_commitment_weight * reduce((codes.sum(0).detach() - z).square())
    return total


# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_those_of_the_equation(strict_tree: bool, training: bool) -> None:
    vq = quantizer(5, 3, 3, strict_tree=strict_tree).double().train(training)
    codebooks = [codebook.clone() for codebook in vq.codebooks]
    z = vectors(40, 5, dtype=torch.float64)
    quantized, indices, losses = vq(z)
    for vector, found, codes in zip(z, quantized, indices, strict=True):
        expected, words = search(vector, codebooks, strict_tree)
        assert codes.tolist() == expected
        torch.testing.assert_close(found, torch.stack(words).sum(0))
    assert losses.shape == (3,)


@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("learnable_codebook", [True, False])
@pytest.mark.parametrize("attached_residual", [True, False])
@pytest.mark.parametrize("combined_loss", [True, False])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_losses_and_gradients_are_those_of_the_equations(
    strict_tree: bool, learnable_codebook: bool, attached_residual: bool, combined_loss: bool, loss_reduction: str
) -> None:
    """With restarts on, which move the codebooks before backward runs."""
    vq = quantizer(
        4,
        3,
        3,
        strict_tree=strict_tree,
        learnable_codebook=learnable_codebook,
        commitment_weight=(0.1, 0.25, 0.7),
        attached_residual=attached_residual,
        combined_loss=combined_loss,
        combined_commitment_weight=0.4,
        loss_reduction=loss_reduction,
        threshold_ema_dead_code=100,
    ).double()
    with torch.no_grad():
        vq.codewords[2] += 100  # dead
    before = copy.deepcopy(vq)
    z = vectors(50, 4, dtype=torch.float64).requires_grad_()
    quantized, indices, losses = vq(z)
    assert not torch.equal(vq.codewords, before.codewords)
    weight = vectors(50, 4, seed=1, dtype=torch.float64)
    leaves = [z, vq.codewords] if learnable_codebook else [z]
    found = torch.autograd.grad(losses.sum() + (weight * quantized).sum(), leaves)

    loss = training_loss(before, z, indices)
    leaves = [z, before.codewords] if learnable_codebook else [z]
    expected = list(torch.autograd.grad(loss, leaves))
    expected[0] = expected[0] + weight  # straight through, once
    torch.testing.assert_close(losses.sum(), loss)
    torch.testing.assert_close(list(found), expected)


def test_losses_fall_apart_into_their_terms() -> None:
    vq = quantizer(4, 3, 2, learnable_codebook=True, commitment_weight=(0.5, 2.0), combined_loss=True)
    z = vectors(30, 4)
    quantized, _, losses, terms = vq(z, return_loss_breakdown=True)
    torch.testing.assert_close(terms.codebook, terms.commitment)
    torch.testing.assert_close(terms.combined, (quantized - z).square().mean())
    torch.testing.assert_close(terms.combined_commitment, terms.combined)
    torch.testing.assert_close(losses[0], 1.5 * terms.codebook[0])
    torch.testing.assert_close(losses[1], 3 * terms.codebook[1] + 1.25 * terms.combined)
    _, _, losses, codes, terms = vq.eval()(z, return_all_codes=True, return_loss_breakdown=True)
    assert codes.shape == (2, 30, 4)
    assert not any(t.any() for t in (losses, *terms))


def test_averages_follow_the_equation_and_an_unreached_codebook_stays() -> None:
    vq = quantizer(2, 2, 2, decay=0.7, eps=0.01)
    with torch.no_grad():
        vq.codewords[:2] = torch.tensor([[0.0, 0.0], [100.0, 0.0]])  # nothing comes near the second
    before = copy.deepcopy(vq)
    z = vectors(60, 2)
    _, indices, _ = vq(z)
    for local, node, xi in ((indices[:, 0], 0, z), (indices[:, 1], 2, z - before.codewords[0])):
        rows = [slice(node, node + 1), slice(node + 1, node + 2)]
        sizes = torch.stack([0.7 + 0.3 * (local == code).sum() for code in range(2)])
        smoothed = (sizes + 0.01) / (sizes.sum() + 2 * 0.01) * sizes.sum()
        for code, row in enumerate(rows):
            mean = 0.7 * before.embed_avg[row] + 0.3 * xi[local == code].sum(0)
            torch.testing.assert_close(vq.cluster_size[row], sizes[code : code + 1])
            torch.testing.assert_close(vq.codewords[row], mean / smoothed[code])
    for name in ("codewords", "cluster_size", "embed_avg"):
        assert torch.equal(getattr(vq, name)[4:], getattr(before, name)[4:])


# --- vector-quantize-pytorch -----------------------------------------------------------------------------------------


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch to compare with")


def clear(z: Tensor, codebooks: Sequence[Tensor], margin: float = 1e-3) -> Tensor:
    """Those of the vectors (N, D) whose nearest codeword is nearer than the next beyond rounding, in every layer."""
    residual, keep = z.double(), torch.ones(len(z), dtype=torch.bool)
    for codebook in codebooks:
        (best, second), (code, _) = (
            pair.unbind(1) for pair in torch.cdist(residual, codebook.double()).topk(2, dim=1, largest=False)
        )
        keep &= second - best > margin
        residual = residual - codebook.double()[code]
    assert keep.sum() > len(z) // 2
    return z[keep]


def give_codebooks(theirs: nn.Module, ours: HierarchicalResidualVQ) -> None:
    layers = theirs.layers if hasattr(theirs, "layers") else [theirs]
    with torch.no_grad():
        for layer, codebook in zip(layers, ours.codebooks, strict=True):
            layer._codebook.embed.copy_(codebook[None])
            layer._codebook.embed_avg.copy_(codebook[None])


OPTIONS = {"dim": 6, "codebook_size": 16, "num_quantizers": 4}


def test_residual_vq_codes_and_vectors_equal_the_peers(peer: Any) -> None:
    ours = quantizer(**OPTIONS, strict_tree=False).eval()
    theirs = peer.ResidualVQ(**OPTIONS).eval()
    give_codebooks(theirs, ours)
    x = clear(vectors(1000, 6), ours.codebooks)[:600].reshape(3, 200, 6)
    found, expected = ours(x, return_all_codes=True), theirs(x, return_all_codes=True)
    assert torch.equal(found[1], expected[1])
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(ours.get_output_from_indices(found[1]), theirs.get_output_from_indices(found[1]))


@pytest.mark.parametrize("layout", ["maps", "volumes", "sequences"])
def test_plain_vq_in_its_layouts_equals_the_peers(peer: Any, layout: str) -> None:
    ours_option, theirs_option, shape = {
        "maps": ({"accept_image_fmap": True}, {"accept_image_fmap": True}, (2, 5, 6)),
        "volumes": ({"accept_image_fmap": True}, {"accept_3d_fmap": True}, (2, 3, 2, 5)),
        "sequences": ({"channel_last": False}, {"channel_last": False}, (2, 30)),
    }[layout]
    ours = quantizer(6, 16, 1, **ours_option).eval()
    theirs = peer.VectorQuantize(6, 16, **theirs_option).eval()
    give_codebooks(theirs, ours)
    x = clear(vectors(200, 6), ours.codebooks)[:60].reshape(*shape, 6).movedim(-1, 1)
    found, expected = ours(x), theirs(x)
    assert torch.equal(found[1][..., 0], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(ours.get_output_from_indices(found[1]), theirs.get_output_from_indices(expected[1]))


def test_an_averaged_step_equals_the_peers(peer: Any) -> None:
    """Several, so that cluster sizes other than the first ones count."""
    options = {**OPTIONS, "decay": 0.7, "eps": 1e-3, "commitment_weight": 0.5}
    ours = quantizer(**options, strict_tree=False)
    theirs = peer.ResidualVQ(**options, rotation_trick=False)
    give_codebooks(theirs, ours)
    for step in range(3):
        x = clear(vectors(1500, 6, seed=step), ours.codebooks).requires_grad_()
        found, expected = ours(x[None]), theirs(x[None])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[2], expected[2])
        gradient, other = (torch.autograd.grad(losses.sum(), x)[0] for losses in (found[2], expected[2]))
        torch.testing.assert_close(gradient, other)
        sizes = [layer._codebook.cluster_size[0] for layer in theirs.layers]
        torch.testing.assert_close(ours.cluster_size, torch.cat(sizes), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(ours.codebooks), theirs.codebooks, rtol=1e-5, atol=1e-5)
        give_codebooks(theirs, ours)
        for layer, avg in zip(theirs.layers, ours.embed_avg.chunk(4), strict=True):
            layer._codebook.embed_avg.copy_(avg[None])


def test_a_masked_step_equals_the_peers(peer: Any) -> None:
    ours, theirs = quantizer(6, 16, 1), peer.VectorQuantize(6, 16, rotation_trick=False)
    give_codebooks(theirs, ours)
    x = clear(vectors(200, 6), ours.codebooks)[:90].reshape(3, 30, 6)
    mask = torch.arange(30) < torch.tensor([30, 12, 0])[:, None]
    found, expected = ours(x, mask), theirs(x, mask=mask)
    assert torch.equal(found[1][..., 0], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2][0], expected[2])
    torch.testing.assert_close(ours.codewords, theirs.codebook)


# --- layouts and decoding --------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["rows", "maps", "volumes", "sequences"]),
    st.lists(st.integers(0, 4), min_size=4, max_size=4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_any_layout_is_its_vectors_in_a_row(
    layout: str, sizes: list[int], layers: int, strict_tree: bool, training: bool, strided: bool
) -> None:
    shape = tuple(sizes[: {"rows": 3, "maps": 3, "volumes": 4, "sequences": 2}[layout]])
    options = {"rows": {}, "sequences": {"channel_last": False}}.get(layout, {"accept_image_fmap": True})
    vq = quantizer(3, 2, layers, strict_tree=strict_tree, **options).train(training)
    flat = quantizer(3, 2, layers, strict_tree=strict_tree).train(training)
    x = vectors(*shape, 3)
    rows = flat(x.reshape(-1, 3))
    if layout != "rows":
        x = x.movedim(-1, 1)  # in memory, the dimension is still last
    x = x if strided else x.contiguous()
    quantized, indices, losses = vq(x)
    assert quantized.shape == x.shape
    assert indices.shape == (*shape, layers)
    assert torch.equal(indices.reshape(-1, layers), rows[1])
    last = quantized if layout == "rows" else quantized.movedim(1, -1)
    assert torch.equal(last.reshape(-1, 3), rows[0])
    assert torch.equal(losses, rows[2])
    assert torch.equal(vq.codewords, flat.codewords)
    for k in range(1, layers + 1):
        decoded = vq.get_output_from_indices(indices[..., :k])
        assert decoded.shape == x.shape
        assert torch.equal(decoded, vq.get_output_from_indices(indices, layers=k))
        assert vq.get_codes_from_indices(indices[..., :k]).shape == (k, *shape, 3)


def test_maps_with_their_channels_last_are_not_copied() -> None:
    vq = quantizer(8, 4, 2, accept_image_fmap=True)
    for x in (
        vectors(2, 8, 4, 6).to(memory_format=torch.channels_last),
        vectors(2, 8, 3, 4, 6).to(memory_format=torch.channels_last_3d),
    ):
        rows, _ = vq._vectors(x)
        assert rows.data_ptr() == x.data_ptr()
        assert vq(x)[0].stride() == x.stride()


@pytest.mark.parametrize("strict_tree", [True, False])
def test_the_first_layers_alone_come_nearer_with_depth(strict_tree: bool) -> None:
    vq = HierarchicalResidualVQ(6, 8, 3, strict_tree=strict_tree, kmeans_init=True)
    z = vectors(2000, 6)
    vq(z)
    quantized, indices, _ = vq.eval()(z)
    errors = [(vq.get_output_from_indices(indices, layers=k) - z).square().mean() for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(vq.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_any_integer_type_decode(dtype: torch.dtype) -> None:
    vq = quantizer(4, 8, 3).eval()
    indices = vq(vectors(50, 4))[1]
    for read in (vq.get_output_from_indices, vq.get_codes_from_indices, vq.usage, vq.perplexity):
        assert torch.equal(read(indices.to(dtype)), read(indices))


@pytest.mark.parametrize("strict_tree", [True, False])
def test_an_absent_index_is_no_codeword(strict_tree: bool) -> None:
    vq = quantizer(4, 3, 3, strict_tree=strict_tree)
    codes = vq.get_codes_from_indices(torch.tensor([[1, -1, 2], [2, 1, 0], [-1, -1, -1]]))
    assert torch.equal(codes[0], torch.stack((vq.codebooks[0][1], vq.codebooks[0][2], torch.zeros(4))))
    assert not codes[1, 0].any()
    assert codes[2, 0].any() == (not strict_tree)
    assert torch.equal(codes[2, 1], vq.codebooks[2][(2 * 3 + 1) * 3 if strict_tree else 0])


def test_masked_vectors_take_no_part() -> None:
    vq = quantizer(4, 3, 2, learnable_codebook=True, threshold_ema_dead_code=2)
    z, mask = vectors(2, 20, 4).requires_grad_(), vectors(2, 20, seed=1) > 0
    small, other = copy.deepcopy(vq), torch.full_like(z, math.nan)
    x = torch.where(mask[..., None], z, other)
    torch.manual_seed(3)
    quantized, indices, losses = vq(x, mask)
    torch.manual_seed(3)
    expected = small(z[mask])
    assert torch.equal(quantized[mask], expected[0])
    assert torch.equal(indices[mask], expected[1])
    assert torch.equal(losses, expected[2])
    assert torch.equal(vq.codewords, small.codewords)
    assert not quantized[~mask].any()
    assert (indices[~mask] == -1).all()
    (gradient,) = torch.autograd.grad(losses.sum() + quantized.sum(), z)
    assert (gradient[mask] != 0).all()
    assert not gradient[~mask].any()


def test_usage_and_perplexity_count_codewords_of_a_whole_layer() -> None:
    vq = HierarchicalResidualVQ(4, 2, 2)
    indices = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(vq.usage(indices), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(vq.perplexity(indices), torch.tensor([2.0, 4.0]))
    indices = torch.tensor([[[0, 0]], [[0, 0]], [[0, 1]], [[0, -1]]])
    torch.testing.assert_close(vq.usage(indices), torch.tensor([0.5, 0.5]))
    expected = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    torch.testing.assert_close(vq.perplexity(indices), torch.tensor([1.0, expected]))
    torch.testing.assert_close(vq.usage(indices[..., :1]), torch.tensor([0.5]))
    assert vq.usage(indices[:0]).tolist() == [0, 0]


# --- what PyTorch expects of a module --------------------------------------------------------------------------------


def test_state_goes_out_and_in() -> None:
    """A loaded module has started: its first batch does not move the codebooks again."""
    options = {"kmeans_init": True, "learnable_codebook": True}
    vq, other = HierarchicalResidualVQ(4, 3, 2, **options), HierarchicalResidualVQ(4, 3, 2, **options)
    z = vectors(100, 4)
    vq(z)
    assert set(vq.state_dict()) == {"codewords", "cluster_size", "started"}
    assert set(HierarchicalResidualVQ(4, 3, 2).state_dict()) == {*vq.state_dict(), "embed_avg"}
    other.load_state_dict(vq.state_dict())
    buffer = io.BytesIO()
    torch.save(vq, buffer)
    buffer.seek(0)
    for same in (other, copy.deepcopy(vq), torch.load(buffer, weights_only=False)):
        found, expected = same(z + 1), vq(z + 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(same.codewords, vq.codewords)
    fresh = HierarchicalResidualVQ(4, 3, 2, **options)
    copied = copy.deepcopy(fresh)
    copied(z)
    assert copied.started


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codebooks_stay_float32_beside_half_precision(dtype: torch.dtype) -> None:
    vq = quantizer(4, 3, 2, threshold_ema_dead_code=2)
    exact = copy.deepcopy(vq)
    vq.to(dtype)
    assert {t.dtype for t in vq.state_dict().values()} == {torch.float32, torch.bool}
    z = vectors(40_000, 4).to(dtype)
    torch.manual_seed(0)
    quantized, indices, losses = vq(z)
    torch.manual_seed(0)
    expected = exact(z.float())
    assert (quantized.dtype, losses.dtype) == (dtype, torch.float32)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(quantized, expected[0].to(dtype))
    torch.testing.assert_close(vq.codewords, exact.codewords)
    assert vq.codewords.isfinite().all()


@given(st.lists(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=1, max_size=4))
@settings(max_examples=20)
def test_codebooks_have_the_type_of_the_module_but_float32_in_half_precision(types: list[torch.dtype]) -> None:
    for options in ({}, {"learnable_codebook": True}):
        vq = quantizer(4, 3, 2, **options)
        for dtype in types:
            vq.to(dtype)
        expected = torch.float64 if types[-1] == torch.float64 else torch.float32
        assert {t.dtype for t in vq.state_dict().values()} == {expected, torch.bool}
        assert vq(vectors(20, 4, dtype=types[-1]))[0].dtype == types[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("learnable_codebook", [True, False])
def test_codebooks_of_a_default_type_and_of_loaded_values(dtype: torch.dtype, learnable_codebook: bool) -> None:
    options = {"learnable_codebook": learnable_codebook}
    wide = torch.promote_types(dtype, torch.float32)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = HierarchicalResidualVQ(4, 3, 2, **options)
    finally:
        torch.set_default_dtype(previous)
    values = {name: value.to(dtype) if name != "started" else value for name, value in made.state_dict().items()}
    given = dict(values)
    with torch.device("meta"):
        assigned = nn.Sequential(HierarchicalResidualVQ(4, 3, 2, **options))
    assigned.load_state_dict({f"0.{name}": value for name, value in values.items()}, assign=True)
    for vq in (made, assigned[0]):
        assert {t.dtype for t in vq.state_dict().values()} == {wide, torch.bool}
        assert vq(vectors(20, 4, dtype=dtype))[0].dtype == dtype
    assert values == given
    exact = quantizer(4, 3, 2, **options).state_dict()
    assigned[0].load_state_dict(exact, assign=True)
    for name, value in assigned[0].state_dict().items():
        assert value.data_ptr() == exact[name].data_ptr()


def test_autocast_changes_nothing() -> None:
    vq = quantizer(4, 3, 2, learnable_codebook=True)
    z = vectors(200, 4)
    expected = vq(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = vq(z)
        half = vq(z.bfloat16())
    torch.testing.assert_close(found, expected)
    assert half[2].dtype == torch.float32
    half[2].sum().backward()
    assert vq.codewords.grad.dtype == torch.float32


def test_double_and_devices() -> None:
    vq = quantizer(4, 3, 2).double()
    assert vq(vectors(20, 4, dtype=torch.float64))[2].dtype == torch.float64
    moved = HierarchicalResidualVQ(4, 3, 2).to("meta").to_empty(device="cpu")
    moved.reset_parameters()
    assert moved(vectors(20, 4))[0].shape == (20, 4)
    assert "dim=4, codebook_size=3, num_quantizers=2, strict_tree=True, averaged" in repr(moved)


@pytest.fixture
def fresh_compiler() -> None:
    """What other modules compiled does not count towards the limit of recompilations."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "aot_eager"),
        ({"learnable_codebook": True, "combined_loss": True}, "aot_eager"),
        ({"strict_tree": False, "threshold_ema_dead_code": 9}, "inductor"),
        ({"learnable_codebook": True, "attached_residual": True, "threshold_ema_dead_code": 9}, "inductor"),
        ({"kmeans_init": True, "threshold_ema_dead_code": 9}, "aot_eager"),
        ({"kmeans_init": True, "learnable_codebook": True}, "aot_eager"),
    ],
)
def test_compiled_training_equals_eager(options: dict[str, Any], backend: str) -> None:
    """Steps with batches of several sizes; gradients use the codewords that were searched, though the table moved."""
    eager = quantizer(4, 3, 2, accept_image_fmap=True, **options)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step, batch in enumerate((2, 3, 5)):
        results = []
        for module, run in ((eager, eager), (model, compiled)):
            x = vectors(batch, 4, 5, 6, seed=step).requires_grad_()
            torch.manual_seed(step)
            quantized, indices, losses = run(x)
            (quantized.square().sum() + losses.sum()).backward()
            results.append((quantized, indices, losses, x.grad, module.codewords.grad, dict(module.state_dict())))
            module.codewords.grad = None
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.usefixtures("fresh_compiler")
def test_evaluation_compiles_and_exports(strict_tree: bool) -> None:
    vq = quantizer(4, 3, 2, strict_tree=strict_tree, accept_image_fmap=True, kmeans_init=True).eval()
    x = vectors(2, 4, 5, 6)
    expected = vq(x)
    torch.testing.assert_close(torch.compile(vq, fullgraph=True, backend="inductor")(x), expected)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(vq, (x,), dynamic_shapes=batch)
    torch.testing.assert_close(program.module()(x), expected)
    more = vectors(7, 4, 5, 6)
    torch.testing.assert_close(program.module()(more), vq(more))


@pytest.mark.usefixtures("fresh_compiler")
def test_no_graph_break_while_decoding() -> None:
    vq = quantizer(4, 3, 2)
    _, indices, _ = vq.eval()(vectors(20, 4))
    decode = torch.compile(vq.get_output_from_indices, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(decode(indices), vq.get_output_from_indices(indices))


@pytest.mark.parametrize("strict_tree", [True, False])
def test_decoding_maps_over_indices(strict_tree: bool) -> None:
    vq = quantizer(4, 3, 3, strict_tree=strict_tree, accept_image_fmap=True)
    indices = torch.randint(-1, 3, (5, 2, 6, 7, 3), generator=torch.Generator().manual_seed(0))
    for decode in (
        vq.get_output_from_indices,
        vq.get_codes_from_indices,
        lambda indices: vq.get_output_from_indices(indices, layers=2),
    ):
        torch.testing.assert_close(torch.func.vmap(decode)(indices), torch.stack([decode(each) for each in indices]))


# --- options and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight",
    [(0.5, 2), np.array([0.5, 2]), torch.tensor([0.5, 2]), [np.float32(0.5), torch.tensor(2)], iter((0.5, 2.0))],
    ids=["tuple", "array", "tensor", "scalars", "iterator"],
)
def test_weights_in_any_sequence(weight: Any) -> None:
    assert HierarchicalResidualVQ(4, 3, 2, commitment_weight=weight).commitment_weight == (0.5, 2.0)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor])
def test_options_of_other_kinds_of_number(number: Callable[[float], Any]) -> None:
    numbers = {
        "decay": 0.75,
        "eps": 0.5,
        "threshold_ema_dead_code": 2.0,
        "commitment_weight": 0.25,
        "combined_commitment_weight": 2.0,
    }
    results = []
    for options in (numbers, {name: number(value) for name, value in numbers.items()}):
        vq = quantizer(4, 3, 2, combined_loss=True, **options)
        results.append((vq(vectors(50, 4)), vq.state_dict()))
        assert {type(getattr(vq, name)) for name in numbers} == {float, tuple}
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 2), {}, "dim must be an integer of at least 1, got 0"),
        ((4, 1, 2), {}, "codebook_size must be an integer of at least 2, got 1"),
        ((4, (4, 4), 2), {}, r"codebook_size must be an integer of at least 2, got \(4, 4\)"),
        ((4, 4, 0), {}, "num_quantizers must be an integer of at least 1, got 0"),
        ((4, 4, 17), {"strict_tree": False}, "num_quantizers must be at most 16, got 17"),
        (
            (4, 1024, 8),
            {},
            r"8 layers of 1024 are [\d,]+ codewords.*at most 16,777,216.*strict_tree=False makes it 8,192",
        ),
        ((4, 4, 2), {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ((4, 4, 2), {"eps": 0.0}, "eps must be positive, got 0.0"),
        ((4, 4, 2), {"kmeans_iters": -1}, "kmeans_iters must be an integer of at least 0, got -1"),
        ((4, 4, 2), {"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be a finite number .* got -1"),
        ((4, 4, 2), {"commitment_weight": math.nan}, "commitment_weight must be a finite number .* got nan"),
        (
            (4, 4, 2),
            {"commitment_weight": (1.0,)},
            r"commitment_weight must be one number or 2, one a layer, got \(1.0,\)",
        ),
        ((4, 4, 2), {"commitment_weight": np.ones((2, 1))}, "commitment_weight must be one number or 2, one a layer"),
        ((4, 4, 2), {"commitment_weight": "ab"}, "commitment_weight must be one number or 2, one a layer, got 'ab'"),
        ((4, 4, 2), {"commitment_weight": (1.0, -1.0)}, "commitment_weight must be a finite number .* got -1.0"),
        ((4, 4, 2), {"combined_commitment_weight": math.inf}, "combined_commitment_weight must be a finite number"),
        ((4, 4, 2), {"loss_reduction": "none"}, "loss_reduction must be one of 'mean', 'sum', got 'none'"),
        (
            (4, 4, 2),
            {"ema_update": True, "learnable_codebook": True},
            "codebooks are averaged or learnable; got ema_up",
        ),
    ],
)
def test_refused_options(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HierarchicalResidualVQ: {message}"):
        HierarchicalResidualVQ(*arguments, **options)
    with pytest.raises(TypeError, match="use_cosine_sim"):
        HierarchicalResidualVQ(4, 4, 2, use_cosine_sim=True)


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({}, [0.0], TypeError, "takes a tensor, got list"),
        ({}, torch.zeros(3, 5), ValueError, r"shape \(\*, 4\), got \(3, 5\)"),
        ({}, torch.zeros(()), ValueError, r"shape \(\*, 4\), got \(\)"),
        ({"channel_last": False}, torch.zeros(3, 5, 4), ValueError, r"shape \(B, 4, \*\), got \(3, 5, 4\)"),
        ({"accept_image_fmap": True}, torch.zeros(3, 5, 4), ValueError, r"\(B, 4, H, W\) or .*got \(3, 5, 4\)"),
        ({"accept_image_fmap": True}, torch.zeros(3, 3, 3, 4), ValueError, r"got \(3, 3, 3, 4\); accept_image_fmap"),
        ({}, torch.zeros(3, 4, device="meta"), ValueError, "the input is on meta, the codebooks on cpu"),
        ({}, torch.zeros(3, 4).double(), TypeError, r"input is torch\.float64 and the codebooks are torch\.float32"),
        ({}, torch.zeros(3, 4).long(), TypeError, r"input is torch\.int64"),
    ],
)
def test_refused_inputs(options: dict[str, Any], x: Any, error: type[Exception], message: str) -> None:
    for training in (True, False):
        with pytest.raises(error, match=message):
            HierarchicalResidualVQ(4, 3, 2, **options).train(training)(x)


def test_refused_masks_and_indices() -> None:
    vq = HierarchicalResidualVQ(4, 3, 2)
    x = torch.zeros(2, 5, 4)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor of shape \(2, 5\), got torch\.float32"):
        vq(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\) beside this input, on cpu, got \(5,\) on cpu"):
        vq(x, torch.ones(5, dtype=torch.bool))
    calls: tuple[Callable[[Tensor], Tensor], ...] = (
        vq.get_codes_from_indices,
        vq.get_output_from_indices,
        vq.usage,
        vq.perplexity,
    )
    for call, (indices, error, message) in itertools.product(
        calls,
        (
            (torch.zeros(5, 2), TypeError, r"indices must be an integer tensor, got torch\.float32"),
            ([0, 1], TypeError, "must be an integer tensor, got list"),
            (torch.zeros(5, 3, dtype=torch.long), ValueError, r"k the number of layers, 1 to 2, got \(5, 3\)"),
            (torch.tensor([[0, 3]]), ValueError, "must be 0 to 2, or -1 for no codeword, got values from 0 to 3"),
            (torch.tensor([[-2, 0]]), ValueError, "got values from -2 to 0"),
        ),
    ):
        with pytest.raises(error, match=message):
            call(indices)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers must be 1 to 2, as the indices have, got {layers}"):
            vq.get_output_from_indices(torch.zeros(5, 2, dtype=torch.long), layers=layers)
