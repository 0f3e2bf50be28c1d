"""What the recurrent cells share: the state they start from and the checks of what they are given."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from vpfast.ops._backend import autocast_is_on, is_mapped

State = tuple[Tensor, Tensor]
"""(h, c) of a recurrent cell."""


def zero_state(like: Tensor, shape: tuple[int, int, int, int]) -> State:
    """h and c of zeros, both of ``shape``, on the device and with the dtype and layout of ``like`` (4-D).

    The cell state is float32 beside half-precision maps: it is a sum over all steps.
    """
    cell_dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
    h, c = (
        torch.zeros(shape, dtype=dtype, device=like.device).contiguous(memory_format=memory_format(like))
        for dtype in (like.dtype, cell_dtype)
    )
    return h, c


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where ``x`` (4-D) is that and nothing else, else contiguous; of what vmap maps over as well."""
    if is_mapped(x) or x.is_contiguous():
        return torch.contiguous_format
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def given_or_zeros(owner: str, state: State | None, like: Tensor, shape: tuple[int, int, int, int]) -> State:
    """``state`` once it is checked, or zeros where there is none. Raises as :func:`check_state`."""
    if state is None:
        return zero_state(like, shape)
    check_state(owner, state, like, shape)
    return state


def check_state(owner: str, state: State, like: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise unless ``state`` is (h, c), both of ``shape``, that go together with the maps ``like``.

    h has a type that becomes theirs when both are put together, c their type or float32 beside half precision. Under
    autocast any types short of float64 go together.

    Raises:
        TypeError: no pair of tensors, or a type that does not go with the maps.
        ValueError: another shape or device.
    """
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{owner}: state must be the pair (h, c) that the step before gave, got {_in_words(state)}")
    h, c = state
    check_joined(owner, "h", h, like, shape)
    _check_place(owner, "c", c, like, shape)
    float32_beside_half = c.dtype == torch.float32 and like.dtype.itemsize == 2
    if c.dtype != like.dtype and not float32_beside_half and not autocast_converts(c, like):
        raise _wrong_type(owner, "c", c, like)


def check_joined(owner: str, name: str, maps: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``maps``, of ``shape``, can be concatenated with ``like`` without changing the type of ``like``.

    Raises:
        TypeError: not a tensor, or a type that does not go with ``like``.
        ValueError: another shape or device.
    """
    _check_place(owner, name, maps, like, shape)
    joined = torch.promote_types(maps.dtype, like.dtype)
    if not maps.is_floating_point() or (joined != like.dtype and not autocast_converts(maps, like)):
        raise _wrong_type(owner, name, maps, like)


def autocast_converts(a: Tensor, b: Tensor) -> bool:
    """Whether autocast is on and brings the types of both together: any floating ones short of float64."""
    if not autocast_is_on(b):
        return False
    return a.is_floating_point() and b.is_floating_point() and torch.float64 not in (a.dtype, b.dtype)


def _check_place(owner: str, name: str, maps: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(maps, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor of shape {shape}, got {_in_words(maps)}")
    if tuple(maps.shape) != shape:
        raise ValueError(f"{owner}: {name} must have shape {shape} beside this input, got {tuple(maps.shape)}")
    if maps.device != like.device:
        raise ValueError(f"{owner}: {name} is on {maps.device} and the input on {like.device}; move one of them")


def _wrong_type(owner: str, name: str, maps: Tensor, like: Tensor) -> TypeError:
    return TypeError(f"{owner}: {name} is {maps.dtype}, which does not go with {like.dtype} maps; convert one of them")


def _in_words(value: object) -> str:
    return f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__


def check_maps(owner: str, x: Tensor, channels: int, weight: Tensor, multiple: int = 1) -> None:
    """Raise unless ``x`` is (B, channels, H, W), H and W positive multiples of ``multiple``, and goes with ``weight``.

    Raises:
        TypeError: not a tensor, not floating point, or of another type than ``weight`` without autocast.
        ValueError: another shape, a size that does not divide, or another device.
    """
    _check_layout(owner, x, f"(B, {channels}, H, W)", channels, weight)
    for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
        if size < 1 or size % multiple != 0:
            raise ValueError(f"{owner} takes maps whose {name} is a positive multiple of {multiple}, got {size}")


def laid_out_as(weight: Tensor, x: Tensor) -> Tensor:
    """``x`` in channels_last where ``weight`` is.

    What is joined of maps in both layouts is in neither, and a convolution copies it forward and backward.
    """
    layout = memory_format(weight)
    return x if layout is torch.contiguous_format else x.contiguous(memory_format=layout)


def check_volumes(owner: str, x: Tensor, channels: int, weight: Tensor) -> None:
    """Raise unless ``x`` is (B, channels, T, H, W), T, H and W of at least 1, and goes with ``weight``.

    Raises:
        TypeError: not a tensor, not floating point, or of another type than ``weight`` without autocast.
        ValueError: another shape, an empty grid, or another device.
    """
    _check_layout(owner, x, f"(B, {channels}, T, H, W)", channels, weight)
    if 0 in x.shape[2:]:
        raise ValueError(f"{owner} takes maps of at least one frame, row and column, got {tuple(x.shape)}")


def _check_layout(owner: str, x: Tensor, layout: str, channels: int, weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} takes maps of shape {layout}, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1 or x.shape[1] != channels:
        raise ValueError(f"{owner} takes maps of shape {layout}, got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{owner}: the input is on {x.device} and the weights on {weight.device}; move one of them")
    check_type(owner, x, weight)


def check_type(owner: str, x: Tensor, weight: Tensor) -> None:
    """Raise TypeError unless ``x`` is floating point and, without autocast, of the type of ``weight``."""
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast_converts(x, weight)):
        raise TypeError(f"{owner}: the input is {x.dtype} and the weights are {weight.dtype}; convert one of them")


def as_integer(value: object) -> int | None:
    """``value`` as an int where it is a whole number of any kind, NumPy's included; None for all else and for bool.

    A size that a trace leaves open stays open.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: object) -> float | None:
    """``value`` as a float where it is a real number of any kind, NumPy's and tensors' included; None for all else and
    for bool."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def check_counts(owner: str, *, lowest: int = 1, **counts: int) -> None:
    """Raise ValueError unless each is an integer of at least ``lowest``."""
    for name, count in counts.items():
        found = as_integer(count)
        if found is None or found < lowest:
            raise ValueError(f"{owner}: {name} must be an integer of at least {lowest}, got {count!r}")


def check_widths(owner: str, channels: object) -> None:
    """Raise ValueError unless ``channels`` are the widths of an encoder: at least two positive integers."""
    widths = channels if isinstance(channels, Sequence) else ()
    if len(widths) < 2 or not all((as_integer(width) or 0) > 0 for width in widths):
        raise ValueError(f"{owner}: channels must be at least two positive integers, got {channels!r}")


def check_kernels(owner: str, **sizes: int) -> None:
    """Raise ValueError unless each is a positive odd integer."""
    for name, size in sizes.items():
        found = as_integer(size)
        if found is None or found < 1 or found % 2 == 0:
            raise ValueError(f"{owner}: {name} must be odd and positive so that maps keep their size, got {size!r}")


def check_gate_order(owner: str, order: object) -> None:
    """Raise ValueError unless ``order`` is a permutation of ``"fiog"``."""
    if not isinstance(order, str) or sorted(order) != sorted("fiog"):
        raise ValueError(f"{owner}: gate_order must be a permutation of 'fiog', got {order!r}")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
