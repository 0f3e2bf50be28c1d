"""Frame-by-frame use: equal to the whole clip, for one video and for several, and never off its place."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import vpfast
from vpfast import Stream
from vpfast.models import MSPN, MSPNConfig


@pytest.fixture(scope="module")
def model() -> MSPN:
    torch.manual_seed(0)
    return MSPN(MSPNConfig(in_channels=1, channels=(4, 6, 8), levels=2, hidden_channels=4)).eval()


FRAMES = torch.rand(2, 5, 1, 8, 12, generator=torch.Generator().manual_seed(1))


def test_push_returns_the_next_frame(model: MSPN) -> None:
    whole = model(FRAMES).predictions[0].detach()
    stream = Stream(model)
    for time in range(4):
        prediction = stream.push(FRAMES[:, time])
        assert not prediction.requires_grad
        assert torch.equal(prediction, whole[:, time + 1])


def test_rollout_is_predict_and_does_not_move_on(model: MSPN) -> None:
    stream = Stream(model)
    for time in range(3):
        last = stream.push(FRAMES[:, time])
    expected = model.predict(FRAMES[:, :3], 4)
    for count in (4, 1, 4):
        assert torch.equal(stream.rollout(count), expected[:, :count])
    assert torch.equal(stream.rollout(np.int64(2)), expected[:, :2])
    assert torch.equal(last, expected[:, 0])
    assert torch.equal(stream.push(FRAMES[:, 3]), model.predict(FRAMES[:, :4], 1)[:, 0])


def test_a_single_video_has_no_batch_dimension(model: MSPN) -> None:
    stream = Stream(model)
    for time in range(3):
        prediction = stream.push(FRAMES[0, time])
    assert prediction.shape == (1, 8, 12)
    assert stream.rollout(3).shape == (3, 1, 8, 12)
    assert torch.equal(stream.rollout(3), model.predict(FRAMES[:1, :3], 3)[0])


def test_reset_begins_another_video_of_any_size(model: MSPN) -> None:
    stream = Stream(model)
    first = stream.push(FRAMES[0, 0])
    stream.push(FRAMES[0, 1])
    stream.reset()
    assert stream.push(FRAMES[:, 0, :, :, :8]).shape == (2, 1, 8, 8)
    stream.reset()
    assert torch.equal(stream.push(FRAMES[0, 0]), first)


def test_each_frame_costs_one_evaluation(model: MSPN, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    look_ahead: Callable[..., object] = model._look_ahead

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return look_ahead(*arguments)

    monkeypatch.setattr(model, "_look_ahead", counted)
    stream = Stream(model)
    stream.push(FRAMES[0, 0])  # the first also predicts itself, from nothing
    assert calls == 2
    for time in range(1, 4):
        stream.push(FRAMES[0, time])
    assert calls == 5


def test_refused(model: MSPN) -> None:
    stream = Stream(model)
    with pytest.raises(ValueError, match="push at least one frame before rollout"):
        stream.rollout(1)
    with pytest.raises(ValueError, match=r"got \(8, 12\)"):
        stream.push(FRAMES[0, 0, 0])
    stream.push(FRAMES[0, 0])
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        stream.rollout(0)
    with pytest.raises(TypeError, match=r"got 2\.5"):
        stream.rollout(2.5)
    with pytest.raises(TypeError, match="got True"):
        stream.rollout(True)
    with pytest.raises(TypeError, match="got list"):
        stream.push([1])


@pytest.mark.parametrize(
    "bad",
    [
        FRAMES[:, 1],
        FRAMES[0, 1, :, :, :8],
        FRAMES[0, 1].expand(3, -1, -1),
        FRAMES[0, 1] * 255,
        (FRAMES[0, 1] * 255).byte(),
        FRAMES[0, 1] / 0,
    ],
    ids=["batch", "size", "channels", "scale", "type", "infinity"],
)
def test_a_refused_frame_leaves_the_stream_where_it_was(model: MSPN, bad: Tensor) -> None:
    stream = Stream(model)
    stream.push(FRAMES[0, 0])
    with pytest.raises((ValueError, TypeError)):
        stream.push(bad)
    assert torch.equal(stream.push(FRAMES[0, 1]), model.predict(FRAMES[:1, :2], 1)[0, 0])


@pytest.mark.parametrize("make", [lambda model: model, vpfast.optimize], ids=["model", "optimized"])
def test_what_is_pushed_out_is_the_callers_to_change(make: Callable[[MSPN], MSPN]) -> None:
    torch.manual_seed(0)
    config = MSPNConfig(in_channels=1, channels=(4, 6), levels=1, hidden_channels=4)
    model, frames = make(MSPN(config).eval()), torch.rand(4, 1, 8, 8)
    changed, left = vpfast.Stream(model), vpfast.Stream(model)
    for frame in frames:
        prediction, wanted = changed.push(frame), left.push(frame)
        assert torch.equal(prediction, wanted)
        prediction.mul_(255)
