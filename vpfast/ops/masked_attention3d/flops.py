"""What ``torch.utils.flop_counter`` counts for masked attention, once this module is imported: see README.md."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vpfast.ops._library import VARIANTS
from vpfast.ops.masked_attention3d.mask import Mask3d
from vpfast.ops.masked_attention3d.register import BACKWARD, FORWARD

Shape = Sequence[int]


def _forward(
    q: Shape, k: Shape, v: Shape, grid: Shape, mask: str, window: Shape, scale: float, *, out_shape: Any = None
) -> int:
    """Two products for every pair that is seen."""
    batch, heads, _, d = q
    return 4 * d * batch * heads * Mask3d.of_radii(mask, window).pairs(grid)


def _backward(
    grad_out: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    out: Shape,
    lse: Shape,
    grid: Shape,
    mask: str,
    window: Shape,
    scale: float,
    *,
    out_shape: Any = None,
) -> int:
    """Five products for every pair: the scores again, and one for each gradient and for that of the scores."""
    return _forward(q, k, v, grid, mask, window, scale) * 5 // 2


for _variant in VARIANTS:
    register_flop_formula(getattr(torch.ops.vpfast, FORWARD + _variant))(_forward)
    register_flop_formula(getattr(torch.ops.vpfast, BACKWARD + _variant))(_backward)
