"""Metrics against torchmetrics and against hand-made numbers; the same however the batches fall."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vpfast.metrics import VideoMetrics, structural_similarity

NAMES = ["mse", "mae", "mse_sum", "mae_sum", "psnr", "ssim"]


def clips(seed=0, shape=(3, 4, 3, 16, 20), noise=0.2):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator)
    return target + noise * torch.randn(shape, generator=generator), target


def report(prediction, target, split=None):
    metrics = VideoMetrics()
    for a, b in zip(prediction.split(split or len(target)), target.split(split or len(target)), strict=True):
        metrics.update(a, b)
    return metrics.compute()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([1, 3]),
    height=st.integers(11, 40),
    width=st.integers(11, 40),
    noise=st.floats(0.001, 1),
)
def test_every_number_is_torchmetrics_of_the_clipped_frames(seed, channels, height, width, noise):
    prediction, target = clips(seed, (2, 3, channels, height, width), noise)
    result = report(prediction, target)
    clipped, real = prediction.clamp(0, 1).double(), target.double()
    for step in range(3):
        a, b = clipped[:, step], real[:, step]
        oracle = {
            "mse": (a - b).square().mean(),
            "mae": (a - b).abs().mean(),
            "mse_sum": (a - b).square().sum() / 2,
            "mae_sum": (a - b).abs().sum() / 2,
            "psnr": peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3)),
            "ssim": structural_similarity_index_measure(a, b, data_range=1.0),
        }
        assert list(result.per_frame) == NAMES
        for name, value in oracle.items():
            tolerance = 1e-6 if name == "psnr" else 1e-9  # torchmetrics takes its logarithms in float32
            assert result.per_frame[name][step] == pytest.approx(value.item(), rel=tolerance, abs=1e-9), name
    for name in NAMES:
        assert result.mean[name] == pytest.approx(np.mean(result.per_frame[name]), rel=1e-12)


def test_float32_frames_agree_with_torchmetrics_in_float32():
    prediction, target = clips(shape=(2, 2, 1, 64, 64))
    oracle = structural_similarity_index_measure(
        prediction.clamp(0, 1).flatten(0, 1), target.flatten(0, 1), data_range=1.0
    )
    assert report(prediction, target).mean["ssim"] == pytest.approx(oracle.item(), abs=2e-6)


def test_valid_border_is_the_mean_over_whole_windows():
    a, b = (x[:, 0].clamp(0, 1).double() for x in clips(shape=(2, 1, 3, 24, 31)))
    _, everywhere = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    expected = everywhere[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert torch.allclose(structural_similarity(a, b, border="valid"), expected, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(split=st.integers(1, 7), seed=st.integers(0, 100))
def test_batches_do_not_matter(split, seed):
    prediction, target = clips(seed, (7, 3, 1, 12, 13))
    whole, parts = report(prediction, target), report(prediction, target, split)
    assert parts.clips == whole.clips == 7
    for name in NAMES:
        assert parts.per_frame[name] == pytest.approx(whole.per_frame[name], rel=1e-12)
        assert parts.mean[name] == pytest.approx(whole.mean[name], rel=1e-12)


def test_large_frames_are_taken_in_pieces(monkeypatch):
    prediction, target = clips()
    whole = report(prediction, target)
    monkeypatch.setattr("vpfast.metrics.video_metrics._IN_CACHE", 1)
    assert report(prediction, target).mean == pytest.approx(whole.mean, rel=1e-12)


def test_memory_holds_sums_only():
    metrics = VideoMetrics()
    for seed in range(5):
        metrics.update(*clips(seed))
    held = [value for value in vars(metrics).values() if isinstance(value, torch.Tensor)]
    assert held == []
    assert {name: tuple(sums.shape) for name, sums in metrics._sums.items()} == dict.fromkeys(NAMES, (4,))


def test_an_exact_match_is_100_db_and_the_mean_stays_finite():
    target = clips()[1]
    prediction = target.clone()
    prediction[:, 1] = (prediction[:, 1] + 0.1).clamp(max=1)
    result = report(prediction, target)
    assert result.per_frame["psnr"][0] == 100.0
    assert result.per_frame["psnr"][1] < 30
    assert math.isfinite(result.mean["psnr"])
    assert result.per_frame["ssim"][0] == pytest.approx(1, abs=1e-12)
    assert result.per_frame["mse"][0] == 0


def test_known_numbers():
    target = torch.full((1, 2, 3, 11, 11), 0.5)
    prediction = target.clone()
    prediction[:, 1] = 0.6
    result = report(prediction, target)
    assert result.per_frame["mse"][1] == pytest.approx(0.01, rel=1e-6)
    assert result.per_frame["mse_sum"][1] == pytest.approx(0.01 * 363, rel=1e-6)
    assert result.per_frame["mae_sum"][1] == pytest.approx(0.1 * 363, rel=1e-6)
    assert result.per_frame["psnr"][1] == pytest.approx(20, rel=1e-6)
    assert result.mean["mae"] == pytest.approx(0.05, rel=1e-6)


def test_predictions_are_clipped():
    target = torch.ones(1, 1, 1, 11, 11)
    assert report(target * 7, target).mean["mse"] == 0
    assert report(target * -7, target).mean["mse"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_and_layouts(dtype):
    prediction, target = (x.clamp(0, 1).to(dtype) for x in clips())
    flipped = prediction.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert report(flipped, target).mean == pytest.approx(report(prediction.double(), target.double()).mean, rel=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_changes_nothing(first):
    prediction, target = clips()
    metrics = VideoMetrics()
    for split in (target[:0], target) if first else (target, target[:0]):
        metrics.update(prediction[: len(split)], split)
    assert metrics.compute() == report(prediction, target)


def test_the_report_reads_well():
    result = report(*clips())
    assert json.loads(json.dumps(result.to_dict()))["mean"] == result.mean
    lines = result.markdown().splitlines()
    assert lines[0].startswith("| frame | MSE")
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 4 + 1
    assert all(line.count("|") == 8 for line in lines if line.startswith("|"))
    assert f"**{result.mean['ssim']:.4f}**" in lines[-3]
    assert lines[-1] == "Protocol `default`, 3 clips."


def test_refusals():
    prediction, target = clips()
    metrics = VideoMetrics()
    with pytest.raises(ValueError, match="no frame was given"):
        metrics.compute()
    with pytest.raises(ValueError, match="protocol 'psnr-hvs' does not exist; there is: default"):
        VideoMetrics("psnr-hvs")
    with pytest.raises(ValueError, match=r"got \(2, 4, 3, 16, 20\) and \(3, 4, 3, 16, 20\)"):
        metrics.update(prediction[:2], target)
    with pytest.raises(ValueError, match="must both be"):
        metrics.update(prediction[0], target[0])
    with pytest.raises(ValueError, match="at least 11x11 pixels, its window; got 10x20"):
        metrics.update(prediction[..., :10, :], target[..., :10, :])
    with pytest.raises(TypeError, match="divide 8-bit frames by 255"):
        metrics.update(prediction, (target * 255).byte())
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\], found .* to 25"):
        metrics.update(prediction, target * 255)
    for other_scale in (prediction * 255, prediction * -255):
        with pytest.raises(
            ValueError, match=r"prediction must be on the scale .* found -?\d+.* divide 8-bit frames by 255"
        ):
            metrics.update(other_scale, target)
    for bad in (math.nan, math.inf):
        broken = prediction.clone()
        broken[2, 1, 0, 3, 3] = bad
        with pytest.raises(ValueError, match="prediction holds NaN or infinity, first in clip 2 of the batch, frame 1"):
            metrics.update(broken, target)
    metrics.update(prediction, target)
    with pytest.raises(ValueError, match=r"were \(4, 3, 16, 20\) .* now \(3, 3, 16, 20\)"):
        metrics.update(prediction[:, :3], target[:, :3])
    assert metrics.compute().clips == 3  # what was refused was not counted


def test_a_gpu_gives_the_same_numbers():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    prediction, target = clips()
    assert report(prediction.cuda(), target.cuda()).mean == pytest.approx(report(prediction, target).mean, rel=1e-9)
