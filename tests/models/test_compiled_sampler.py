"""The compiled sampler: the codes of the sampler in torch, whatever the network, instruction set and threads."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_priors import DRAWS, clip, in_torch, kept, network

import vpfast
from vpfast.models import STPixelCNN
from vpfast.models.shrvqvae import compiled, sample
from vpfast.models.shrvqvae.compiled import CompiledPass
from vpfast.ops import _native

pytestmark = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")

ISAS = ("plain", "avx2", "avx512")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        _native.extension.select_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.extension.select_isa("auto")


@pytest.mark.parametrize("attention", ["full", "axial", "window", "none"])
@pytest.mark.parametrize("code_order", ["depth", "independent", "layers"])
@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_the_codes_of_the_sampler_in_torch(isa: str, attention: str, code_order: str, draws: dict[str, Any]) -> None:
    for dtype, batch in itertools.product((torch.float64, torch.float32), (1, 3)):
        prior = network(dtype, attention=attention, code_order=code_order)
        codes = clip(prior, batch, (1, 4, 5))
        assert compiled.serves(prior, codes)
        assert torch.equal(sample(prior, codes, 2, **draws), in_torch(prior, codes, 2, **draws))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_codes(isa: str, count: int, batch: int, threads: None) -> None:
    prior = network(torch.float32)
    codes = clip(prior, batch, (1, 4, 5))
    expected = in_torch(prior, codes, 2)
    torch.set_num_threads(count)
    assert torch.equal(sample(prior, codes, 2), expected)


@given(
    grid=st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)),
    horizon=st.integers(1, 3),
    layers=st.integers(1, 4),
    size=st.integers(2, 17),
    widths=st.tuples(*(st.integers(1, 20) for _ in range(5))),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one set for all examples
def test_networks_of_any_size(
    isa: str,
    grid: tuple[int, int, int],
    horizon: int,
    layers: int,
    size: int,
    widths: tuple[int, ...],
    blocks: tuple[int, int],
    temperature: float,
) -> None:
    channels, heads, head_dim, ffn, head = widths
    prior = network(
        codebook_size=size,
        layers=layers,
        strict_tree=False,
        prior_channels=channels,
        prior_heads=heads,
        prior_head_dim=head_dim,
        prior_ffn=ffn,
        prior_head=head,
        prior_blocks=blocks[0],
        prior_attention_every=min(blocks),
    )
    codes = clip(prior, 2, grid)
    options: dict[str, Any] = {"temperature": temperature, "top_k": min(3, size), "seed": [1, 2**32 - 1]}
    assert torch.equal(sample(prior, codes, horizon, **options), in_torch(prior, codes, horizon, **options))


@pytest.mark.parametrize("top_k", [1, 2, 7, 35, 68, 69])
def test_the_likeliest_of_many_codewords(top_k: int) -> None:
    prior = network(codebook_size=70)
    codes = clip(prior, 2, (1, 4, 5))
    drawn: dict[str, Any] = {"temperature": 1.5, "top_k": top_k, "seed": 5}
    assert torch.equal(sample(prior, codes, 1, **drawn), in_torch(prior, codes, 1, **drawn))


def test_more_keys_than_one_chunk_of_weights() -> None:
    prior = network(torch.float32, prior_blocks=2)
    codes = clip(prior, 1, (2, 12, 12))
    assert torch.equal(sample(prior, codes, 1), in_torch(prior, codes, 1))


@pytest.mark.parametrize("attention", ["full", "axial", "window", "none"])
@pytest.mark.parametrize("code_order", ["depth", "independent", "layers"])
def test_positions_evaluated_together_give_the_bits_of_each_alone(isa: str, attention: str, code_order: str) -> None:
    """Whatever is guessed of the codes before them, and to the last bit of every feature."""
    for dtype, draws in ((torch.float32, DRAWS["likeliest"]), (torch.float64, DRAWS["drawn"])):
        prior = network(dtype, attention=attention, code_order=code_order)
        codes = clip(prior, 2, (1, 5, 6))
        alone = kept(prior, codes, 2, run=1, **draws)
        assert torch.equal(alone[0], in_torch(prior, codes, 2, **draws))
        for run in (2, 3, 5, 16, 0):
            assert all(map(torch.equal, kept(prior, codes, 2, run=run, **draws), alone))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_together_or_alone_by_any_number_of_threads(count: int, draws: dict[str, Any], threads: None) -> None:
    """With more keys than one chunk, groups of queries of every size, and runs that end amid a frame's last row."""
    prior = network(torch.float32, prior_channels=32, prior_heads=4, prior_head_dim=16, attention="full")
    codes = clip(prior, 1, (2, 9, 10))
    torch.set_num_threads(1)
    alone = kept(prior, codes, 1, run=1, **draws)
    torch.set_num_threads(count)
    for run in (1, 4, 7, 12, 16, 0):
        assert all(map(torch.equal, kept(prior, codes, 1, run=run, **draws), alone))


@pytest.mark.parametrize("run", [1, 16])
def test_guesses_need_not_be_codes(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the frame before, of which the operator itself is told anything."""
    monkeypatch.setattr(compiled, "_RUN", run)
    arguments = passed(network())
    expected = arguments[0].clone()
    arguments[0] = torch.full_like(arguments[0], 10**6)
    torch.ops.vpfast.sample_codes(*arguments)
    assert torch.equal(arguments[0][:, 6:], expected[:, 6:])


@pytest.mark.parametrize("run", [1, 16, 0])
def test_a_wrong_guess_that_leads_to_no_numbers_is_forgotten(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a frame before, code 0 is guessed; what follows from it is not finite, but 1 is chosen everywhere."""
    prior = network(attention_window=(None, None, None))
    with torch.no_grad():
        for head in prior.heads:
            head.bias[1] += 1000
        prior.embed[0].weight[0] = torch.inf
    monkeypatch.setattr(compiled, "_RUN", run)
    assert (sample(prior, torch.empty(1, 0, 4, 5, 3, dtype=torch.int64), 2) == 1).all()


@pytest.mark.parametrize("code_order", ["depth", "layers"])
def test_weights_may_lie_anyhow_in_memory(code_order: str) -> None:
    prior = network(code_order=code_order)
    codes = clip(prior, 1, (1, 2, 3))
    expected = sample(prior, codes, 2)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.set_(parameter.detach().new_empty(*parameter.shape, 2)[..., 0].copy_(parameter))
    assert not any(parameter.is_contiguous() for parameter in prior.parameters())
    assert torch.equal(sample(prior, codes, 2), expected)


def test_what_is_not_served_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bool:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(CompiledPass, "sample", refuse)
    for prior in (network(conditioning="eq6"), network(conditioning="past_frames"), network(torch.float16)):
        sample(prior, clip(prior, 1, (1, 2, 2)), 1)
    prior = network()
    with vpfast.backend("reference"):
        sample(prior, clip(prior, 1, (1, 2, 2)), 1)
    with pytest.raises(AssertionError, match="the kernel was called"):
        sample(prior, clip(prior, 1, (1, 2, 2)), 1)


def test_codes_of_earlier_layers_must_exist() -> None:
    arguments = passed(network(code_order="layers"), call=1)
    arguments[0] = torch.full_like(arguments[0], -1)
    with pytest.raises(RuntimeError, match="there is no code -1"):
        torch.ops.vpfast.sample_codes(*arguments)


def passed(prior: STPixelCNN, call: int = 0) -> list[Any]:
    """The arguments of one call of the operator."""
    calls: list[Any] = []
    original = torch.ops.vpfast.sample_codes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.vpfast, "sample_codes", lambda *given: calls.append(given) or original(*given))
        sample(prior, clip(prior, 1, (1, 2, 3)), 1)
    return list(calls[call])


@pytest.mark.parametrize(
    ("argument", "broken", "message"),
    [
        (0, lambda codes: codes[:, :-1], "codes has another shape"),
        (0, lambda codes: codes.int(), "codes has another shape, type"),
        (1, lambda network: network[:-1], "a head is missing"),
        (1, lambda network: [*network, network[0]], "left over"),
        (1, lambda network: [network[0].float(), *network[1:]], "another shape, type or layout"),
        (1, lambda network: [network[0], network[1].transpose(0, 1), *network[2:]], "another shape, type or layout"),
        (2, lambda tables: tables[:3], "4 tables"),
        (2, lambda tables: [tables[0] + 10**6, *tables[1:]], "outside of the inputs"),
        (2, lambda tables: [tables[0], tables[1] - 10**6, *tables[2:]], "lies outside"),
        (3, lambda keys: keys[:0], "keys has another shape"),
        (4, lambda grid: [1, *grid[1:]], "outside of the clip|another shape"),
        (5, lambda masks: ["diagonal"], "no mask 'diagonal'"),
        (6, lambda windows: windows[:2], "masks and windows"),
        (7, lambda sizes: sizes[:-1], "16 sizes"),
        (7, lambda sizes: [*sizes[:7], 99, *sizes[8:]], "sizes that cannot be"),
    ],
)
def test_the_operator_refuses_what_would_read_out_of_bounds(argument: int, broken: Any, message: str) -> None:
    arguments = passed(network())
    arguments[argument] = broken(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vpfast.sample_codes(*arguments)
