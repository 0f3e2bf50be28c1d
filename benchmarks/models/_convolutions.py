"""The convolutions that a network runs: how many operations they take, and how fast each is alone."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.benchmarks import harness
from vpfast.benchmarks.problem import Place

MOST_CALLS, FEWEST_CALLS = 200, 5


@dataclass(frozen=True)
class Convolution:
    """One convolution by its sizes: input (B, C, H, W), ``wide`` output channels, ``bias`` added or not."""

    batch: int
    channels: int
    height: int
    width: int
    wide: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each weight and output pixel; the bias is not counted."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        height, width = (self.height + 2 * ph - kh) // sh + 1, (self.width + 2 * pw - kw) // sw + 1
        return 2 * self.batch * height * width * self.wide * self.channels * kh * kw

    def call(self, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
        """It alone, in channels_last, with weights packed beforehand where torch can."""
        x = torch.randn(self.batch, self.channels, self.height, self.width, device=device).to(dtype)
        weight = torch.randn(self.wide, self.channels, *self.kernel, device=device).to(dtype)
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        bias = torch.randn(self.wide, device=device).to(dtype) if self.bias else None
        if device != "cpu" or not torch.backends.mkldnn.is_available():
            return lambda: F.conv2d(x, weight, bias, self.stride, self.padding)
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        run: Any = torch.ops.mkldnn._convolution_pointwise
        how = (self.padding, self.stride, (1, 1), 1)
        packed = pack(weight.to_mkldnn(), *how, tuple(x.shape))
        return lambda: run(x, packed, bias, *how, "none", [], "")  # type: ignore[no-any-return]


def convolutions_of(network: nn.Module, run: Callable[[], object]) -> Counter[Convolution]:
    """How often each convolution of ``network`` runs during ``run``."""
    found: Counter[Convolution] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(layer.padding, tuple)
        batch, channels, height, width = inputs[0].shape
        kernel, stride, padding = ((pair[0], pair[1]) for pair in (layer.kernel_size, layer.stride, layer.padding))
        wide, bias = layer.out_channels, layer.bias is not None
        found[Convolution(batch, channels, height, width, wide, kernel, stride, padding, bias)] += 1

    with _noting(network, note):
        run()
    return found


@contextmanager
def _noting(network: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(note) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def flops_of(convolutions: Counter[Convolution]) -> int:
    """Operations of all of them."""
    return sum(convolution.flops * count for convolution, count in convolutions.items())


@torch.no_grad()
def alone(convolutions: Counter[Convolution], dtype: torch.dtype, place: Place, seconds: float) -> float:
    """Milliseconds that all of them take when each distinct one is called alone, again and again: medians, weighted."""
    total = 0.0
    for convolution, count in convolutions.items():
        call = convolution.call(dtype, place.device)
        total += count * _median_ms(call, place.device, seconds / len(convolutions))
    return total


def _median_ms(call: Callable[[], object], device: str, seconds: float) -> float:
    def timed() -> float:
        if device == "cpu":
            return harness.seconds_of(call) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for _ in range(3):
        once = timed()
    calls = max(FEWEST_CALLS, min(MOST_CALLS, int(seconds * 1e3 / max(once, 1e-3))))
    return statistics.median(timed() for _ in range(calls))
