"""Attention over a clip's positions under a causal mask of rules on (t, y, x): see README.md beside this file."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vpfast.ops._backend import autocast_is_on, current_backend, is_differentiated, is_transformed
from vpfast.ops._library import operator
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.mask import Mask3d
from vpfast.ops.masked_attention3d.register import NO_GRADIENT, as_autocast, backends

__all__ = ["Mask3d", "masked_attention3d", "masked_attention3d_decode"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def masked_attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], mask: Mask3d, scale: float | None = None
) -> Tensor:
    """Attention of every position of a clip to those that ``mask`` allows: ``softmax(scale q k^T) v`` over them.

    S-HR-VQVAE paper, section 4.3. The mask is a rule on (t, y, x), never a tensor. Memory is that of the inputs and
    outputs, and keys that are hidden from a whole tile of queries cost nothing.

    Args:
        q: (B, heads, T H W, d) queries in raster order (t, then y, then x), any strides, any d from 1. float64,
            float32, float16 or bfloat16.
        k: keys, as ``q`` in shape, type and device. May be expanded, one head for all.
        v: values, as ``k``.
        grid: (T, H, W), how the positions lie.
        mask: a :class:`Mask3d`.
        scale: what q . k is multiplied by; finite, 0 and negative allowed. d^-0.5 when None.

    Returns:
        (B, heads, T H W, d), contiguous, in the type of ``q``. Sums are float32 for half precision. A query that sees
        no key gets 0, and gradients of 0.

    Differentiable once in ``q``, ``k`` and ``v``; backward keeps those, the result and one number a query, and
    recomputes the rest. ``torch.func.vmap`` makes one batch of what it maps; ``torch.func``'s derivatives and
    forward-mode differentiation use the plain PyTorch reference, whose memory is quadratic. Results are bitwise
    repeatable whatever the number of threads. NaN and infinity affect the queries that see them, as in a softmax, and
    no others. Under autocast the type is autocast's, as for ``torch.nn.functional.scaled_dot_product_attention``.

    Raises:
        TypeError: a type that is not supported, types that differ, or a mask that is no :class:`Mask3d`.
        ValueError: shapes, a grid or a scale that do not fit; the message holds the numbers.
        BackendError: (a RuntimeError) the chosen backend cannot serve this device; the message says why.
    """
    op = "masked_attention3d"
    _check_types(op, {"q": q, "k": k, "v": v})
    T, H, W = _check_grid_and_mask(op, grid, mask)
    if q.dim() != 4 or q.shape[2] != T * H * W or q.shape[3] < 1:
        raise ValueError(
            f"{op}: q must be (B, heads, T H W, d) with d at least 1, where the grid {tuple(grid)} has {T * H * W} "
            f"positions, got {tuple(q.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{op}: {name} must have the shape of q, {tuple(q.shape)}, got {tuple(tensor.shape)}")
    scale = _checked_scale(op, scale, q)
    backend = _serving(q, k, v)
    result: tuple[Tensor, Tensor]
    if backend == "reference":
        result = _plainly(reference.masked_attention3d, q, k, v, grid, mask, scale)
    else:
        result = operator(op, backend)(q, k, v, (T, H, W), mask.name, mask.radii, scale)
    return result[0]


def masked_attention3d_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    positions: Tensor,
    mask: Mask3d,
    scale: float | None = None,
) -> Tensor:
    """The output of :func:`masked_attention3d` for a few queries, from cached keys and values.

    Only the cache entries that a query sees are read; the others may be uninitialised. For inference, where positions
    are computed one or a few at a time.

    Args:
        q: (B, heads, n, d), the queries at ``positions``. float64, float32, float16 or bfloat16.
        k: (B, heads, T H W, d), the cache of keys, any strides, of the type and device of ``q``.
        v: the cache of values, as ``k``.
        grid: (T, H, W), how the positions of the caches lie.
        positions: (n,) int64 on the device of ``q``: raster positions in the grid, in any order, also repeated.
        mask: a :class:`Mask3d`.
        scale: as for :func:`masked_attention3d`.

    Returns:
        (B, heads, n, d), contiguous, in the type of ``q``; 0 for a query that sees no key.

    Raises:
        TypeError: a type that is not supported, types that differ, or a mask that is no :class:`Mask3d`.
        ValueError: shapes, positions, a grid or a scale that do not fit; the message holds the numbers.
        RuntimeError: an input requires a gradient while gradients are recorded.
        BackendError: (a RuntimeError) the chosen backend cannot serve this device; the message says why.
    """
    op = "masked_attention3d_decode"
    _check_types(op, {"q": q, "k": k, "v": v})
    T, H, W = _check_grid_and_mask(op, grid, mask)
    if q.dim() != 4 or q.shape[3] < 1:
        raise ValueError(f"{op}: q must be (B, heads, n, d) with d at least 1, got {tuple(q.shape)}")
    cache = (q.shape[0], q.shape[1], T * H * W, q.shape[3])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != cache:
            raise ValueError(
                f"{op}: {name} must be (B, heads, T H W, d) = {cache} for q {tuple(q.shape)} and the grid "
                f"{tuple(grid)}, got {tuple(tensor.shape)}"
            )
    _check_positions(op, positions, q, T * H * W)
    scale = _checked_scale(op, scale, q)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise RuntimeError(NO_GRADIENT)
    backend = _serving(q, k, v, positions)
    result: Tensor
    if backend == "reference":
        result = _plainly(reference.masked_attention3d_decode, q, k, v, positions, grid, mask, scale)
    else:
        result = operator(op, backend)(q, k, v, positions, (T, H, W), mask.name, mask.radii, scale)
    return result


def _serving(*tensors: Tensor) -> str:
    """The backend that serves these. On a CPU without a kernel that is still the operator: the reference answers there,
    but in bounded memory."""
    backend = backends.select(tensors[0].device)
    if current_backend() == "reference" or is_differentiated(*tensors):
        return "reference"
    return "native" if backend == "reference" else backend


def _plainly(attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """Call the reference as autocast would have it: inputs cast once, and nothing after them."""
    if not autocast_is_on(q):
        return attention(q, k, v, *options)
    with torch.autocast(q.device.type, enabled=False):
        return attention(*as_autocast(q, k, v), *options)


def _check_types(op: str, tensors: dict[str, Tensor]) -> None:
    q = tensors["q"]
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: q is on {q.device} and {name} on {tensor.device}; move one of them")
        if tensor.dtype != q.dtype and not (autocast_is_on(q) and torch.float64 not in (tensor.dtype, q.dtype)):
            raise TypeError(f"{op}: {name} must have the type of q ({q.dtype}), got {tensor.dtype}; convert one")


def _check_grid_and_mask(op: str, grid: Sequence[int], mask: Mask3d) -> tuple[int, int, int]:
    if not isinstance(mask, Mask3d):
        raise TypeError(f"{op}: mask must be a vpfast.ops.Mask3d, such as Mask3d('raster'), got {mask!r}")
    if not (
        isinstance(grid, Sequence)
        and len(grid) == 3
        and all(isinstance(size, int | torch.SymInt) and size >= 0 for size in grid)
    ):
        raise ValueError(f"{op}: grid must be three sizes (T, H, W), each an int >= 0, got {grid!r}")
    T, H, W = grid
    return T, H, W


def _checked_scale(op: str, scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[3] ** -0.5)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number, or None for d^-0.5, got {scale!r}")
    return float(scale)


def _check_positions(op: str, positions: Tensor, q: Tensor, length: int) -> None:
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        given = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"{op}: positions must be an int64 tensor, got {given}")
    if positions.device != q.device:
        raise ValueError(f"{op}: q is on {q.device} and positions on {positions.device}; move one of them")
    if tuple(positions.shape) != (q.shape[2],):
        raise ValueError(
            f"{op}: positions must be ({q.shape[2]},), one a query of q {tuple(q.shape)}, got {tuple(positions.shape)}"
        )
    # Of a GPU's values or a traced tensor's nothing can be known here without waiting or breaking the graph.
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed(positions):
        return
    if positions.numel():
        lowest, highest = (bound.item() for bound in positions.aminmax())
        if lowest < 0 or highest >= length:
            raise ValueError(
                f"{op}: positions must lie in 0..{length - 1}, raster positions of the grid, got {lowest}..{highest}"
            )
