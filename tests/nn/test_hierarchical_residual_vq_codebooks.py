"""The quantizer's codebooks on the move: their start from data, averages, restarts, training, and what leaves them."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import quantizer, vectors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpfast.nn import HierarchicalResidualVQ, hierarchical_residual_vq
from vpfast.nn._codebooks import _assign


def planted(strict_tree: bool, per_leaf: int = 40) -> tuple[Tensor, int]:
    """Vectors at the leaves of a tree of 3 x 3 places, and how many different ones there are."""
    generator = torch.Generator().manual_seed(4)
    first = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, 14.0]])
    second = torch.randn(3 if strict_tree else 1, 3, 2, generator=generator).expand(3, 3, 2)
    places = (first[:, None] + second - second.mean(1, keepdim=True)).reshape(-1, 2)
    return places.repeat(per_leaf, 1), len(places)


@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("learnable_codebook", [True, False])
def test_the_start_finds_planted_codewords(strict_tree: bool, learnable_codebook: bool) -> None:
    """Many equal vectors besides: codewords that start on the same one are moved to others."""
    z, places = planted(strict_tree)
    vq = HierarchicalResidualVQ(
        2, 3, 2, strict_tree=strict_tree, kmeans_init=True, learnable_codebook=learnable_codebook, eps=1e-9
    )
    torch.manual_seed(0)
    quantized, indices, _ = vq(z)
    assert vq.started
    torch.testing.assert_close(quantized, z, rtol=0, atol=1e-4)
    assert len(indices.unique(dim=0)) == places
    table = vq.codewords.clone()
    vq(z + 100, freeze_codebook=True)
    assert torch.equal(vq.codewords, table)


def test_the_start_waits_for_vectors_and_for_training() -> None:
    vq = HierarchicalResidualVQ(2, 3, 2, kmeans_init=True)
    start = vq.codewords.clone()
    vq.eval()(vectors(9, 2))
    vq.train()(vectors(0, 2))
    vq(vectors(9, 2), freeze_codebook=True)
    assert torch.equal(vq.codewords, start)
    assert not vq.started
    vq(vectors(300, 2))
    assert vq.started
    assert not torch.equal(vq.codewords, start)


def test_a_start_is_due_again_after_a_reset() -> None:
    torch.manual_seed(0)
    vq, fresh = (HierarchicalResidualVQ(2, 3, 2, kmeans_init=True) for _ in range(2))
    vq(vectors(100, 2))
    for one in (vq, fresh):
        torch.manual_seed(1)
        one.reset_parameters()
        one(vectors(100, 2) + 50)
    torch.testing.assert_close(vq.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    assert (vq.codebooks[0] > 40).all()


def test_the_start_copes_with_fewer_vectors_than_codewords() -> None:
    vq = HierarchicalResidualVQ(2, 8, 2, kmeans_init=True, threshold_ema_dead_code=1, learnable_codebook=True)
    z = vectors(3, 2)
    z[1] = math.nan
    quantized, _, _ = vq(z)
    assert vq.codewords.isfinite().all()
    torch.testing.assert_close(quantized[[0, 2]].detach(), z[[0, 2]])


def test_cluster_sizes_after_the_start_are_those_of_the_batch() -> None:
    """Of all its vectors, though k-means saw 65,536 of them."""
    vq = HierarchicalResidualVQ(1, 2, 1, kmeans_init=True, kmeans_iters=2, threshold_ema_dead_code=1, decay=1.0)
    vq(torch.cat((vectors(60_000, 1) - 9, vectors(20_000, 1) + 9)))
    torch.testing.assert_close(vq.cluster_size.sort().values, torch.tensor([20_000.0, 60_000.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize("strict_tree", [True, False])
@pytest.mark.parametrize("learnable_codebook", [True, False])
def test_dead_codewords_restart_on_residuals_of_their_parent(strict_tree: bool, learnable_codebook: bool) -> None:
    """And others, seldom chosen but chosen now, do not."""
    vq = quantizer(
        4, 4, 2, strict_tree=strict_tree, learnable_codebook=learnable_codebook, threshold_ema_dead_code=100, decay=0.5
    )
    with torch.no_grad():
        vq.codewords[1] += 100  # nothing chooses it, nor, in the tree, its children
        vq.codewords[4:8] += 100 * torch.tensor([0, 0, 1, 1])[:, None]
    before, z = copy.deepcopy(vq), vectors(200, 4)
    _, indices, _ = vq(z)
    if not learnable_codebook:  # leave the average out, to see the restart alone
        averaged = copy.deepcopy(before)
        averaged.threshold_ema_dead_code = 0
        averaged(z)
        assert torch.equal(averaged.codewords[0], vq.codewords[0])
    chosen = [set(before.layout.rows(indices)[:, layer].tolist()) for layer in (0, 1)]
    under_first = z[indices[:, 0] == 0] if strict_tree else z
    own = before.get_codes_from_indices(indices[:, :1])[0]
    residual = (z - own)[indices[:, 0] == 0] if strict_tree else z - own
    assert 1 not in chosen[0]
    assert (vq.codewords[1] == z).all(1).any()
    assert len(under_first)
    for row in (6, 7):
        assert row not in chosen[1]
        torch.testing.assert_close((vq.codewords[row] - residual).abs().amax(1).min(), torch.tensor(0.0))
    restarted = [row for row in range(len(vq.codewords)) if vq.cluster_size[row] == 100]
    assert {1, 6, 7} <= set(restarted)
    assert not set(restarted) & (chosen[0] | chosen[1])
    assert any(vq.cluster_size[row] < 100 for row in chosen[1])
    assert len(vq.codewords[restarted].unique(dim=0)) == len(restarted)
    if strict_tree:  # no vector reached these
        assert torch.equal(vq.codewords[8:12], before.codewords[8:12])
        assert torch.equal(vq.cluster_size[8:12], before.cluster_size[8:12])
    if vq.embed_avg is not None:
        torch.testing.assert_close(vq.embed_avg[restarted], vq.codewords[restarted] * 100)


@given(st.data())
@settings(max_examples=80)
def test_assignment_uses_a_candidate_once_and_leaves_none_out(data: st.DataObject) -> None:
    groups, size, count = (data.draw(st.integers(1, most)) for most in (4, 4, 12))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    vacant = torch.rand(groups, size, generator=draw) < 0.5
    group = torch.randint(0, groups, (count,), generator=draw)
    weights = torch.rand(count, generator=draw) * (torch.rand(count, generator=draw) < 0.6)
    taken, source = _assign(vacant, group, weights, torch.rand(count, generator=draw))
    rows = taken.nonzero().flatten()
    assert (rows // size).tolist() == group[source[rows]].tolist()
    assert vacant.flatten()[rows].all()
    assert (weights[source[rows]] > 0).all()
    assert len(source[rows].unique()) == len(rows)
    for g in range(groups):
        possible = int(((group == g) & (weights > 0)).sum())
        assert int(taken.view(groups, size)[g].sum()) == min(int(vacant[g].sum()), possible)


def test_restarts_prefer_the_vectors_that_are_quantized_worst() -> None:
    hits = 0
    for seed in range(200):
        torch.manual_seed(seed)
        vacant = torch.tensor([[True]])
        _, source = _assign(vacant, torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 3.0]), torch.rand(2))
        hits += int(source)
    assert 130 <= hits <= 170  # three in four are 150, with a deviation of 6


@pytest.mark.parametrize("kmeans_init", [True, False])
@pytest.mark.parametrize("learnable_codebook", [True, False])
@pytest.mark.parametrize("strict_tree", [True, False])
def test_training_lowers_the_error_until_every_code_is_used(
    kmeans_init: bool, learnable_codebook: bool, strict_tree: bool
) -> None:
    torch.manual_seed(1)
    vq = HierarchicalResidualVQ(
        4,
        4,
        3,
        strict_tree=strict_tree,
        kmeans_init=kmeans_init,
        learnable_codebook=learnable_codebook,
        threshold_ema_dead_code=1,
    )
    mix = torch.randn(4, 4)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05) if learnable_codebook else None
    held_out = torch.randn(4000, 4).tanh() @ mix + 3
    before = (vq.eval()(held_out)[0] - held_out).square().mean()
    vq.train()
    for _ in range(150):
        _, _, losses = vq(torch.randn(1000, 4).tanh() @ mix + 3)
        if optimizer is not None:
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
    quantized, indices, _ = vq.eval()(held_out)
    error = (quantized - held_out).square().mean()
    assert error < 0.1 * held_out.var()
    assert error < 0.1 * before
    assert (vq.usage(indices) == 1).all()
    assert (vq.perplexity(indices) > 0.6 * torch.tensor([len(c) for c in vq.codebooks])).all()


@pytest.mark.parametrize(
    "options", [{"kmeans_init": True}, {"threshold_ema_dead_code": 5}, {"learnable_codebook": True}]
)
def test_an_empty_batch_changes_nothing(options: dict[str, Any]) -> None:
    vq = quantizer(4, 3, 2, **options)
    before = copy.deepcopy(vq.state_dict())
    z = torch.zeros(0, 4, requires_grad=True)
    quantized, indices, losses = vq(z)
    assert quantized.shape == (0, 4)
    assert indices.shape == (0, 2)
    assert losses.tolist() == [0, 0]
    (losses.sum() + quantized.sum()).backward()
    for name, tensor in vq.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_bad_vector_moves_nothing() -> None:
    """The codebooks are those that the other vectors give."""
    z = vectors(50, 4)
    bad = torch.cat((z, torch.full((3, 4), math.nan), torch.full((2, 4), math.inf)))
    for options in ({}, {"kmeans_init": True, "threshold_ema_dead_code": 3}):
        vq, other = quantizer(4, 3, 2, **options), quantizer(4, 3, 2, **options)
        quantized, indices, losses = vq(bad)
        other(z)
        assert quantized[50:].isnan().all()
        assert losses.isnan().all()
        assert not indices[50:].any()
        assert vq.codewords.isfinite().all()
        if not options:
            assert torch.equal(vq.codewords, other.codewords)


def test_frozen_codebooks_stay_and_learn_nothing() -> None:
    for options in ({"learnable_codebook": True, "threshold_ema_dead_code": 9}, {}):
        vq = quantizer(4, 3, 2, **options)
        before = copy.deepcopy(vq.state_dict())
        z = vectors(30, 4).requires_grad_()
        quantized, _, losses = vq(z, freeze_codebook=True)
        (quantized.sum() + losses.sum()).backward()
        assert vq.codewords.grad is None
        assert z.grad is not None
        for name, tensor in vq.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_neither_averaged_nor_learnable_is_fixed() -> None:
    vq = quantizer(4, 3, 2, ema_update=False)
    before = copy.deepcopy(vq.state_dict())
    vq(vectors(30, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vq.state_dict().items())
    assert not list(vq.parameters())


CALLS = {
    "moving": lambda vq, z: vq.train()(z),
    "frozen": lambda vq, z: vq.train()(z, freeze_codebook=True),
    "evaluation": lambda vq, z: vq.eval()(z),
}


@given(
    st.lists(st.sampled_from(sorted(CALLS)), min_size=2, max_size=4),
    st.sampled_from([(True, 0), (True, 9), (False, 0), (False, 9)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_calls_in_any_order_before_backward_have_their_own_gradients(
    calls: list[str], updates: tuple[bool, float], kmeans_init: bool, strict_tree: bool
) -> None:
    """Those that each call has with backward right behind it."""
    ema_update, threshold = updates
    vq = quantizer(
        4,
        3,
        2,
        strict_tree=strict_tree,
        ema_update=ema_update,
        learnable_codebook=not ema_update,
        threshold_ema_dead_code=threshold,
        kmeans_init=kmeans_init,
    )
    twin = copy.deepcopy(vq)
    total, found, expected = 0.0, [], []
    weight = vectors(30, 4, seed=9)
    for seed, call in enumerate(calls):
        for one in (vq, twin):
            torch.manual_seed(seed)
            z = vectors(30, 4, seed=seed).requires_grad_()
            quantized, _, losses = CALLS[call](one, z)
            loss = (quantized * weight).sum() + losses.sum()
            if one is vq:
                total = total + loss
                found.append(z)
            else:
                loss.backward()
                expected.append(z)
    total.backward()
    for z, other in zip(found, expected, strict=True):
        torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(vq.codewords.grad, twin.codewords.grad)
    assert torch.equal(vq.codewords, twin.codewords)


def test_the_table_is_copied_only_where_it_moves_before_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(hierarchical_residual_vq, "snapshot", lambda table, moves: copies.append(0) or table.clone())

    def copied(options: dict[str, Any], call: str, requires_grad: bool) -> int:
        copies.clear()
        vq = quantizer(4, 3, 2, **options)
        CALLS[call](vq, vectors(30, 4).requires_grad_(requires_grad))
        return len(copies)

    for options in ({"ema_update": False}, {"learnable_codebook": True}):
        assert not any(copied(options, call, True) for call in CALLS)
    assert [copied({}, call, True) for call in ("moving", "frozen", "evaluation")] == [1, 1, 1]
    assert [copied({}, call, False) for call in ("moving", "frozen", "evaluation")] == [1, 0, 0]
    with torch.no_grad():
        assert [copied({}, call, True) for call in ("frozen", "evaluation")] == [0, 0]
    assert copied({"learnable_codebook": True, "threshold_ema_dead_code": 2}, "evaluation", False) == 1
    assert copied({"learnable_codebook": True, "kmeans_init": True}, "evaluation", False) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kmeans_init": True}, {"learnable_codebook": True, "threshold_ema_dead_code": 9}]
)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_codebooks_that_move_refuse_to_be_checkpointed(
    options: dict[str, Any], use_reentrant: bool, backend: str | None
) -> None:
    """In the second run, which is that for gradients; and so they move once."""
    torch.compiler.reset()
    vq = quantizer(4, 3, 2, **options)
    run = vq if backend is None else torch.compile(vq, fullgraph=True, backend=backend)
    z = vectors(50, 4).requires_grad_()
    losses = checkpoint(run, z, use_reentrant=use_reentrant)[2]
    moved = vq.codewords.clone()
    with pytest.raises(RuntimeError, match=r"HierarchicalResidualVQ: activation checkpointing .*freeze_codebook=True"):
        losses.sum().backward()
    assert torch.equal(vq.codewords, moved)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"freeze_codebook": True}),
        ({"ema_update": False}, {}),
        ({"learnable_codebook": True}, {}),
        ({"learnable_codebook": True, "kmeans_init": True}, {}),
    ],
)
def test_codebooks_that_stay_can_be_checkpointed(
    options: dict[str, Any], arguments: dict[str, Any], use_reentrant: bool
) -> None:
    gradients = []
    for checkpointed in (True, False):
        vq, z = quantizer(4, 3, 2, **options), vectors(50, 4).requires_grad_()

        def run(z: Tensor, vq: HierarchicalResidualVQ = vq) -> Tensor:
            quantized, _, losses = vq(z, **arguments)
            return quantized.square().sum() + losses.sum()

        torch.manual_seed(0)
        (checkpoint(run, z, use_reentrant=use_reentrant) if checkpointed else run(z)).backward()
        gradients.append((z.grad, vq.codewords.grad, vq.codewords.detach()))
    torch.testing.assert_close(gradients[0], gradients[1])
