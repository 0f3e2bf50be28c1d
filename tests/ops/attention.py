"""Queries, keys, values and the float64 oracle for the tests of masked_attention3d."""

import itertools
import math
from functools import cache

import pytest
import torch

from vpfast.ops import Mask3d
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.mask import RULES
from vpfast.ops.masked_attention3d.register import backends

native = pytest.mark.skipif("cpu" not in backends.native, reason="needs the compiled kernel of masked_attention3d")

NAMES = list(RULES)
WINDOWS = [None, (1, 1, 1), (None, 0, 0), (0, None, 0), (0, 0, None), (2, None, 3), (None, 2, None)]
MASKS = [Mask3d(name, window) for name, window in itertools.product(NAMES, WINDOWS)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# One position; one frame, row or column; sizes with remainders; several tiles of queries and keys; a large frame.
GRIDS = [(1, 1, 1), (5, 1, 1), (1, 5, 3), (4, 1, 9), (3, 7, 1), (3, 4, 5), (2, 11, 11), (4, 8, 8)]
STRIDED = (2, 3, 5)  # the grid of the cases of every stride


def length(grid):
    return math.prod(grid)


def inputs(grid, dim=24, batch=2, heads=2, dtype=torch.float32, seed=0, count=4):
    """``count`` normal tensors (batch, heads, T H W, dim): q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length(grid), dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def oracle(q, k, v, grid, mask, scale=None):
    """Attention over the written-out mask by torch's own softmax, in the type of ``q`` -> (out, lse)."""
    seen = mask.visible(grid)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum("bhid,bhjd->bhij", q, k)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen.any(1)[:, None], 0)
    return weights @ v, scores.masked_fill(~seen, -math.inf).logsumexp(-1)


def options(q, grid, mask, scale=None):
    """What the raw operators take after their tensors."""
    return grid, mask.name, mask.radii, q.shape[-1] ** -0.5 if scale is None else scale


def operator(q, k, v, grad, grid, mask, scale=None):
    """(out, lse, grad_q, grad_k, grad_v) by the raw operators."""
    out, lse = torch.ops.vpfast.masked_attention3d(q, k, v, *options(q, grid, mask, scale))
    gradients = torch.ops.vpfast.masked_attention3d_backward(grad, q, k, v, out, lse, *options(q, grid, mask, scale))
    return out, lse, *gradients


def specification(q, k, v, grad, grid, mask, scale=None):
    """The same by the reference."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = reference.masked_attention3d(q, k, v, grid, mask, scale)
    return out, lse, *reference.masked_attention3d_backward(grad, q, k, v, out, lse, grid, mask, scale)


def exact(q, k, v, grad, grid, mask, scale=None):
    """The same in float64, gradients by autograd through the oracle."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    out, lse = oracle(q, k, v, grid, mask, scale)
    gradients = torch.autograd.grad(out, (q, k, v), grad.double())
    return tuple(tensor.detach() for tensor in (out, lse, *gradients))


@cache
def solved(grid, mask, dim, dtype, seed):
    """A problem with its solutions by the reference and in float64, shared by the instruction sets."""
    given = inputs(grid, dim, dtype=dtype, seed=seed)
    return given, specification(*given, grid, mask), exact(*given, grid, mask)


def relative_error(found, truth):
    """Of lists of tensors, taken together, where ``truth`` is finite: a few numbers alone are too few to compare by."""
    pairs = [(f.double()[t.isfinite()], t[t.isfinite()]) for f, t in zip(found, truth, strict=True)]
    off = sum((f - t).square().sum() for f, t in pairs)
    return (off / sum(t.square().sum() for _, t in pairs).clamp_min(1e-300)).sqrt().item()


def assert_error_at_most_twice(found, same_precision, truth, dtype):
    """Of each of several results over many cases: against ``truth``, in float64, beside the reference in the same
    precision. Where that is float64 nothing more exact stands beside the two: sums may differ by their order."""
    terms = 64 if dtype == torch.float64 else 4
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    columns = (zip(*cases, strict=True) for cases in (found, same_precision, truth))
    for name, ours, theirs, right in zip(names, *columns, strict=False):
        assert all(torch.equal(o.isneginf(), r.isneginf()) for o, r in zip(ours, right, strict=True)), name
        assert all(o[r.isfinite()].isfinite().all() for o, r in zip(ours, right, strict=True)), name
        limit = max(2 * relative_error(theirs, right), terms * torch.finfo(ours[0].dtype).eps)
        assert relative_error(ours, right) <= limit, name


def soil_memory():
    """Leave NaN in memory that the next allocations are likely to get, of torch and of the kernels' own."""
    for size in (2**8, 2**12, 2**16):
        held = [torch.full((size,), math.nan) for _ in range(4)]
        del held


def strided_cases():
    """Name -> q, k, v and a gradient of every kind of stride; (2, 3, 30, 6) each."""
    plain = inputs(STRIDED, 6, 2, 3)
    wide = torch.randn(4, 6, 60, 12)
    qkv = torch.randn(2, 30, 3, 3, 6)
    unaligned = torch.randn(4 * 1080 + 1)[1:].view(4, 2, 3, 30, 6)
    return {
        "contiguous": plain,
        "heads last": [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in plain],
        "channels first": [tensor.mT.contiguous().mT for tensor in plain],
        "one projection": [*(qkv[:, :, k].transpose(1, 2) for k in range(3)), plain[3]],
        "all reversed": [tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for tensor in plain],
        "sliced": [wide[::2, ::2, ::2, ::2], wide[1::2, :3, 30:, :6], wide[:2, 3:, 1::2, 6:], wide[2:, ::2, :30, 1::2]],
        "expanded heads": [plain[0], *(tensor[:, :1].expand(-1, 3, -1, -1) for tensor in plain[1:])],
        "expanded batch": [tensor[:1].expand(2, -1, -1, -1) for tensor in plain],
        "one position": [tensor[:, :, :1].expand(-1, -1, 30, -1) for tensor in plain],
        "one number": [tensor[:1, :1, :1, :1].expand(2, 3, 30, 6) for tensor in plain],
        "unaligned": list(unaligned),
        "mixed": [plain[0].mT.contiguous().mT, plain[1], wide[::2, ::2, ::2, ::2], torch.ones(()).expand(2, 3, 30, 6)],
    }
