"""``vpfast::edlstm_gates`` and its backward as torch operators: schema, fake, autograd, autocast, vmap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vpfast.ops import _native
from vpfast.ops._backend import Backends, native_devices
from vpfast.ops._library import LIBRARY, VARIANTS, register_fake, register_vmap, serve_by_triton
from vpfast.ops.edlstm_gates import reference

FORWARD, BACKWARD = "edlstm_gates", "edlstm_gates_backward"

for _variant in VARIANTS:
    LIBRARY.define(f"{FORWARD}{_variant}(Tensor gates, Tensor c_prev, str order) -> (Tensor h, Tensor c)")
    LIBRARY.define(
        f"{BACKWARD}{_variant}(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor c_prev, str order)"
        " -> (Tensor grad_gates, Tensor grad_c_prev)"
    )

backends = Backends("ops.edlstm_gates", native=native_devices(f"vpfast::{FORWARD}"), triton=True)


def memory_format(gates: Tensor) -> torch.memory_format:
    """The layout of every output: channels_last (2-D or 3-D) where ``gates`` is, else contiguous."""
    if not gates.is_contiguous():
        if gates.dim() == 4 and gates.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if gates.dim() == 5 and gates.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _serve_reference_on_cpu() -> None:
    """Without a compiled extension the operators still exist: the reference answers for CPU tensors."""

    def forward(gates: Tensor, c_prev: Tensor, order: str) -> tuple[Tensor, Tensor]:
        layout = memory_format(gates)
        h, c = reference.edlstm_gates(gates, c_prev, order)
        return h.contiguous(memory_format=layout), c.contiguous(memory_format=layout)

    def backward(
        grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, c_prev: Tensor, order: str
    ) -> tuple[Tensor, Tensor]:
        layout = memory_format(gates)
        grad_gates, grad_c_prev = reference.edlstm_gates_backward(grad_h, grad_c, gates, c_prev, order)
        return grad_gates.contiguous(memory_format=layout), grad_c_prev.contiguous(memory_format=layout)

    LIBRARY.impl("edlstm_gates", forward, "CPU")
    LIBRARY.impl("edlstm_gates_backward", backward, "CPU")


if _native.extension is None:
    _serve_reference_on_cpu()


serve_by_triton("edlstm_gates", FORWARD, BACKWARD)


def _fake(gates: Tensor, c_prev: Tensor, order: str) -> tuple[Tensor, Tensor]:
    layout = memory_format(gates)
    h = torch.empty_like(c_prev, dtype=gates.dtype, memory_format=layout)
    return h, torch.empty_like(c_prev, memory_format=layout)


def _fake_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, c_prev: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    layout = memory_format(gates)
    return torch.empty_like(gates, memory_format=layout), torch.empty_like(c_prev, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    gates, c_prev, ctx.order = inputs
    ctx.save_for_backward(gates, c_prev)
    ctx.set_materialize_grads(False)


def _backward(variant: str) -> Callable[..., tuple[Tensor | None, Tensor | None, None]]:
    operator = getattr(torch.ops.vpfast, BACKWARD + variant)

    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_h is None and grad_c is None:
            return None, None, None
        return *operator(grad_h, grad_c, *ctx.saved_tensors, ctx.order), None

    return backward


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "vpfast.ops.edlstm_gates is differentiable once; a second derivative was asked for. "
        'Use vpfast.backend("reference"), whose gradients PyTorch can differentiate again.'
    )


def _register_autocast(op: str, key: str) -> None:
    """Under autocast the gates keep the type that the convolution before them gave; the cell is kept in float32."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    operator = getattr(torch.ops.vpfast, op)

    def forward(gates: Tensor, c_prev: Tensor, order: str) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if gates.dtype != torch.float64:
                c_prev = c_prev.float()
            result: tuple[Tensor, Tensor] = operator(gates, c_prev, order)
            return result

    LIBRARY.impl(op, forward, key)


for _variant in VARIANTS:
    register_fake(FORWARD + _variant, _fake)
    register_fake(BACKWARD + _variant, _fake_backward)
    register_vmap(FORWARD + _variant, ("gates", "c_prev"))
    register_vmap(BACKWARD + _variant, ("grad_h", "grad_c", "gates", "c_prev"))
    torch.library.register_autograd(
        f"vpfast::{FORWARD}{_variant}", _backward(_variant), setup_context=_setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(f"vpfast::{BACKWARD}{_variant}", _double_backward, lib=LIBRARY)
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _register_autocast(FORWARD + _variant, _key)
