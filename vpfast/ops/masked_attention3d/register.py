"""``vpfast::masked_attention3d``, its backward and its decode form: schema, fake, autograd, autocast, vmap.

A mask travels as its name and the three radii of its window, -1 for no limit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vpfast.ops._backend import Backends, native_devices
from vpfast.ops._library import LIBRARY, VARIANTS, register_fake, register_vmap, serve_by_triton
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.mask import Mask3d
from vpfast.ops.masked_attention3d.reference import working_dtype

FORWARD, BACKWARD, DECODE = "masked_attention3d", "masked_attention3d_backward", "masked_attention3d_decode"

for _variant in VARIANTS:
    LIBRARY.define(
        f"{FORWARD}{_variant}(Tensor q, Tensor k, Tensor v, SymInt[] grid, str mask, SymInt[] window, float scale)"
        " -> (Tensor out, Tensor lse)"
    )
    LIBRARY.define(
        f"{BACKWARD}{_variant}(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt[] grid,"
        " str mask, SymInt[] window, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
    )
    LIBRARY.define(
        f"{DECODE}{_variant}(Tensor q, Tensor k, Tensor v, Tensor positions, SymInt[] grid, str mask,"
        " SymInt[] window, float scale) -> Tensor out"
    )

Ints = Sequence[int]

backends = Backends(
    "ops.masked_attention3d", native=native_devices(f"vpfast::{FORWARD}"), triton=True, cuda_source=False
)


# --- the reference in the kernel's place ------------------------------------------------------------------------------


def _some_at_a_time(positions: Tensor, k: Tensor) -> Sequence[Tensor]:
    """The queries in parts small enough that their scores against all keys number 2^22, and memory stays bounded."""
    step = max(1, 2**22 // max(1, k.shape[0] * k.shape[1] * k.shape[2]))
    parts: Sequence[Tensor] = positions.split(step)
    return parts


def _forward(
    q: Tensor, k: Tensor, v: Tensor, grid: Ints, mask: str, window: Ints, scale: float
) -> tuple[Tensor, Tensor]:
    rule = Mask3d.of_radii(mask, window)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=working_dtype(q))
    for rows in _some_at_a_time(reference.all_positions(k), k):
        out[:, :, rows], lse[:, :, rows] = reference.attend(q[:, :, rows], k, v, rule.visible(grid, rows), scale)
    return out, lse


def _decode(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, grid: Ints, mask: str, window: Ints, scale: float
) -> Tensor:
    out = reference.masked_attention3d_decode(q, k, v, positions, grid, Mask3d.of_radii(mask, window), scale)
    return out.contiguous()


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Ints,
    mask: str,
    window: Ints,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = Mask3d.of_radii(mask, window)
    grad_q, grad_k, grad_v = (q.new_zeros(q.shape, dtype=working_dtype(q)) for _ in range(3))
    for rows in _some_at_a_time(reference.all_positions(k), k):
        grad, queries, result, norm = (tensor[:, :, rows] for tensor in (grad_out, q, out, lse))
        parts = reference.attend_backward(grad, queries, k, v, result, norm, rule.visible(grid, rows), scale)
        grad_q[:, :, rows] = parts[0]
        grad_k += parts[1]
        grad_v += parts[2]
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def _serve_reference_on_cpu() -> None:
    """Whatever the extension has no kernel for still exists: the reference answers for CPU tensors."""
    served: dict[str, Callable[..., Any]] = {FORWARD: _forward, BACKWARD: _backward, DECODE: _decode}
    for op, answer in served.items():
        if "cpu" not in native_devices(f"vpfast::{op}"):
            exact = torch.autocast("cpu", enabled=False)(answer)  # or its products of matrices were cast down again
            LIBRARY.impl(op, exact, "CPU")


_serve_reference_on_cpu()
serve_by_triton("masked_attention3d", FORWARD, BACKWARD, DECODE)


# --- fake tensors -----------------------------------------------------------------------------------------------------


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, grid: Ints, mask: str, window: Ints, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=working_dtype(q))


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Ints,
    mask: str,
    window: Ints,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _fake_decode(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, grid: Ints, mask: str, window: Ints, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


# --- gradients --------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(variant: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.vpfast, BACKWARD + variant)

    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 7
        return *operator(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None, None

    return gradients


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "vpfast.ops.masked_attention3d is differentiable once; a second derivative was asked for. "
        'Use vpfast.backend("reference"), whose gradients PyTorch can differentiate again.'
    )


NO_GRADIENT = (
    "vpfast.ops.masked_attention3d_decode is for inference and has no gradient, but an input requires one: call it "
    "under torch.no_grad(), or call masked_attention3d, which has one"
)


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(NO_GRADIENT)


# --- autocast ---------------------------------------------------------------------------------------------------------


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of q, k and v: its own type, as for ``scaled_dot_product_attention``; float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _register_autocast(op: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    call = getattr(torch.ops.vpfast, op)

    def cast(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(*as_autocast(q, k, v), *others)

    LIBRARY.impl(op, cast, key)


# --- both variants ----------------------------------------------------------------------------------------------------


for _variant in VARIANTS:
    for _op, _fake in ((FORWARD, _fake_forward), (BACKWARD, _fake_backward), (DECODE, _fake_decode)):
        register_fake(_op + _variant, _fake)
        register_vmap(_op + _variant, ("grad_out", "q", "k", "v", "out", "lse"))
    torch.library.register_autograd(
        f"vpfast::{FORWARD}{_variant}", _gradients(_variant), setup_context=_setup, lib=LIBRARY
    )
    torch.library.register_autograd(f"vpfast::{BACKWARD}{_variant}", _double_backward, lib=LIBRARY)
    torch.library.register_autograd(f"vpfast::{DECODE}{_variant}", _no_gradient, lib=LIBRARY)
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _register_autocast(FORWARD + _variant, _key)
        _register_autocast(DECODE + _variant, _key)
