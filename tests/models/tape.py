"""Stands in for CUDA graphs on the CPU, as strictly as they: what is recorded is operators on tensors where they lie.

A replay calls the recorded operators again, with the numbers that they were called with, and writes their results where
the recorded ones lay. So whatever a recording does not know of, be it a number of Python or a new tensor, is as it was,
and what reads a value on the host, or brings one from there, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpfast.models._graphs import Recording

R = TypeVar("R")

WAITS = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2", "item"}


class NotRecordableError(RuntimeError):
    """What a GPU would refuse within a recording."""


class Tape(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in WAITS:
            raise NotRecordableError(f"{func} waits for a value")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if "empty" in func._schema.name:
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A recorder that counts what it does; ``failing`` is raised by the next recording, half-way."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.captures = self.replays = self.released = self.turns = 0
        self.failing: Exception | None = None
        self.is_busy = False
        self.within = False

    def busy(self) -> bool:
        return self.is_busy

    def capture(self, work: Callable[[], R]) -> Recording[R]:
        assert self.within, "recorded out of turn"
        work()
        with Tape() as tape:
            result = work()
        if self.failing is not None:
            error, self.failing = self.failing, None
            raise error
        self.captures += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(float("nan"))  # a graph that is recorded has not been at work yet

        def replay() -> None:
            assert self.within, "replayed out of turn"
            self.replays += 1
            tape.replay()

        def release() -> None:
            self.released += 1
            tape.calls.clear()

        return Recording(result, replay, release)

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.within, "a turn within a turn"
        self.turns += 1
        self.within = True
        try:
            yield
        finally:
            self.within = False
