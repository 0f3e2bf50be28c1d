"""The specification of ``masked_attention3d``: plain torch, to be read beside the formula.

    s_ij = scale q_i . k_j        lse_i = log sum_j exp(s_ij)        out_i = sum_j exp(s_ij - lse_i) v_j

every sum over the keys j that query i sees, by the rules of ``mask.py``. S-HR-VQVAE paper, section 4.3, attends so with
the conditioning set of Eq. 6. Every kernel is tested against these functions in float64. They hold the scores of all
queries and keys in memory at once; kernels do not.

Sums over no key are 0, and lse is -inf there. What a query does not see has no part in its row, whatever it holds.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vpfast.ops.masked_attention3d.mask import Mask3d


def working_dtype(q: Tensor) -> torch.dtype:
    """Arithmetic is float64 for float64 queries, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def masked_attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], mask: Mask3d, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, heads, T H W, d) -> (out (B, heads, T H W, d), lse (B, heads, T H W))."""
    return attend(q, k, v, mask.visible(grid, all_positions(k)), scale)


def masked_attention3d_decode(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, grid: Sequence[int], mask: Mask3d, scale: float
) -> Tensor:
    """q (B, heads, n, d) of queries at the raster ``positions`` (n,), and all keys -> out (B, heads, n, d)."""
    return attend(q, k, v, mask.visible(grid, positions), scale)[0]


def masked_attention3d_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Sequence[int],
    mask: Mask3d,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``out`` -> (grad_q, grad_k, grad_v). ``out`` and ``lse`` are what the forward pass gave."""
    gradients = attend_backward(grad_out, q, k, v, out, lse, mask.visible(grid, all_positions(k)), scale)
    grad_q, grad_k, grad_v = (gradient.to(q.dtype) for gradient in gradients)
    return grad_q, grad_k, grad_v


def all_positions(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2], device=k.device)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries q (B, heads, n, d) and keys (B, heads, L, d), of which query i sees those of row i of ``seen`` (n, L)."""
    scores = masked_scores(q, k, seen, scale)
    lse = scores.logsumexp(-1)
    out = weighted_sum(softmax(scores, lse, seen), seen, v)
    return out.to(q.dtype), lse


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the working type. Nothing of size n x L is kept from the forward pass: weights are recomputed."""
    dtype = working_dtype(q)
    weights = softmax(masked_scores(q, k, seen, scale), lse, seen)
    grad_weights = grad_out.to(dtype) @ v.to(dtype).mT
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)  # sum_j weights_ij grad_weights_ij
    grad_scores = scale * (weights * (grad_weights - delta)).masked_fill(~seen, 0)
    grad_q = weighted_sum(grad_scores, seen, k)
    grad_k = weighted_sum(grad_scores.mT, seen.mT, q)
    grad_v = weighted_sum(weights.mT, seen.mT, grad_out)
    return grad_q, grad_k, grad_v


def masked_scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    dtype = working_dtype(q)
    return (scale * (q.to(dtype) @ k.to(dtype).mT)).masked_fill(~seen, -math.inf)


def softmax(scores: Tensor, lse: Tensor, seen: Tensor) -> Tensor:
    """exp(s_ij - lse_i), and 0 for what is not seen, of which a row may hold nothing else."""
    return (scores - lse[..., None]).masked_fill(~seen, -math.inf).exp()


def weighted_sum(weights: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """sum_j weights_ij values_j over what is seen: a matrix product, but for 0 times a NaN or infinity not seen.

    Where one is seen the sum is NaN.
    """
    values = values.to(weights.dtype)
    finite = values.isfinite()
    spoilt = seen.to(weights.dtype) @ (~finite).to(weights.dtype) > 0
    return (weights @ values.where(finite, 0)).masked_fill(spoilt, math.nan)
