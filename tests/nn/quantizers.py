"""Vectors and quantizers for the tests of HierarchicalResidualVQ."""

from typing import Any

import torch
from torch import Tensor

from vpfast.nn import HierarchicalResidualVQ


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantizer(*sizes: int, seed: int = 0, **options: Any) -> HierarchicalResidualVQ:
    """With codewords of the size of the vectors, smaller from layer to layer."""
    torch.manual_seed(seed)
    vq = HierarchicalResidualVQ(*sizes, **options)
    with torch.no_grad():
        for layer, codebook in enumerate(vq.codebooks):
            codebook.normal_().mul_(0.6**layer)
        if vq.embed_avg is not None:
            vq.embed_avg.copy_(vq.codewords)
    return vq
