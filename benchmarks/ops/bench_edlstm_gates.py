"""edlstm_gates against eager PyTorch and torch.compile of the same formula: ``vpfast bench edlstm_gates``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpfast.benchmarks import gpu
from vpfast.benchmarks.problem import (
    OWN,
    Bar,
    Benchmark,
    Call,
    Case,
    Growth,
    Memory,
    Place,
    Problem,
    Row,
    hold,
    in_words,
    median,
    ratio,
    relative_error,
)
from vpfast.ops import current_backend, edlstm_gates
from vpfast.ops._library import operator
from vpfast.ops.edlstm_gates import reference
from vpfast.ops.edlstm_gates.register import backends

SHAPES = {
    "MSPN level 0, batch 8, 64x64": (8, 256, 64, 64),
    "MSPN level 0, batch 1, 128x128": (1, 256, 128, 128),
    "MSPN level 2, batch 8, 16x16": (8, 256, 16, 16),
}
GPU_SHAPES = {"MSPN level 0, batch 32, 64x64": (32, 256, 64, 64), "MSPN level 2, batch 8, 16x16": (8, 256, 16, 16)}
BATCHES = (1, 2, 4, 8, 16)
LARGE = 100e6  # bytes moved, from which on the copy rate is to be reached on a GPU

MOVED = {"forward": 7, "backward": 12}
"""Elements of a map that are read and written for one of the cell: gates count four."""
FLOPS = {"forward": 21, "backward": 42}
"""For an element of the cell, an exponential counted as one. Forward: a sigmoid takes 3, a tanh 4, and 4 join them.
Backward computes c again (20 in all) and takes 22 for the six gradients."""

Gating = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """One call of the operator. ``phase``: ``forward``, ``backward``, or both joined by `` + ``."""

    title: str
    shape: tuple[int, ...]
    phase: str
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    memory: Memory = "recycled"

    @property
    def elements(self) -> int:
        """Of the cell."""
        return torch.Size(self.shape).numel() // 4

    @property
    def moved(self) -> int:
        return sum(MOVED[part] for part in self.phase.split(" + ")) * self.elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return sum(FLOPS[part] for part in self.phase.split(" + ")) * self.elements

    def case(self, *, compiled: bool = True) -> Case:
        dtype = [] if self.dtype == torch.float32 else [in_words(self.dtype)]
        memory = [] if self.memory == "recycled" else [f"{self.memory} memory"]
        title = ", ".join([self.title, *dtype, self.layout, *memory, self.phase])
        return Case(title, lambda place: Inputs(self, place).problem(title, compiled), self.memory)


class Inputs:
    """What a setting computes on, and the right results in float64."""

    def __init__(self, setting: Setting, place: Place) -> None:
        batch, channels, *size = setting.shape
        cell = (batch, channels // 4, *size)
        layout = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
        drawn = [torch.randn(s, device=place.device).to(setting.dtype) for s in (setting.shape, cell, cell, cell)]
        gates, c_prev, *grads = (tensor.contiguous(memory_format=layout) for tensor in drawn)
        self.setting, self.place = setting, place
        self.gates, self.c_prev = gates.requires_grad_(), c_prev.requires_grad_()
        self.grads = (grads[0], grads[1])
        exact_in = [tensor.detach().double().requires_grad_() for tensor in (gates, c_prev)]
        exact = reference.edlstm_gates(exact_in[0], exact_in[1])
        self.exact: tuple[Tensor, ...] = exact
        if "backward" in setting.phase:
            self.exact = torch.autograd.grad(exact, exact_in, [grad.double() for grad in self.grads])

    def forward(self, gating: Gating) -> Call:
        return lambda: gating(self.gates.detach(), self.c_prev.detach())

    def both(self, gating: Gating) -> Call:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(gating(self.gates, self.c_prev), (self.gates, self.c_prev), self.grads)

        return run

    def backward(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda: function(*self.grads, self.gates.detach(), self.c_prev.detach())

    def own_backward(self) -> Call:
        return lambda: operator("edlstm_gates_backward", current_backend())(
            *self.grads, self.gates.detach(), self.c_prev.detach(), "fiog"
        )

    def contenders(self, compiled: bool) -> dict[str, Call]:
        if self.setting.phase == "backward":
            own, plain = self.own_backward(), reference.edlstm_gates_backward
            peers = {"torch.compile": self.backward(torch.compile(plain)), "eager": self.backward(plain)}
        else:
            made = self.forward if self.setting.phase == "forward" else self.both
            own, gates = made(edlstm_gates), reference.edlstm_gates
            peers = {"torch.compile": made(torch.compile(gates)), "eager": made(gates)}
        if not compiled:
            del peers["torch.compile"]
        return (gpu.by_backend(backends, self.place.device, own) if self.place.gpu else {OWN: own}) | peers

    def problem(self, title: str, compiled: bool) -> Problem:
        limit = 4 * torch.finfo(self.setting.dtype).eps

        def check(name: str, found: tuple[Tensor, ...]) -> None:
            hold(name, "relative error", max(map(relative_error, found, self.exact)), limit)

        def finish(rows: list[Row]) -> Sequence[Bar]:
            if not self.place.gpu or self.setting.moved < LARGE or self.setting.phase == "forward + backward":
                return ()
            share = ratio(median(rows, "copy"), median(rows, OWN))
            return [Bar(f"{title}, of the copy rate", share, 0.9, "")]

        setting = self.setting
        moved, flops = setting.moved, setting.flops
        return Problem(self.contenders(compiled), check, moved, flops, setting.dtype, finish=finish)


def cases(place: Place) -> Iterator[Case]:
    if place.gpu:
        yield from gpu_cases(place)
        return
    shapes = {"small": (1, 16, 8, 8)} if place.small else SHAPES
    memories: tuple[Memory, ...] = ("fresh", "recycled")  # in this order: see harness.allocator
    for memory in memories:
        for title, shape in shapes.items():
            for layout in ("contiguous", "channels_last"):
                for phase in ("forward", "forward + backward"):
                    yield Setting(title, shape, phase, layout, memory=memory).case()


def gpu_cases(place: Place) -> Iterator[Case]:
    shapes = {"small": (1, 16, 8, 8)} if place.small else GPU_SHAPES
    for title, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for phase in ("forward", "backward", "forward + backward"):
                    yield Setting(title, shape, phase, layout, dtype).case(compiled=layout == "contiguous")


def growth(place: Place) -> Iterator[Growth]:
    size = (16, 8, 8) if place.small else (256, 64, 64)
    for phase in ("forward", "forward + backward"):
        settings = {batch: Setting(f"batch {batch}, {size[1]}x{size[2]}", (batch, *size), phase) for batch in BATCHES}
        sizes = {batch: setting.case(compiled=False) for batch, setting in settings.items()}
        yield Growth(f"MSPN level 0, {phase}", "batch", sizes, {"time": 1.0})


BENCHMARK = Benchmark(
    name="edlstm_gates",
    about="The gating of an LSTM cell on maps, in one pass, beside eager PyTorch and torch.compile of the same formula",
    note=(
        "float32 unless said. With memory that is recycled unless said: `fresh memory` is new from the system, which "
        "every contender then waits for. Bytes: forward 7, backward 12 maps of a cell element each; operations: 21 and "
        "42 an element, an exponential counted as one."
    ),
    cases=lambda place: list(cases(place)),
    growth=lambda place: list(growth(place)),
)
