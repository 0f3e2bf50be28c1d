"""Small networks to sample from, for the tests of the compiled sampler."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vpfast
from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae import compiled, sample
from vpfast.models.shrvqvae.compiled import CompiledPass

DRAWS: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "drawn": {"temperature": 0.9, "seed": 7},
    "of the two likeliest": {"temperature": 1.2, "top_k": 2, "seed": 3},
    "almost the likeliest": {"temperature": 5e-324},
}
# Sizes that are no multiple of any register's lanes, and heads that do not divide among threads.
ODD: dict[str, Any] = {
    "in_channels": 1,
    "channels": (8,),
    "codebook_size": 3,
    "layers": 3,
    "prior_channels": 24,
    "prior_blocks": 4,
    "prior_heads": 3,
    "prior_head_dim": 5,
    "prior_ffn": 20,
    "prior_head": 18,
    "attention_window": (1, 2, None),
}


def network(dtype: torch.dtype = torch.float64, **changes: Any) -> STPixelCNN:
    torch.manual_seed(1)
    prior = STPixelCNN(SHRVQVAEConfig(**{**ODD, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5)  # far from uniform
    return prior


def clip(prior: STPixelCNN, batch: int, grid: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(prior.config.codebook_size, (batch, *grid, prior.config.layers), generator=generator)


def in_torch(prior: STPixelCNN, codes: Tensor, horizon: int, **options: Any) -> Tensor:
    with vpfast.backend("reference"):
        return sample(prior, codes, horizon, **options)


def kept(prior: STPixelCNN, codes: Tensor, horizon: int, run: int, **options: Any) -> list[Tensor]:
    """The codes, and what the last pass of each layer of codes keeps of its layers: inputs, keys and values."""
    passes: dict[int, CompiledPass] = {}
    original = CompiledPass.sample

    def remembered(self: CompiledPass, *arguments: Any) -> bool:
        passes[id(self)] = self
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledPass, "sample", remembered)
        patch.setattr(compiled, "_RUN", run)
        found = [sample(prior, codes, horizon, **options)]
    for each in passes.values():
        found += [each.cache.stem.inputs, *(conv.inputs for _, conv, _ in each.layers)]
        found += [tensor for _, _, after in each.layers for tensor in after[-2:] if tensor.dim() >= 5]
    return found
