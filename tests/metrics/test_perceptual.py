"""LPIPS: what it says where something is missing, and what it measures with a backbone that stands in for AlexNet's.

The weights of the real backbone are 233 MB and torchvision goes with one torch alone, so the tests bring a torchvision
of their own: its AlexNet has the right layers with random weights. The package's own linear heads are the real ones.
"""

import builtins
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from urllib.error import URLError

import pytest
import torch
from torch import nn

from vpfast.metrics import PROTOCOLS, VideoMetrics
from vpfast.metrics.perceptual import Perceptual

needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="needs the package lpips")


def alexnet(pretrained=False, weights=None):
    """The convolutions of torchvision's AlexNet, with random weights that are the same every time."""
    if not (pretrained or weights):
        raise AssertionError("LPIPS of a backbone that was never trained")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
    return types.SimpleNamespace(features=features)


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision with an AlexNet and nothing else."""
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.__spec__, models.__spec__ = ModuleSpec("torchvision", None), ModuleSpec("torchvision.models", None)
    package.models, package.__path__ = models, []
    models.alexnet, models.AlexNet_Weights = alexnet, types.SimpleNamespace(DEFAULT="trained")
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    yield models
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        del sys.modules[name]


def frames(channels=3, side=40, count=3):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(count, channels, side, side, generator=generator)
    return target + 0.2 * torch.randn(target.shape, generator=generator), target


def by_hand(prediction, target):
    """Zhang et al., Eq. 1, on frames scaled to [-1, 1]: unit-length features, squared differences, learned weights."""
    import lpips

    heads = torch.load(f"{lpips.__path__[0]}/weights/v0.1/alex.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (
        ((each.expand(-1, 3, -1, -1) - shift[:, None, None]) / scale[:, None, None]) for each in (prediction, target)
    )
    total, taps = torch.zeros(len(x)), iter(range(5))
    for layer in alexnet(pretrained=True).features[:12]:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            weights = heads[f"lin{next(taps)}.model.1.weight"]
            unit = [each / (each.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for each in (x, y)]
            total += ((unit[0] - unit[1]).square() * weights).sum(dim=1).mean(dim=(1, 2))
    return total.double()


@needs_lpips
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_the_distance_is_the_papers_formula_with_the_packages_heads(torchvision, channels):
    prediction, target = frames(channels)
    distance = Perceptual()(prediction * 2 - 1, target * 2 - 1)
    assert distance.dtype == torch.float64
    assert distance.shape == (3,)
    assert torch.allclose(distance, by_hand(prediction * 2 - 1, target * 2 - 1), rtol=1e-4)
    assert (distance > 0.001).all()
    assert (Perceptual()(target, target) == 0).all()


@needs_lpips
@torch.no_grad()
def test_torchmetrics_agrees(torchvision, monkeypatch):
    from torchmetrics.functional.image import lpips as of_torchmetrics

    monkeypatch.setattr(of_torchmetrics, "_TORCHVISION_AVAILABLE", True)
    oracle = of_torchmetrics._LPIPS(pretrained=True, net="alex")
    prediction, target = frames()
    expected = oracle(prediction * 2 - 1, target * 2 - 1).flatten().double()
    assert torch.allclose(Perceptual()(prediction * 2 - 1, target * 2 - 1), expected, rtol=1e-3)


@needs_lpips
@pytest.mark.parametrize("protocol", PROTOCOLS)
@torch.no_grad()
def test_every_protocol_feeds_the_network_its_own_way(torchvision, protocol):
    prediction, target = (x.view(3, 1, 3, 40, 40) for x in frames())
    metrics = VideoMetrics(protocol, lpips=True)
    metrics.update(prediction, target)
    a, b = prediction[:, 0], target[:, 0]
    name, fed = {
        "default": ("lpips", (a.clamp(0, 1) * 2 - 1, b * 2 - 1)),
        "openstl": ("lpips", (a.clamp(0, 1) * 2 - 1, b * 2 - 1)),
        "simvp": ("lpips", (a.clamp(0, 1) * 2 - 1, b * 2 - 1)),
        "predrnn": ("lpips", (a.clamp(0, 1), b)),
        "mspn": ("lpips_x100", (a * 2 - 1, b * 2 - 1)),
        "vptr": ("lpips", ((a - 0.6013795) / 2.7570653, (b - 0.6013795) / 2.7570653)),
    }[protocol]
    expected = by_hand(*fed).mean().item() * (100 if protocol == "mspn" else 1)
    report = metrics.compute()
    assert list(report.mean)[-1] == name
    assert report.mean[name] == pytest.approx(expected, rel=1e-4)
    assert "LPIPS" in report.markdown()


@needs_lpips
@torch.no_grad()
def test_chunks_do_not_matter(torchvision, monkeypatch):
    prediction, target = (x.view(3, 1, 3, 40, 40) for x in frames())
    whole, parts = (VideoMetrics(lpips=True) for _ in range(2))
    whole.update(prediction, target)
    monkeypatch.setattr("vpfast.metrics.video_metrics._PIXELS_AT_ONCE", 1)
    parts.update(prediction, target)
    assert parts.compute().mean == pytest.approx(whole.compute().mean, rel=1e-5)


def test_another_distance_can_be_given():
    metrics = VideoMetrics(lpips=lambda a, b: (a - b).abs().flatten(1).mean(dim=1))
    target = torch.full((2, 3, 1, 12, 12), 0.5)
    metrics.update(target + 0.1, target)
    assert metrics.compute().per_frame["lpips"] == pytest.approx([0.2] * 3, rel=1e-5)  # on the scale [-1, 1]


def test_nothing_is_imported_before_it_is_asked_for(monkeypatch):
    def fail(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("lpips", "torchvision")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", fail)
    VideoMetrics()


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"packages lpips and torchvision, .* pip install 'vpfast\[lpips\]'"):
        VideoMetrics(lpips=True)


@needs_lpips
def test_a_missing_torchvision_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="First install the torchvision that goes with your torch"):
        VideoMetrics(lpips=True)


@needs_lpips
def test_missing_weights_are_told_with_the_place_to_put_them(torchvision, monkeypatch, tmp_path):
    def download(**kwargs):
        raise URLError("Name or service not known")

    torchvision.alexnet = download
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        VideoMetrics(lpips=True)
    said = str(error.value)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said
    assert said.endswith(f"place it at {tmp_path}/checkpoints/alexnet-owt-7be5be79.pth")


@needs_lpips
def test_frames_that_the_network_cannot_take_are_refused(torchvision):
    distance = Perceptual()
    distance(*frames(side=31))
    with pytest.raises(ValueError, match="LPIPS needs frames of at least 31x31 pixels, got 30x30"):
        distance(*frames(side=30))
    with pytest.raises(ValueError, match="LPIPS is of frames with 1 or 3 channels, got 2"):
        distance(*frames(channels=2))
