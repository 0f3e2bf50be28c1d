"""Each protocol against the formula of the project that it is named after, with scikit-image as an oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate
from skimage.metrics import peak_signal_noise_ratio
from skimage.metrics import structural_similarity as skimage_ssim
from skimage.util.dtype import dtype_range
from torchmetrics.functional.image import structural_similarity_index_measure

from vpfast.metrics import PROTOCOLS, VideoMetrics, structural_similarity

NAMES = {
    "default": ["mse", "mae", "mse_sum", "mae_sum", "psnr", "ssim"],
    **{name: ["mse_sum", "mae_sum", "psnr", "ssim"] for name in ("openstl", "predrnn", "simvp", "mspn", "vptr")},
}


def clips(seed=0, shape=(3, 2, 3, 16, 20), noise=0.2):
    """Predictions that leave [0, 1], and 8-bit targets, as float32: what the projects get."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.avg_pool2d(torch.rand(shape, generator=generator).flatten(0, 1), 3, 1, 1).view(shape)
    target = (coarse * 255).round() / 255
    return target + noise * torch.randn(shape, generator=generator), target


def report(protocol, prediction, target, split=None, **options):
    metrics = VideoMetrics(protocol, **options)
    for a, b in zip(prediction.split(split or len(target)), target.split(split or len(target)), strict=True):
        metrics.update(a, b)
    return metrics.compute()


def each_frame(prediction, target):
    """(step, prediction (C, H, W), target) in float32, frame by frame, clip after clip."""
    for clip in range(len(target)):
        for step in range(target.shape[1]):
            yield step, prediction[clip, step].numpy(), target[clip, step].numpy()


def of_scikit_image(a, b, data_range):
    wide = (a, b) if a.dtype == np.uint8 else (a.astype(np.float64), b.astype(np.float64))
    return skimage_ssim(*wide, channel_axis=0, data_range=data_range)


def errors(a, b):
    difference = a.astype(np.float64) - b.astype(np.float64)
    return {"mse_sum": (difference**2).sum(), "mae_sum": np.abs(difference).sum()}


def openstl(a, b):
    """openstl/core/metrics.py with the scikit-image of its time, which took the range from the type."""
    low, high = dtype_range[np.float32]
    clipped = np.minimum(np.maximum(a, 0), 1)
    mse = np.mean((clipped.astype(np.float64) - b) ** 2)
    return {
        **errors(a, b),
        "psnr": 20 * np.log10(1 / np.sqrt(mse)),
        "ssim": of_scikit_image(clipped, b, data_range=high - low),
    }


def simvp(a, b):
    """API/metrics.py: uint8 minus uint8 is uint8, and so is its square."""
    clipped = np.minimum(np.maximum(a, 0), 1)
    mse = np.mean((np.uint8(clipped * 255) - np.uint8(b * 255)) ** 2)
    return openstl(a, b) | {"psnr": 20 * np.log10(255) - 10 * np.log10(mse)}


def predrnn(a, b):
    """core/trainer.py and core/utils/metrics.py."""
    a = np.minimum(np.maximum(a, 0), 1)
    x, y = np.uint8(a * 255), np.uint8(b * 255)
    mse = np.mean((np.int32(x) - np.int32(y)) ** 2)
    return {
        **errors(a, b),
        "psnr": 20 * np.log10(255) - 10 * np.log10(mse),
        "ssim": of_scikit_image(x, y, data_range=255),
    }


def mspn(a, b):
    """test.py with batches of one."""
    return {
        **errors(a, b),
        "psnr": peak_signal_noise_ratio(b.astype(np.float64), a.astype(np.float64), data_range=1.0),
        "ssim": of_scikit_image(a, b, data_range=1.0),
    }


def vptr(a, b):
    """utils/metrics.py: the window reaches over the edge into zeros."""
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell)[None] / bell.sum() ** 2
    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my, xx, yy, xy = (correlate(each, window, mode="constant") for each in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    ssim = ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2)) / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    mse = np.mean((x - y) ** 2)
    return {**errors(a, b), "psnr": -10 * np.log10(mse + 1e-8), "ssim": ssim.mean()}


ORACLES = {"openstl": openstl, "simvp": simvp, "predrnn": predrnn, "mspn": mspn, "vptr": vptr}


def test_every_protocol_has_an_oracle():
    assert set(PROTOCOLS) == {"default", *ORACLES} == set(NAMES)


@pytest.mark.parametrize("protocol", ORACLES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([1, 3]),
    height=st.integers(11, 30),
    width=st.integers(11, 30),
    noise=st.floats(0.01, 0.6),
)
def test_every_number_is_that_of_the_projects_formula(protocol, seed, channels, height, width, noise):
    prediction, target = clips(seed, (2, 2, channels, height, width), noise)
    result = report(protocol, prediction, target)
    assert list(result.per_frame) == NAMES[protocol]
    expected = {name: np.zeros(2) for name in NAMES[protocol]}
    for step, a, b in each_frame(prediction, target):
        for name, value in ORACLES[protocol](a, b).items():
            expected[name][step] += value / 2
    for name, values in expected.items():
        assert result.per_frame[name] == pytest.approx(values, rel=1e-7, abs=1e-9), name
        assert result.mean[name] == pytest.approx(values.mean(), rel=1e-7, abs=1e-9), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(max_examples=10)
@given(split=st.integers(1, 7), seed=st.integers(0, 100))
def test_how_clips_come_does_not_matter(protocol, split, seed):
    prediction, target = clips(seed, (7, 3, 1, 12, 13))
    for options in ({}, {"batch": 3}) if protocol == "mspn" else ({},):
        whole = report(protocol, prediction, target, **options)
        parts = report(protocol, prediction, target, split, **options)
        assert parts.clips == whole.clips == 7
        for name, values in whole.per_frame.items():
            assert parts.per_frame[name] == pytest.approx(values, rel=1e-12)


def test_mspns_batches_are_those_of_its_test():
    """Per step and batch, as test.py has it for Moving MNIST; the last batch is smaller."""
    prediction, target = clips(shape=(5, 2, 1, 16, 20))
    result = report("mspn", prediction, target, batch=2)
    for step in range(2):
        numbers = []
        for first in (0, 2, 4):
            a, b = (x[first : first + 2, step, 0].double().numpy() for x in (prediction, target))
            ssim = skimage_ssim(b, a, channel_axis=0, data_range=1.0)
            numbers.append((peak_signal_noise_ratio(b, a, data_range=1.0), ssim, ((a - b) ** 2).sum() / 2))
        psnr, ssim, mse = np.mean(numbers, axis=0)
        assert result.per_frame["psnr"][step] == pytest.approx(psnr, rel=1e-9)
        assert result.per_frame["ssim"][step] == pytest.approx(ssim, rel=1e-9)
        assert result.per_frame["mse_sum"][step] == pytest.approx(mse, rel=1e-9)
    alone = report("mspn", prediction, target)
    assert result.mean["psnr"] < alone.mean["psnr"]  # of a mean error, not a mean of PSNRs
    assert report("mspn", prediction[:4], target[:4], batch=2).mean["ssim"] == pytest.approx(
        report("mspn", prediction[:4], target[:4]).mean["ssim"], rel=1e-12
    )


def test_what_is_still_waiting_for_its_batch_is_reported_and_waits_on():
    prediction, target = clips(shape=(5, 2, 1, 16, 20))
    metrics = VideoMetrics("mspn", batch=2)
    metrics.update(prediction[:3], target[:3])
    assert metrics.compute() == report("mspn", prediction[:3], target[:3], batch=2)
    metrics.update(prediction[3:], target[3:])
    assert metrics.compute().mean == pytest.approx(report("mspn", prediction, target, batch=2).mean, rel=1e-12)


def test_a_batch_is_refused_where_it_makes_no_difference():
    with pytest.raises(ValueError, match="batch: 2 given, must be 1: protocol 'openstl' measures frame by frame"):
        VideoMetrics("openstl", batch=2)
    with pytest.raises(ValueError, match="batch: 0 given, must be at least 1"):
        VideoMetrics("mspn", batch=0)


def test_eight_bit_numbers_come_back_as_they_were():
    """k / 255 in float32 is k again under the protocols that measure 8-bit frames: no error out of nothing."""
    target = (torch.arange(256).float() / 255).view(1, 1, 1, 16, 16)
    for protocol in ("predrnn", "simvp"):
        assert report(protocol, target + 0.4 / 255, target).mean["psnr"] == 100  # cut off, not rounded
    shifted = (torch.arange(256).add(1).clamp(max=255).float() / 255).view(1, 1, 1, 16, 16)
    expected = -10 * np.log10(255 / 256 / 255**2)
    for protocol in ("predrnn", "simvp"):
        assert report(protocol, shifted, target).mean["psnr"] == pytest.approx(expected, rel=1e-12)


def test_eight_bit_numbers_are_those_of_float32_products():
    """As numpy has them in the projects, for every float32 number that is near to where the whole number changes."""
    near = np.arange(1, 256, dtype=np.float32) / np.float32(255)
    around = [near]
    for towards in (0, 1):
        step = near
        for _ in range(4):
            step = np.nextafter(step, np.float32(towards))
            around.append(step)
    frames = np.concatenate(around).reshape(9, 1, 1, 15, 17)
    cut = np.uint8(frames * 255)
    assert (cut.reshape(9, -1) < np.uint8(np.arange(1, 256))).any()  # some of them are just below
    prediction, target = torch.from_numpy(frames), torch.from_numpy(cut).float() / 255
    for protocol in ("predrnn", "simvp"):
        assert report(protocol, prediction, target).mean["psnr"] == 100


def test_simvps_psnr_does_not_see_a_difference_of_sixteen():
    target = torch.full((1, 1, 1, 16, 16), 100 / 255)
    assert report("simvp", target + 16 / 255, target).mean["psnr"] == 100
    assert report("predrnn", target + 16 / 255, target).mean["psnr"] == pytest.approx(20 * np.log10(255 / 16))
    black, white = torch.zeros(1, 1, 1, 16, 16), torch.ones(1, 1, 1, 16, 16)
    assert report("simvp", white, black).mean["psnr"] == pytest.approx(20 * np.log10(255))  # white for black: 48 dB
    assert report("predrnn", white, black).mean["psnr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("protocol", "ceiling"), [("vptr", 80.0), ("openstl", 100.0), ("mspn", 100.0)])
def test_an_exact_match_stays_finite(protocol, ceiling):
    target = clips()[1]
    assert report(protocol, target, target).mean["psnr"] == pytest.approx(ceiling)


def test_predictions_that_leave_the_range_are_clipped_where_the_project_clips():
    target = torch.ones(1, 1, 1, 12, 12)
    for protocol, counted in (("openstl", 1.0), ("simvp", 1.0), ("mspn", 1.0), ("vptr", 1.0), ("predrnn", 0.0)):
        assert report(protocol, target * 2, target).mean["mse_sum"] == counted * 144, protocol
    for protocol, clipped in (("openstl", True), ("simvp", True), ("predrnn", True), ("mspn", False), ("vptr", False)):
        assert (report(protocol, target * 2, target).mean["psnr"] > 90) == clipped, protocol


@settings(max_examples=15)
@given(seed=st.integers(0, 100), channels=st.sampled_from([1, 3]), side=st.integers(7, 20))
def test_the_uniform_window_is_scikit_images(seed, channels, side):
    a, b = (x[:, 0].clamp(0, 1).double() for x in clips(seed, (2, 1, channels, side, side + 3)))
    expected = [skimage_ssim(x.numpy(), y.numpy(), channel_axis=0, data_range=1.0) for x, y in zip(a, b, strict=True)]
    found = structural_similarity(a, b, border="valid", window="uniform")
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_gaussian_window_is_scikit_images_too():
    a, b = (x[:, 0].clamp(0, 1).double() for x in clips(shape=(2, 1, 3, 24, 31)))
    like_wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for x, y in zip(a, b, strict=True):
        expected = skimage_ssim(x.numpy(), y.numpy(), channel_axis=0, data_range=1.0, **like_wang)
        assert structural_similarity(x[None], y[None], border="valid").item() == pytest.approx(expected, rel=1e-9)
        everywhere = structural_similarity_index_measure(x[None], y[None], data_range=1.0).item()
        assert structural_similarity(x[None], y[None]).item() == pytest.approx(everywhere, rel=1e-9)


def test_ssim_refuses_what_it_does_not_know():
    a, b = (x[:, 0] for x in clips())
    with pytest.raises(
        ValueError, match="border 'same' and window 'gaussian' given, must be one of reflect, zeros, valid"
    ):
        structural_similarity(a, b, border="same")
    with pytest.raises(ValueError, match="at least 7x7 pixels, its window; got 6x20"):
        structural_similarity(a[..., :6, :], b[..., :6, :], border="valid", window="uniform")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reports_read_well(protocol):
    result = report(protocol, *clips())
    lines = result.markdown().splitlines()
    assert lines[-1] == f"Protocol `{protocol}`, 3 clips."
    assert all(line.count("|") == 2 + len(NAMES[protocol]) for line in lines if line.startswith("|"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_gpu_gives_the_same_numbers(protocol):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    prediction, target = clips()
    on_gpu = report(protocol, prediction.cuda(), target.cuda())
    assert on_gpu.mean == pytest.approx(report(protocol, prediction, target).mean, rel=1e-9)
