"""A training step as it is recorded on a GPU, with a tape in the place of CUDA graphs."""

from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor

from vpfast.models import MSPN, GraphedStep, MSPNConfig
from vpfast.models.mspn import pixel_loss


@pytest.fixture(autouse=True)
def _as_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's values are not looked at within a recording; the model and its loss do it on a CPU. And convolutions are
    torch's there: those of a CPU's own kernel differ by rounding, which Adam turns into whole steps of weights whose
    gradient is 0 but for it."""
    monkeypatch.setattr("vpfast.models._frames.values_can_be_read", lambda frames: False)
    for kernel in ("plane", "winograd"):
        monkeypatch.setattr(f"vpfast.ops._{kernel}_convolution.serves", lambda *given: False)


def tiny(**changes: Any) -> MSPN:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "channels": (4, 6, 8), "levels": 2, "hidden_channels": 4}
    return MSPN(MSPNConfig(**{**fields, **changes}))


def clips(seed: int, batch: int = 2, time: int = 4) -> Tensor:
    return torch.rand(batch, time, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(model: MSPN, frames: Tensor) -> Tensor:
    return pixel_loss(model(frames[:, :2], horizon=frames.shape[1] - 2), frames)


def trained(model: MSPN, graphed: bool, seeds: list[int], **shape: int) -> tuple[list[Tensor], TapeRecorder]:
    recorder = TapeRecorder()
    step = GraphedStep(model, lambda frames: loss_of(model, frames), recorder)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for seed in seeds:
        if graphed:
            loss = step(clips(seed, **shape))
        else:
            optimizer.zero_grad()
            loss = loss_of(model, clips(seed, **shape))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        losses.append(loss.detach())
    return losses, recorder


@pytest.mark.parametrize("changes", [{}, {"batch_norm": True}, {"recurrence": "enc_lstm_dec"}])
def test_training_goes_as_ever(changes: dict[str, Any]) -> None:
    plain, graphed = tiny(**changes), tiny(**changes)
    wanted, _ = trained(plain, False, [1, 2, 3, 4])
    found, recorder = trained(graphed, True, [1, 2, 3, 4])
    assert (recorder.captures, recorder.replays) == (1, 4)
    assert len({loss.item() for loss in wanted}) == 4
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_call_alone() -> None:
    model = tiny()
    step = GraphedStep(model, lambda frames: loss_of(model, frames), TapeRecorder())
    for seed, batch in [(1, 2), (2, 3), (3, 2), (3, 2)]:
        model.zero_grad(set_to_none=seed == 2)
        frames = clips(seed, batch)
        loss = step(frames)
        wanted = torch.autograd.grad(loss_of(model, frames), list(model.parameters()))
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(wanted))
        torch.testing.assert_close(loss, loss_of(model, frames).detach())
        assert not loss.requires_grad


def test_a_loss_is_the_callers_own() -> None:
    model = tiny()
    step = GraphedStep(model, lambda frames: loss_of(model, frames), TapeRecorder())
    first = step(clips(1))
    kept = first.clone()
    assert step(clips(2)) != kept
    assert torch.equal(first, kept)


def test_shapes_modes_and_types_are_recorded_apart_and_the_oldest_given_up() -> None:
    model, recorder = tiny(batch_norm=True), TapeRecorder()
    step = GraphedStep(model, lambda frames: loss_of(model, frames), recorder, limit=3)
    step(clips(1))
    step(clips(1, time=3))
    model.eval()
    step(clips(1))
    assert (recorder.captures, recorder.released) == (3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            step(clips(1))
    assert (recorder.captures, recorder.released) == (4, 1)
    model.levels[0].requires_grad_(False)
    assert all(parameter.grad is not None for parameter in model.levels[1].parameters())
    step(clips(1))
    assert (recorder.captures, recorder.released) == (5, 2)


def test_under_autocast_weights_are_cast_anew() -> None:
    """Autocast keeps what it cast while it lasts; weights that changed since must be seen all the same."""
    model = tiny()
    step = GraphedStep(model, lambda frames: loss_of(model, frames), TapeRecorder())
    with torch.autocast("cpu", torch.bfloat16):
        first = step(clips(1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        second = step(clips(1))
        torch.clear_autocast_cache()
        wanted = loss_of(model, clips(1)).detach()
    assert second != first
    assert torch.equal(second, wanted)


def test_a_failed_recording_leaves_everything_as_it_was() -> None:
    model, recorder = tiny(batch_norm=True), TapeRecorder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = GraphedStep(model, lambda frames: loss_of(model, frames), recorder)
    recorder.failing = MemoryError("no room")
    with pytest.raises(MemoryError, match="no room"):
        step(clips(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    step(clips(1))
    assert recorder.captures == 1


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="this one is on cpu; move it there first"):
        GraphedStep(model, lambda frames: loss_of(model, frames))
    monkeypatch.undo()
    recorder = TapeRecorder()
    with pytest.raises(ValueError, match="must be finite"):
        GraphedStep(model, lambda frames: loss_of(model, frames), recorder)(torch.full((1, 3, 1, 8, 8), float("nan")))
    assert recorder.turns == 0
