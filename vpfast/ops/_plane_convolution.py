"""2-D convolutions between maps of few channels, for training in float32 on a CPU: what :mod:`vpfast.nn` calls.

Maps are planes (B, C, H, W), dense; kernels are odd, and zeros around the maps keep them at their size. The kernel is
csrc/plane_convolution; where it is not compiled, plain PyTorch answers. The operators have no derivatives of their own:
:func:`plane_convolution` has. A network calls it hundreds of times a step, where an operator's own take twice as long.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpfast.ops import _native
from vpfast.ops._backend import autocast_is_on, current_backend, has_registers, is_transformed
from vpfast.ops._library import LIBRARY, register_fake, register_vmap
from vpfast.ops._tracing import is_looked_at

FORWARD, WEIGHT = "plane_convolution", "plane_convolution_weight"
MOST_PRODUCTS = 1024
"""Inputs times outputs. Beyond, channels are many enough to fill registers, and torch's convolutions are faster."""

LIBRARY.define(f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
LIBRARY.define(
    f"{WEIGHT}(Tensor grad, Tensor x, int kernel_height, int kernel_width) -> (Tensor grad_weight, Tensor grad_bias)"
)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result: Tensor = torch.ops.vpfast.plane_convolution(x, weight, bias, False)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # these are differentiated again: by PyTorch
            return gradients(grad, x, weight, ctx.needs_input_grad)
        operators = torch.ops.vpfast
        grad_x = operators.plane_convolution(grad, weight, None, True) if of_x else None
        if not (of_weight or of_bias):
            return grad_x, None, None
        grad_weight, grad_bias = operators.plane_convolution_weight(grad, x, *weight.shape[2:])
        return grad_x, grad_weight, grad_bias if of_bias else None


def plane_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, in, H, W), weight (out, in, kh, kw), bias (out,) or None -> (B, out, H, W), all float32.

    Ask :func:`serves` before. Differentiable as often as is asked for. Results are bitwise repeatable whatever the
    number of threads.
    """
    result: Tensor = _Convolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Is this kernel the one to take for such maps, and may it be taken?"""
    if is_looked_at() or not has_registers() or not is_narrow(weight):
        return False
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if bias is not None and bias.dtype != torch.float32:
        return False
    if x.shape[1] != weight.shape[1] or current_backend() == "reference" or autocast_is_on(x):
        return False
    if is_transformed(x, weight, *(() if bias is None else (bias,))):
        return False
    return has_whole_rows(*x.shape[2:]) and x.is_contiguous() and weight.is_contiguous()


def has_whole_rows(height: int, width: int) -> bool:
    """Do the rows of such maps, or pairs of them, fill registers?"""
    return height > 0 and (width % 16 == 0 or (width == 8 and height % 2 == 0))


def is_narrow(weight: Tensor) -> bool:
    """Has a convolution's weight so few channels?"""
    return weight.shape[0] * weight.shape[1] <= MOST_PRODUCTS


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``transposed``: of weight (in, out, kh, kw) turned by half a turn, as the gradient of the input needs it."""
    if transposed:
        weight = weight.flip(2, 3).transpose(0, 1)
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2)).contiguous()


def reference_weight(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> tuple[Tensor, Tensor]:
    """The gradients of weight (out, in, kh, kw) and bias (out,): ``grad`` (B, out, H, W), x (B, in, H, W)."""
    weight = x.new_empty(grad.shape[1], x.shape[1], kernel_height, kernel_width)
    _, grad_weight, grad_bias = gradients(grad, x, weight, (False, True, True))
    return grad_weight, grad_bias


def gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own of x, weight and bias, those that are ``wanted``."""
    border = [size // 2 for size in weight.shape[2:]]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], border, [1, 1], False, [0, 0], 1, wanted
    )
    return found


if _native.extension is None:
    LIBRARY.impl(FORWARD, reference, "CPU")
    LIBRARY.impl(WEIGHT, reference_weight, "CPU")


# --- shapes, vmap -----------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:]))


def _fake_weight(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((grad.shape[1], x.shape[1], kernel_height, kernel_width)), x.new_empty(grad.shape[1])


register_fake(FORWARD, _fake)
register_fake(WEIGHT, _fake_weight)
register_vmap(FORWARD, ("x",))
register_vmap(WEIGHT)
