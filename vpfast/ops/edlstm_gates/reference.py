"""The specification of ``edlstm_gates``: plain torch, to be read beside the equations.

MSPN paper, Eq. 1-3 (Ling et al., "Predictive Coding Based Multiscale Network with Encoder-Decoder LSTM for Video
Prediction"). Every kernel is tested against these two functions in float64.
"""

import torch
from torch import Tensor


def working_dtype(gates: Tensor) -> torch.dtype:
    """Arithmetic is float32 for half-precision gates, else the gates' own type."""
    return torch.float64 if gates.dtype == torch.float64 else torch.float32


def split_gates(gates: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split (B, 4C, *) along dim 1 and name the parts: always returned as f, i, o, g, whatever their ``order``."""
    part = dict(zip(order, gates.chunk(4, dim=1), strict=True))
    return part["f"], part["i"], part["o"], part["g"]


def edlstm_gates(gates: Tensor, c_prev: Tensor, order: str = "fiog") -> tuple[Tensor, Tensor]:
    """(B, 4C, *) gates and (B, C, *) cell -> (h, c)."""
    dtype = working_dtype(gates)
    f, i, o, g = split_gates(gates.to(dtype), order)  # Eq. 1
    f, i, o, g = f.sigmoid(), i.sigmoid(), o.sigmoid(), g.tanh()  # Eq. 2
    c = f * c_prev.to(dtype) + i * g  # Eq. 3
    h = o * c.tanh()
    return h.to(gates.dtype), c.to(c_prev.dtype)


def edlstm_gates_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, c_prev: Tensor, order: str = "fiog"
) -> tuple[Tensor, Tensor]:
    """Gradients of both outputs -> (grad_gates, grad_c_prev). ``None`` stands for a gradient of zeros.

    Nothing but the inputs of the forward pass is kept: h and c are recomputed.
    """
    dtype = working_dtype(gates)
    f, i, o, g = split_gates(gates.to(dtype), order)
    f, i, o, g = f.sigmoid(), i.sigmoid(), o.sigmoid(), g.tanh()
    c_prev_ = c_prev.to(dtype)
    tanh_c = (f * c_prev_ + i * g).tanh()

    zero = torch.zeros_like(tanh_c)
    grad_h_ = zero if grad_h is None else grad_h.to(dtype)
    grad_cell = grad_h_ * o * (1 - tanh_c * tanh_c) + (zero if grad_c is None else grad_c.to(dtype))

    part = {
        "f": grad_cell * c_prev_ * f * (1 - f),
        "i": grad_cell * g * i * (1 - i),
        "o": grad_h_ * tanh_c * o * (1 - o),
        "g": grad_cell * i * (1 - g * g),
    }
    grad_gates = torch.cat([part[name] for name in order], dim=1)
    return grad_gates.to(gates.dtype), (grad_cell * f).to(c_prev.dtype)
