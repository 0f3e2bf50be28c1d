"""The sampler's step of a position as it is recorded on a GPU, with a tape in the place of CUDA graphs."""

import copy
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spreading import spread
from tape import TapeRecorder

import vpfast
from vpfast.models import HRVQVAE, SHRVQVAE, SHRVQVAEConfig
from vpfast.models.shrvqvae import sample
from vpfast.models.shrvqvae.captured import CapturablePrior, CapturedSHRVQVAE

FIELDS: dict[str, Any] = {
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
    "prior_heads": 3,
    "prior_head_dim": 4,
    "prior_ffn": 5,
    "prior_head": 5,
    "attention_window": (1, 1, 1),
}
FRAMES = torch.rand(2, 3, 1, 8, 12, generator=torch.Generator().manual_seed(1))
POSITIONS = 6  # of a frame's codes
DRAWS: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "drawn": {"temperature": 0.9, "seed": [3, 8]},
    "several futures": {"temperature": 0.9, "num_futures": 3},
    "of the two likeliest": {"temperature": 1.3, "top_k": 2},
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the kernel of the CPU, and without its look at the values of positions, which a GPU's has not."""
    monkeypatch.setattr(sys.modules["vpfast.ops.masked_attention3d"], "_check_positions", lambda *arguments: None)
    with vpfast.backend("reference"):
        yield


class Recorders:
    """Makes recorders and keeps them."""

    def __init__(self) -> None:
        self.made: list[TapeRecorder] = []

    def __call__(self, device: torch.device) -> TapeRecorder:
        self.made.append(TapeRecorder(device))
        return self.made[-1]

    @property
    def counts(self) -> tuple[int, int]:
        return sum(each.captures for each in self.made), sum(each.replays for each in self.made)


def whole(**changes: Any) -> SHRVQVAE:
    torch.manual_seed(0)
    model = SHRVQVAE(SHRVQVAEConfig(**{**FIELDS, **changes})).eval()
    spread(model, FRAMES)
    with torch.no_grad():  # else logits hardly depend on what was seen
        for parameter in model.prior.parameters():
            parameter.mul_(2)
    return model


def given(model: SHRVQVAE) -> torch.Tensor:
    codes: torch.Tensor = model.autoencoder.encode(FRAMES).indices
    return codes


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("code_order", ["depth", "layers", "independent"])
def test_the_codes_are_those_of_the_sampler(code_order: str, draw: str) -> None:
    model, recorders = whole(code_order=code_order), Recorders()
    prior = CapturablePrior(model.prior, recorders)
    codes = given(model)
    wanted = sample(model.prior, codes, 3, **DRAWS[draw])
    assert torch.equal(sample(prior, codes, 3, **DRAWS[draw]), wanted)
    assert len(wanted.unique()) > 1
    passes = 2 if code_order == "layers" else 1
    assert recorders.counts == (passes, passes * 3 * POSITIONS)


@pytest.mark.parametrize("attention", ["axial", "window", "none"])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_whatever_it_attends_to_and_begins_with(attention: str, context: int) -> None:
    model, recorders = whole(attention=attention), Recorders()
    codes = given(model)[:, :context]
    wanted = sample(model.prior, codes, 2, temperature=1.0)
    assert torch.equal(sample(CapturablePrior(model.prior, recorders), codes, 2, temperature=1.0), wanted)
    assert recorders.counts == (1, 2 * POSITIONS)


@pytest.mark.parametrize("conditioning", ["eq6", "past_frames"])
def test_where_positions_are_evaluated_together_nothing_is_recorded(conditioning: str) -> None:
    model, recorders = whole(conditioning=conditioning), Recorders()
    codes = given(model)
    assert torch.equal(sample(CapturablePrior(model.prior, recorders), codes, 2), sample(model.prior, codes, 2))
    assert recorders.counts == (0, 0)


def test_a_frame_of_one_position() -> None:
    model, recorders = whole(), Recorders()
    codes = given(model)[:, :, :1, :1]
    wanted = sample(model.prior, codes, 3)
    assert torch.equal(sample(CapturablePrior(model.prior, recorders), codes, 3), wanted)
    assert recorders.counts == (1, 3)


def test_clips_share_a_recorder_and_its_memory() -> None:
    model, recorders = whole(), Recorders()
    prior = CapturablePrior(model.prior, recorders)
    codes = given(model)
    wanted = sample(model.prior, codes, 2)
    assert all(torch.equal(sample(prior, codes, 2), wanted) for _ in range(3))
    assert len(recorders.made) == 1
    assert copy.deepcopy(prior).idle == []
    recorders.made[0].failing = MemoryError("no room")
    with pytest.raises(MemoryError):
        sample(prior, codes, 2)
    assert torch.equal(sample(prior, codes, 2), wanted)
    assert len(recorders.made) == 2  # not with what failed


def test_within_a_recording_nothing_is_recorded() -> None:
    model = whole()
    busy = TapeRecorder()
    busy.is_busy = True
    codes = given(model)
    found = sample(CapturablePrior(model.prior, lambda device: busy), codes, 2)
    assert torch.equal(found, sample(model.prior, codes, 2))
    assert busy.captures == 0


def test_logits_that_are_not_finite_are_told() -> None:
    model = whole()
    prior = CapturablePrior(model.prior, Recorders())
    with torch.no_grad():
        prior.heads[1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        sample(prior, given(model), 1)


def test_every_code_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    told: list[int] = []
    monkeypatch.setattr("tqdm.std.tqdm.update", lambda self, count: told.append(count))
    for code_order in ("depth", "layers"):
        model = whole(code_order=code_order)
        sample(CapturablePrior(model.prior, Recorders()), given(model), 2, progress=True)
        assert sum(told) == 2 * POSITIONS * 2
        told.clear()


def test_a_copy_for_inference_predicts_and_streams() -> None:
    model, recorders = whole(), Recorders()
    fast = CapturedSHRVQVAE(model, None, recorders)
    wanted = model.predict(FRAMES, 2)
    assert torch.equal(fast.predict(FRAMES, 2), wanted)
    assert recorders.counts == (1, 2 * POSITIONS)
    drawn = {"temperature": 0.9, "num_futures": 2, "seed": 5}
    assert torch.equal(fast.predict(FRAMES, 1, **drawn), model.predict(FRAMES, 1, **drawn))
    stream = vpfast.Stream(fast)
    for time in range(3):
        pushed = stream.push(FRAMES[:, time])
    assert torch.equal(pushed, wanted[:, 0])
    assert torch.equal(stream.rollout(2), wanted)


def test_optimize_records_what_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HRVQVAE, "_weight", property(lambda model: SimpleNamespace(is_cuda=True)))
    monkeypatch.setattr("vpfast._optimize.optimize_shrvqvae", lambda model, dtype: ("recorded", dtype))
    assert vpfast.optimize(whole(), torch.bfloat16) == ("recorded", torch.bfloat16)


def test_the_model_and_its_copy_do_not_share_weights() -> None:
    model = whole()
    fast = CapturedSHRVQVAE(model, None, Recorders())
    wanted = fast.predict(FRAMES, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(fast.predict(FRAMES, 1), wanted)
    assert not any(parameter.requires_grad for parameter in fast._model.parameters())
    assert all(parameter.requires_grad for parameter in model.prior.parameters())


def test_half_precision_keeps_the_type_of_the_model() -> None:
    model = whole()
    fast = CapturedSHRVQVAE(model, torch.bfloat16, Recorders())
    found = fast.predict(FRAMES, 1)
    assert found.dtype == torch.float32
    assert found.shape == (2, 1, 1, 8, 12)
    assert fast._model.prior.norm.weight.dtype == torch.bfloat16
    assert vpfast.Stream(fast).push(FRAMES[:, 0]).dtype == torch.float32


def test_refusals_are_those_of_the_model() -> None:
    fast = CapturedSHRVQVAE(whole(), None, Recorders())
    with pytest.raises(TypeError, match="float64"):
        fast.predict(FRAMES.double(), 1)
    with pytest.raises(TypeError, match="must be a tensor"):
        fast.predict(None, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reach from"):
        fast.predict(FRAMES * 255, 1)
    with pytest.raises(ValueError, match="top_k"):
        fast.predict(FRAMES, 1, top_k=9)
