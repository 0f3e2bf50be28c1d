"""The one ``torch.library`` namespace that every operator of vpfast is registered in.

An operator exists twice: ``vpfast::name``, which the compiled extension implements, and ``vpfast::name_triton``.
Schema, fake, autograd and autocast are the same code for both.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("vpfast", "FRAGMENT")

VARIANTS = ("", "_triton")
"""What is added to an operator's name: nothing for the compiled kernels, ``_triton`` for Triton's."""


def operator(name: str, backend: str) -> Any:
    """The torch operator ``vpfast::name`` as ``backend`` serves it, one of those that ``Backends.select`` returns."""
    return getattr(torch.ops.vpfast, f"{name}_triton" if backend == "triton" else name)


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """``fake`` tells the shapes of what ``vpfast::name`` returns, once its tensors are seen to be on one device."""

    def checked(*arguments: Any) -> Any:
        device_of_all(name, arguments)
        return fake(*arguments)

    torch.library.register_fake(f"vpfast::{name}", checked, lib=LIBRARY)


def device_of_all(name: str, arguments: tuple[Any, ...]) -> torch.device:
    """The device of all tensors that ``vpfast::name`` is called with. Kernels read addresses, wherever they lead.

    Raises:
        RuntimeError: they are on two devices, which the message names with the arguments.
    """
    first, *others = _tensors(arguments)
    if all(other.device == first.device for other in others):
        return first.device
    schema = getattr(torch.ops.vpfast, name).default._schema
    given = zip(schema.arguments, arguments, strict=False)
    placed = [(argument.name, tensor.device) for argument, value in given for tensor in _tensors((value,))]
    argument, device = placed[0]
    other, elsewhere = next(place for place in placed if place[1] != device)
    raise RuntimeError(f"{name}: {argument} is on {device} and {other} on {elsewhere}; move one of them")


def serve_by_triton(room: str, *names: str) -> None:
    """Implement each ``vpfast::name_triton`` by the function ``name`` of ``vpfast.kernels.<room>``.

    Triton is imported at the first call: it takes a second, and importing vpfast needs neither Triton nor a GPU. CPU
    tensors are for Triton's interpreter.
    """
    for name in names:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(f"{name}_triton", _Launcher(room, name), key)


class _Launcher:
    def __init__(self, room: str, name: str) -> None:
        self.room, self.name = room, name

    def __call__(self, *arguments: Any) -> Any:
        kernels = importlib.import_module(f"vpfast.kernels.{self.room}")
        device = device_of_all(f"{self.name}_triton", arguments)
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return getattr(kernels, self.name)(*arguments)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(tuple(argument))
