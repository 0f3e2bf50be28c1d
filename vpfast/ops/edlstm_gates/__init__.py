"""The gating of a convolutional LSTM cell in one pass: see README.md beside this file."""

import torch
from torch import Tensor

from vpfast.ops._backend import autocast_is_on, is_differentiated
from vpfast.ops._library import operator
from vpfast.ops.edlstm_gates import reference
from vpfast.ops.edlstm_gates.register import backends

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def edlstm_gates(gates: Tensor, c_prev: Tensor, order: str = "fiog") -> tuple[Tensor, Tensor]:
    """LSTM gating, fused: ``c = sigmoid(f) * c_prev + sigmoid(i) * tanh(g)``, ``h = sigmoid(o) * tanh(c)``.

    MSPN paper, Eq. 1-3; the gating of every LSTM and ConvLSTM.

    Args:
        gates: (B, 4C, *) before activation, the four gates one after another along dim 1. ``*`` is any number of
            trailing dimensions: none, a map, a volume. float64, float32, float16 or bfloat16.
        c_prev: (B, C, *), the cell state of the step before. The type of ``gates``, or float32 beside half-precision
            gates.
        order: in which order the gates lie, a permutation of ``"fiog"`` (forget, input, output, candidate).

    Returns:
        ``h`` (B, C, *) in the type of ``gates`` and ``c`` (B, C, *) in the type of ``c_prev``; both channels_last
        where ``gates`` is, else contiguous. Arithmetic is float32 for half-precision gates.

    Differentiable once in both inputs; backward keeps ``gates`` and ``c_prev`` only. ``torch.func.vmap`` makes one
    batch of what it maps; ``torch.func``'s derivatives and forward-mode differentiation use the plain PyTorch
    reference. Results are bitwise repeatable whatever the number of threads. NaN in gives NaN out. Under autocast the
    cell state is float32.

    Raises:
        TypeError: a type that is not supported, or two that do not go together.
        ValueError: shapes or ``order`` that do not fit; the message holds the numbers.
        BackendError: (a RuntimeError) the chosen backend cannot serve this device; the message says why.
    """
    _check(gates, c_prev, order)
    backend = backends.select(gates.device)
    if backend == "reference" or is_differentiated(gates, c_prev):
        if autocast_is_on(gates) and gates.dtype != torch.float64:
            c_prev = c_prev.float()
        return reference.edlstm_gates(gates, c_prev, order)
    result: tuple[Tensor, Tensor] = operator("edlstm_gates", backend)(gates, c_prev, order)
    return result


def _go_together(gates: Tensor, c_prev: Tensor) -> bool:
    """Of two different types: float32 beside half precision, or any two short of float64 where autocast will cast."""
    if torch.float64 in (gates.dtype, c_prev.dtype) or c_prev.dtype not in _DTYPES:
        return False
    if c_prev.dtype == torch.float32:
        return True
    return autocast_is_on(gates)


def _check(gates: Tensor, c_prev: Tensor, order: str) -> None:
    if sorted(order) != sorted("fiog"):
        raise ValueError(f"edlstm_gates: order must be a permutation of 'fiog', got {order!r}")
    if gates.dtype not in _DTYPES:
        raise TypeError(f"edlstm_gates: gates must be float64, float32, float16 or bfloat16, got {gates.dtype}")
    if c_prev.dtype != gates.dtype and not _go_together(gates, c_prev):
        raise TypeError(
            f"edlstm_gates: c_prev must have the type of gates ({gates.dtype}), or float32 beside half-precision "
            f"gates, got {c_prev.dtype}"
        )
    if gates.device != c_prev.device:
        raise ValueError(f"edlstm_gates: gates are on {gates.device} and c_prev on {c_prev.device}; move one of them")
    if gates.dim() < 2 or gates.shape[1] % 4 != 0:
        raise ValueError(f"edlstm_gates: gates must be (B, 4C, *), got {tuple(gates.shape)}")
    expected = (gates.shape[0], gates.shape[1] // 4, *gates.shape[2:])
    if tuple(c_prev.shape) != expected:
        raise ValueError(
            f"edlstm_gates: gates {tuple(gates.shape)} need c_prev of shape {expected}, got {tuple(c_prev.shape)}"
        )
