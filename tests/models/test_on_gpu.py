"""The models by the backends of a GPU: switching while training changes nothing; on a GPU what the CPU gives."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import interpreter
import pytest
import torch
from spreading import spread
from torch import Tensor, nn

import vpfast
from vpfast.models import MSPN, SHRVQVAE, GraphedStep, MSPNConfig, SHRVQVAEConfig
from vpfast.models.mspn import pixel_loss
from vpfast.models.mspn.captured import optimize_mspn
from vpfast.models.shrvqvae import hrvqvae_loss, joint_loss, sample

CODES: dict[str, Any] = {
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
    "prior_heads": 1,
    "prior_head_dim": 4,
    "prior_ffn": 5,
    "prior_head": 5,
}
FRAMES = torch.rand(2, 4, 1, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GIVEN, COMING = 2, 2

Loss = Callable[[Any, Tensor], Tensor]


def mspn() -> nn.Module:
    return MSPN(MSPNConfig(in_channels=1, channels=(4, 6, 8), levels=2, hidden_channels=4))


def hrvqvae() -> nn.Module:
    return whole().autoencoder


def whole(**changes: Any) -> SHRVQVAE:
    """Its codewords are spread, as training leaves them."""
    model = SHRVQVAE(SHRVQVAEConfig(**{**CODES, **changes}))
    spread(model, FRAMES.float())
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "MSPN": (mspn, lambda model, frames: pixel_loss(model(frames), frames)),
    "HR-VQVAE": (hrvqvae, lambda model, frames: hrvqvae_loss(model(frames), frames)),
    "S-HR-VQVAE": (whole, lambda model, frames: joint_loss(model, frames, GIVEN)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def made(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().to(dtype)


def train(model: nn.Module, loss: Loss, frames: Tensor, backends: Sequence[Any]) -> list[Tensor]:
    """A step by each of ``backends``; every loss, and the weights after the last step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for backend in backends:
        with vpfast.backend(backend):
            value = loss(model.train(), frames)
            optimizer.zero_grad()
            value.backward()
        optimizer.step()
        losses.append(value.detach())
    return [*losses, *(parameter.detach() for parameter in model.parameters())]


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-7) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=tolerance, atol=tolerance)


@every_kind
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_switching_backends_in_training_changes_nothing(kind: str) -> None:
    if DEVICE == "cpu":
        interpreter.mend()
    frames = FRAMES.to(DEVICE)
    switched = train(made(kind).to(DEVICE), KINDS[kind][1], frames, ["auto", "triton", "reference", "triton", "auto"])
    plain = train(made(kind).to(DEVICE), KINDS[kind][1], frames, ["reference"] * 5)
    assert len({value.item() for value in plain[:5]}) == 5
    assert_close(switched, plain)


# --- on a GPU what the CPU gives --------------------------------------------------------------------------------------


@needs_gpu
@every_kind
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_training(kind: str, backend: Any) -> None:
    found = train(made(kind).cuda(), KINDS[kind][1], FRAMES.cuda(), [backend] * 4)
    assert_close(found, train(made(kind), KINDS[kind][1], FRAMES, ["auto"] * 4))


@needs_gpu
@pytest.mark.parametrize("kind", ["MSPN", "S-HR-VQVAE"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_predicting_and_streaming(kind: str, backend: Any) -> None:
    model, frames = made(kind).eval(), FRAMES
    wanted = model.predict(frames, COMING)
    on_gpu = made(kind).eval().cuda()
    with vpfast.backend(backend):
        assert_close([on_gpu.predict(frames.cuda(), COMING)], [wanted])
        stream = vpfast.Stream(on_gpu)
        for time in range(frames.shape[1]):
            pushed = stream.push(frames[:, time].cuda())
        assert_close([pushed, stream.rollout(COMING)], [wanted[:, 0], wanted])


@needs_gpu
@pytest.mark.parametrize("conditioning", ["raster", "eq6", "past_frames"])
@pytest.mark.parametrize("attention", ["full", "axial", "window"])
def test_sampling(conditioning: str, attention: str) -> None:
    torch.manual_seed(0)
    model = whole(conditioning=conditioning, attention=attention, attention_window=(1, 1, 1)).double().eval()
    given = model.autoencoder.encode(FRAMES).indices
    draws: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": [3, 8], "num_futures": 2}]
    wanted = [sample(model.prior, given, COMING, **each) for each in draws]
    model = model.cuda()
    for each, codes in zip(draws, wanted, strict=True):
        assert torch.equal(sample(model.prior, given.cuda(), COMING, **each).cpu(), codes)


@needs_gpu
def test_in_single_precision_and_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    wanted = made("MSPN", torch.float32).predict(FRAMES.float(), COMING)
    model = made("MSPN", torch.float32).cuda().to(memory_format=torch.channels_last)
    assert_close([model.predict(FRAMES.float().cuda(), COMING)], [wanted], 1e-4)


@needs_gpu
@every_kind
def test_under_autocast(kind: str) -> None:
    """Half precision wanders off from the same start, but not far in a step."""
    frames = FRAMES.float().cuda()
    model = made(kind, torch.float32).cuda()
    wanted = KINDS[kind][1](model, frames)
    with torch.autocast("cuda", torch.bfloat16):
        loss = KINDS[kind][1](model, frames)
    loss.backward()
    assert abs(loss.item() / wanted.item() - 1) < 0.1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- recorded as CUDA graphs ------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("levels", [2, 3])
def test_mspn_in_graphs(overlap: bool, levels: int) -> None:
    """Shapes by turns, again and again: each replay finds the memory as others left it."""
    torch.manual_seed(0)
    channels = (8, 16, 16, 16)[: levels + 1]
    model = MSPN(MSPNConfig(in_channels=3, channels=channels, levels=levels, hidden_channels=8)).double().eval()
    fast = optimize_mspn(model.cuda(), None, overlap=overlap)
    model = model.cpu()
    clips = torch.rand(5, 4, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for batch, horizon in [(1, 3), (5, 3), (3, 3), (1, 2), (1, 3), (4, 3), (5, 3)]:
        frames = clips[:batch]
        assert_close([fast.predict(frames.cuda(), horizon)], [model.predict(frames, horizon)])
        stream, plain = vpfast.Stream(fast), vpfast.Stream(model)
        for time in range(4):
            pushed, wanted = stream.push(frames[:, time].cuda()), plain.push(frames[:, time])
        assert_close([pushed, stream.rollout(2)], [wanted, plain.rollout(2)])


@needs_gpu
def test_mspn_in_graphs_from_several_streams() -> None:
    """Calls on other streams wait for each other, as they share memory; nobody waits on the host."""
    model = made("MSPN").eval().cuda()
    fast = vpfast.optimize(model)
    clips = [torch.rand(2, 4, 1, 8, 12, dtype=torch.float64).cuda() for _ in range(12)]
    wanted = [model.predict(frames, COMING) for frames in clips]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for turn, frames in enumerate(clips):
        with torch.cuda.stream(streams[turn % 3]):
            found.append(fast.predict(frames, COMING))
    torch.cuda.synchronize()
    assert_close(found, wanted)


@needs_gpu
def test_mspn_in_half_precision() -> None:
    torch.manual_seed(0)
    model = MSPN(MSPNConfig.preset("released-mnist")).eval().cuda()
    frames = torch.rand(2, 4, 1, 64, 64, device="cuda")
    wanted = model.predict(frames, 4)
    found = vpfast.optimize(model, torch.bfloat16).predict(frames, 4)
    assert found.dtype == torch.float32
    assert 10 * torch.log10(1 / (found - wanted).square().mean()) > 40  # PSNR


@needs_gpu
def test_recorded_within_a_graph_of_the_callers() -> None:
    model = made("MSPN").eval().cuda()
    fast = vpfast.optimize(model)
    frames = FRAMES.cuda()
    wanted = fast.predict(frames, COMING)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fast.predict(frames, COMING)
    found.zero_()
    graph.replay()
    assert_close([found], [wanted])


@needs_gpu
@pytest.mark.parametrize("code_order", ["depth", "layers", "independent"])
@pytest.mark.parametrize("attention", ["full", "axial", "window"])
def test_sampling_in_graphs(code_order: str, attention: str) -> None:
    torch.manual_seed(0)
    model = whole(code_order=code_order, attention=attention, attention_window=(1, 1, 1)).double().eval().cuda()
    fast, frames = vpfast.optimize(model), FRAMES.cuda()
    draws: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": [3, 8], "num_futures": 2}, {"top_k": 2}]
    for draw in draws:
        assert_close([fast.predict(frames, COMING, **draw)], [model.predict(frames, COMING, **draw)])
    stream = vpfast.Stream(fast)
    for time in range(frames.shape[1]):
        stream.push(frames[:, time])
    assert_close([stream.rollout(COMING)], [model.predict(frames, COMING)])


@needs_gpu
def test_training_in_graphs() -> None:
    clips = [torch.rand(2, 4, 1, 8, 12, dtype=torch.float64, device="cuda") for _ in range(5)]

    def trained(graphed: bool) -> list[Tensor]:
        model = made("MSPN").cuda()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
        step = GraphedStep(model, lambda frames: pixel_loss(model(frames[:, :2], horizon=2), frames))
        losses = []
        for frames in clips:
            optimizer.zero_grad()
            if graphed:
                loss = step(frames)
            else:
                loss = step.loss(frames)
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(parameter.detach() for parameter in model.parameters())]

    assert_close(trained(True), trained(False))
