"""ST-PixelCNN: the network written out, sizes, that it learns, compiles and saves its choices, and what it refuses.

What each code depends on is tested in test_st_pixelcnn_leaks.py.
"""

import dataclasses
import itertools
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import prune

from vpfast.models import HRVQVAE, SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae.config import Attention, CodeOrder, Conditioning
from vpfast.nn import sinusoidal_positions

CASES = list(itertools.product(get_args(Conditioning), get_args(Attention), get_args(CodeOrder)))


def prior(**changes: Any) -> STPixelCNN:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "codebook_size": 4,
        "prior_channels": 12,
        "prior_blocks": 2,
        "prior_attention_every": 1,
        "prior_heads": 3,
        "prior_head_dim": 5,
        "prior_ffn": 10,
        "prior_head": 14,
    }
    return STPixelCNN(SHRVQVAEConfig(**{**fields, **changes}))


def codes(*shape: int, size: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(size, shape or (2, 3, 4, 5, 3), generator=torch.Generator().manual_seed(seed))


def written_out(model: STPixelCNN, given: Tensor) -> Tensor:
    """``conditioning="raster"`` and full attention, in dense convolutions and a dense mask; the code order is read."""
    w = model.state_dict(keep_vars=True)
    layers, grid = model.config.layers, tuple(given.shape[1:4])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(name: str, past: Tensor, present: Tensor) -> Tensor:
        taps = w[f"{name}.present"].shape[-1]
        kernel = F.pad(w[f"{name}.present"], (0, 9 - taps)).unflatten(-1, (1, 3, 3))
        sooner = F.pad(past.movedim(-1, 1), (1, 1, 1, 1, 1, 0))[:, :, :-1]
        out = F.conv3d(sooner, w[f"{name}.past"].unflatten(-1, (3, 3)), w[f"{name}.bias"])
        return (out + F.conv3d(present.movedim(-1, 1), kernel, padding=(0, 1, 1))).movedim(1, -1)

    def attention(name: str, x: Tensor) -> Tensor:
        heads, size = model.config.prior_heads, model.config.prior_head_dim
        q, k, v = linear(f"{name}.qkv", x.flatten(1, 3)).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
        # Every feature knows codes before its own place alone, so raster order is plain causality.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(f"{name}.output", attended.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def mix(seen: range) -> Tensor:
        return linear("mix.1", F.gelu(sum(w[f"embed.{layer}.weight"][given[..., layer]] for layer in seen)))

    everything, logits = mix(range(layers)), []
    for layer in range(layers):
        by_layer = model.config.code_order == "layers"
        alone = mix(range(layer, layer + 1)) if by_layer else everything
        before = F.pad(alone.flatten(1, 3), (0, 0, 1, 0))[:, :-1].unflatten(1, grid)
        before[:, 1:, 0, 0] = everything[:, :-1, -1, -1]
        x = conv("stem", everything, alone) + linear("carry", before) + sinusoidal_positions(grid, 12, alone.dtype)
        if by_layer:
            x = x + w["layer.weight"][layer]
        if by_layer and layer > 0:
            kernel = w["context.weight"][:, :, None]
            x = x + F.conv3d(mix(range(layer)).movedim(-1, 1), kernel, w["context.bias"], padding=(0, 1, 1)).movedim(
                1, -1
            )
        for index in range(model.config.prior_blocks):
            normed = norm(f"blocks.{index}.norm", x)
            a, b = conv(f"blocks.{index}.conv", normed, normed).chunk(2, -1)
            x = x + linear(f"blocks.{index}.out", a.tanh() * b.sigmoid())
            x = x + attention(f"attentions.{index}.attention", norm(f"attentions.{index}.norm1", x))
            hidden = F.gelu(linear(f"attentions.{index}.ffn.0", norm(f"attentions.{index}.norm2", x)))
            x = x + linear(f"attentions.{index}.ffn.2", hidden)
        x = norm("norm", x)
        for parent in range(layer if model.config.code_order != "independent" else 0):
            x = x + w[f"parents.{parent}.weight"][given[..., parent]]
        logits.append(linear(f"heads.{layer}", linear("mlp.2", F.gelu(linear("mlp.0", x)))))
    return torch.stack(logits, -2)


@pytest.mark.parametrize("code_order", get_args(CodeOrder))
def test_the_network_written_out_with_its_gradients(code_order: str) -> None:
    model = prior(code_order=code_order).double()
    logits, expected = model(codes()), written_out(model, codes())
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(logits)
    named = dict(model.named_parameters())
    actual = torch.autograd.grad((logits * weight).sum(), list(named.values()))
    wanted = torch.autograd.grad((expected * weight).sum(), list(named.values()))
    for name, a, e in zip(named, actual, wanted, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")
        assert a.abs().max() > 0, name


@pytest.mark.parametrize(("conditioning", "attention", "code_order"), CASES)
def test_every_choice_gives_logits_and_gradients(conditioning: str, attention: str, code_order: str) -> None:
    """For any clip down to a single position, and for no clip at all; every parameter is used."""
    model = prior(conditioning=conditioning, attention=attention, code_order=code_order)
    for shape in ((2, 3, 4, 5), (1, 1, 1, 1), (0, 2, 2, 2)):
        logits = model(codes(*shape, 3))
        assert logits.shape == (*shape, 3, 4)
    F.cross_entropy(model(codes()).flatten(0, -2), codes().flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("code_order", get_args(CodeOrder))
def test_any_number_of_layers(code_order: str, layers: int) -> None:
    model = prior(layers=layers, code_order=code_order, prior_attention_every=2)
    assert model(codes(1, 2, 3, 3, layers)).shape == (1, 2, 3, 3, layers, 4)
    assert len(model.attentions) == 1


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "own", "whole"),
    [
        ("kth-3x8", 951_096, 1_144_835),
        ("mnist-3x4", 949_036, 1_135_873),
        ("kth-1x512", 1_013_024, 1_206_187),
        ("kth-9x2", 950_322, 1_147_565),
        ("mnist-1x64", 955_232, 1_141_989),
        ("mnist-6x2", 949_164, 1_136_169),
    ],
)
def test_parameters_of_the_presets(preset: str, own: int, whole: int) -> None:
    """The three-layer ones have 1.14 M with the autoencoder, to half a percent."""
    config = SHRVQVAEConfig.preset(preset)
    model, autoencoder = STPixelCNN(config), HRVQVAE(config)
    learnt = size(autoencoder.encoder) + size(autoencoder.decoder) + config.codewords * config.latent_channels
    assert (size(model), size(model) + learnt) == (own, whole)
    if "-3x" in preset:
        assert abs(whole / 1.14e6 - 1) < 0.005


@pytest.mark.parametrize("preset", ["kth-3x8", "kth-9x2"])
@pytest.mark.parametrize("code_order", get_args(CodeOrder))
def test_it_starts_knowing_nothing_on_an_even_scale(preset: str, code_order: str) -> None:
    torch.manual_seed(0)
    config = SHRVQVAEConfig.preset(preset, code_order=code_order)
    model, given = STPixelCNN(config), codes(1, 4, 8, 8, config.layers, size=config.codebook_size)
    inside: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: inside.append(output))
    with torch.no_grad():
        logits = model(given)
    assert all(0.5 < x.std() < 2 for x in inside)
    loss = F.cross_entropy(logits.flatten(0, -2), given.flatten())
    assert loss.item() == pytest.approx(math.log(config.codebook_size), abs=0.05)


def moving_pattern(batch: int, seed: int) -> Tensor:
    """Codes that shift by one column a frame, each layer the sum of the one before and another pattern."""
    start = codes(batch, 1, 6, 6, 2, size=3, seed=seed)
    start[..., 1] = (start[..., 0] + start[..., 1] % 2) % 3
    return torch.cat([start.roll(t, dims=3) for t in range(4)], dim=1)


@pytest.mark.parametrize("code_order", get_args(CodeOrder))
def test_it_learns_at_the_default_rate(code_order: str) -> None:
    model = prior(layers=2, codebook_size=3, prior_channels=32, code_order=code_order)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def loss(given: Tensor) -> Tensor:
        return F.cross_entropy(model(given)[:, 1:].flatten(0, -2), given[:, 1:].flatten())

    for step in range(120):
        optimizer.zero_grad()
        loss(moving_pattern(8, step)).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(moving_pattern(8, 1000)).item() < 0.5 * math.log(3)


@pytest.mark.parametrize("code_order", ["depth", "layers"])
def test_it_compiles_whole(code_order: str) -> None:
    model = prior(code_order=code_order)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(codes())
    torch.testing.assert_close(compiled(codes()), expected)
    compiled(codes()).square().sum().backward()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_types() -> None:
    model = prior()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(codes())
    torch.testing.assert_close(logits.float(), model(codes()), rtol=0.1, atol=0.05)
    assert model.bfloat16()(codes()).dtype == torch.bfloat16
    assert model.double()(codes()).dtype == torch.float64


def test_what_the_sampler_takes_apart_is_the_whole() -> None:
    model = prior()
    embedded = model._embedded(codes())
    feature = model._features(model._after_stem(embedded, embedded))
    logits = [model._logits_of(feature, layer, codes()[..., :layer]) for layer in range(3)]
    torch.testing.assert_close(torch.stack(logits, -2), model(codes()), rtol=0, atol=0)
    torch.testing.assert_close(model._embedded(codes()[0, 1, 2, 3]), embedded[0, 1, 2, 3])
    assert [model._attends_after(block) for block in range(2)] == [True, True]
    assert not any(prior(attention="none")._attends_after(block) for block in range(2))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1], TypeError, r"int64 tensor \(B, T, H, W, 3\), got list"),
        (codes().int(), TypeError, r"got torch.int32"),
        (codes(3, 4, 5, 3), ValueError, r"\(B, T, H, W, 3\).* got \(3, 4, 5, 3\)"),
        (codes(1, 3, 4, 5, 2), ValueError, r"got \(1, 3, 4, 5, 2\)"),
        (codes(1, 0, 4, 5, 3), ValueError, r"at least one frame.* got \(1, 0, 4, 5, 3\)"),
        (codes() + 1, ValueError, r"in 0\.\.3, as the codebooks have 4 codewords, got 1\.\.4"),
        (codes() - 1, ValueError, r"got -1\.\.2"),
        (codes().to("meta"), ValueError, r"codes are on meta and the model on cpu"),
    ],
)
def test_refused_codes(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prior()(given)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prior_channels", 0, "must be a positive integer, got 0"),
        ("prior_blocks", 1.5, "must be a positive integer, got 1.5"),
        ("prior_attention_every", 0, "must be a positive integer"),
        ("prior_ffn", -1, "must be a positive integer"),
        ("conditioning", "all", "must be one of 'raster', 'eq6', 'past_frames', got 'all'"),
        ("code_order", "breadth", "must be one of 'depth', 'independent', 'layers'"),
        ("attention", None, "must be one of 'full', 'axial', 'window', 'none'"),
        ("attention_window", (1, 2), r"must be three radii \(t, y, x\).* got \(1, 2\)"),
        ("attention_window", (1, 2, -1), r"must be three radii"),
        ("prior_loss_frames", "past", "must be one of 'future', 'all'"),
        ("prior_loss_layers", "max", "must be one of 'mean', 'sum'"),
        ("joint_trains", "prior", "must be one of 'prior_and_decoder', 'decoder'"),
        ("joint_relaxation", "hard", "must be one of 'softmax', 'gumbel'"),
        ("joint_inputs", "own", "must be one of 'teacher', 'free'"),
        ("joint_weight", -0.1, "must be a finite number of at least 0"),
    ],
)
def test_refused_fields(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"SHRVQVAEConfig\.{field} {message}"):
        SHRVQVAEConfig(**{field: value})


def test_the_window_comes_from_a_file_as_a_list_and_limits_attention() -> None:
    config = SHRVQVAEConfig(attention="window", attention_window=[1, None, 0])  # type: ignore[arg-type]
    assert config.attention_window == (1, None, 0)
    assert config == SHRVQVAEConfig(**dataclasses.asdict(config))
    model = STPixelCNN(config)
    assert {block.attention.mask.window for block in model.attentions} == {(1, None, 0)}
    assert {block.attention.mask.window for block in prior().attentions} == {None}


@pytest.mark.parametrize("code_order", get_args(CodeOrder))
def test_the_stem_may_be_pruned(code_order: str) -> None:
    model, given = prior(code_order=code_order), codes()
    for name in ("past", "present"):
        prune.l1_unstructured(model.stem, name, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(given).square().mean().backward()
        optimizer.step()
    found = model(given)
    for name in ("past", "present"):
        prune.remove(model.stem, name)
    assert torch.equal(found, model(given))
