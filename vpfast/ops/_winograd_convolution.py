"""3x3 convolutions of stride 1 between maps in channels_last, in float32 on a CPU: what :mod:`vpfast.nn` calls.

By F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), Eq. 8: 16 products for
each tile of 2x2 pixels, input and output, in place of 36. The kernel is csrc/winograd_convolution; where it is not
compiled, plain PyTorch answers. The operators give maps and the gradient of weights in channels_last, and have no
derivatives of their own: :func:`winograd_convolution` has.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpfast.ops import _native
from vpfast.ops._backend import autocast_is_on, current_backend, has_registers, is_transformed
from vpfast.ops._library import LIBRARY, register_fake, register_vmap
from vpfast.ops._plane_convolution import gradients
from vpfast.ops._tracing import is_looked_at

TRANSFORM, FORWARD, WEIGHT = "winograd_weights", "winograd_convolution", "winograd_convolution_weight"
PANEL = 32
"""Outputs whose transformed weights lie together: (panels, 16 cells, inputs, 32), zeros after the last output."""
LEAST_CHANNELS, LEAST_PIXELS = 16, 16
"""Of inputs and of outputs, and in all images. With fewer, transforms take longer than products."""

LIBRARY.define(f"{TRANSFORM}(Tensor weight, bool transposed) -> Tensor")
LIBRARY.define(f"{FORWARD}(Tensor x, Tensor weights, Tensor? bias, Tensor? added, float slope, int outputs) -> Tensor")
LIBRARY.define(f"{WEIGHT}(Tensor grad, Tensor x) -> Tensor")


class TransformedWeight:
    """A convolution's weight (out, in, 3, 3), and what the kernel needs of it, each made when it is first asked for.

    What is made within a backward pass is forgotten at its end, or in the next one where that ended by an error.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._made: dict[bool, Tensor] = {}
        self._made_in = -1  # that backward pass

    def __call__(self, transposed: bool = False) -> Tensor:
        """For the convolution, or the one that is the gradient of its input."""
        backward = torch._C._current_graph_task_id()
        if self._made_in not in (-1, backward):
            self.forget()
        if transposed not in self._made:
            self._made[transposed] = torch.ops.vpfast.winograd_weights(self.weight.detach(), transposed)
            if backward != -1:
                self._made_in = backward
                torch.autograd.Variable._execution_engine.queue_callback(self.forget)  # type: ignore[attr-defined]
        return self._made[transposed]

    def forget(self) -> None:
        """Give back the memory: what is asked for again is made again."""
        self._made.clear()
        self._made_in = -1


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: TransformedWeight | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.known = known
        return convolve(x, (known or TransformedWeight(weight))(), bias, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # these are differentiated again: by PyTorch
            return *gradients(grad, x, weight, (of_x, of_weight, of_bias)), None
        grad_x = grad_weight = None
        if of_x:
            known = ctx.known or TransformedWeight(weight)
            grad_x = convolve(grad, known(transposed=True), None, x.shape[1])
            if known is not ctx.known:
                known.forget()
        if of_weight:
            grad_weight = torch.ops.vpfast.winograd_convolution_weight(grad, x)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if of_bias else None, None


def winograd_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, known: TransformedWeight | None = None
) -> Tensor:
    """x (B, in, H, W), weight (out, in, 3, 3), bias (out,) or None -> (B, out, H, W), float32, in channels_last.

    Ask :func:`serves` before. Differentiable as often as is asked for. Results are bitwise repeatable whatever the
    number of threads. ``known`` is of this weight, and spares transforms that were made before.
    """
    result: Tensor = _Convolution.apply(x, weight, bias, known)  # type: ignore[no-untyped-call]
    return result


def convolve(
    x: Tensor, weights: Tensor, bias: Tensor | None, outputs: int, added: Tensor | None = None, slope: float = 1.0
) -> Tensor:
    """x (B, in, H, W) by transformed weights -> (B, out, H, W), both in channels_last, without gradients.

    ``added`` (B, out, H, W) is summed to it; then numbers below 0 become ``slope`` times as large.
    """
    result: Tensor = torch.ops.vpfast.winograd_convolution(x, weights, bias, added, slope, outputs)
    return result


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Is this kernel the one to take for such maps, and may it be taken?"""
    if is_looked_at() or not has_registers() or not takes(weight, bias):
        return False
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if current_backend() == "reference" or autocast_is_on(x) or is_transformed(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and x.numel() >= LEAST_PIXELS * x.shape[1]


def takes(weight: Tensor, bias: Tensor | None) -> bool:
    """Whatever the maps: are weight and bias of a convolution that this kernel is for?"""
    if not is_wide(weight) or weight.dtype != torch.float32 or not (bias is None or bias.dtype == torch.float32):
        return False
    return not is_transformed(*((weight,) if bias is None else (weight, bias)))


def is_wide(weight: Tensor) -> bool:
    """Is a convolution's weight 3x3, with channels enough?"""
    return tuple(weight.shape[2:]) == (3, 3) and min(weight.shape[:2]) >= LEAST_CHANNELS


# --- plain PyTorch ----------------------------------------------------------------------------------------------------

_OF_WEIGHTS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OF_MAPS = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float32)
_OF_SUMS = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float32)
"""G, B^T and A^T of Lavin and Gray, Eq. 9."""


def reference_weights(weight: Tensor, transposed: bool) -> Tensor:
    """(out, in, 3, 3) -> (panels, 16, in, 32); ``transposed``: of weight (in, out, 3, 3) turned by half a turn."""
    if transposed:
        weight = weight.flip(2, 3).transpose(0, 1)
    of_weights = _OF_WEIGHTS.to(weight)
    cells = (of_weights @ weight @ of_weights.t()).flatten(2)  # (out, in, 16)
    cells = F.pad(cells, (0, 0, 0, 0, 0, -len(cells) % PANEL))
    panels: Tensor = cells.unflatten(0, (-1, PANEL)).permute(0, 3, 2, 1).contiguous()
    return panels


def reference(
    x: Tensor, weights: Tensor, bias: Tensor | None, added: Tensor | None, slope: float, outputs: int
) -> Tensor:
    """x (B, in, H, W) and weights (panels, 16, in, 32) -> (B, out, H, W)."""
    height, width = x.shape[2:]
    of_maps, of_sums = _OF_MAPS.to(x), _OF_SUMS.to(x)
    padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)  # (B, in, tiles down, tiles across, 4, 4)
    cells = (of_maps @ tiles @ of_maps.t()).flatten(4)
    sums = torch.einsum("bkijc,pcko->bpoijc", cells, weights).flatten(1, 2)[:, :outputs]
    pixels = of_sums @ sums.unflatten(-1, (4, 4)) @ of_sums.t()  # (B, out, tiles down, tiles across, 2, 2)
    y = pixels.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    y = y if bias is None else y + bias[:, None, None]
    y = F.leaky_relu(y if added is None else y + added, slope)
    return y.contiguous(memory_format=torch.channels_last)


def reference_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of weight (out, in, 3, 3): ``grad`` (B, out, H, W), x (B, in, H, W)."""
    weight = x.new_empty(grad.shape[1], x.shape[1], 3, 3)
    found: Tensor = gradients(grad, x, weight, (False, True, False))[1]
    return found.contiguous(memory_format=torch.channels_last)


if _native.extension is None:
    LIBRARY.impl(TRANSFORM, reference_weights, "CPU")
    LIBRARY.impl(FORWARD, reference, "CPU")
    LIBRARY.impl(WEIGHT, reference_weight, "CPU")


# --- shapes, vmap -----------------------------------------------------------------------------------------------------


def _fake_weights(weight: Tensor, transposed: bool) -> Tensor:
    outputs, inputs = weight.shape[:2][::-1] if transposed else weight.shape[:2]
    return weight.new_empty((-(-outputs // PANEL), 16, inputs, PANEL))


def _fake(x: Tensor, weights: Tensor, bias: Tensor | None, added: Tensor | None, slope: float, outputs: int) -> Tensor:
    return _channels_last(x, x.shape[0], outputs, *x.shape[2:])


def _fake_weight(grad: Tensor, x: Tensor) -> Tensor:
    return _channels_last(x, grad.shape[1], x.shape[1], 3, 3)


def _channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


register_fake(TRANSFORM, _fake_weights)
register_fake(FORWARD, _fake)
register_fake(WEIGHT, _fake_weight)
register_vmap(TRANSFORM)
register_vmap(FORWARD, ("x", "added"))
register_vmap(WEIGHT)
