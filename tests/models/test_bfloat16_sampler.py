"""The compiled sampler in bfloat16: no further from exact arithmetic than torch's operators in bfloat16 are."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_priors import DRAWS, clip, in_torch, kept, network
from torch import Tensor

import vpfast
from vpfast.models import SHRVQVAE, Predictor, STPixelCNN
from vpfast.models.shrvqvae import compiled, sample
from vpfast.models.shrvqvae.compiled import CompiledPass
from vpfast.models.shrvqvae.random import Choice
from vpfast.models.shrvqvae.sampler import _Clip
from vpfast.ops import _native
from vpfast.ops._backend import computes_in_bfloat16

needs_bfloat16 = pytest.mark.skipif(
    not computes_in_bfloat16(), reason="needs a processor with dot products of bfloat16 (AVX512_BF16)"
)

# Pairs of everything, and no whole registers of anything.
EVEN: dict[str, Any] = {"prior_channels": 26, "prior_head_dim": 6, "prior_ffn": 22, "prior_head": 18}


def even(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> STPixelCNN:
    return network(dtype, **{**EVEN, **changes})


def layers_of(prior: STPixelCNN, codes: Tensor) -> list[Tensor]:
    """What the convolutions of the blocks are given in every pass, once all codes are known: (B, T H W, C) each."""
    with torch.no_grad():
        known = _Clip(prior, codes, 0, Choice(0.0, None, torch.empty(0)), lambda count: None)
        known.look_at(codes.shape[1])
    own = _own(known.networks[0].stem.window, codes)
    return [layer.conv.inputs[:, own].double() for network in known.networks for layer in network.layers]


def _own(window: Any, codes: Tensor) -> Tensor:
    return (torch.arange(codes.shape[1])[:, None] * window.frame + window.own).flatten()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_bfloat16
@pytest.mark.parametrize("attention", ["full", "axial", "window", "none"])
@pytest.mark.parametrize("code_order", ["depth", "independent", "layers"])
@pytest.mark.parametrize("grid", [(1, 4, 5), (2, 12, 13)])
def test_as_near_to_exact_arithmetic_as_torch(attention: str, code_order: str, grid: tuple[int, int, int]) -> None:
    """What the layers were given at the positions sampled, against float64; and the logits of what was chosen."""
    prior = even(attention=attention, code_order=code_order)
    exact = copy.deepcopy(prior).double()
    codes = clip(prior, 2, grid)
    passes: list[CompiledPass] = []
    original = CompiledPass.sample

    def remembered(self: CompiledPass, *arguments: Any) -> bool:
        passes.append(self)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledPass, "sample", remembered)
        whole = torch.cat((codes, sample(prior, codes, 2)), 1)
    own = _own(passes[0].cache.stem.window, whole)
    found = [conv.inputs[:, own].double() for each in dict.fromkeys(passes) for _, conv, _ in each.layers]
    sampled = slice(codes.shape[1] * grid[1] * grid[2], None)
    for ours, torchs, expected in zip(found, layers_of(prior, whole), layers_of(exact, whole), strict=True):
        mine, others = (ours - expected)[:, sampled].abs(), (torchs - expected)[:, sampled].abs()
        assert mine.mean() <= others.mean()
        assert mine.max() <= 2 * others.max()

    with torch.no_grad():
        logits, rounded = exact(whole), prior(whole).double()
    chosen = logits.gather(-1, whole[..., None])[..., 0]
    regret = (logits.amax(-1) - chosen)[:, codes.shape[1] :]
    assert regret.max() <= 2 * (rounded - logits).abs().max()
    assert (regret == 0).double().mean() > 0.97


@needs_bfloat16
@pytest.mark.parametrize("attention", ["full", "axial", "window"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_together_or_alone_by_any_number_of_threads(
    attention: str,
    count: int,
    draws: dict[str, Any],
    threads: None,
) -> None:
    """With more keys than one chunk, to the last bit of every feature."""
    prior = even(attention=attention, prior_channels=32, prior_heads=4, prior_head_dim=16)
    codes = clip(prior, 2, (2, 12, 13))
    torch.set_num_threads(1)
    alone = kept(prior, codes, 1, run=1, **draws)
    torch.set_num_threads(count)
    for run in (4, 7, 16, 0):
        assert all(map(torch.equal, kept(prior, codes, 1, run=run, **draws), alone))


@needs_bfloat16
def test_scores_far_apart() -> None:
    """Bases move within a chunk, where weights are already rounded."""
    prior = even(attention="full", prior_channels=32, prior_heads=4, prior_head_dim=16)
    with torch.no_grad():
        for block in prior.attentions:
            block.attention.qkv.weight[: 2 * 64] *= 12
    codes = clip(prior, 1, (2, 12, 13))
    exact = copy.deepcopy(prior).double()
    found = torch.cat((codes, sample(prior, codes, 1)), 1)
    with torch.no_grad():
        logits, rounded = exact(found), prior(found).double()
    regret = (logits.amax(-1) - logits.gather(-1, found[..., None])[..., 0])[:, 2:]
    assert regret.mean() <= 0.1 * (rounded - logits).abs().mean()


@needs_bfloat16
@pytest.mark.parametrize("run", [1, 16, 0])
@pytest.mark.parametrize("attention", ["full", "window"])
def test_a_wrong_guess_that_leads_to_no_numbers_is_forgotten(
    run: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = even(attention=attention, attention_window=(None, None, None))
    with torch.no_grad():
        for head in prior.heads:
            head.bias[1] += 1000
        prior.embed[0].weight[0] = torch.inf
    monkeypatch.setattr(compiled, "_RUN", run)
    assert (sample(prior, torch.empty(1, 0, 4, 5, 3, dtype=torch.int64), 2) == 1).all()


@needs_bfloat16
def test_logits_that_are_not_finite() -> None:
    prior = even()
    with torch.no_grad():
        prior.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        sample(prior, clip(prior, 1, (1, 2, 2)), 1)


@needs_bfloat16
@pytest.mark.parametrize("changes", [{"prior_channels": 27}, {"prior_head_dim": 5}, {"prior_ffn": 21}])
def test_odd_sizes_are_torchs(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CompiledPass, "sample")
    prior = even(**changes)
    codes = clip(prior, 1, (1, 2, 3))
    assert torch.equal(sample(prior, codes, 1), in_torch(prior, codes, 1))


@pytest.fixture
def without_bfloat16() -> Iterator[None]:
    if _native.extension is None:
        pytest.skip("needs the compiled extension")
    _native.extension.select_isa("plain")
    yield
    _native.extension.select_isa("auto")


def test_a_processor_without_it(without_bfloat16: None) -> None:
    prior = even()
    codes = clip(prior, 1, (1, 2, 3))
    assert torch.equal(sample(prior, codes, 1), in_torch(prior, codes, 1))
    model = small()
    assert vpfast.optimize(model, torch.bfloat16).prior.norm.weight.dtype == torch.float32  # type: ignore[attr-defined]


def small(**changes: Any) -> SHRVQVAE:
    torch.manual_seed(0)
    prior = even(torch.float32, **changes)
    return SHRVQVAE(prior.config).eval()


@needs_bfloat16
def test_optimized() -> None:
    """The prior alone is in bfloat16: clips have the codes that they have, and frames the type that they have."""
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = vpfast.optimize(model, torch.bfloat16)
    frames = torch.rand(2, 2, 1, 16, 16)
    future = fast.predict(frames, 2)
    assert future.dtype == torch.float32
    rounded = copy.deepcopy(model)
    rounded.prior.bfloat16()
    assert torch.equal(future, rounded.predict(frames, 2))
    stream = vpfast.Stream(fast)
    for frame in frames.unbind(1):
        stream.push(frame)
    assert torch.equal(stream.rollout(2), future)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_optimized_with_a_prior_that_the_kernel_does_not_serve() -> None:
    for changes in ({"conditioning": "eq6"}, {"prior_head_dim": 5}):
        fast = vpfast.optimize(small(**changes), torch.bfloat16)
        assert fast.prior.norm.weight.dtype == torch.float32  # type: ignore[attr-defined]


@needs_bfloat16
def test_compiled_whole() -> None:
    """In a graph that torch.compile makes, the kernel samples all the same."""
    prior = even()
    codes = clip(prior, 1, (1, 3, 4))
    whole = torch.compile(lambda codes: sample(prior, codes, 2), fullgraph=True, backend="eager")
    assert torch.equal(whole(codes), sample(prior, codes, 2))


@needs_bfloat16
def test_exported(tmp_path: Path) -> None:
    model = small()
    model.prior.bfloat16()
    frames = torch.rand(1, 2, 1, 16, 16)
    path = tmp_path / "future.pt2"
    torch.export.save(Predictor(model, 2).export(frames), path)
    assert torch.equal(torch.export.load(path).module()(frames), model.predict(frames, 2))
