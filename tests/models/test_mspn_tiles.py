"""MSPN by the compiled step on matrix tiles, and what stands in for it elsewhere: exact as promised, and a drop-in."""

import copy
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vpfast
from vpfast.models import MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig
from vpfast.models._tiles import Size
from vpfast.models.mspn.cpu import LaidOutMSPN, TiledMSPN
from vpfast.ops import _native
from vpfast.ops._backend import has_registers

TILES = _native.extension is not None and _native.extension.isa() == "amx"
needs_tiles = pytest.mark.skipif(not TILES, reason="needs a processor with matrix tiles (AMX) and compiled kernels")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one level": {"levels": 1},
    "without enc_info": {"enc_info": False},
    "feed_frame": {"feed_frame": True},
    "average": {"down_sampling": "average"},
    "batch norm": {"batch_norm": True},
    "paper": {"gate_order": "fiog", "widen": "after_pool", "input_kernel_size": 3},
    "rgb, wide kernel": {"in_channels": 3, "input_kernel_size": 7},
    "many hidden channels": {"hidden_channels": 41, "channels": (33, 40, 70)},
    "weights in slabs": {"channels": (40, 140, 300), "hidden_channels": 33},
}
all_variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def lively(**changes: Any) -> MSPN:
    """A small MSPN whose predictions move: weights as first drawn leave them almost alike."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "channels": (12, 20, 36), "levels": 2, "hidden_channels": 10}
    model = MSPN(MSPNConfig(**{**fields, **changes})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1.0)
                if module.bias is not None and module.out_channels == model.config.in_channels:
                    module.bias.fill_(0.5)  # below 0 a frame's LeakyReLU leaves little to see
            if isinstance(module, nn.BatchNorm2d):
                for statistic in (module.weight, module.running_var):
                    assert statistic is not None
                    statistic.uniform_(0.5, 1.5)
                assert module.running_mean is not None
                module.running_mean.normal_(0, 0.2)
    return model


def clip(model: MSPN, batch: int = 2, time: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, time, model.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))


def in_float64(model: MSPN, frames: Tensor, horizon: int) -> Tensor:
    exact = MSPN(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    return exact.predict(frames.double(), horizon)


def error(prediction: Tensor, exact: Tensor) -> float:
    return (prediction.double() - exact).abs().max().item()


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def isa(name: str) -> Iterator[None]:
    assert _native.extension is not None
    _native.extension.select_isa(name)
    try:
        yield
    finally:
        _native.extension.select_isa("auto")


@needs_tiles
@all_variants
def test_as_exact_as_float32(changes: dict[str, Any]) -> None:
    model = lively(**changes)
    frames = clip(model)
    exact = in_float64(model, frames, 3)
    assert exact.std() > 0.01
    fast = vpfast.optimize(model)
    assert isinstance(fast, TiledMSPN)
    assert error(fast.predict(frames, 3), exact) <= 2 * error(model.predict(frames, 3), exact)


@needs_tiles
@pytest.mark.parametrize(("precision", "bits"), [("high", 16), ("medium", 8)])
def test_products_of_fewer_bits_where_torch_is_told_so(precision: str, bits: int) -> None:
    model = lively()
    frames = clip(model)
    exact = in_float64(model, frames, 3)
    with matmul_precision(precision):
        fast = vpfast.optimize(model)
    far = error(fast.predict(frames, 3), exact) / exact.abs().max().item()
    assert 2.0 ** -(bits + 6) < far < 2.0 ** -(bits - 5)  # no better either: that would be another precision


@needs_tiles
def test_bfloat16_is_as_exact_as_torch_in_bfloat16() -> None:
    model = lively()
    frames = clip(model)
    exact = in_float64(model, frames, 3)
    half = MSPN(model.config).eval().bfloat16()
    half.load_state_dict(model.state_dict())
    usual = error(half.predict(frames.bfloat16(), 3), exact)
    fast = vpfast.optimize(model, torch.bfloat16).predict(frames, 3)
    assert fast.dtype == torch.float32
    assert error(fast, exact) <= usual
    from_half = vpfast.optimize(half).predict(frames.bfloat16(), 3)
    assert from_half.dtype == torch.bfloat16
    assert error(from_half, exact) <= 2 * usual


@needs_tiles
@settings(max_examples=15)
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 6),
    width=st.integers(1, 9),
    time=st.integers(1, 3),
    horizon=st.integers(0, 3),
)
def test_any_size(batch: int, height: int, width: int, time: int, horizon: int) -> None:
    model, fast = _pair()
    frames = clip(model, batch, time, 4 * height, 4 * width)
    expected = model.predict(frames, horizon)
    torch.testing.assert_close(fast.predict(frames, horizon), expected, rtol=1e-4, atol=1e-4)


_made: list[tuple[MSPN, TiledMSPN]] = []


def _pair() -> tuple[MSPN, TiledMSPN]:
    if not _made:
        model = lively()
        fast = vpfast.optimize(model)
        assert isinstance(fast, TiledMSPN)
        _made.append((model, fast))
    return _made[0]


@needs_tiles
@pytest.mark.parametrize("changes", [{}, VARIANTS["weights in slabs"]], ids=["few channels", "weights in slabs"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_clips_beside_each_other_change_nothing(changes: dict[str, Any], precision: str) -> None:
    model = lively(**changes)
    with matmul_precision(precision):
        fast = vpfast.optimize(model)
    frames = clip(model, 5, 1, 32, 32)
    together = fast.predict(frames, 2)
    for k in range(5):
        assert torch.equal(fast.predict(frames[k : k + 1], 2)[0], together[k])


@needs_tiles
@pytest.mark.parametrize("changes", [{}, VARIANTS["weights in slabs"]], ids=["few channels", "weights in slabs"])
def test_the_number_of_threads_changes_nothing(changes: dict[str, Any]) -> None:
    model = lively(**changes)
    fast = vpfast.optimize(model)
    frames, before = clip(model, 1, 2, 32, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fast.predict(frames, 2)
        torch.set_num_threads(3)
        assert torch.equal(fast.predict(frames, 2), alone)
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_many_threads_at_once() -> None:
    model, fast = _pair()
    frames = [clip(model) * scale for scale in (1.0, 0.5, 0.25)]
    expected, found = [fast.predict(each, 4) for each in frames], [torch.empty(0)] * 3

    def predict(k: int) -> None:
        for _ in range(10):
            found[k] = fast.predict(frames[k], 4)
            if not torch.equal(found[k], expected[k]):
                return

    workers = [threading.Thread(target=predict, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_tiles
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_thread_predicts_predicts_too() -> None:
    model, fast = _pair()
    frames, threads = clip(model), torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP has no threads in a forked child
    try:
        expected = fast.predict(frames, 1)
        with fast._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(0 if torch.equal(fast.predict(frames, 1), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


@all_variants
@pytest.mark.parametrize("served", ["tiles", "channels_last"])
def test_a_stream_gives_what_the_clip_gives(served: str, changes: dict[str, Any]) -> None:
    if served == "tiles" and not TILES:
        pytest.skip("needs a processor with matrix tiles (AMX) and compiled kernels")
    model = lively(**changes)
    with vpfast.backend("auto" if served == "tiles" else "reference"):
        fast = vpfast.optimize(model)
    assert isinstance(fast, TiledMSPN if served == "tiles" else LaidOutMSPN)
    frames = clip(model)
    expected = fast.predict(frames, 3)
    state = fast.init_state(2, 16, 24)
    for time in range(3):
        _, state = fast.step(frames[:, time], state)
    for k in range(3):
        ahead, peeked = fast.peek(state)
        again, state = fast.step(None, peeked if k % 2 else state)
        assert torch.equal(ahead, again)
        assert torch.equal(again, expected[:, k])


NARROW: dict[str, Any] = {"channels": (6, 10, 12), "hidden_channels": 6}


@pytest.mark.skipif(not has_registers(), reason="needs kernels compiled for registers of a processor (AVX2)")
@pytest.mark.parametrize("feed_frame", [False, True])
@pytest.mark.parametrize(("size", "in_planes"), [((16, 32), True), ((16, 8), True), ((16, 24), False)])
def test_a_narrow_model_lies_in_planes_where_rows_fill_registers(
    size: tuple[int, int], in_planes: bool, feed_frame: bool
) -> None:
    model = lively(**NARROW, feed_frame=feed_frame)
    fast = LaidOutMSPN(model, None)
    frames = clip(model, 2, 3, *size)
    expected = fast.predict(frames, 2)
    torch.testing.assert_close(expected, model.predict(frames, 2), rtol=1e-4, atol=1e-4)
    state = fast.init_state(2, *size)
    for time in range(5):
        layout = torch.contiguous_format if in_planes else torch.channels_last
        assert all(error.is_contiguous(memory_format=layout) for error in state.errors)
        prediction, state = fast.step(frames[:, time] if time < 3 else None, fast.peek(state)[1])
        assert time < 3 or torch.equal(prediction, expected[:, time - 3])


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "float64"])
def test_other_models_lie_in_channels_last(wide: bool) -> None:
    model = lively(channels=(36, 40, 44), hidden_channels=36) if wide else lively(**NARROW).double()
    error = LaidOutMSPN(model, None).init_state(1, 16, 32).errors[0]
    assert error.is_contiguous(memory_format=torch.channels_last)


@needs_tiles
def test_no_method_changes_a_state() -> None:
    model, fast = _pair()
    frames = clip(model)
    _, state = fast.step(frames[:, 0], fast.init_state(2, 16, 24))
    first, after = fast.step(frames[:, 1], state)
    assert torch.equal(fast.peek(state)[0], first)
    again, after_again = fast.step(frames[:, 1], state)
    assert torch.equal(again, first)
    assert torch.equal(fast.peek(after)[0], fast.peek(after_again)[0])


@needs_tiles
def test_predictions_are_the_callers() -> None:
    _, fast = _pair()
    state = fast.init_state(2, 16, 24)
    prediction, ahead = fast.peek(state)
    kept = prediction.clone()
    prediction.fill_(7.0)
    assert torch.equal(fast.step(None, ahead)[0], kept)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_are_copied(backend: Any) -> None:
    model = lively()
    frames = clip(model)
    with vpfast.backend(backend):
        fast = vpfast.optimize(model)
    before = fast.predict(frames, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(fast.predict(frames, 1), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@needs_tiles
def test_large_values_are_not_lost() -> None:
    """A number past bfloat16's steps keeps all its bits: 1 + 2^-20 in a weight shows in the prediction."""
    model = lively(levels=1)
    head = model.levels[0].head
    assert isinstance(head, nn.Conv2d)
    frames = clip(model)
    before = vpfast.optimize(model).predict(frames, 1)
    with torch.no_grad():
        head.weight.mul_(1 + 2.0**-20)
        assert head.bias is not None
        head.bias.mul_(1 + 2.0**-20)
    gain = (vpfast.optimize(model).predict(frames, 1).double() / before.double()).median().item()
    assert gain == pytest.approx(1 + 2.0**-20, abs=2.0**-22)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_errors_are_those_of_the_model(backend: Any) -> None:
    model = lively()
    with vpfast.backend(backend):
        fast = vpfast.optimize(model)
    frames = clip(model)
    bad: list[tuple[Any, Any]] = [
        (frames[0], 1),
        (frames.double(), 1),
        (frames[..., :3], 1),
        (255 * frames, 1),
        (frames[:, :0], 1),
        (frames, -1),
        (frames, 0.5),
        ([1, 2], 1),
    ]
    for given_frames, horizon in bad:
        with pytest.raises((TypeError, ValueError)) as expected:
            model.predict(given_frames, horizon)
        with pytest.raises(type(expected.value)) as found:
            fast.predict(given_frames, horizon)
        assert str(found.value) == str(expected.value)
    state, its_own = fast.init_state(2, 16, 24), model.init_state(2, 16, 24)
    for frame in (frames, frames[:, 0].double(), (255 * frames[:, 0]).byte(), [1, 2]):
        with pytest.raises((TypeError, ValueError)) as expected:
            model.step(frame, its_own)  # type: ignore[arg-type]
        with pytest.raises(type(expected.value)) as found:
            fast.step(frame, state)  # type: ignore[arg-type]
        assert str(found.value) == str(expected.value)
    with pytest.raises(ValueError, match="the state was made for frames of shape"):
        fast.step(frames[:1, 0], fast.init_state(2, 16, 24))
    with pytest.raises(ValueError, match="multiple of 4"):
        fast.init_state(1, 6, 8)


def test_the_last_four_sizes_are_kept_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        arena_bytes = 64

        def __init__(self, *given: Any) -> None:
            sleep(0.001)

    monkeypatch.setattr("vpfast.models.mspn.cpu.Program", Slow)
    fast = TiledMSPN(lively(), None)

    def ask() -> None:
        for height in range(8, 64, 8):
            fast._program(Size(1, height, 8))

    together = [threading.Thread(target=ask) for _ in range(4)]
    for each in together:
        each.start()
    for each in together:
        each.join()
    assert len(fast._programs) == 4


@pytest.mark.parametrize("kind", [TiledMSPN, LaidOutMSPN])
def test_what_optimize_made_can_be_copied_and_sent(kind: Any) -> None:
    fast = kind(lively(), None)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert copied.config == fast.config
        if kind is LaidOutMSPN or (_native.extension is not None and _native.extension.isa() == "amx"):
            frames = torch.rand(1, 2, fast.config.in_channels, 16, 16)
            assert torch.equal(copied.predict(frames, 1), fast.predict(frames, 1))


def test_what_optimize_takes() -> None:
    with pytest.raises(TypeError, match="takes an MSPN or an SHRVQVAE, got Linear"):
        vpfast.optimize(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch\.float16"):
        vpfast.optimize(lively(), torch.float16)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        vpfast.optimize(lively(batch_norm=True).train())


@needs_tiles
def test_without_tiles_torch_serves() -> None:
    model = lively()
    frames = clip(model)
    fast = vpfast.optimize(model)
    with isa("avx512"):
        assert isinstance(vpfast.optimize(model), LaidOutMSPN)
        with pytest.raises(RuntimeError, match="no matrix tiles"):
            fast.predict(frames, 1)
    for kind in (model.double(), lively(recurrence="enc_lstm_dec")):
        other = vpfast.optimize(kind)
        assert isinstance(other, LaidOutMSPN)
        given_frames = frames.to(kind._weight.dtype)
        torch.testing.assert_close(other.predict(given_frames, 2), kind.predict(given_frames, 2), rtol=1e-4, atol=1e-4)


def test_an_shrvqvae_is_copied_whole() -> None:
    torch.manual_seed(0)
    model = SHRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(4, 8), prior_channels=8, prior_blocks=2, layers=2))
    frames = torch.rand(1, 2, 1, 8, 8)
    fast = vpfast.optimize(model.eval())
    expected = model.predict(frames, 1)
    assert torch.equal(fast.predict(frames, 1), expected)
    nn.init.zeros_(model.autoencoder.decoder[0].weight)  # type: ignore[arg-type]
    assert torch.equal(fast.predict(frames, 1), expected)
