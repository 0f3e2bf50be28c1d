"""MSPN itself: Algorithm 1 written out, streaming, feedback, layouts and types, compiling."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vpfast
from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss
from vpfast.ops._backend import current_backend

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "two levels": {"levels": 2},
    "one level": {"levels": 1},
    "without enc_info": {"enc_info": False},
    "enc_lstm_dec": {"recurrence": "enc_lstm_dec"},
    "feed_frame": {"feed_frame": True},
    "average": {"down_sampling": "average"},
    "batch norm": {"batch_norm": True},
    "paper": {"gate_order": "fiog", "widen": "after_pool", "input_kernel_size": 3},
    "rgb": {"in_channels": 3},
}
all_variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**changes: Any) -> MSPN:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "channels": (4, 6, 8, 10), "levels": 3, "hidden_channels": 5}
    model = MSPN(MSPNConfig(**{**fields, **changes})).eval()
    # Random weights leave the errors almost alike from step to step; larger ones let every mistake show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def clip(model: MSPN, batch: int = 2, time: int = 4, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, time, model.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_algorithm_1_written_out() -> None:
    model = tiny()
    frames = clip(model)
    cells, heads = [level.cell for level in model.levels], [level.head for level in model.levels]
    errors = [torch.zeros(2, 2, 16 >> level, 24 >> level) for level in range(3)]
    states: list[Any] = [None, None, None]

    def up(t: Tensor) -> Tensor:
        return F.interpolate(t, scale_factor=2, mode="bilinear", align_corners=True)

    def half(t: Tensor) -> Tensor:
        return F.interpolate(t, scale_factor=0.5, mode="nearest")

    made = []
    for time in range(6):
        states[2], v2 = cells[2].step(torch.cat((errors[2], half(errors[1])), 1), states[2])
        p2 = F.leaky_relu(heads[2](states[2][0]), 0.01)
        states[1], v1 = cells[1].step(torch.cat((errors[1], half(errors[0]), up(p2)), 1), states[1], v2)
        p1 = F.leaky_relu(heads[1](states[1][0]), 0.01)
        states[0], _ = cells[0].step(torch.cat((errors[0], up(p1)), 1), states[0], v1)
        p0 = F.leaky_relu(heads[0](states[0][0]), 0.01)
        made.append((p0, p1, p2))
        target = frames[:, time] if time < 4 else p0
        for level, p in enumerate(made[-1]):
            f = F.interpolate(target, scale_factor=1 / 2**level, mode="nearest")
            errors[level] = torch.cat((F.relu(f - p), F.relu(p - f)), 1)
        if time >= 4:
            assert not errors[0].any()

    output = model(frames, horizon=2)
    for level in range(3):
        torch.testing.assert_close(output.predictions[level], torch.stack([p[level] for p in made], 1))


@all_variants
def test_shapes_at_every_horizon(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    frames = clip(model)
    channels = model.config.in_channels
    for horizon in (0, 1, 3):
        output = model(frames, horizon)
        assert len(output.predictions) == model.config.levels
        for level, prediction in enumerate(output.predictions):
            assert prediction.shape == (2, 4 + horizon, channels, 16 >> level, 24 >> level)
        future = model.predict(frames, horizon)
        assert future.shape == (2, horizon, channels, 16, 24)
        assert not future.requires_grad
        same(future, output.predictions[0][:, 4:])


@all_variants
def test_frame_by_frame_is_the_whole_clip_bit_for_bit(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    frames = clip(model)
    whole = model(frames, horizon=3).predictions[0]
    state = model.init_state(2, 16, 24)
    for time in range(7):
        ahead, peeked = model.peek(state)
        same(ahead, whole[:, time])
        frame = frames[:, time].clone() if time < 4 else None
        prediction, state = model.step(frame, peeked if time % 2 else state)
        same(prediction, whole[:, time])


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_any_size_batch_and_length(batch: int, time: int, rows: int, columns: int, horizon: int) -> None:
    model = tiny(channels=(3, 4, 5), levels=2, hidden_channels=2)
    frames = clip(model, batch, time, 4 * rows, 4 * columns)
    whole = model(frames, horizon).predictions[0]
    assert whole.shape == (batch, time + horizon, 1, 4 * rows, 4 * columns)
    state = model.init_state(batch, 4 * rows, 4 * columns)
    for index in range(time + horizon):
        prediction, state = model.step(frames[:, index] if index < time else None, state)
        same(prediction, whole[:, index])


def test_a_prediction_does_not_see_its_frame_and_the_next_one_does() -> None:
    model = tiny()
    frames = clip(model)
    changed = frames.clone()
    changed[:, 2] = 1 - changed[:, 2]
    before, after = model(frames, 1).predictions[0], model(changed, 1).predictions[0]
    same(before[:, :3], after[:, :3])
    for time in (3, 4):
        assert (before[:, time] - after[:, time]).abs().max() > 1e-4


def test_states_are_never_changed_in_place() -> None:
    model = tiny(feed_frame=True)
    frames = clip(model)
    _, state = model.step(frames[:, 0], model.init_state(2, 16, 24))
    first, _ = model.step(None, state)
    model.step(frames[:, 1], state)
    same(model.step(None, state)[0], first)


def gradients(model: MSPN, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("feed_frame", [False, True])
def test_frames_that_are_not_seen_are_predicted(feed_frame: bool) -> None:
    model = tiny(feed_frame=feed_frame)
    frames = clip(model)
    seen = [True, False, True, False]
    whole = model(frames, 1, seen=seen).predictions[0]
    state = model.init_state(2, 16, 24)
    for time in range(5):
        prediction, state = model.step(frames[:, time] if time < 4 and seen[time] else None, state)
        same(prediction, whole[:, time])
    same(model(frames, seen=[True, True, False, False]).predictions[0], model(frames[:, :2], 2).predictions[0])
    with pytest.raises(ValueError, match="seen must hold one value for each of the 4 frames, got 3"):
        model(frames, seen=[True] * 3)


@pytest.mark.parametrize("feed_frame", [False, True])
def test_feedback_attached_and_detached(feed_frame: bool) -> None:
    """Each equals a loop that feeds predictions by hand, and they differ from each other."""
    model = tiny(feed_frame=feed_frame).double()
    frames = clip(model).double()
    found = {}
    for feedback in ("attached", "detached"):
        loss = model(frames, 3, feedback=feedback).predictions[0][:, -1].square().sum()
        found[feedback] = gradients(model, loss)

        state = model.init_state(2, 16, 24)
        for time in range(4):
            prediction, state = model.step(frames[:, time], state)
        for _ in range(3):
            prediction, state = model.peek(state)
            _, state = model.step(prediction if feedback == "attached" else prediction.detach(), state)
        by_hand = gradients(model, prediction.square().sum())
        torch.testing.assert_close(found[feedback], by_hand)
    apart = [(a - d).norm() / a.norm() for a, d in zip(*found.values(), strict=True)]
    assert max(apart) > 1e-4


@all_variants
def test_every_parameter_is_used(changes: dict[str, Any]) -> None:
    model = tiny(**changes).train()
    frames = clip(model, time=3)
    pixel_loss(model(frames[:, :2], 1), frames).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias before batch norm is taken away again: its gradient is rounding.
        if not model.config.batch_norm:
            assert parameter.grad.abs().sum() > 0, name


def test_fed_frame_is_the_last_frame() -> None:
    """The extra input of level 0 enters the first convolution alone; with its weights at zero nothing is left of it."""
    model, plain = tiny(feed_frame=True), tiny()
    weights = model.state_dict()
    stem = weights["levels.0.cell.encoder.stem.weight"]  # inputs: E_0 (2), P_1 (1), frame (1), h (5)
    plain.load_state_dict({**weights, "levels.0.cell.encoder.stem.weight": stem[:, [0, 1, 2, 4, 5, 6, 7, 8]]})
    frames = clip(model)
    same(model(frames[:, :1]).predictions[0], plain(frames[:, :1]).predictions[0])  # no frame was seen: zeros
    assert (model(frames).predictions[0] - plain(frames).predictions[0]).abs().max() > 1e-4
    with torch.no_grad():
        stem[:, 3] = 0
    torch.testing.assert_close(model(frames, 2).predictions[0], plain(frames, 2).predictions[0])


def test_averaging_differs_from_slicing_unless_frames_are_flat() -> None:
    nearest, average = tiny(), tiny(down_sampling="average")
    frames = clip(nearest)
    same(nearest(frames[:, :1]).predictions[0], average(frames[:, :1]).predictions[0])
    assert (nearest(frames).predictions[0] - average(frames).predictions[0]).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"in_channels": 3, "feed_frame": True}], ids=["grey", "rgb"])
def test_channels_last_is_kept(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    frames = clip(model)
    expected = model(frames, 2)
    model.to(memory_format=torch.channels_last)
    channels_last = frames.movedim(2, -1).contiguous().movedim(-1, 2)
    for given_frames in (channels_last, frames):
        output = model(given_frames, 2)
        for prediction, reference in zip(output.predictions, expected.predictions, strict=True):
            torch.testing.assert_close(prediction, reference, rtol=1e-4, atol=1e-5)
            assert prediction.movedim(2, -1).is_contiguous()
        state = model.init_state(2, 16, 24)
        for time in range(3):
            prediction, state = model.step(given_frames[:, time], state)
            same(prediction, output.predictions[0][:, time])
            for h, c in state.cells:
                assert h.is_contiguous(memory_format=torch.channels_last)
                assert c.is_contiguous(memory_format=torch.channels_last)
            assert all(error.is_contiguous(memory_format=torch.channels_last) for error in state.errors)


@pytest.mark.parametrize("recurrence", ["edlstm", "enc_lstm_dec"])
def test_half_precision(recurrence: str) -> None:
    """Autocast and a bfloat16 module stay near float32, and cell states are float32 in both."""
    model = tiny(recurrence=recurrence, feed_frame=True)
    frames = clip(model)
    reference = model(frames, 2).predictions[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(frames, 2)
        state = model.init_state(2, 16, 24)
        for time in range(2):
            _, state = model.step(frames[:, time], state)
    assert all(c.dtype == torch.float32 for _, c in state.cells)
    assert (output.predictions[0] - reference).abs().max() < 0.05 * reference.abs().max()
    pixel_loss(output, torch.cat((frames, frames[:, :2]), 1)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    half = tiny(recurrence=recurrence, feed_frame=True).bfloat16()
    prediction, state = half.step(frames[:, 0].bfloat16(), half.init_state(2, 16, 24))
    assert prediction.dtype == torch.bfloat16
    assert all((h.dtype, c.dtype) == (torch.bfloat16, torch.float32) for h, c in state.cells)
    assert (half.predict(frames.bfloat16(), 2).float() - reference[:, 4:]).abs().max() < 0.05 * reference.abs().max()


def test_float64() -> None:
    model = tiny().double()
    frames = clip(model).double()
    reference = tiny().predict(frames.float(), 2)
    torch.testing.assert_close(model.predict(frames, 2).float(), reference, rtol=1e-4, atol=1e-5)


def small() -> MSPN:
    return tiny(channels=(3, 4), levels=1, hidden_channels=2)


def test_compiles_without_a_break() -> None:
    model = small()
    frames = clip(model, time=1, height=4, width=6)
    compiled = torch.compile(model, fullgraph=True)
    output, expected = compiled(frames, 1), model(frames, 1)
    torch.testing.assert_close(output.predictions, expected.predictions)
    output.predictions[0].square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, gradients(model, expected.predictions[0].square().sum()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"recurrence": "enc_lstm_dec", "feed_frame": True}], ids=["edlstm", "ablation"]
)
def test_predict_and_step_trace_in_one_graph(changes: dict[str, Any]) -> None:
    """All levels, without the cost of code generation."""
    model = tiny(levels=2, **changes)
    frames = clip(model, time=1)
    predict = torch.compile(model.predict, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predict(frames, 1), model.predict(frames, 1))
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    state, expected_state = model.init_state(2, 16, 24), model.init_state(2, 16, 24)
    for frame in (frames[:, 0], None):
        prediction, state = step(frame, state)
        expected, expected_state = model.step(frame, expected_state)
        torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_steps_that_are_computed_again_compile(batch_norm: bool) -> None:
    torch.manual_seed(0)
    config = MSPNConfig(in_channels=1, channels=(4, 6), levels=1, hidden_channels=4, batch_norm=batch_norm)
    model, frames = MSPN(config).double(), torch.rand(2, 3, 1, 8, 8, dtype=torch.float64)
    compiled = copy.deepcopy(model)
    model(frames, 1).predictions[0].square().sum().backward()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    step(frames, 1, recompute=True).predictions[0].square().sum().backward()
    for (name, found), wanted in zip(compiled.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=name)
    for found, wanted in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_steps_are_computed_again_by_the_backend_they_were_computed_by() -> None:
    model, frames = tiny(levels=2), clip(tiny(levels=2))
    expected = torch.autograd.grad(model(frames, 1).predictions[0].square().sum(), list(model.parameters()))
    with vpfast.backend("reference"):
        loss = model(frames, 1, recompute=True).predictions[0].square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert current_backend() == "auto"
    torch.testing.assert_close(found, expected)


def test_exports() -> None:
    model = tiny(levels=2)
    frames = clip(model, time=2)
    program = torch.export.export(model, (frames,), {"horizon": 1})
    torch.testing.assert_close(program.module()(frames, horizon=1).predictions, model(frames, 1).predictions)


def test_an_empty_batch_gives_an_empty_result() -> None:
    model = tiny()
    assert model.predict(clip(model, batch=0), 2).shape == (0, 2, 1, 16, 24)


def test_all_combinations_of_options_build() -> None:
    """No option assumes the default of another."""
    options = {
        "levels": (1, 2),
        "enc_info": (False, True),
        "recurrence": ("edlstm", "enc_lstm_dec"),
        "feed_frame": (False, True),
        "widen": ("before_pool", "after_pool"),
    }
    for values in itertools.product(*options.values()):
        model = tiny(channels=(2, 3, 4), hidden_channels=2, **dict(zip(options, values, strict=True)))
        assert model.predict(clip(model, 1, 1, 4, 4), 1).shape == (1, 1, 1, 4, 4)
