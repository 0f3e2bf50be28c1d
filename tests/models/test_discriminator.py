"""The discriminator: size, formula, and the counts of the released one."""

import pytest
import torch
import torch.nn.functional as F

from vpfast.models.mspn import Discriminator


@pytest.mark.parametrize(
    ("arguments", "count", "frame_size"),
    [
        ({}, 40_812_097, (128, 160)),
        ({"channels": (64, 64, 128, 256, 256, 512), "size": (4, 4)}, 14_812_609, (128, 128)),
    ],
)
def test_released_sizes(arguments: dict[str, tuple[int, ...]], count: int, frame_size: tuple[int, int]) -> None:
    with torch.device("meta"):
        discriminator = Discriminator(**arguments)
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == count
        assert discriminator(torch.empty(2, 3, *frame_size)).shape == (2,)
        assert discriminator(torch.empty(2, 5, 3, *frame_size)).shape == (2, 5)


def small() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator((4, 6, 8), (2, 3), in_channels=1)


def test_formula() -> None:
    discriminator = small().eval()
    frames = torch.rand(5, 1, 8, 12)
    mean = frames.sum() / frames.numel()
    std = ((frames - mean).square().sum() / (frames.numel() - 1)).sqrt()
    x = F.conv2d((frames - mean) / std, discriminator.first.weight, discriminator.first.bias, padding=3)
    for block in discriminator.blocks:
        x = F.max_pool2d(block(x), 2)
    x = x.flatten(1) @ discriminator.last.weight.flatten(1).T + discriminator.last.bias
    first, _, last = discriminator.score
    expected = (F.leaky_relu(x @ first.weight.T + first.bias, 0.01) @ last.weight.T + last.bias)[:, 0]
    torch.testing.assert_close(discriminator(frames), expected, rtol=1e-4, atol=1e-5)


def test_clips_are_scored_frame_by_frame() -> None:
    discriminator = small().eval()
    frames = torch.rand(2, 3, 1, 8, 12)
    torch.testing.assert_close(discriminator(frames).flatten(), discriminator(frames.flatten(0, 1)))


def test_gradients_reach_frames_and_a_flat_frame_scores_a_number() -> None:
    discriminator = small()
    frames = torch.rand(4, 1, 8, 12, requires_grad=True)
    discriminator(frames).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().sum() > 0
    assert discriminator(torch.full((4, 1, 8, 12), 0.5)).isfinite().all()


def test_refused_sizes() -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 8, 12), (1, 8, 12), (1, 1, 1, 1, 8, 12)):
        with pytest.raises(ValueError, match=r"\(N, 1, 8, 12\) or \(B, T, 1, 8, 12\), which its `size` sets; got"):
            small()(torch.zeros(shape))


def test_refused_types() -> None:
    for dtype, message in ((torch.uint8, r"floating point.*torch\.uint8.*/ 255"), (torch.float64, r"torch\.float64")):
        with pytest.raises(TypeError, match=message):
            small()(torch.zeros(2, 1, 8, 12, dtype=dtype))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        small()([])
    with pytest.raises(ValueError, match="frames are on meta and the model on cpu"):
        small()(torch.zeros(2, 1, 8, 12, device="meta"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "channels must be a list of positive integers, got"),
        ({"channels": (4, 0)}, r"channels must be a list of positive integers, got \(4, 0\)"),
        ({"channels": (4, 8.0)}, "channels must be"),
        ({"size": (4,)}, r"size must be two positive integers \(h, w\), got \(4,\)"),
        ({"size": (4, -1)}, "size must be"),
        ({"in_channels": 0}, "in_channels must be a positive integer"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"Discriminator: {message}"):
        Discriminator(**changes)
