"""MSPN against the authors' released code: outputs, gradients, parameter counts, and loading its checkpoints."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import Discriminator, pixel_loss

TINY = MSPNConfig(in_channels=1, channels=(4, 6, 8, 10), levels=3, hidden_channels=5)


@pytest.fixture(scope="module")
def fixture(shared: Path) -> dict[str, Any]:
    """Inputs and results of the released code for a tiny network, recorded in float32."""
    found: dict[str, Any] = torch.load(shared / "fixtures" / "mspn_released_tiny_grey.pt", weights_only=True)
    return found


def released_model(fixture: dict[str, Any], **changes: Any) -> MSPN:
    model = MSPN(replace(TINY, **changes))
    model.load_released(fixture["state_dict"])
    return model


def test_predictions_from_four_frames(fixture: dict[str, Any]) -> None:
    predictions = released_model(fixture).predict(fixture["x"][:, :4], horizon=fixture["pred_steps"])
    expected = torch.stack(fixture["test"]["preds"], dim=1)
    torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", ["train", "adv_train"])
def test_training_step(fixture: dict[str, Any], case: str) -> None:
    """Predictions, loss and every gradient, and none of the recorded gradients is left over."""
    model, expected = released_model(fixture), fixture[case]
    output = model(fixture["x"][:, :4], horizon=2)
    for time, prediction in enumerate(expected["preds"]):
        torch.testing.assert_close(output.predictions[0][:, time], prediction, rtol=1e-5, atol=1e-8)
    loss = pixel_loss(output, fixture["x"], norm="sum_squares", level_weights="uniform")
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    loss.backward()

    theirs = {key: value for key, value in expected["grads"].items()}
    for name, parameter in model.named_parameters():
        gradient = theirs.pop(find_released(fixture, model, name))
        assert parameter.grad is not None
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
    assert not theirs


def find_released(fixture: dict[str, Any], model: MSPN, name: str) -> str:
    """The released tensor whose random values our parameter holds: independent of the table of names."""
    values = model.state_dict()[name]
    matches = [key for key, other in fixture["state_dict"].items() if torch.equal(other, values)]
    assert len(matches) == 1, (name, matches)
    return str(matches[0])


def test_checkpoint_of_data_parallel(fixture: dict[str, Any]) -> None:
    wrapped = {f"module.{key}": value for key, value in fixture["state_dict"].items()}
    model = MSPN(TINY)
    model.load_released(wrapped)
    for key, value in released_model(fixture).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_gate_order_changes_nothing_but_the_layout(fixture: dict[str, Any]) -> None:
    x = fixture["x"]
    reference = released_model(fixture).predict(x, 1)
    for order in ("fiog", "gofi"):
        torch.testing.assert_close(released_model(fixture, gate_order=order).predict(x, 1), reference)


def test_checkpoint_of_another_shape_is_refused_whole(fixture: dict[str, Any]) -> None:
    model = MSPN(replace(TINY, hidden_channels=7))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"in_conv\.0\.weight' has shape \(4, 8, 5, 5\).*needs \(4, 10, 5, 5\)"):
        model.load_released(fixture["state_dict"])
    # The last tensor to be checked is the wrong one: all that came before must not be loaded either.
    almost = dict(fixture["state_dict"])
    almost["ELcell.out_conv.0.bias"] = torch.zeros(2)
    tiny = MSPN(TINY)
    with pytest.raises(ValueError, match=r"ELcell\.out_conv\.0\.bias' has shape \(2,\).*needs \(1,\)"):
        tiny.load_released(almost)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(torch.equal(value, almost["EHcell.out_conv.0.weight"]) for value in tiny.state_dict().values())


def test_other_checkpoints_are_refused(fixture: dict[str, Any]) -> None:
    state = fixture["state_dict"]
    less = {key: value for key, value in state.items() if key != "EHcell.out_conv.0.weight"}
    with pytest.raises(ValueError, match=r"lacks 'EHcell\.out_conv\.0\.weight', needed with shape \(1, 5, 5, 5\)"):
        MSPN(TINY).load_released(less)
    with pytest.raises(ValueError, match=r"holds 'EHcell\.extra' of shape \(3,\)"):
        MSPN(TINY).load_released({**state, "EHcell.extra": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"holds 'EHcell\.en_decoder\.Merge_Hidden"):
        MSPN(replace(TINY, enc_info=False)).load_released(state)
    with pytest.raises(TypeError, match=r"'state_dict' is dict; pass the state dict inside it"):
        MSPN(TINY).load_released({"state_dict": state})
    with pytest.raises(TypeError, match="got list"):
        MSPN(TINY).load_released([1])


def released_block(name: str, i: int, o: int, batch_norm: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of one released Bottleneck."""
    second, res = ("3", "res.0") if batch_norm else ("2", "res")
    shapes: dict[str, tuple[int, ...]] = {}
    for key, kernel in (("bottleneck.0", (o, i, 3, 3)), (f"bottleneck.{second}", (o, o, 3, 3)), (res, (o, i, 1, 1))):
        shapes |= {f"{name}.{key}.weight": kernel, f"{name}.{key}.bias": (o,)}
    if batch_norm:
        for key in ("bottleneck.1", "bottleneck.4", "res.1"):
            shapes |= {f"{name}.{key}.{part}": (o,) for part in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{name}.{key}.num_batches_tracked"] = ()
    return shapes


def released_convolution(key: str, o: int, i: int, kernel: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{key}.0.weight": (o, i, kernel, kernel)}
    return {**shapes, f"{key}.0.bias": (o,)} if bias else shapes


def released_network(config: MSPNConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of everything that the released code registers, never-used weights included."""
    shapes: dict[str, tuple[int, ...]] = {}
    edlstm = config.recurrence == "edlstm"
    for level in range(config.levels):
        widths, top = config.level_channels(level), level == config.levels - 1
        cell = "EHcell" if level == 0 else "ELcell" if top else f"ELHcell{level}"
        codec = f"{cell}.en_decoder" if edlstm else cell
        inputs = (4 if top else 3 if level == 0 else 5) * config.in_channels + edlstm * config.hidden_channels
        gates = 4 * config.hidden_channels if edlstm else config.in_channels

        shapes |= released_convolution(f"{codec}.in_conv", widths[0], inputs, 5)
        shapes[f"{codec}.scale"] = (1,)
        if config.enc_info and not top:
            shapes |= released_convolution(f"{codec}.Merge_Hidden", widths[-1], widths[-1] + widths[-2], 3, bias=False)
        for stage in range(len(widths) - 1):
            i, o = widths[stage], widths[stage + 1]
            shapes |= released_block(f"{codec}.encoder{stage}.0", i, o, config.batch_norm)
            shapes |= released_block(f"{codec}.encoder{stage}.2", o, o, config.batch_norm)
            i, o = widths[-1 - stage], widths[-2 - stage]
            shapes |= released_block(f"{codec}.upsample{stage}.0", i, o, config.batch_norm)
            shapes |= released_block(f"{codec}.upsample{stage}.2", o, o, config.batch_norm)
            shapes |= released_convolution(f"{codec}.merge_conv{stage}", o, 2 * o, 3)
        shapes |= released_convolution(f"{codec}.out_conv", gates, 2 * widths[0], 3)
        if edlstm:
            shapes |= released_convolution(f"{cell}.out_conv", config.in_channels, config.hidden_channels, 5)
        else:
            shapes |= released_convolution(f"{cell}.lstm_conv", 4 * widths[-1], 2 * widths[-1], 3)
            shapes |= released_convolution(f"{cell}.lstm_out_conv", widths[-1], widths[-1], 3)
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.randn(shape) if shape else torch.tensor(7) for key, shape in shapes.items()}


def test_the_names_used_here_are_those_of_the_recorded_checkpoint(fixture: dict[str, Any]) -> None:
    recorded = {key: tuple(value.shape) for key, value in fixture["state_dict"].items()}
    assert released_network(TINY) == recorded


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("recurrence", ["edlstm", "enc_lstm_dec"])
def test_every_variant_loads_each_tensor_once(recurrence: str, batch_norm: bool) -> None:
    config = MSPNConfig(1, (2, 3, 4, 5), 3, 3, batch_norm=batch_norm, recurrence=recurrence)
    released = random_tensors(released_network(config))
    model = MSPN(config)
    model.load_released(released)
    unused = {
        key
        for key in released
        if key.endswith("scale")
        or (recurrence == "enc_lstm_dec" and "Merge_Hidden" in key)
        or any(
            f"{cell}." in key and f"merge_conv{2 - level}." in key
            for level, cell in enumerate(("EHcell", "ELHcell1", "ELcell"))
        )
    }
    loaded = sorted(tuple(value.shape) for value in model.state_dict().values())
    assert loaded == sorted(tuple(value.shape) for key, value in released.items() if key not in unused)
    values = {value.flatten()[0].item() for key, value in released.items() if key not in unused and value.dim()}
    assert values == {value.flatten()[0].item() for value in model.state_dict().values() if value.dim()}


def count(config: MSPNConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MSPN(config).parameters())


def never_used(config: MSPNConfig) -> int:
    """A scalar and a 3x3 convolution 2 c0 -> c0 a level; for En-LSTM-De its merging weights F besides."""
    c0 = config.channels[0]
    total = config.levels * (1 + 9 * 2 * c0 * c0 + c0)
    if config.recurrence == "enc_lstm_dec":
        widths = [config.level_channels(level)[-1] for level in range(config.levels)]
        total += sum(9 * (own + above) * own for own, above in pairwise(widths))
    return total


@pytest.mark.parametrize(
    ("preset", "changes", "used", "registered"),
    [
        ("released-default", {}, 110_840_140, 111_135_312),
        ("released-default", {"enc_info": False}, 92_260_684, 92_555_856),
        ("released-default", {"recurrence": "enc_lstm_dec"}, 203_478_476, 222_353_104),
        ("released-mnist", {}, 26_731_043, 26_952_422),
        ("released-mnist", {"enc_info": False}, 22_307_363, 22_528_742),
        ("released-mnist", {"recurrence": "enc_lstm_dec"}, 49_585_731, 54_230_790),
        ("paper", {}, 20_314_595, 20_535_974),
        ("paper", {"enc_info": False}, 15_890_915, 16_112_294),
        ("paper-enc-lstm-dec", {}, 46_833_219, 51_478_278),
    ],
)
def test_parameter_counts(preset: str, changes: dict[str, Any], used: int, registered: int) -> None:
    config = MSPNConfig.preset(preset, **changes)
    assert count(config) == used
    assert used + never_used(config) == registered


def test_compact_preset_is_the_size_that_its_readme_states() -> None:
    assert count(MSPNConfig.preset("compact")) == 80_458


def released_discriminator(channels: tuple[int, ...], size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"layer1.weight": (channels[0], 3, 7, 7), "layer1.bias": (channels[0],)}
    for index, (i, o) in enumerate(pairwise(channels)):
        shapes |= released_block(f"conv.{2 * index}", i, o, batch_norm=True)
    shapes |= {"full_conv.weight": (1024, channels[-1], *size), "full_conv.bias": (1024,)}
    shapes |= {"linear.0.weight": (256, 1024), "linear.0.bias": (256,)}
    return shapes | {"linear.2.weight": (1, 256), "linear.2.bias": (1,)}


def test_discriminator_checkpoint() -> None:
    released = random_tensors(released_discriminator((4, 6, 8, 10), (2, 3)))
    discriminator = Discriminator((4, 6, 8, 10), (2, 3))
    discriminator.load_released({f"module.{key}": value for key, value in released.items()})
    state = discriminator.state_dict()
    assert torch.equal(state["blocks.2.body.4.running_var"], released["conv.4.bottleneck.4.running_var"])
    assert torch.equal(state["blocks.0.skip.0.weight"], released["conv.0.res.0.weight"])
    assert torch.equal(state["score.2.bias"], released["linear.2.bias"])
    with pytest.raises(ValueError, match=r"'layer1\.weight' has shape \(4, 3, 7, 7\).*needs \(5, 3, 7, 7\)"):
        Discriminator((5, 6, 8, 10), (2, 3)).load_released(released)
