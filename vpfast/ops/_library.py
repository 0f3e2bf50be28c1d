"""The one ``torch.library`` namespace that every operator of vpfast is registered in.

A public operator exists twice: ``vpfast::name``, which the compiled extension implements, and ``vpfast::name_triton``.
Schema, fake, autograd, autocast and vmap are the same code for both. A private one exists once.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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


def register_vmap(name: str, folded: Sequence[str] = ()) -> None:
    """Let ``torch.func.vmap`` call ``vpfast::name``, which changes none of its arguments.

    ``folded`` names the arguments whose dim 0 is a batch, as dim 0 of every result is: where ``vmap`` maps over no
    other, its dimension becomes part of theirs, and the operator is called once. Else it is called for one after
    another.
    """
    operator = getattr(torch.ops.vpfast, name).default
    is_folded = [argument.name in folded for argument in operator._schema.arguments]

    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        if info.batch_size == 0:
            raise RuntimeError(f"vpfast::{name}: torch.func.vmap maps over a dimension of size 0; leave the call out")
        if any(_is_mapped(dim) for dim, may_fold in zip(dims, is_folded, strict=True) if not may_fold):
            return _one_after_another(operator, info.batch_size, dims, arguments), 0
        whole = [
            _folded(given, dim, info.batch_size) if may_fold and given is not None else given
            for given, dim, may_fold in zip(arguments, dims, is_folded, strict=True)
        ]
        return tree_map(lambda result: result.unflatten(0, (info.batch_size, -1)), operator(*whole)), 0

    torch.library.register_vmap(f"vpfast::{name}", rule, lib=LIBRARY)


def refuse_vmap(name: str, instead: str) -> None:
    """Let ``torch.func.vmap`` of ``vpfast::name`` be one error, which says what to do ``instead``."""

    def refuse(*arguments: Any) -> NoReturn:
        raise RuntimeError(
            f"vpfast::{name} writes into tensors that it is given, which torch.func.vmap cannot map; {instead}"
        )

    torch.library.register_vmap(f"vpfast::{name}", refuse, lib=LIBRARY)


def _is_mapped(dims: Any) -> bool:
    """Of an argument's dim that is mapped over, or None; a list of these where the argument is a list."""
    return any(map(_is_mapped, dims)) if isinstance(dims, list | tuple) else dims is not None


def _one_after_another(operator: Any, count: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    def one(index: int) -> Any:
        of_index = tree_map(lambda given, dim: given if dim is None else given.select(dim, index), arguments, dims)
        return operator(*of_index)

    return tree_map(lambda *results: torch.stack(results), *map(one, range(count)))


def _folded(given: Tensor, dim: int | None, count: int) -> Tensor:
    """(B, ...) for each of ``count``, which lie along ``dim`` or are the same, -> (count B, ...)."""
    each = given.expand(count, *given.shape) if dim is None else given.movedim(dim, 0)
    return each.flatten(0, 1)


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
