"""Sampling on a GPU with the step of a position recorded once: what :mod:`sampler` and :mod:`cache` do, in one launch.

A position takes some 150 small kernels, each of which is over before the host has launched the next. They do the same
at every position but for the places that they read and write, which are numbers in tensors; so they are recorded as a
CUDA graph that looks its places up in a table by a counter on the GPU, and moves the counter on. A frame then is its
table and as many launches as it has positions.

It serves ``conditioning="raster"``, whose codes come one position after another. A recording is made for every clip, on
its tensors. That takes the time of a few positions. Between clips nothing is kept but memory, for the next recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpfast.models._graphs import CudaRecorder, Recorder, Recording
from vpfast.models.shrvqvae.cache import ConvCache, NetworkCache, Places
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN, as_made
from vpfast.nn._as_made import check_as_made, plain_copy

if TYPE_CHECKING:  # the model samples, and the sampler looks here
    from vpfast.models.shrvqvae.shrvqvae import SHRVQVAE, SHRVQVAEState

NewRecorder = Callable[[torch.device], Recorder]


class CapturablePrior(STPixelCNN):
    """A copy of ``prior`` from which codes are sampled by recordings, wherever they can be."""

    def __init__(self, prior: STPixelCNN, recorder: NewRecorder = CudaRecorder) -> None:
        super().__init__(prior.config)
        check_as_made("optimize", prior, as_made(prior.config))
        self.to(prior.norm.weight).load_state_dict(prior.state_dict())
        self.train(prior.training).requires_grad_(False)
        self.recorder, self.idle = recorder, Idle()


class Idle(list[Recorder]):
    """Recorders that no clip uses. A copy has none yet."""

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()


def recorder_for(prior: STPixelCNN) -> Recorder | None:
    """Where codes are to be sampled from ``prior`` by recordings: a recorder, for :func:`give_back` afterwards."""
    if not isinstance(prior, CapturablePrior) or prior.config.conditioning != "raster":
        return None
    try:
        recorder = prior.idle.pop()
    except IndexError:  # another thread may have taken the last one
        recorder = prior.recorder(prior.norm.weight.device)
    if recorder.busy():
        prior.idle.append(recorder)
        return None
    return recorder


def give_back(prior: STPixelCNN, passes: Sequence[CapturedPass]) -> None:
    """What recorded these passes, all of which went well, may serve another clip."""
    if passes:
        assert isinstance(prior, CapturablePrior)
        prior.idle.append(passes[0].recorder)


class CapturedPass:
    """One pass of the network over frames whose positions come one after another.

    Args:
        recorder: what records; no other thread's recordings go through it.
        cache: what the pass keeps. Its tensors stay where they are from the first frame on.
        places: the positions of a frame, and where they find their taps.
        step: evaluates one position and chooses its codes, all in tensors that stay where they are.
    """

    def __init__(
        self,
        recorder: Recorder,
        cache: NetworkCache,
        places: Callable[[int], Places],
        step: Callable[[Places], None],
    ) -> None:
        self.recorder, self.cache, self.places, self.step = recorder, cache, places, step
        self._frames: list[Tensor] = []
        self._table = self._counter = torch.empty(0)
        self._recording: Recording[None] | None = None

    def sample(self, time: int) -> None:
        """Choose the codes of frame ``time``, which the cache has begun."""
        places = self.places(time)
        count = len(places.positions)
        table = torch.cat([column.view(count, -1) for column in places], dim=1)
        with self.recorder.turn():
            if self._recording is None:
                self._frames = [_begun(conv) for conv in self._convolutions()]
                self._table, self._counter = table, table.new_zeros(1)
                widths = [column.numel() // count for column in places]
                self._recording = self.recorder.capture(lambda: self._position(widths))
            else:
                self._table.copy_(table)
                for conv, frame in zip(self._convolutions(), self._frames, strict=True):
                    conv.frame = frame.copy_(_begun(conv))
            self._counter.zero_()
            for _ in range(count):
                self._recording.replay()

    def _position(self, widths: Sequence[int]) -> None:
        """What is recorded: the position that the counter is at."""
        row = self._table.index_select(0, self._counter)[0]
        self.step(Places(*row.split(widths)))
        self._counter.add_(1).remainder_(len(self._table))  # warming up takes more positions than a small frame has

    def _convolutions(self) -> list[ConvCache]:
        return [self.cache.stem, *(layer.conv for layer in self.cache.layers)]


def _begun(conv: ConvCache) -> Tensor:
    assert conv.frame is not None, "the cache has begun a frame"
    return conv.frame


class CapturedSHRVQVAE:
    """What :func:`vpfast.optimize` makes of an S-HR-VQVAE on a GPU: a copy that samples by recordings."""

    def __init__(self, model: SHRVQVAE, dtype: torch.dtype | None, recorder: NewRecorder = CudaRecorder) -> None:
        self.config = model.config
        self.dtype = model.autoencoder._weight.dtype
        self._model = plain_copy(model).to(dtype or self.dtype)
        self._model.prior = CapturablePrior(self._model.prior, recorder)
        self.init_state = self._model.init_state

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int, **options: Any) -> Tensor:
        """As :meth:`SHRVQVAE.predict`, with all of its options."""
        return self._model.predict(self._converted(frames), horizon, **options).to(self.dtype)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: SHRVQVAEState) -> tuple[Tensor, SHRVQVAEState]:
        """As :meth:`SHRVQVAE.step`."""
        prediction, state = self._model.step(None if frame is None else self._converted(frame), state)
        return prediction.to(self.dtype), state

    @torch.no_grad()
    def peek(self, state: SHRVQVAEState) -> tuple[Tensor, SHRVQVAEState]:
        """As :meth:`SHRVQVAE.peek`."""
        prediction, state = self._model.peek(state)
        return prediction.to(self.dtype), state

    @torch.no_grad()
    def rollout(self, state: SHRVQVAEState, count: int) -> Tensor:
        """As :meth:`SHRVQVAE.rollout`."""
        return self._model.rollout(state, count).to(self.dtype)

    def _converted(self, frames: Tensor) -> Tensor:
        """Frames of the type of the model that was given, in the type that is computed in; others are left alone."""
        given = isinstance(frames, Tensor) and frames.dtype == self.dtype
        return frames.to(self._model.autoencoder._weight.dtype) if given else frames


def optimize_shrvqvae(model: SHRVQVAE, dtype: torch.dtype | None) -> CapturedSHRVQVAE:
    """See :func:`vpfast.optimize`."""
    return CapturedSHRVQVAE(model, dtype)
