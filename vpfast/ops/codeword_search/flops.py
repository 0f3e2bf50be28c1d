"""What ``torch.utils.flop_counter`` counts for codeword search, once this module is imported.

The products of the search alone, as those of a matrix product; sums of gradients and statistics move memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vpfast.ops._library import VARIANTS
from vpfast.ops.codeword_search.register import FORWARD, LOSSES, TRAIN

Shape = Sequence[int]


def _search(z: Shape, codebooks: Sequence[Shape], *options: bool, out_shape: Any = None) -> int:
    """Every vector is compared with the M codewords of one codebook a layer."""
    vectors, d = z
    return 2 * vectors * d * codebooks[0][0] * len(codebooks)


for _op in (FORWARD, TRAIN, LOSSES):
    for _variant in VARIANTS:
        register_flop_formula(getattr(torch.ops.vpfast, _op + _variant))(_search)
