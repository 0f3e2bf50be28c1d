"""Frame-by-frame use: equal to the whole clip, for one video and for several, and never off its place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vpfast
from vpfast import Stream
from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig


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


def test_what_cannot_be_streamed_is_refused_at_once() -> None:
    autoencoder = HRVQVAE(SHRVQVAEConfig.preset("kth-3x8"))
    for model, named in ((autoencoder, "HRVQVAE"), (MSPN, "the class MSPN"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"takes an MSPN or SHRVQVAE, .* init_state, step and peek; got {named}$"):
            Stream(model)


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


def predictors() -> dict[str, Any]:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "channels": (4, 6), "levels": 1, "hidden_channels": 4}
    plain, fed = (MSPN(MSPNConfig(**fields, feed_frame=feed_frame)).eval() for feed_frame in (False, True))
    for model in (plain, fed):
        model.levels[0].head.bias.data.fill_(0.5)  # type: ignore[union-attr]
    latent = {"in_channels": 1, "channels": (4, 8), "residual_channels": 4, "latent_channels": 2}
    prior = {
        "prior_channels": 4,
        "prior_blocks": 1,
        "prior_heads": 1,
        "prior_ffn": 4,
        "prior_attention_every": 1,
        "prior_head": 4,
    }
    by_codes = SHRVQVAE(SHRVQVAEConfig(**latent, **prior)).eval()  # type: ignore[arg-type]
    by_codes.autoencoder.quantizer.codewords.data.normal_()
    optimized = {f"{name}, optimized": vpfast.optimize(each) for name, each in (("MSPN", plain), ("feed_frame", fed))}
    return {"MSPN": plain, "feed_frame": fed, **optimized, "S-HR-VQVAE": by_codes}


PREDICTORS = predictors()


@pytest.mark.parametrize("model", PREDICTORS.values(), ids=PREDICTORS)
def test_what_is_pushed_in_and_out_is_the_callers_to_change(model: Any) -> None:
    changed, left, buffer = vpfast.Stream(model), vpfast.Stream(model), torch.empty(1, 8, 8)
    for frame in torch.rand(4, 1, 8, 8):
        prediction, wanted = changed.push(buffer.copy_(frame)), left.push(frame)
        assert torch.equal(prediction, wanted)
        prediction.mul_(255)
        buffer.fill_(float("nan"))
    assert torch.equal(changed.rollout(3), left.rollout(3))


@pytest.mark.parametrize("model", PREDICTORS.values(), ids=PREDICTORS)
@torch.no_grad()
def test_what_steps_and_peeks_give_is_no_part_of_a_state(model: Any) -> None:
    """Steps with None, which stands for the prediction, included: and a state may be gone on from twice."""
    _, state = model.step(torch.rand(1, 1, 8, 8), model.init_state(1, 8, 8))
    seen, ahead = model.peek(state)
    wanted = [each.clone() for each in (seen, model.step(None, ahead)[0], *steps(model, ahead))]
    seen.mul_(0)
    model.step(None, ahead)[0].mul_(0)
    found = [model.peek(ahead)[0], model.step(None, ahead)[0], *steps(model, ahead, by=0)]
    assert all(map(torch.equal, found, wanted))


def steps(model: Any, state: Any, by: float = 1) -> list[Tensor]:
    """The predictions of two steps with None, each multiplied ``by`` a number once a copy was made."""
    made = []
    for _ in range(2):
        prediction, state = model.step(None, state)
        made.append(prediction.clone())
        prediction.mul_(by)
    return made
