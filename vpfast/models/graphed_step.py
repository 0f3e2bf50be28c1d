"""A training step's loss and gradients on a GPU in one launch: for batches so small that launches take the time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpfast.models._frames import check_values
from vpfast.models._graphs import CudaRecorder, Recorder, Recording, modes


class GraphedStep:
    """Forward and backward pass as one CUDA graph: clips -> loss, with the gradients in ``.grad``.

    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    >>> step = GraphedStep(model, lambda clips: pixel_loss(model(clips[:, :10], horizon=10), clips))
    >>> for clips in loader:
    ...     loss = step(clips.cuda(non_blocking=True))
    ...     optimizer.step()

    The first call with clips of a shape, under autocast or not, in training mode or not, runs the step a few times and
    records it; calls like it replay that, with weights, batch norms and clips as they are then. The gradients take the
    place of those that were there: nothing has to be set to zero, and nothing adds up over calls. Clip or scale them,
    and change the learning rate, as ever: the optimizer is not part of the graph.

    For one GPU and one process. What is recorded must do the same work every time: an MSPN with any feedback that does
    not change from step to step. Dead codes that are restarted, or anything else that looks at values, cannot be
    recorded; nor can float16 with a scaled loss. While a step is recorded, no loss of the model from before may be kept
    that has gradients: its graph ties the weights to another stream.

    Args:
        model: whose parameters are trained: those that require gradients.
        loss: clips (B, T, C, H, W) -> the loss, by ``model``.
        recorder: records what is replayed; None: CUDA graphs.
        limit: how many recordings are kept, the latest used.

    Raises:
        ValueError: a model on the CPU; clips whose values are not finite or far outside [0, 1], before any change.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor], Tensor], recorder: Recorder | None = None, limit: int = 4
    ) -> None:
        self.model, self.loss, self.limit = model, loss, limit
        device = next(model.parameters()).device
        if recorder is None and device.type != "cuda":
            raise ValueError(f"a GraphedStep is for a model on a GPU, this one is on {device}; move it there first")
        self.recorder = recorder or CudaRecorder(device)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, clips: Tensor) -> Tensor:
        """Clips (B, T, C, H, W) -> their loss, a number without gradient that later calls leave alone."""
        check_values(clips)
        with self._lock, self.recorder.turn():
            entry = self._entry(clips)
            with torch.no_grad():
                entry.clips.copy_(clips)
                entry.recording.replay()
            loss, gradients = entry.recording.result
            for parameter, gradient in zip(entry.parameters, gradients, strict=True):
                parameter.grad = gradient
            return loss.clone()

    def _entry(self, clips: Tensor) -> _Entry:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        training = tuple(module.training for module in self.model.modules())
        key = (clips.shape, clips.dtype, tuple(map(id, parameters)), training, *modes(clips.device))
        entry = self._entries.get(key)
        if entry is None:
            while len(self._entries) >= self.limit:
                self._entries.popitem(last=False)[1].recording.release()
            entry = self._entries[key] = self._recorded(clips, parameters)
        self._entries.move_to_end(key)
        return entry

    def _recorded(self, clips: Tensor, parameters: list[nn.Parameter]) -> _Entry:
        """What running the step beforehand moves, which are running statistics, is put back."""
        own = clips.detach().clone()
        kept = [buffer.clone() for buffer in self.model.buffers()]
        try:
            recording = self.recorder.capture(lambda: self._pass(own, parameters))
        finally:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), kept, strict=True):
                    buffer.copy_(before)
        return _Entry(own, parameters, recording)

    def _pass(self, clips: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor | None]]:
        """Weights that autocast has cast and kept would be those of now for ever."""
        torch.clear_autocast_cache()
        try:
            with torch.enable_grad():
                loss = self.loss(clips)
            return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))
        finally:
            torch.clear_autocast_cache()


@dataclass(frozen=True)
class _Entry:
    """A recording, the clips that it reads and the parameters whose gradients it writes."""

    clips: Tensor
    parameters: list[nn.Parameter]
    recording: Recording[tuple[Tensor, list[Tensor | None]]]
