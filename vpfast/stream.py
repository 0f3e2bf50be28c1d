"""Frame-by-frame use of a model: what a camera loop calls."""

import inspect
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vpfast.models._frames import check_count

S = TypeVar("S")


class FramePredictor(Protocol[S]):
    """What a model offers to be streamed; its state is never changed in place.

    ``init_state`` also takes ``context`` where the model remembers frames one by one, and has to forget some. A model
    that makes several frames faster together than step by step has a method ``rollout`` too: (state, count) -> (B,
    count, C, H, W).
    """

    @property
    def init_state(self) -> Callable[..., S]: ...

    def step(self, frame: Tensor | None, state: S) -> tuple[Tensor, S]: ...

    def peek(self, state: S) -> tuple[Tensor, S]: ...


class Stream(Generic[S]):
    """Predicts a video frame by frame, without gradients. Neither memory nor time per frame grows with the video.

    >>> stream = Stream(model.eval())
    >>> for frame in camera:
    ...     next_frame = stream.push(frame)
    >>> second_ahead = stream.rollout(25)

    A frame is (C, H, W), or (B, C, H, W) for several videos side by side; predictions have the same dimensions.

    An MSPN is recurrent: its state has a fixed size, and a frame costs one evaluation. With ``frames`` all frames so
    far, ``push`` returns ``model.predict(frames, 1)`` and ``rollout(k)`` returns ``model.predict(frames, k)``.

    An S-HR-VQVAE keeps the codes of the last ``context`` frames; for each frame it evaluates them again and samples the
    codes of the next one. With ``recent`` the last ``context`` frames (all, while they are fewer), ``push`` returns
    ``model.predict(recent, 1)`` and ``rollout(k)`` returns ``model.predict(recent, k)``.

    Args:
        model: an MSPN or S-HR-VQVAE, what ``vpfast.optimize`` makes of one, or another with their ``init_state``,
            ``step`` and ``peek``.
        context: how many frames an S-HR-VQVAE keeps, at least 1; by default 10, the number that the papers train with.
            A model may predict badly from more frames than it was trained with. None for an MSPN.

    Raises:
        TypeError: a model without these, or a context that is no integer.
        ValueError: a context below 1, or one given with an MSPN.
    """

    def __init__(self, model: FramePredictor[S], context: int | None = None) -> None:
        if isinstance(model, type) or not all(hasattr(model, name) for name in ("init_state", "step", "peek")):
            found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise TypeError(
                "Stream takes an MSPN or SHRVQVAE, what vpfast.optimize makes of one, or another model with "
                f"init_state, step and peek; got {found}"
            )
        self.model = model
        self._options = {} if context is None else {"context": _checked(model, context)}
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
        frame = frame.detach()  # a state may keep it, and with it whatever it was computed from
        batch = frame.unsqueeze(0) if single else frame
        state = self._state
        if state is None:
            if batch.dim() != 4:
                raise ValueError(f"a frame is (C, H, W) or (B, C, H, W), got {tuple(frame.shape)}")
            state = self.model.init_state(batch.shape[0], batch.shape[2], batch.shape[3], **self._options)
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
        frames = self._rollout(self._state, check_count("count", count, lowest=1))
        return frames[0] if self._single else frames

    def _rollout(self, state: S, count: int) -> Tensor:
        """(B, count, C, H, W)"""
        if (together := getattr(self.model, "rollout", None)) is not None:
            made: Tensor = together(state, count)
            return made
        frames = []
        for _ in range(count):
            prediction, state = self.model.step(None, state)
            frames.append(prediction)
        return torch.stack(frames, dim=1)


def _checked(model: FramePredictor[Any], context: int) -> int:
    """``context`` as an int that ``init_state`` takes."""
    context = check_count("context", context, lowest=1)
    try:
        inspect.signature(model.init_state).bind(1, 1, 1, context=context)
    except TypeError:
        raise ValueError(
            f"context: {context} given, must be left out: {type(model).__name__} keeps a state of one size, in which "
            "all frames have their part"
        ) from None
    return context
