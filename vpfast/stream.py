"""Frame-by-frame use of a model: what a camera loop calls."""

from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vpfast.models._frames import check_count

S = TypeVar("S")


class FramePredictor(Protocol[S]):
    """What a model offers to be streamed; its state is never changed in place."""

    def init_state(self, batch_size: int, height: int, width: int) -> S: ...

    def step(self, frame: Tensor | None, state: S) -> tuple[Tensor, S]: ...

    def peek(self, state: S) -> tuple[Tensor, S]: ...


class Stream(Generic[S]):
    """Keeps a model's state between frames, without gradients.

    >>> stream = Stream(model.eval())
    >>> for frame in camera:
    ...     next_frame = stream.push(frame)
    >>> second_ahead = stream.rollout(25)

    A frame is (C, H, W), or (B, C, H, W) for several videos side by side; what comes back has the same dimensions.
    Each frame costs one evaluation of an MSPN; an S-HR-VQVAE looks again at the codes of all frames so far, and samples
    those of the next.
    """

    def __init__(self, model: FramePredictor[S]) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forget every frame: the next ``push`` begins a new video, of any size."""
        self._state: S | None = None
        self._single = False

    @torch.no_grad()
    def push(self, frame: Tensor) -> Tensor:
        """Look at the next frame and return the prediction of the one after it, of the same shape.

        Raises:
            TypeError, ValueError: a frame that the model does not take, or not of the shape of the frames before; the
                stream is then where it was.
        """
        if not isinstance(frame, Tensor):
            raise TypeError(f"a frame must be a tensor, got {type(frame).__name__}")
        single = frame.dim() == 3
        batch = frame.unsqueeze(0) if single else frame
        state = self._state
        if state is None:
            if batch.dim() != 4:
                raise ValueError(f"a frame is (C, H, W) or (B, C, H, W), got {tuple(frame.shape)}")
            state = self.model.init_state(batch.shape[0], batch.shape[2], batch.shape[3])
        elif single != self._single:
            raise ValueError(f"the frames before had {3 if self._single else 4} dimensions, got {tuple(frame.shape)}")
        _, state = self.model.step(batch, state)
        prediction, self._state = self.model.peek(state)
        self._single = single
        return prediction[0] if single else prediction

    @torch.no_grad()
    def rollout(self, count: int) -> Tensor:
        """The next ``count`` frames without moving on: (count, C, H, W), or (B, count, C, H, W).

        The first one is what the last ``push`` returned.

        Raises:
            TypeError, ValueError: no frame was pushed yet, or ``count`` is no integer, or below 1.
        """
        if self._state is None:
            raise ValueError("nothing to continue: push at least one frame before rollout")
        count = check_count("count", count, lowest=1)
        state, frames = self._state, []
        for _ in range(count):
            prediction, state = self.model.step(None, state)
            frames.append(prediction)
        return torch.stack(frames, dim=1)[0] if self._single else torch.stack(frames, dim=1)
