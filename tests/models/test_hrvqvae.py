"""HR-VQVAE: Eqs. 3-5 written out with their gradients, codes and back, presets, saving, and that it learns."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vpfast.data import MovingDigits
from vpfast.models import HRVQVAE, Codes, SHRVQVAEConfig, load, save
from vpfast.models.shrvqvae import PRESETS, CodesError, HRVQVAEOutput, hrvqvae, hrvqvae_loss

TINY: dict[str, Any] = {
    "in_channels": 1,
    "channels": (6, 8),
    "residual_channels": 4,
    "residual_blocks": 1,
    "latent_channels": 4,
    "codebook_size": 3,
    "dead_codes": "ignore",
}

OPTIONS: dict[str, tuple[Any, ...]] = {
    "strict_tree": (True, False),
    "codebook_update": ("gradient", "ema"),
    "combined_loss": (True, False),
    "loss_reduction": ("mean", "sum"),
    "residual": ("detached", "attached"),
    "scaling": ("half", "unit"),
    "commitment_weight": (0.25, (0.5, 0.0, 2.0)),
}
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def tiny(**changes: Any) -> HRVQVAE:
    """Small, with a latent and codebooks of standard deviation 1, so that all layers and their codewords are in use."""
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(**{**TINY, **changes}))
    with torch.no_grad():
        latent = model.encoder(clip(8, model.config.in_channels, 16, 16) - 0.5)
        spread, mean = torch.std_mean(latent, dim=(0, 2, 3))
        last = model.encoder[-1]
        last.weight.div_(spread[:, None, None, None])
        last.bias.sub_(mean).div_(spread)
        for depth, codebook in enumerate(model.quantizer.codebooks):
            codebook.copy_(0.6**depth * torch.randn(codebook.shape))
    return model


def clip(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape or (2, 3, 1, 8, 12), generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def search_written_out(model: HRVQVAE, latent: Tensor) -> tuple[list[Tensor], Tensor]:
    """Eq. 3: the codewords e^1 .. e^n of every vector of ``latent`` (N, D), and their local indices (N, n)."""
    size, path = model.config.codebook_size, torch.zeros(len(latent), dtype=torch.int64)
    residual, codewords, indices = latent.detach(), [], []
    for codebook in model.quantizer.codebooks:
        books = codebook.unflatten(0, (-1, size))
        book = books[path if model.config.strict_tree else torch.zeros_like(path)]
        index = (residual[:, None] - book.detach()).square().sum(-1).argmin(-1)
        codewords.append(book[torch.arange(len(latent)), index])
        residual = residual - codewords[-1].detach()
        path = path * size + index
        indices.append(index)
    return codewords, torch.stack(indices, -1)


def equation_4_written_out(model: HRVQVAE, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of Eq. 4 and Eq. 5, the reconstruction and the indices, in plain PyTorch."""
    config = model.config
    gain = {"half": 1, "unit": 2}[config.scaling]
    x = gain * (frames.flatten(0, 1) - 0.5)
    maps = model.encoder(x)
    latent = maps.movedim(1, -1).flatten(0, -2)
    codewords, indices = search_written_out(model, latent)
    combined = sum(codewords)
    restored = model.decoder((latent + (combined - latent).detach()).reshape(maps.movedim(1, -1).shape).movedim(-1, 1))

    def squares(difference: Tensor) -> Tensor:
        return difference.square().mean() if config.loss_reduction == "mean" else difference.square().sum()

    betas = config.commitment_weight if isinstance(config.commitment_weight, tuple) else [config.commitment_weight] * 3
    gradient = config.codebook_update == "gradient"
    loss = squares(x - restored)
    residual = latent
    for codeword, beta in zip(codewords, betas, strict=True):
        loss = loss + beta * squares(codeword.detach() - residual)
        if gradient:
            loss = loss + squares(residual.detach() - codeword)
        residual = residual - (codeword if config.residual == "attached" and gradient else codeword.detach())
    if config.combined_loss:
        loss = loss + config.combined_commitment_weight * squares(combined.detach() - latent)
        if gradient:
            loss = loss + squares(latent.detach() - combined)
    shape = (*frames.shape[:2], *maps.shape[2:], config.layers)
    return loss, (restored / gain + 0.5).reshape(frames.shape), indices.reshape(shape)


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_equations_3_to_5_written_out_with_their_gradients(changes: dict[str, Any]) -> None:
    """Value, reconstruction, indices, and the gradient of every parameter, in float64 and for every option."""
    model = tiny(combined_commitment_weight=0.7, **changes).double().train()
    frames = clip().double()
    loss, reconstruction, indices = equation_4_written_out(model, frames)
    assert all(len(layer.unique()) > 1 for layer in indices.unbind(-1))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(loss, list(trained.values()))

    output = model(frames)
    found = hrvqvae_loss(output, frames)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(output.reconstruction, reconstruction)
    assert torch.equal(output.indices, indices)
    for name, a, b in zip(trained, torch.autograd.grad(found, list(trained.values())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_gradients_reach_encoder_codebooks_and_decoder(changes: dict[str, Any]) -> None:
    """In training mode; averages move the codebooks in the forward pass, and without a gradient."""
    model = tiny(**changes).train()
    before = [codebook.detach().clone() for codebook in model.quantizer.codebooks]
    frames = clip()
    hrvqvae_loss(model(frames), frames).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    trained = any(parameter.requires_grad for parameter in model.quantizer.parameters())
    assert trained == (changes["codebook_update"] == "gradient")
    for codebook, old in zip(model.quantizer.codebooks, before, strict=True):
        assert torch.equal(codebook, old) == trained


def test_terms_by_name_are_those_of_the_loss() -> None:
    betas = (0.5, 0.25, 2.0)
    model, frames = tiny(commitment_weight=betas, combined_commitment_weight=0.3), clip()
    output = model(frames)
    terms = output.terms
    assert terms.codebook.shape == terms.commitment.shape == output.quantization_losses.shape == (3,)
    weighted = terms.codebook + torch.tensor(betas) * terms.commitment
    weighted[-1] += terms.combined + 0.3 * terms.combined_commitment
    torch.testing.assert_close(output.quantization_losses, weighted)
    error = (output.reconstruction - frames).square().mean()
    torch.testing.assert_close(hrvqvae_loss(output, frames), error + weighted.sum())


COUNTS = {  # encoder, decoder, codewords of each layer
    "kth-3x8": (113_000, 76_067, [8, 64, 512]),
    "mnist-3x4": (111_716, 74_785, [4, 16, 64]),
    "kth-1x512": (113_000, 76_067, [512]),
    "kth-9x2": (113_000, 76_067, [2, 4, 8, 16, 32, 64, 128, 256, 512]),
    "mnist-1x64": (111_716, 74_785, [64]),
    "mnist-6x2": (111_716, 74_785, [2, 4, 8, 16, 32, 64]),
}


def test_the_presets_are_the_columns_of_table_1() -> None:
    assert COUNTS.keys() == PRESETS.keys()
    for name, (encoder, decoder, codewords) in COUNTS.items():
        model = HRVQVAE(SHRVQVAEConfig.preset(name))
        dim = 8 if name.startswith("kth") else 4
        assert sum(p.numel() for p in model.encoder.parameters()) == encoder
        assert sum(p.numel() for p in model.decoder.parameters()) == decoder
        assert [tuple(codebook.shape) for codebook in model.quantizer.codebooks] == [(k, dim) for k in codewords]
        assert model.config.codewords == sum(codewords)
        assert sum(p.numel() for p in model.parameters()) == encoder + decoder + dim * sum(codewords)
        frames = clip(1, 3, 128, 128) if dim == 8 else clip(1, 1, 64, 64)
        codes = model.encode(frames)
        assert codes.shape == ((1, 32, 32, len(codewords)) if dim == 8 else (1, 16, 16, len(codewords)))
        data = codes.to_bytes()
        ratio = 128 / 3 if dim == 8 else 64 / 3
        assert frames.numel() / (len(data) - codes.header_bytes) == pytest.approx(ratio, rel=1e-15)
        same(model.decode(Codes.from_bytes(data)), model.decode(codes))


@pytest.mark.parametrize("shape", [(1, 1, 1, 4, 4), (2, 3, 1, 8, 20), (3, 1, 12, 4), (2, 1, 3, 8, 8)])
def test_clips_and_batches_of_any_size(shape: tuple[int, ...]) -> None:
    model = tiny(in_channels=shape[-3])
    frames = clip(*shape)
    output, codes = model(frames), model.encode(frames)
    clips, latent = shape[:-3], (shape[-2] // 4, shape[-1] // 4)
    assert output.reconstruction.shape == shape
    assert output.indices.shape == codes.shape == (*clips, *latent, 3)
    assert codes.frame_size == shape[-2:]
    assert model.decode(codes).shape == shape


@pytest.mark.parametrize("channels", [(8,), (4, 6, 8)])
def test_strides_other_than_4(channels: tuple[int, ...]) -> None:
    model = tiny(channels=channels)
    stride = 2 ** len(channels)
    assert model.config.multiple == stride
    codes = model.encode(clip(2, 1, 2 * stride, 3 * stride))
    assert codes.shape == (2, 2, 3, 3)
    assert model.decode(codes).shape == (2, 1, 2 * stride, 3 * stride)


def test_no_frames_give_no_frames() -> None:
    model = tiny()
    for shape in ((0, 1, 8, 12), (2, 0, 1, 8, 12), (0, 2, 1, 8, 12)):
        codes = model.encode(clip(*shape))
        assert codes.shape == (*shape[:-3], 2, 3, 3)
        assert model.decode(Codes.from_bytes(codes.to_bytes()), 2).shape == shape


@pytest.mark.parametrize("changes", [{}, {"strict_tree": False}, {"scaling": "unit"}, {"codebook_update": "ema"}])
def test_codes_and_back_are_the_reconstruction(changes: dict[str, Any]) -> None:
    model, frames = tiny(**changes).eval(), clip()
    output, codes = model(frames), model.encode(frames)
    assert torch.equal(codes.indices, output.indices)
    torch.testing.assert_close(model.decode(codes), output.reconstruction.clamp(0, 1), rtol=1e-5, atol=1e-6)
    assert not model.decode(codes).requires_grad


def test_decoded_frames_are_clamped_and_reconstructions_are_not() -> None:
    model, frames = tiny(), clip()
    with torch.no_grad():
        model.decoder[-1].weight.mul_(100)
    reconstruction, decoded = model(frames).reconstruction, model.decode(model.encode(frames))
    assert reconstruction.min() < 0
    assert reconstruction.max() > 1
    assert (decoded.min(), decoded.max()) == (0, 1)


def test_decoding_from_the_first_layers() -> None:
    model, frames = tiny(), clip()
    codes = model.encode(frames)
    latent = model.encoder(frames.flatten(0, 1) - 0.5).movedim(1, -1)
    codewords, _ = search_written_out(model, latent.flatten(0, -2))
    made = []
    for layers in (1, 2, 3):
        quantized = sum(codewords[:layers]).reshape(latent.shape).movedim(-1, 1)
        expected = (model.decoder(quantized) + 0.5).clamp(0, 1).reshape(frames.shape)
        made.append(model.decode(codes, layers))
        torch.testing.assert_close(made[-1], expected, rtol=1e-5, atol=1e-6)
        same(model.decode(codes.first(layers)), made[-1])
        data = codes.to_bytes()[: codes.header_bytes + layers * codes.layer_bytes]
        same(model.decode(Codes.from_bytes(data, layers)), made[-1])
    same(model.decode(codes), made[-1])
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(made, 2))
    with pytest.raises(CodesError, match="layers must be 1 to 3, as many as these codes have, got 4"):
        model.decode(codes, 4)
    with pytest.raises(CodesError, match="layers must be 1 to 2, as many as these codes have, got 3"):
        model.decode(codes.first(2), 3)
    with pytest.raises(ValueError, match="layers must be 1 or more, got 0"):
        model.decode(codes, 0)


def test_each_frame_stands_for_itself() -> None:
    model, frames = tiny(), clip()
    changed = frames.clone()
    changed[1, 1] = 1 - changed[1, 1]
    before, after = model.encode(frames), model.encode(changed)
    assert torch.equal(before[:1].indices, after[:1].indices)
    assert torch.equal(before[2:].indices, after[2:].indices)
    assert not torch.equal(before.indices[1, 1], after.indices[1, 1])
    assert torch.equal(before.indices[0], after.indices[0])


def test_long_clips_pass_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is larger than asked for, and the codes and frames are those of the whole."""
    model, frames = tiny(), clip(2, 11, 1, 8, 12)
    codes = model.encode(frames)
    whole = model.decode(codes)
    sizes = []
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(hrvqvae, "_PIXELS_AT_ONCE", 5 * 8 * 12)
    assert model.encode(frames) == codes
    torch.testing.assert_close(model.decode(codes), whole, rtol=1e-5, atol=1e-6)
    assert sizes == 2 * [5, 5, 5, 5, 2]
    monkeypatch.setattr(hrvqvae, "_PIXELS_AT_ONCE", 1)
    assert model.encode(frames) == codes


@pytest.mark.parametrize("changes", [{}, {"codebook_update": "ema"}, {"dead_codes": "restart"}])
def test_encoding_moves_nothing_in_training_mode(changes: dict[str, Any]) -> None:
    model, frames = tiny(**changes).train(), clip()
    before = copy.deepcopy(model.state_dict())
    codes = model.encode(frames)
    assert model.encode(frames) == codes == model.eval().encode(frames)
    for key, value in model.state_dict().items():
        same(value, before[key])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, frames = tiny(commitment_weight=(0.1, 0.2, 0.3), scaling="unit", dead_codes="restart").train(), clip()
    model(frames)  # starts the codebooks from these frames
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, HRVQVAE)
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    codes = model.encode(frames)
    assert loaded.encode(frames) == codes
    same(loaded.decode(codes), model.decode(codes))
    model.eval()
    same(loaded(frames).quantization_losses, model(frames).quantization_losses)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"codebook_size": 4}, "3 codewords in a codebook, and the model has 4"),
        ({"layers": 2}, "3 layers, and it has 2"),
        ({"in_channels": 3}, "1 channels of a frame, and the model has 3"),
        ({"channels": (8,)}, "4 pixels a position downwards, and the model has 2"),
        ({"channels": (4, 6, 8)}, "4 pixels a position downwards, and the model has 8"),
        ({"strict_tree": False}, "made with other codebooks"),
        ({"layers": 4}, "made with other codebooks"),
        ({"latent_channels": 5}, "made with other codebooks"),
    ],
)
def test_codes_of_another_model_are_refused(other: dict[str, Any], message: str) -> None:
    codes = tiny().encode(clip())
    with pytest.raises(CodesError, match=message):
        tiny(**other).decode(codes)
    with pytest.raises(CodesError, match=message):
        tiny(**other).decode(codes, layers=1)


def test_codes_of_other_weights_are_refused_and_those_of_a_copy_are_not() -> None:
    model, frames = tiny(), clip()
    codes = model.encode(frames)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.quantizer.codebooks[2][5, 1] += 0.1
    with pytest.raises(CodesError, match="made with other codebooks"):
        moved.decode(codes)
    decodes_otherwise = copy.deepcopy(model)
    with torch.no_grad():
        decodes_otherwise.decoder[-1].bias += 0.1
    assert not torch.equal(decodes_otherwise.decode(codes), model.decode(codes))
    by_hand = Codes(codes.indices, 3, codes.frame_size, 1)
    same(model.decode(by_hand), model.decode(codes))
    assert moved.decode(by_hand).shape == frames.shape
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        decoded = copy.deepcopy(model).to(dtype).decode(codes)
        assert decoded.dtype == dtype
        assert (decoded.float() - model.decode(codes)).abs().max() < 0.05
    with pytest.raises(TypeError, match="decode takes Codes, got Tensor"):
        model.decode(codes.indices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (clip(1, 8, 12), ValueError, r"\(B, T, C, H, W\) or \(T, C, H, W\), got 3 dimensions: \(1, 8, 12\)"),
        (clip(2, 3, 8, 12), ValueError, r"\(T, C, H, W\) have 3 channels.*in_channels=1"),
        (clip(2, 1, 10, 12), ValueError, r"height 10 is not a multiple of 4.*resize to 8 or 12"),
        (clip(2, 1, 8, 2), ValueError, r"width 2 is not a multiple of 4"),
        ((clip() * 255).to(torch.uint8), TypeError, r"floating point.*torch\.uint8"),
        (clip().double(), TypeError, r"torch\.float64.*torch\.float32"),
        (clip() * 255, ValueError, "dividing by 255"),
        (clip() / 0, ValueError, "must be finite"),
        (clip().numpy(), TypeError, "must be a tensor.*got ndarray"),
    ],
)
def test_frames_refused(frames: Any, error: type[Exception], message: str) -> None:
    model = tiny()
    for method in (model, model.encode):
        with pytest.raises(error, match=message):
            method(frames)


def test_a_broken_encoder_gives_no_codes() -> None:
    model = tiny()
    with torch.no_grad():
        model.encoder[0].bias[0] = math.nan
    with pytest.raises(ValueError, match="the encoder gives values that are not finite"):
        model.encode(clip())


def test_loss_refused() -> None:
    model, frames = tiny(), clip()
    output = model(frames)
    for wrong, error, message in (
        (frames[:, :2], ValueError, r"shape of the reconstruction, \(2, 3, 1, 8, 12\), got \(2, 2, 1, 8, 12\)"),
        ((frames * 255).byte(), TypeError, r"torch\.uint8"),
        (frames * 255, ValueError, "dividing by 255"),
        (frames.to("meta"), ValueError, "frames are on meta and the reconstruction on cpu"),
    ):
        with pytest.raises(error, match=message):
            hrvqvae_loss(output, wrong)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("in_channels", 0, "a positive integer, got 0"),
        ("channels", (), r"a list of positive integers, got \(\)"),
        ("channels", 32, "a list of positive integers, got 32"),
        ("channels", (32, 6.5), "a list of positive integers"),
        ("residual_channels", -1, "a positive integer, got -1"),
        ("residual_blocks", -1, "an integer >= 0, got -1"),
        ("latent_channels", True, "a positive integer, got True"),
        ("codebook_size", 1, "an integer >= 2, got 1"),
        ("layers", 0, "a positive integer, got 0"),
        ("layers", 17, "at most 16, got 17"),
        ("layers", 9, "at most 16777216 codewords, not 153391688 of 8, got 9"),
        ("strict_tree", 1, "true or false, got 1"),
        ("combined_loss", None, "true or false, got None"),
        ("codebook_update", "adam", "one of 'gradient', 'ema', got 'adam'"),
        ("loss_reduction", "none", "one of 'mean', 'sum', got 'none'"),
        ("residual", True, "one of 'detached', 'attached', got True"),
        ("dead_codes", "on", "one of 'restart', 'ignore', got 'on'"),
        ("scaling", "whole", "one of 'half', 'unit', got 'whole'"),
        ("ema_decay", 1.0, r"in \[0, 1\), got 1\.0"),
        ("ema_decay", -0.1, r"in \[0, 1\), got -0\.1"),
        ("commitment_weight", -1, "at least 0, or one for each layer, got -1"),
        ("commitment_weight", (1, math.nan, 1), "at least 0, or one for each layer"),
        ("commitment_weight", (1, 1), r"one for each of the 3 layers, got \(1, 1\)"),
        ("combined_commitment_weight", math.inf, "a finite number of at least 0, got inf"),
        ("dead_code_threshold", "2", "a finite number of at least 0, got '2'"),
    ],
)
def test_configurations_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"SHRVQVAEConfig\.{field} must .*{message}"):
        SHRVQVAEConfig(**{field: value})
    with pytest.raises(ValueError, match=rf"SHRVQVAEConfig\.{field} "):
        SHRVQVAEConfig.preset("kth-3x8", **{field: value})


def test_configurations() -> None:
    assert SHRVQVAEConfig.preset("kth-3x8") == SHRVQVAEConfig()
    assert SHRVQVAEConfig.preset("mnist-3x4", scaling="unit").scaling == "unit"
    listed = SHRVQVAEConfig(channels=[8, 16], commitment_weight=[1, 2, 3])  # type: ignore[arg-type]
    assert (listed.channels, listed.commitment_weight) == ((8, 16), (1, 2, 3))
    assert SHRVQVAEConfig(strict_tree=False, layers=16).codewords == 16 * 8
    with pytest.raises(ValueError, match="no preset 'kth'; choose one of 'kth-3x8', 'mnist-3x4'"):
        SHRVQVAEConfig.preset("kth")
    with pytest.raises(ValueError, match="no field 'widths'; its fields are in_channels"):
        SHRVQVAEConfig.preset("kth-3x8", widths=3)


def test_half_precision() -> None:
    """Autocast and a bfloat16 module stay near float32, losses are float32, and gradients are finite."""
    model, frames = tiny(), clip()
    reference = model(frames)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(frames)
        loss = hrvqvae_loss(output, frames)
        codes = model.encode(frames)
        decoded = model.decode(codes)
    assert loss.dtype == output.quantization_losses.dtype == torch.float32
    torch.testing.assert_close(loss, hrvqvae_loss(reference, frames), rtol=0.05, atol=0)
    assert codes.shape == reference.indices.shape
    assert (decoded - model.decode(codes)).abs().max() < 0.05
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    half = copy.deepcopy(model).bfloat16()
    output = half(frames.bfloat16())
    assert output.reconstruction.dtype == torch.bfloat16
    torch.testing.assert_close(hrvqvae_loss(output, frames), hrvqvae_loss(reference, frames), rtol=0.05, atol=0)


def test_channels_last() -> None:
    model, frames = tiny(), clip(3, 1, 8, 12)
    expected = model(frames)
    output = model.to(memory_format=torch.channels_last)(frames.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.indices, expected.indices)


def check_compiled(compiled: Any, model: HRVQVAE) -> None:
    frames = clip(1, 2, 1, 8, 8)
    expected: HRVQVAEOutput = model(frames)
    output: HRVQVAEOutput = compiled(frames)
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.indices, expected.indices)
    parameters = [*model.decoder.parameters(), *(model.parameters() if model.training else ())]
    found = torch.autograd.grad(hrvqvae_loss(output, frames), parameters)
    torch.testing.assert_close(
        found, torch.autograd.grad(hrvqvae_loss(expected, frames), parameters), rtol=1e-3, atol=1e-5
    )


def test_compiles_without_a_break() -> None:
    model = tiny(layers=2).train()
    check_compiled(torch.compile(model, fullgraph=True), model)


@pytest.mark.parametrize("changes", [{}, {"strict_tree": False, "residual": "attached", "loss_reduction": "sum"}])
def test_traces_in_one_graph(changes: dict[str, Any]) -> None:
    for training in (True, False):
        model = tiny(**changes).train(training)
        check_compiled(torch.compile(model, fullgraph=True, backend="aot_eager"), model)


def test_exports() -> None:
    model, frames = tiny().eval(), clip()
    program = torch.export.export(model, (frames,))
    output = program.module()(frames)
    torch.testing.assert_close(output.reconstruction, model(frames).reconstruction)
    assert torch.equal(output.indices, model(frames).indices)


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_learns_moving_digits_and_every_layer_helps(codebook_update: str) -> None:
    """Sixty steps on one batch: reconstructions sharpen with every layer decoded."""
    torch.manual_seed(0)
    data = MovingDigits(None, count=4, length=4)
    frames = torch.stack([data[index] for index in range(4)])
    model = HRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", codebook_update=codebook_update)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = hrvqvae_loss(model(frames), frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    codes = model.encode(frames)
    psnr = [-10 * (model.decode(codes, k) - frames).square().mean().log10().item() for k in (1, 2, 3)]
    black = -10 * frames.square().mean().log10().item()
    assert psnr[0] < psnr[1] < psnr[2], psnr
    assert psnr[2] > black + 2, (psnr, black)
