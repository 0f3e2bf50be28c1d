"""The pixel loss against its formulas written out as loops."""

import math

import pytest
import torch
from torch import Tensor

from vpfast.models import MSPN, MSPNConfig, MSPNOutput
from vpfast.models.mspn import pixel_loss
from vpfast.models.mspn.config import DownSampling


def example(dtype: torch.dtype = torch.float64, down_sampling: DownSampling = "nearest") -> tuple[MSPNOutput, Tensor]:
    random = torch.Generator().manual_seed(0)
    levels = (torch.rand(2, 4, 3, 8 >> n, 16 >> n, generator=random, dtype=torch.float64).to(dtype) for n in range(3))
    return MSPNOutput(tuple(levels), down_sampling), torch.rand(
        2, 4, 3, 8, 16, generator=random, dtype=torch.float64
    ).to(dtype)


def by_hand(output: MSPNOutput, frames: Tensor, norm: str, level_weights: str, down_sampling: str) -> float:
    levels, total = len(output.predictions), 0.0
    for level, prediction in enumerate(output.predictions):
        weight = (levels - level) / levels if level_weights == "paper" else 1
        squares: list[list[Tensor]] = []
        for time in range(1, frames.shape[1]):
            step = []
            for sample in range(frames.shape[0]):
                frame = frames[sample, time]
                if down_sampling == "nearest":
                    target = frame[:, :: 2**level, :: 2**level]
                else:
                    target = torch.nn.functional.avg_pool2d(frame, 2**level)
                step.append((prediction[sample, time] - target) ** 2)
            squares.append(step)
        if norm == "sum_squares":
            total += weight * sum(s.sum().item() for step in squares for s in step)
        elif norm == "l2":
            total += weight * sum(math.sqrt(s.sum().item()) for step in squares for s in step)
        else:
            total += weight * torch.stack([s for step in squares for s in step]).mean().item()
    return total


@pytest.mark.parametrize("down_sampling", ["nearest", "average"])
@pytest.mark.parametrize("level_weights", ["paper", "uniform"])
@pytest.mark.parametrize("norm", ["sum_squares", "l2", "mse"])
def test_formulas(norm: str, level_weights: str, down_sampling: DownSampling) -> None:
    output, frames = example(down_sampling=down_sampling)
    loss = pixel_loss(output, frames, norm, level_weights)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(output, frames, norm, level_weights, down_sampling), rel=1e-12)


def test_defaults_are_the_papers() -> None:
    output, frames = example()
    assert pixel_loss(output, frames).item() == pytest.approx(
        by_hand(output, frames, "sum_squares", "paper", "nearest"), rel=1e-12
    )


@pytest.mark.parametrize("norm", ["sum_squares", "l2", "mse"])
def test_first_step_has_no_weight(norm: str) -> None:
    output, frames = example()
    loss = pixel_loss(output, frames, norm)
    for prediction in output.predictions:
        prediction[:, 0] = math.nan
    frames[:, 0] = 1.5
    assert pixel_loss(output, frames, norm).item() == loss.item()


@pytest.mark.parametrize("norm", ["sum_squares", "l2", "mse"])
def test_a_perfect_prediction_costs_nothing_and_has_a_gradient(norm: str) -> None:
    """The Euclidean norm has a kink at zero, where its gradient must not be NaN."""
    _, frames = example()
    prediction = frames.clone().requires_grad_()
    loss = pixel_loss(MSPNOutput((prediction,), "nearest"), frames, norm)
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert not prediction.grad.any()


def test_half_precision_sums_in_float32() -> None:
    output, frames = example(torch.float16)
    loss = pixel_loss(output, frames)
    assert loss.dtype == torch.float32
    exact = MSPNOutput(tuple(prediction.double() for prediction in output.predictions), "nearest")
    assert loss.item() == pytest.approx(pixel_loss(exact, frames.double()).item(), rel=1e-5)


def test_refused() -> None:
    output, frames = example()
    for option, value in (("norm", "l1"), ("level_weights", "none")):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{value}'"):
            pixel_loss(output, frames, **{option: value})
    with pytest.raises(ValueError, match=r"all 4 steps, \(2, 4, 3, 8, 16\), got \(2, 3, 3, 8, 16\)"):
        pixel_loss(output, frames[:, :3])
    single = MSPNOutput(tuple(prediction[:, :1] for prediction in output.predictions), "nearest")
    with pytest.raises(ValueError, match="at least 2 steps"):
        pixel_loss(single, frames[:, :1])
    with pytest.raises(ValueError, match=r"down_sampling must be one of .*, got 'max'"):
        pixel_loss(output._replace(down_sampling="max"), frames)


def test_frames_refused() -> None:
    output, frames = example(torch.float32)
    for wrong, error, message in (
        ((frames * 255).byte(), TypeError, r"floating point.*torch\.uint8.*/ 255"),
        (frames.numpy(), TypeError, "must be a tensor, got ndarray"),
        (frames * 255, ValueError, r"\[0, 1\], but reach from .*dividing by 255"),
        (frames * 8 - 4, ValueError, "scale them first"),
        (frames / 0, ValueError, "must be finite"),
        (frames.to("meta"), ValueError, "frames are on meta and the predictions on cpu"),
    ):
        with pytest.raises(error, match=message):
            pixel_loss(output, wrong)


def test_values_are_not_read_where_they_cannot_be() -> None:
    output, frames = example(torch.float32)
    compiled = torch.compile(pixel_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(output, frames), pixel_loss(output, frames))
    meta = MSPNOutput(tuple(prediction.to("meta") for prediction in output.predictions), "nearest")
    assert pixel_loss(meta, frames.to("meta")).is_meta


@pytest.mark.parametrize("down_sampling", ["nearest", "average"])
def test_targets_are_made_as_the_model_makes_them(down_sampling: DownSampling) -> None:
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(1, (2, 3, 4), 2, 2, down_sampling=down_sampling))
    frames = torch.rand(1, 3, 1, 8, 8)
    output = model(frames)
    expected = by_hand(output, frames, "sum_squares", "paper", down_sampling)
    assert pixel_loss(output, frames).item() == pytest.approx(expected, rel=1e-5)


def test_a_few_updates_reduce_it() -> None:
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 6, 8), levels=2, hidden_channels=4))
    frames = torch.rand(2, 1, 1, 8, 8).expand(-1, 5, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = pixel_loss(model(frames[:, :3], 2), frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
