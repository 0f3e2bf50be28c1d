"""The average of a run's weights over its steps, which is often better than the weights of any of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vpfast.nn import HierarchicalResidualVQ


class Average:
    """An exponential moving average of the trained parameters of ``model``.

    After step t, from 1, it moves by 1 - d towards the weights, d = min(decay, (1 + t) / (10 + t)), so that the random
    weights of the beginning are soon forgotten. What is not trained stays the model's own, and so do buffers, those of
    batch norm among them, and codebooks: the mean of a codeword before and after a restart is no codeword.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Module], decay: float) -> None:
        self.decay = decay
        moving = {id(parameter) for part in trained for parameter in part.parameters()}
        for module in model.modules():
            if isinstance(module, HierarchicalResidualVQ):
                moving -= {id(parameter) for parameter in module.parameters()}
        self._parameters = {name: value for name, value in model.named_parameters() if id(value) in moving}
        self._averages = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights: list[Tensor] = [self._parameters[name] for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)  # one kernel on a GPU, not hundreds

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the model has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._averages[name] = self._averages[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the names of the parameters."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state_dict`.

        Raises:
            KeyError, RuntimeError: averages of other parameters.
        """
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(state[name])
