"""The cached sampler: the codes of the specification in every combination, whatever stands beside a clip."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import vpfast
from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae import sample, sample_naively
from vpfast.models.shrvqvae.cache import NetworkCache

TINY: dict[str, Any] = {
    "codebook_size": 3,
    "layers": 2,
    "prior_channels": 6,
    "prior_blocks": 3,
    "prior_heads": 3,
    "prior_head_dim": 2,
    "prior_ffn": 5,
    "prior_head": 5,
    "attention_window": (1, 1, None),
}
CONDITIONING = ("raster", "eq6", "past_frames")
ATTENTION = ("full", "axial", "window", "none")
CODE_ORDER = ("depth", "independent", "layers")
ORDERS = ("pipelined", "plain")
DRAWS: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "drawn": {"temperature": 0.9, "seed": [3, 8]},
    "futures of the two likeliest": {"temperature": 1.2, "top_k": 2, "num_futures": 2},
}


def network(dtype: torch.dtype = torch.float64, **changes: Any) -> STPixelCNN:
    """Small; no code is likelier than others on the whole, so that each hangs on what came before."""
    torch.manual_seed(0)
    prior = STPixelCNN(SHRVQVAEConfig(**{**TINY, **changes})).to(dtype)
    config = prior.config
    with torch.no_grad():
        for branch in (*(block.out for block in prior.blocks), *(each.attention.output for each in prior.attentions)):
            branch.weight.mul_(3)
        for head in prior.heads:
            head.weight.mul_(8)
        logits = prior(clip(8, 3, 3, 3, config.layers, size=config.codebook_size))
        for head, mean in zip(prior.heads, logits.mean((0, 1, 2, 3)), strict=True):
            head.bias.sub_(mean)
    return prior


def clip(*shape: int, size: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(size, shape or (2, 2, 2, 3, 2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("code_order", CODE_ORDER)
def test_the_codes_of_the_specification(conditioning: str, attention: str, code_order: str) -> None:
    prior = network(conditioning=conditioning, attention=attention, code_order=code_order)
    for draws in DRAWS.values():
        expected = sample_naively(prior, clip(), 2, **draws)
        assert len(expected.unique()) > 1
        for order in ORDERS:
            assert torch.equal(sample(prior, clip(), 2, order=order, **draws), expected)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("code_order", CODE_ORDER)
@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_in_single_precision(conditioning: str, code_order: str, draws: dict[str, Any]) -> None:
    prior = network(torch.float32, conditioning=conditioning, code_order=code_order)
    assert torch.equal(sample(prior, clip(), 2, **draws), sample_naively(prior, clip(), 2, **draws))


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_a_network_of_full_size(conditioning: str) -> None:
    """Codes are those of the specification if each is the likeliest one that a pass over the finished clip gives."""
    torch.manual_seed(0)
    config = SHRVQVAEConfig.preset("mnist-3x4", conditioning=conditioning)
    prior, codes = STPixelCNN(config), clip(1, 2, 6, 7, 3, size=4)
    future = sample(prior, codes, 2)
    with torch.no_grad():
        logits = prior(torch.cat((codes, future), 1))[:, 2:]
    behind = logits.amax(-1) - logits.gather(-1, future[..., None])[..., 0]
    assert behind.max() < 1e-5


@settings(max_examples=25)
@given(data=st.data())
def test_of_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    size, layers, blocks = draw(2, 6), draw(1, 3), draw(1, 3)
    options = {
        "conditioning": data.draw(st.sampled_from(CONDITIONING)),
        "attention": data.draw(st.sampled_from(ATTENTION)),
        "code_order": data.draw(st.sampled_from(CODE_ORDER)),
        "prior_blocks": blocks,
        "prior_attention_every": draw(1, blocks),
        "prior_heads": draw(1, 4),
    }
    prior = network(**options, codebook_size=size, layers=layers)
    codes = clip(draw(1, 3), draw(0, 3), draw(1, 3), draw(1, 3), layers, size=size)
    horizon, draws = draw(1, 2), {"temperature": data.draw(st.sampled_from([0.0, 1.0])), "top_k": draw(1, size)}
    expected = sample_naively(prior, codes, horizon, **draws)
    for order in ORDERS:
        assert torch.equal(sample(prior, codes, horizon, order=order, **draws), expected)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("code_order", CODE_ORDER)
def test_a_clip_in_a_batch_draws_what_it_draws_alone(conditioning: str, code_order: str) -> None:
    prior, codes, seeds = network(conditioning=conditioning, code_order=code_order), clip(3, 2, 2, 3, 2), [5, 6, 5]
    together = sample(prior, codes, 2, temperature=1.0, seed=seeds)
    for index, seed in enumerate(seeds):
        alone = sample(prior, codes[index : index + 1], 2, temperature=1.0, seed=seed)
        assert torch.equal(together[index : index + 1], alone)
    assert torch.equal(sample(prior, codes[[2, 0, 1]], 2, temperature=1.0, seed=[5, 5, 6]), together[[2, 0, 1]])


def test_a_longer_future_begins_with_the_shorter_one() -> None:
    prior = network()
    longer = sample(prior, clip(), 3, temperature=1.0)
    assert torch.equal(sample(prior, clip(), 1, temperature=1.0), longer[:, :1])
    continued = sample(prior, torch.cat((clip(), longer[:, :1]), 1), 2, temperature=1.0)
    assert torch.equal(continued, longer[:, 1:])


def test_futures_differ_and_do_not_depend_on_their_number() -> None:
    prior = network()
    one, three = (sample(prior, clip(), 2, temperature=1.0, num_futures=count) for count in (1, 3))
    assert one.shape == (2, 1, 2, 2, 3, 2)
    assert torch.equal(one, three[:, :1])
    assert torch.equal(one[:, 0], sample(prior, clip(), 2, temperature=1.0))
    assert not torch.equal(three[:, 0], three[:, 1])
    assert not torch.equal(three[:, 1], three[:, 2])
    likeliest = sample(prior, clip(), 2, num_futures=2)
    assert torch.equal(likeliest[:, 0], likeliest[:, 1])


def test_the_seed_decides_what_is_drawn() -> None:
    prior = network()
    first, again, other = (sample(prior, clip(), 2, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    sample(prior, clip(), 1, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({}, 3 * 6),
        ({"conditioning": "eq6"}, 6),
        ({"conditioning": "past_frames"}, 3),
        ({"code_order": "layers"}, 2 * 3 * 6),
        ({"conditioning": "past_frames", "code_order": "layers"}, 2 * 3),
    ],
    ids=["raster", "eq6", "past frames", "layers", "past frames, layers"],
)
def test_how_often_the_network_is_evaluated(
    options: dict[str, str], evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    evaluate: Callable[..., Tensor] = NetworkCache.evaluate

    def counted(self: NetworkCache, *arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return evaluate(self, *arguments)

    monkeypatch.setattr(NetworkCache, "evaluate", counted)
    with vpfast.backend("reference"):
        sample(network(**options), clip(1, 2, 2, 3, 2), 3)
    assert count == evaluations


@pytest.mark.parametrize(("conditioning", "code_order"), itertools.product(CONDITIONING, CODE_ORDER))
def test_nothing_is_read_before_it_is_written(conditioning: str, code_order: str) -> None:
    prior = network(conditioning=conditioning, code_order=code_order)
    expected = sample(prior, clip(), 2)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan().all()
        assert torch.equal(sample(prior, clip(), 2), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_changes_no_code() -> None:
    prior = network(torch.float32)
    expected = sample(prior, clip(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(prior, clip(), 2), expected)
        assert torch.equal(sample_naively(prior, clip(), 2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """As near to the specification as rounding lets it: almost every code, since logits are wide apart."""
    prior = network(dtype)
    found, expected = (sampler(prior, clip(8, 2, 2, 3, 2), 1) for sampler in (sample, sample_naively))
    assert (found == expected).float().mean() > 0.9


def test_the_result_is_an_ordinary_tensor() -> None:
    prior = network()
    future = sample(prior, clip(), 1)
    logits: Tensor = prior(torch.cat((clip(), future), 1))
    logits.sum().backward()
    assert prior.embed[0].weight.grad is not None


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 2), (2, 2, 2, 3, 2)])
def test_nothing_to_sample(shape: tuple[int, ...]) -> None:
    horizon = 0 if shape[0] else 2
    assert sample(network(), clip(*shape), horizon).shape == (shape[0], horizon, 2, 3, 2)
    assert sample(network(), clip(*shape), horizon, num_futures=3).shape == (shape[0], 3, horizon, 2, 3, 2)
    assert sample_naively(network(), clip(*shape), horizon).shape == (shape[0], horizon, 2, 3, 2)


def test_the_bar_counts_codes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    expected = sample(network(), clip(), 2)
    assert capsys.readouterr().err == ""
    assert torch.equal(sample(network(), clip(), 2, progress=True), expected)
    assert "/24 [" in capsys.readouterr().err


def test_a_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    sample(network(), clip(), 1)
    with pytest.raises(ImportError, match="pip install tqdm, or pass progress=False"):
        sample(network(), clip(), 1, progress=True)


@pytest.mark.parametrize("sampler", [sample, sample_naively])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": clip().float()}, TypeError, "int64 tensor, got torch.float32"),
        ({"codes": [1]}, TypeError, "int64 tensor, got list"),
        ({"codes": clip(2, 2, 2, 3, 1)}, ValueError, r"\(B, T, H, W, 2\).*got \(2, 2, 2, 3, 1\)"),
        ({"codes": clip(2, 2, 0, 3, 2)}, ValueError, r"got \(2, 2, 0, 3, 2\)"),
        ({"codes": clip() + 1}, ValueError, r"0\.\.2.*got 1\.\.3"),
        ({"codes": clip().to("meta")}, ValueError, "codes are on meta and the prior on cpu"),
        ({"horizon": -1}, ValueError, "horizon must be 0 or more, got -1"),
        ({"horizon": 1.5}, TypeError, r"horizon must be an integer, got 1\.5"),
        ({"temperature": -0.1}, ValueError, r"temperature must be a finite number of at least 0, got -0\.1"),
        ({"temperature": float("nan")}, ValueError, "got nan"),
        ({"temperature": "hot"}, ValueError, "got 'hot'"),
        ({"top_k": 0}, ValueError, "top_k must be 1 to 3.*got 0"),
        ({"top_k": 4}, ValueError, "top_k must be 1 to 3.*got 4"),
        ({"num_futures": 0}, ValueError, "num_futures must be a positive integer.*got 0"),
        ({"seed": [1]}, ValueError, "each of the 2 clips, got 1"),
    ],
)
def test_refused(sampler: Callable[..., Tensor], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampler(network(), **{"codes": clip(), "horizon": 1, **changes})


def test_numbers_of_numpy_and_of_tensors_are_numbers() -> None:
    plain = sample(network(), clip(), 1, temperature=1.5, top_k=2, num_futures=2, seed=7)
    found = sample(
        network(), clip(), np.int64(1), np.float32(1.5), np.int32(2), np.uint8(7), num_futures=torch.tensor(2)
    )
    assert torch.equal(found, plain)
    assert torch.equal(sample(network(), clip(), 1, torch.tensor(1.5), 2, 7, 2), plain)
    assert torch.equal(sample_naively(network(), clip(), 1, np.float64(1.5), np.int64(2), 7, np.int64(2)), plain)


def made_of_others(prior: STPixelCNN) -> Iterator[nn.Module]:
    """Linear layers whose weights a hook makes when they are called, and one that a parametrization makes."""
    linear = [part for part in prior.modules() if isinstance(part, nn.Linear)]
    for part in linear[::2]:
        prune.l1_unstructured(part, "weight", 0.3)
    with pytest.warns(FutureWarning):
        weight_norm(linear[1])
    parametrizations.weight_norm(linear[3])
    yield from linear


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_made_of_others_are_those_of_the_moment(conditioning: str, backend: str) -> None:
    prior = network(torch.float32, conditioning=conditioning)
    before = sample(prior, clip(), 2)
    changed = list(made_of_others(prior))
    with torch.no_grad():
        for part in changed:
            for parameter in part.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    with vpfast.backend(backend):
        found = sample(prior, clip(), 2)
        assert torch.equal(found, sample_naively(prior, clip(), 2))
    assert not torch.equal(found, before)


def test_a_prior_with_other_layers_is_refused() -> None:
    prior = network()
    prior.blocks[0].out = nn.Sequential(prior.blocks[0].out)
    with pytest.raises(TypeError, match=r"sample reads the layers that STPixelCNN is made of: 'blocks.0.out' is Seq"):
        sample(prior, clip(), 1)
    prior = network()
    prior.mlp[0].forward = lambda x: x
    with pytest.raises(TypeError, match=r"does not call the `forward` that was set on 'mlp.0', Linear\("):
        sample(prior, clip(), 1)


def test_a_compiled_prior_gives_the_same_codes() -> None:
    prior = network()
    assert torch.equal(sample(torch.compile(prior, backend="eager"), clip(), 1), sample(prior, clip(), 1))


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_within_a_transform_that_sees_nothing_of_it(conditioning: str) -> None:
    prior = network(torch.float32, conditioning=conditioning)
    expected = sample(prior, clip(), 1)
    seen = []

    def by(factor: Tensor) -> Tensor:
        seen.append(sample(prior, clip(), 1))
        return (factor * seen[-1]).sum()

    assert torch.func.grad(by)(torch.tensor(2.0)) == expected.sum()
    assert torch.equal(seen[0], expected)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of 'pipelined', 'plain', got 'zigzag'"):
        sample(network(), clip(), 1, order="zigzag")  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [sample, sample_naively])
@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("attention", ["full", "none"])
@pytest.mark.parametrize("name", ["stem.bias", "heads.0.bias"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_that_are_not_finite_are_told(
    sampler: Callable[..., Tensor], conditioning: str, attention: str, name: str, backend: str
) -> None:
    """Those of the first layer's logits alone too, of which nothing reaches those of later layers and positions."""
    prior = network(conditioning=conditioning, attention=attention)
    with torch.no_grad():
        prior.get_parameter(name)[0] = torch.nan
    with vpfast.backend(backend), pytest.raises(ValueError, match="logits that are not finite"):
        sampler(prior, clip(), 1)


@pytest.mark.parametrize("code_order", CODE_ORDER)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_that_are_not_finite_at_a_single_position_are_told(code_order: str, backend: str) -> None:
    """Without attention nothing of them is seen further on."""
    prior = network(attention="none", code_order=code_order)
    codes = torch.ones(1, 2, 12, 12, 2, dtype=torch.int64)
    with torch.no_grad():
        for head in prior.heads:
            head.bias[1] += 100  # so that 1 is all that is chosen
        prior.embed[0].weight[2] = torch.inf
    with vpfast.backend(backend):
        assert (sample(prior, codes, 1) == 1).all()
        codes[0, 1, 0, 0, 0] = 2
        with pytest.raises(ValueError, match="logits that are not finite"):
            sample(prior, codes, 1)
