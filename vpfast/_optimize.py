"""The fastest exact inference of a model on the device that it is on."""

from typing import Any, Protocol

import torch
from torch import Tensor

from vpfast.models import MSPN, SHRVQVAE
from vpfast.models.mspn import captured, cpu
from vpfast.models.shrvqvae import compiled
from vpfast.models.shrvqvae.captured import optimize_shrvqvae
from vpfast.nn._as_made import plain_copy

State = Any
"""What a model remembers between two frames; only the model that made it can read it."""


class Optimized(Protocol):
    """A model ready to predict: its methods take and give what the model's own do, without gradients."""

    config: Any

    def predict(self, frames: Tensor, horizon: int) -> Tensor: ...

    def init_state(self, batch_size: int, height: int, width: int) -> State: ...

    def step(self, frame: Tensor | None, state: State) -> tuple[Tensor, State]: ...

    def peek(self, state: State) -> tuple[Tensor, State]: ...


def optimize(model: MSPN | SHRVQVAE, dtype: torch.dtype | None = None) -> Optimized:
    """A copy of ``model`` for the fastest inference on the device that it is on.

    >>> fast = vpfast.optimize(model.eval())
    >>> future = fast.predict(frames, horizon=10)
    >>> stream = vpfast.Stream(fast)

    The model itself stays as it is. Weights are copied, so training it further does not change the copy;
    parametrizations and pruning are worked in.

    Args:
        model: an MSPN or an S-HR-VQVAE; its batch norms, if it has any, in evaluation mode.
        dtype: ``torch.bfloat16`` computes in that type, or in float32 on a CPU without instructions for it; frames and
            predictions keep the type of the model. Of an S-HR-VQVAE on a CPU the prior alone does, which is where its
            time goes: the codes of the frames that are given stay what they are. None computes in the type of the
            model, with the precision of ``torch.get_float32_matmul_precision()``: ``"highest"``, torch's default, has
            the accuracy of float32; on matrix tiles ``"high"`` is less accurate and twice as fast.

    Raises:
        TypeError: another model, or one with layers replaced, hooks, or methods of a subclass, of which an optimized
            MSPN would know nothing; a type that is neither None nor bfloat16.
        ValueError: batch norms in training mode.
    """
    if dtype not in (None, torch.bfloat16):
        raise TypeError(f"optimize computes in the model's own type (None) or in torch.bfloat16, got {dtype}")
    if isinstance(model, MSPN):
        if model._weight.is_cuda:
            return captured.optimize_mspn(model, dtype)
        return cpu.optimize_mspn(model, dtype)
    if isinstance(model, SHRVQVAE):
        if model.autoencoder._weight.is_cuda:
            return optimize_shrvqvae(model, dtype)
        fast = plain_copy(model)
        if dtype is not None and compiled.could_serve(dtype, fast.prior):
            fast.prior.to(dtype)
        return fast
    raise TypeError(f"optimize takes an MSPN or an SHRVQVAE, got {type(model).__name__}")
