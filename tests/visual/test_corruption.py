"""Frames made worse on purpose: by how much, and that they stay frames."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpfast.visual import fragment_blur, gaussian_blur, gaussian_noise, salt_and_pepper


def clip(frames=2, channels=1, height=24, width=32, seed=0):
    return torch.rand(frames, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_a_point_becomes_a_gaussian(sigma):
    frames = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    frames[..., 15, 15] = 1
    spread = torch.arange(-15.0, 16.0, dtype=torch.float64)
    bell = torch.exp(-spread.square() / (2 * sigma**2)) * (spread.abs() <= math.ceil(3 * sigma))
    bell /= bell.sum()
    blurred = gaussian_blur(frames, sigma)[0, 0]
    assert torch.allclose(blurred, bell[:, None] * bell)
    assert blurred.sum() == pytest.approx(1)


@pytest.mark.parametrize("distance", [1, 4])
def test_a_point_becomes_four(distance):
    frames = torch.zeros(1, 1, 31, 31)
    frames[..., 15, 15] = 1
    blurred = fragment_blur(frames, distance)[0, 0]
    assert blurred.nonzero().tolist() == [
        [15 - distance, 15],
        [15, 15 - distance],
        [15, 15 + distance],
        [15 + distance, 15],
    ]
    assert blurred.max() == 0.25


@pytest.mark.parametrize("blur", [lambda x: gaussian_blur(x, 1.5), lambda x: fragment_blur(x, 3)])
def test_a_blur_leaves_what_is_even_and_every_channel_and_frame_for_itself(blur):
    even = torch.full((2, 3, 16, 20), 0.3)
    assert torch.allclose(blur(even), even)
    frames = clip(3, 3)
    for frame in range(3):
        for channel in range(3):
            alone = blur(frames[frame : frame + 1, channel : channel + 1])[0, 0]
            assert torch.allclose(blur(frames)[frame, channel], alone, atol=1e-6)


@pytest.mark.parametrize("decibels", [30.0, 10.0])
def test_noise_has_the_ratio_that_was_asked_for(decibels):
    frames = 0.5 + 0.02 * (clip(4, 3, 64, 64) - 0.5)  # far from 0 and 1: nothing is clipped
    noise = gaussian_noise(frames, decibels) - frames
    ratio = 10 * torch.log10(frames.var(correction=0) / noise.square().mean()).item()
    assert ratio == pytest.approx(decibels, abs=0.1)
    assert torch.equal(gaussian_noise(frames, decibels), gaussian_noise(frames, decibels))
    assert not torch.equal(gaussian_noise(frames, decibels, seed=1), gaussian_noise(frames, decibels))


def test_a_share_of_the_pixels_is_salt_or_pepper():
    frames = clip(4, 3, 64, 64) * 0.8 + 0.1
    speckled = salt_and_pepper(frames, 0.2)
    white, black = (speckled == 1).float().mean().item(), (speckled == 0).float().mean().item()
    assert (white, black) == (pytest.approx(0.1, abs=0.01), pytest.approx(0.1, abs=0.01))
    changed = speckled != frames
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))
    assert not torch.equal(salt_and_pepper(frames, 0.2, seed=1), speckled)
    assert torch.equal(salt_and_pepper(frames, 0.0), frames)


@given(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(6, 20), st.integers(6, 20), st.integers(0, 9))
def test_what_comes_out_are_frames(frames, channels, height, width, seed):
    before = clip(frames, channels, height, width, seed)
    kept = before.clone()
    for worse in (
        gaussian_blur(before, 3.0),
        fragment_blur(before, 5),
        gaussian_noise(before, -5.0, seed),
        salt_and_pepper(before, 0.5, seed),
    ):
        assert (worse.shape, worse.dtype) == (before.shape, before.dtype)
        assert 0 <= worse.min() <= worse.max() <= 1
        assert torch.equal(before, kept)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: gaussian_blur(clip(), 0), "sigma must be a finite number above 0, got 0"),
        (lambda: gaussian_blur(clip(), float("inf")), "sigma must be a finite number above 0, got inf"),
        (lambda: fragment_blur(clip(), 0), "distance must be a whole number from 1 to 24, got 0"),
        (lambda: fragment_blur(clip(), 25), "distance must be a whole number from 1 to 24, got 25"),
        (lambda: gaussian_noise(clip(), float("nan")), "decibels must be a finite number, got nan"),
        (lambda: salt_and_pepper(clip(), 1.1), "share must be from 0 to 1, got 1.1"),
        (lambda: salt_and_pepper(clip(), float("nan")), "share must be from 0 to 1, got nan"),
    ],
)
def test_levels_that_cannot_be_are_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()
