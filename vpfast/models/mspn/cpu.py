"""MSPN for inference on the CPU."""

import copy
from typing import Any

import torch
from torch import Tensor

from vpfast.models.mspn.network import MSPN, MSPNState


class OptimizedMSPN:
    """What :func:`vpfast.optimize` makes of an MSPN on the CPU: a copy in channels_last, in the type asked for."""

    def __init__(self, model: MSPN, dtype: torch.dtype | None) -> None:
        self.config = model.config
        self.dtype = model._weight.dtype
        self._network = copy.deepcopy(model).to(memory_format=torch.channels_last, dtype=dtype or self.dtype)  # type: ignore[call-overload]

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int) -> Tensor:
        """As :meth:`MSPN.predict`."""
        return self._network.predict(frames.to(self._network._weight.dtype), horizon).to(self.dtype)

    def init_state(self, batch_size: int, height: int, width: int) -> MSPNState:
        """As :meth:`MSPN.init_state`."""
        return self._network.init_state(batch_size, height, width)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.step`."""
        seen = None if frame is None else frame.to(self._network._weight.dtype)
        prediction, state = self._network.step(seen, state)
        return prediction.to(self.dtype), state

    @torch.no_grad()
    def peek(self, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.peek`."""
        prediction, state = self._network.peek(state)
        return prediction.to(self.dtype), state


def optimize_mspn(model: MSPN, dtype: torch.dtype | None) -> Any:
    """See :func:`vpfast.optimize`."""
    return OptimizedMSPN(model, dtype)
