"""S-HR-VQVAE as a whole: prediction made of its parts, frame by frame, saved, learnt, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from spreading import spread
from torch import Tensor

from vpfast import Stream
from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, Codes, MSPNConfig, SHRVQVAEConfig, STPixelCNN, load, save
from vpfast.models.shrvqvae import PRESETS, prior_loss, sample, sample_naively

TINY: dict[str, Any] = {
    "in_channels": 1,
    "channels": (4, 6),
    "residual_channels": 3,
    "residual_blocks": 1,
    "latent_channels": 3,
    "codebook_size": 3,
    "layers": 2,
    "dead_codes": "ignore",
    "prior_channels": 6,
    "prior_blocks": 2,
    "prior_heads": 2,
    "prior_head_dim": 3,
    "prior_ffn": 5,
    "prior_head": 5,
}


def model(**changes: Any) -> SHRVQVAE:
    """Small; codewords are spread, and no code is likelier than others on the whole."""
    torch.manual_seed(0)
    made = SHRVQVAE(SHRVQVAEConfig(**{**TINY, **changes})).eval()
    spread(made, frames(4, 2))
    with torch.no_grad():
        logits = made.prior(made.autoencoder.encode(frames(4, 2)).indices)
        for head, average in zip(made.prior.heads, logits.mean((0, 1, 2, 3)), strict=True):
            head.bias.sub_(average)
    return made


def frames(batch: int = 2, length: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(batch, length, 1, 8, 12, generator=torch.Generator().manual_seed(seed))


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [{}, {"temperature": 1.0, "top_k": 2, "seed": [3, 4]}], ids=["likeliest", "drawn"])
def test_a_prediction_is_the_frames_of_the_sampled_codes(draws: dict[str, Any]) -> None:
    made = model()
    codes = sample_naively(made.prior, made.autoencoder.encode(frames()).indices, 2, **draws)
    expected = made.autoencoder.decode(Codes(codes, 3, (8, 12), 1))
    prediction = made.predict(frames(), 2, **draws)
    assert prediction.shape == (2, 2, 1, 8, 12)
    assert not prediction.requires_grad
    assert 0 <= prediction.min() <= prediction.max() <= 1
    assert prediction.std() > 0
    torch.testing.assert_close(prediction, expected)


def test_several_futures() -> None:
    made = model()
    futures = made.predict(frames(), 2, temperature=1.0, num_futures=3, seed=5)
    assert futures.shape == (2, 3, 2, 1, 8, 12)
    assert torch.equal(futures[:, :1], made.predict(frames(), 2, temperature=1.0, num_futures=1, seed=5))
    assert torch.equal(futures[:, 0], made.predict(frames(), 2, temperature=1.0, seed=5))
    assert not torch.equal(futures[:, 0], futures[:, 1])


def test_nothing_to_predict() -> None:
    assert model().predict(frames(), 0).shape == (2, 0, 1, 8, 12)
    assert model().predict(frames()[:0], 2).shape == (0, 2, 1, 8, 12)
    assert model().predict(frames(), 0, num_futures=2).shape == (2, 2, 0, 1, 8, 12)


def test_predicting_changes_nothing_in_training_mode() -> None:
    made = model(dead_codes="restart", codebook_update="ema").train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    prediction = made.predict(frames(), 1)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert torch.equal(prediction, made.eval().predict(frames(), 1))


def test_in_double_precision() -> None:
    prediction = model().double().predict(frames().double(), 1)
    assert prediction.dtype == torch.float64
    torch.testing.assert_close(prediction.float(), model().predict(frames(), 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["raster", "eq6", "past_frames"])
@pytest.mark.parametrize("code_order", ["depth", "independent", "layers"])
def test_frame_by_frame_gives_what_the_clip_gives(conditioning: str, code_order: str) -> None:
    made = model(conditioning=conditioning, code_order=code_order)
    stream = Stream(made)
    for time in range(3):
        pushed = stream.push(frames()[:, time])
    expected = made.predict(frames(), 3)
    assert torch.equal(pushed, expected[:, 0])
    for count in (3, 1, 3):
        assert torch.equal(stream.rollout(count), expected[:, :count])
    assert torch.equal(
        stream.push(frames(seed=2)[:, 0]), made.predict(torch.cat((frames(), frames(seed=2)[:, :1]), 1), 1)[:, 0]
    )


def test_a_single_video_has_no_batch_dimension() -> None:
    made = model()
    stream = Stream(made)
    for time in range(2):
        stream.push(frames()[0, time])
    assert torch.equal(stream.rollout(2), made.predict(frames()[:1, :2], 2)[0])


def test_a_step_does_not_change_the_state_it_is_given() -> None:
    made = model()
    _, state = made.step(frames()[:, 0], made.init_state(2, 8, 12))
    codes = state.codes.clone()
    first, moved = made.step(None, state)
    peeked, ahead = made.peek(state)
    again, _ = made.step(None, ahead)
    assert torch.equal(state.codes, codes)
    assert moved.codes.shape[1] == 2
    assert torch.equal(first, peeked)
    assert torch.equal(first, again)


# --- made, saved, loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kth-3x8", "mnist-3x4"])
def test_the_presets_of_three_layers_have_1_14_million_parameters(name: str) -> None:
    made = SHRVQVAE(SHRVQVAEConfig.preset(name))
    assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(1.14e6, rel=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_predicts(name: str) -> None:
    made = SHRVQVAE(SHRVQVAEConfig.preset(name))
    clip = torch.rand(1, 2, made.config.in_channels, 8, 8)
    assert made.predict(clip, 1).shape == (1, 1, made.config.in_channels, 8, 8)


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = model(conditioning="eq6", attention="window", attention_window=(1, None, 2), joint_weight=0.2)
    save(made, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, SHRVQVAE)
    assert loaded.config == made.config
    assert isinstance(loaded.autoencoder, HRVQVAE)
    assert isinstance(loaded.prior, STPixelCNN)
    assert torch.equal(loaded.predict(frames(), 2), made.predict(frames(), 2))


def test_from_an_autoencoder() -> None:
    autoencoder = model().autoencoder.double().eval()
    made = SHRVQVAE.from_autoencoder(autoencoder, conditioning="past_frames", prior_channels=8)
    assert made.config == dataclasses.replace(autoencoder.config, conditioning="past_frames", prior_channels=8)
    assert not made.training
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float64}
    codes = autoencoder.encode(frames().double())
    assert torch.equal(made.autoencoder.encode(frames().double()).indices, codes.indices)
    with torch.no_grad():
        made.autoencoder.quantizer.codewords.add_(1)
    assert autoencoder.encode(frames().double()) == codes  # a copy


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_prior_that_has_learnt_a_clip_continues_it() -> None:
    """A bar that moves one position a frame, two of its four frames given."""
    codes = torch.zeros(1, 4, 3, 6, 2, dtype=torch.int64)
    for time in range(4):
        codes[0, time, :, time + 1, 0] = 1
        codes[0, time, time % 3, time + 1, 1] = 2
    torch.manual_seed(0)
    prior = STPixelCNN(SHRVQVAEConfig(**{**TINY, "prior_channels": 16}))
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(120):
        loss = prior_loss(prior(codes), codes, 2, prior.config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(sample(prior, codes[:, :2], 2), codes[:, 2:])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frames": frames()[0]}, ValueError, r"frames must be \(B, T, C, H, W\), got 4 dimensions"),
        ({"frames": frames()[:, :0]}, ValueError, "give at least one frame"),
        ({"frames": frames().expand(-1, -1, 3, -1, -1)}, ValueError, "have 3 channels.*in_channels=1"),
        ({"frames": frames()[..., :10]}, ValueError, "width 10 is not a multiple of 4"),
        ({"frames": frames() * 255}, ValueError, "dividing by 255"),
        ({"frames": frames() / 0}, ValueError, "must be finite"),
        ({"frames": (frames() * 255).byte()}, TypeError, "must be floating point"),
        ({"frames": frames().double()}, TypeError, "float64 and the model's weights torch.float32"),
        ({"horizon": -1}, ValueError, "horizon must be 0 or more, got -1"),
        ({"horizon": True}, TypeError, "got True"),
        ({"temperature": -1.0}, ValueError, r"temperature must be.*got -1\.0"),
        ({"top_k": 4}, ValueError, "top_k must be 1 to 3.*got 4"),
        ({"num_futures": 0}, ValueError, "num_futures must be.*got 0"),
        ({"seed": [1, 2, 3]}, ValueError, "each of the 2 clips, got 3"),
    ],
)
def test_predict_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model().predict(**{"frames": frames(), "horizon": 1, **changes})


def test_forward_refuses() -> None:
    with pytest.raises(ValueError, match="must leave a frame to predict: 3 frames given as context of a clip of 3"):
        model()(frames(), 3)
    with pytest.raises(ValueError, match=r"got 4 dimensions"):
        model()(frames()[0], 1)


def test_from_autoencoder_refuses() -> None:
    with pytest.raises(TypeError, match="takes an HRVQVAE, got MSPN"):
        SHRVQVAE.from_autoencoder(MSPN(MSPNConfig.preset("compact")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'layers' is no field of the prior; those are prior_channels"):
        SHRVQVAE.from_autoencoder(model().autoencoder, layers=3)
    with pytest.raises(ValueError, match="conditioning must be one of"):
        SHRVQVAE.from_autoencoder(model().autoencoder, conditioning="future")


def test_a_state_of_other_frames_is_refused() -> None:
    made = model()
    with pytest.raises(ValueError, match="height 6 is not a multiple of 4"):
        made.init_state(1, 6, 8)
    with pytest.raises(ValueError, match=r"made for frames of shape \(1, 1, 8, 12\), got \(2, 1, 8, 12\)"):
        made.step(frames()[:, 0], made.init_state(1, 8, 12))
