"""What MSPN and its configuration refuse: one error each, with the offending number."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, MSPNConfig, STPixelCNN
from vpfast.models.mspn import PRESETS


@pytest.fixture(scope="module")
def model() -> MSPN:
    return MSPN(MSPNConfig(in_channels=1, channels=(2, 3, 4, 5), levels=2, hidden_channels=2))


GOOD = torch.rand(1, 2, 1, 16, 24, generator=torch.Generator().manual_seed(0))


def with_value(value: float) -> torch.Tensor:
    frames = GOOD.clone()
    frames[0, 1, 0, 3, 5] = value
    return frames


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (GOOD[0], ValueError, r"\(B, T, C, H, W\), got 4 dimensions: \(2, 1, 16, 24\)"),
        (GOOD.expand(-1, -1, 3, -1, -1), ValueError, r"have 3 channels.*in_channels=1"),
        (GOOD[..., :12, :], ValueError, r"height 12 is not a multiple of 8.*resize to 8 or 16"),
        (GOOD[..., :20], ValueError, r"width 20 is not a multiple of 8.*resize to 16 or 24"),
        (GOOD[..., :4], ValueError, r"width 4 is not a multiple of 8.*resize to 8 or 16"),
        (GOOD[:, :0], ValueError, r"T = 0"),
        (GOOD[..., :0], ValueError, r"width 0 is not a multiple of 8"),
        ((GOOD * 255).to(torch.uint8), TypeError, r"floating point.*torch\.uint8.*frames\.float\(\) / 255"),
        (GOOD.double(), TypeError, r"torch\.float64.*torch\.float32"),
        (GOOD.half(), TypeError, r"torch\.float16.*torch\.float32"),
        (GOOD.numpy(), TypeError, r"must be a tensor.*got ndarray"),
        (with_value(math.nan), ValueError, r"index \(0, 1, 0, 3, 5\) is nan"),
        (with_value(math.inf), ValueError, r"index \(0, 1, 0, 3, 5\) is inf"),
        (with_value(-math.inf), ValueError, r"index \(0, 1, 0, 3, 5\) is -inf"),
        (with_value(1.51), ValueError, r"\[0, 1\], but reach from .* to 1\.51"),
        (with_value(-0.51), ValueError, r"reach from -0\.51 to .*\(frames \+ 1\) / 2"),
        (GOOD * 255, ValueError, r"to 25\d\.\d+; .*dividing by 255"),
        (GOOD * 8 - 4, ValueError, r"scale them first"),
    ],
)
def test_frames_refused(model: MSPN, frames: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(frames)
    with pytest.raises(error, match=message):
        model.predict(frames, 1)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_values_a_little_outside_are_accepted(model: MSPN, value: float) -> None:
    assert model(with_value(value)).predictions[0].isfinite().all()


def test_frames_on_another_device(model: MSPN) -> None:
    with pytest.raises(ValueError, match="frames are on meta and the model on cpu"):
        model(GOOD.to("meta"))


def test_horizon_and_feedback_refused(model: MSPN) -> None:
    with pytest.raises(ValueError, match="horizon must be 0 or more, got -1"):
        model(GOOD, -1)
    for horizon in (2.0, True, np.True_, "3"):
        with pytest.raises(TypeError, match="horizon must be an integer"):
            model.predict(GOOD, horizon)
    with pytest.raises(ValueError, match="feedback must be one of 'attached', 'detached', got 'none'"):
        model(GOOD, 1, feedback="none")
    state = model.init_state(1, 16, 24)
    for frame in (None, GOOD[:, 0]):
        with pytest.raises(ValueError, match="feedback must be one of 'attached', 'detached', got 'foo'"):
            model.step(frame, state, feedback="foo")


def test_any_whole_number_is_a_horizon(model: MSPN) -> None:
    expected = model.predict(GOOD, 2)
    for horizon in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert torch.equal(model.predict(GOOD, horizon), expected)


def test_streaming_refused(model: MSPN) -> None:
    with pytest.raises(ValueError, match="height 12 is not a multiple of 8"):
        model.init_state(1, 12, 24)
    with pytest.raises(ValueError, match="batch_size must be 0 or more, got -1"):
        model.init_state(-1, 16, 24)
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 1\.0"):
        model.init_state(1.0, 16, 24)
    with pytest.raises(TypeError, match=r"width must be an integer, got 24\.0"):
        model.init_state(1, 16, 24.0)
    state = model.init_state(1, 16, 24)
    for frame, error, message in (
        (GOOD, ValueError, r"\(B, C, H, W\), got 5 dimensions"),
        (with_value(math.nan)[:, 1], ValueError, r"index \(0, 0, 3, 5\) is nan"),
        (GOOD[:, 0, ..., :16], ValueError, r"shape \(1, 1, 16, 24\), got \(1, 1, 16, 16\)"),
        (GOOD[:, 0].expand(2, -1, -1, -1), ValueError, r"shape \(1, 1, 16, 24\), got \(2, 1, 16, 24\)"),
        ((GOOD[:, 0] * 255).byte(), TypeError, r"torch\.uint8"),
    ):
        with pytest.raises(error, match=message):
            model.step(frame, state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("in_channels", 0, "positive integer, got 0"),
        ("in_channels", True, "positive integer, got True"),
        ("channels", (8,), r"at least two positive integers, got \(8,\)"),
        ("channels", (8, -1, 4, 4, 4), "at least two positive integers"),
        ("channels", 64, "a list of widths, got 64"),
        ("levels", 5, r"at most 4, one less than the widths in \(64, 128, 256, 512, 1024\), got 5"),
        ("levels", 0, "positive integer, got 0"),
        ("hidden_channels", 2.5, "positive integer, got 2.5"),
        ("input_kernel_size", 4, "odd, got 4"),
        ("lstm_output_kernel_size", 2, "odd, got 2"),
        ("enc_info", "yes", "true or false, got 'yes'"),
        ("batch_norm", 1, "true or false, got 1"),
        ("feed_frame", None, "true or false, got None"),
        ("recurrence", "lstm", "one of 'edlstm', 'enc_lstm_dec', got 'lstm'"),
        ("down_sampling", "max", "one of 'nearest', 'average', got 'max'"),
        ("widen", "never", "one of 'before_pool', 'after_pool', got 'never'"),
        ("gate_order", "ifo", "permutation of 'fiog', got 'ifo'"),
        ("gate_order", 4, "permutation of 'fiog', got 4"),
    ],
)
def test_configurations_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"MSPNConfig\.{field} must be .*{message}"):
        MSPNConfig(**{field: value})
    with pytest.raises(ValueError, match=rf"MSPNConfig\.{field} "):
        MSPNConfig.preset("released-default", **{field: value})


def test_presets() -> None:
    assert MSPNConfig.preset("released-default") == MSPNConfig()
    assert MSPNConfig.preset("paper", enc_info=False).enc_info is False
    assert MSPNConfig(channels=[8, 16], levels=1).channels == (8, 16)
    with pytest.raises(ValueError, match="no preset 'papre'; choose one of 'released-default'"):
        MSPNConfig.preset("papre")
    with pytest.raises(ValueError, match="no field 'widths'; its fields are in_channels"):
        MSPNConfig.preset("paper", widths=3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name: str) -> None:
    """Shapes alone, with nothing computed: what estimates of memory and FLOPs stand on."""
    config = MSPNConfig.preset(name)
    with FakeTensorMode():
        frames = torch.zeros(1, 2, config.in_channels, 2 * config.multiple, 4 * config.multiple)
        assert MSPN(config).predict(frames, 1).shape[:2] == (1, 1)


@pytest.mark.parametrize("kind", [MSPN, HRVQVAE, STPixelCNN, SHRVQVAE])
@pytest.mark.parametrize("config", ["compact", {"levels": 2}, None])
def test_models_are_made_of_their_configuration_alone(kind: Any, config: Any) -> None:
    of = "MSPNConfig" if kind is MSPN else "SHRVQVAEConfig"
    with pytest.raises(TypeError, match=rf"config must be of type {of}, such as {of}.preset\('.*'\), got {config!r}"):
        kind(config)
