"""Work on a GPU recorded once for a shape and launched in one go from then on: CUDA graphs, kept by what they are for.

A network of many small kernels is bound by their launches. A graph replays all of them in one, on the addresses that it
was recorded with: inputs are copied to where it reads, results from where it writes. What is recorded must be the same
work every time, wait for nothing and read no value on the host.

The recording itself is behind :class:`Recorder`, so that all the rest runs, and is tested, without a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vpfast.nn._common import memory_format
from vpfast.ops._backend import current_backend

R = TypeVar("R")

Work = Callable[..., Sequence[Tensor]]
"""Tensors (B, ...) -> tensors (B, ...), whose row b depends on row b of the inputs alone."""


@dataclass(frozen=True)
class Recording(Generic[R]):
    """Work that was recorded.

    ``result``: what it returned; every replay writes its tensors anew. ``replay`` does the work again on the current
    stream. ``release`` gives up what the recording holds, after which it is of no use.
    """

    result: R
    replay: Callable[[], None]
    release: Callable[[], None]


class Recorder(Protocol):
    """Records work, and has the replays of its recordings take turns, since they share memory."""

    def busy(self) -> bool:
        """Whether the work of this moment is recorded already, by whomever. Nothing can be recorded within that."""
        ...

    def capture(self, work: Callable[[], R]) -> Recording[R]:
        """Do the work, to warm up, and record it; what it raises is raised, and nothing is left behind."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """What is launched in the block, on whichever stream, comes after what was launched in the last such block."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: at any time at most one of them is at work."""

    _WARM_UPS = 2
    """The first compiles kernels and lets libraries choose theirs, the second shows the allocator what is needed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()
            self._mark = torch.zeros(1, device=device)
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._last: torch.cuda.Event | None = None

    def busy(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, work: Callable[[], R]) -> Recording[R]:
        with torch.cuda.device(self.device):
            self._side.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(self._side):
                    for _ in range(self._WARM_UPS):
                        work()
                    torch.cuda.synchronize()
                    result = self._recorded(graph, work)
            finally:
                torch.cuda.current_stream().wait_stream(self._side)
        return Recording(result, graph.replay, graph.reset)

    def _recorded(self, graph: torch.cuda.CUDAGraph, work: Callable[[], R]) -> R:
        """Other threads go on with what they do: only what this one does must not wait or synchronise."""
        if self._anchor is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._anchor = self._anchored()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            with suppress(RuntimeError):  # the recording is broken off; why is what is being raised
                graph.capture_end()
            self._anchor = None
            raise
        graph.capture_end()
        return result

    def _anchored(self) -> torch.cuda.CUDAGraph:
        """A graph of next to nothing in the pool, which keeps it: torch refuses one that no graph uses any more."""
        anchor = torch.cuda.CUDAGraph()
        anchor.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._mark.zero_()
        anchor.capture_end()
        return anchor

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            if self._last is not None:
                torch.cuda.current_stream().wait_event(self._last)
            try:
                yield
            finally:
                self._last = torch.cuda.current_stream().record_event()


class Lanes(Protocol):
    """Lines of work beside each other, within which everything comes in order."""

    def forked(self) -> AbstractContextManager[None]:
        """The lanes begin after what was launched before the block; what follows it comes after all of them."""
        ...

    def lane(self, index: int, after: Sequence[int] = ()) -> AbstractContextManager[None]:
        """What is launched in the block goes on in lane ``index``, after all that was in the lanes ``after`` so far."""
        ...

    def keep(self, *tensors: Tensor | None) -> None:
        """Tensors of one lane that others read: their memory is not used again before the lanes are joined."""
        ...


class OneLane:
    """One thing after another."""

    def forked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lane(self, index: int, after: Sequence[int] = ()) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, *tensors: Tensor | None) -> None:
        pass


class CudaLanes:
    """A stream a lane. Recorded, the lanes become branches of the graph."""

    def __init__(self, device: torch.device, count: int) -> None:
        with torch.cuda.device(device):
            self._streams = [torch.cuda.Stream() for _ in range(count)]
        self._kept: list[Tensor | None] = []

    @contextmanager
    def forked(self) -> Iterator[None]:
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        try:
            yield
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(stream.device).wait_stream(stream)
            self._kept.clear()

    @contextmanager
    def lane(self, index: int, after: Sequence[int] = ()) -> Iterator[None]:
        for other in after:
            self._streams[index].wait_stream(self._streams[other])
        with torch.cuda.stream(self._streams[index]):
            yield

    def keep(self, *tensors: Tensor | None) -> None:
        self._kept += tensors


class GraphCache:
    """Recordings of work by what it is and the shapes that it is given, the latest ``limit`` of them.

    A batch is filled up with zeros to the next power of two, so that few recordings serve all batch sizes; all other
    sizes are exact. What comes back are copies, which later calls leave alone. Calls from several threads take turns;
    within a recording that is under way already the work is done as it is.
    """

    def __init__(self, recorder: Recorder, limit: int = 16) -> None:
        self.recorder, self.limit = recorder, limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, name: Hashable, work: Work, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``work(*inputs)`` by its recording, which is made where there is none.

        Args:
            name: of the work, with everything but shapes and types of the inputs that it depends on.
            work: see :data:`Work`. It may read other tensors too, where they lie: weights.
            inputs: one or more, of one batch size of at least 1 and on one device.
        """
        if self.recorder.busy():
            return list(work(*inputs))
        batch = inputs[0].shape[0]
        key = (name, bucket(batch), *map(_kind, inputs), *modes(inputs[0].device))
        with self._lock, self.recorder.turn():
            entry = self._entries.get(key)
            if entry is None:
                while len(self._entries) >= self.limit:  # first, so that the new one finds their memory
                    self._entries.popitem(last=False)[1].recording.release()
                entry = self._entries[key] = _Entry(work, inputs, bucket(batch), self.recorder)
            self._entries.move_to_end(key)
            return entry.run(inputs)


class _Entry:
    """A recording with the tensors that it reads.

    Its tensors are ordinary ones even if inference mode is on when they are made: it may be off when they are written.
    """

    def __init__(self, work: Work, inputs: Sequence[Tensor], batch: int, recorder: Recorder) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [_filled_up(each, batch) for each in inputs]
            self.recording = recorder.capture(lambda: list(work(*self.inputs)))

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        batch = inputs[0].shape[0]
        torch._foreach_copy_([own[:batch] for own in self.inputs], list(inputs))
        if batch < self.inputs[0].shape[0]:
            torch._foreach_zero_([own[batch:] for own in self.inputs])
        self.recording.replay()
        results = [result[:batch] for result in self.recording.result]
        copies = [torch.empty_like(result) for result in results]
        torch._foreach_copy_(copies, results)
        return copies


def bucket(batch: int) -> int:
    """The batch size, a power of two, that is recorded for ``batch``, which is at least 1."""
    return int(1 << (batch - 1).bit_length())


def _filled_up(like: Tensor, batch: int) -> Tensor:
    """Zeros for ``batch`` rows, in the layout of ``like``."""
    layout = memory_format(like) if like.dim() == 4 else torch.contiguous_format
    zeros = torch.zeros((batch, *like.shape[1:]), dtype=like.dtype, device=like.device)
    return zeros.contiguous(memory_format=layout)


def _kind(tensor: Tensor) -> Hashable:
    """What of a tensor decides on the recording, but for its batch size."""
    channels_last = tensor.dim() == 4 and memory_format(tensor) is torch.channels_last
    return (tensor.shape[1:], tensor.dtype, tensor.device, channels_last)


def modes(device: torch.device) -> tuple[Hashable, ...]:
    """The settings of the process that choose kernels: a recording keeps those that were chosen when it was made."""
    backends = torch.backends
    return (
        current_backend(),
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        backends.cuda.matmul.fp32_precision,
        (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
    )
