"""Frames of codes by the compiled kernel: what :mod:`cache` and :mod:`sampler` do in torch, in one call a frame.

It serves networks on the CPU with ``conditioning="raster"``, whose codes come one position after another: in float32,
float64, and bfloat16 where the processor has dot products of it; ``vpfast.backend("reference")`` keeps to torch. The
codes are the same, but where two logits are within rounding of each other. Of bfloat16 are weights, what is kept of the
layers, and factors of products; sums and all else are float32, more than torch's operators keep between layers. The
operators are in vpfast/ops/_sample_codes.py, the kernel in csrc/sample_codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models.shrvqvae.cache import ConvCache, NetworkCache
from vpfast.models.shrvqvae.random import Choice
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN
from vpfast.ops import Mask3d
from vpfast.ops._backend import computes_in_bfloat16, current_backend, native_devices

_RUN = 0
"""Positions evaluated together, 1 to 16, or 0: as many as pay. The codes do not depend on it."""


def serves(prior: STPixelCNN, codes: Tensor) -> bool:
    """Can the kernel sample from this network, under the backend that is chosen?"""
    return (
        current_backend() in ("auto", "native")
        and codes.device.type in native_devices("vpfast::sample_codes")
        and could_serve(prior.norm.weight.dtype, prior)
    )


def could_serve(dtype: torch.dtype, prior: STPixelCNN) -> bool:
    """Can the kernel sample from this network on this machine's CPU, were its weights of this type?"""
    config = prior.config
    if config.conditioning != "raster":
        return False
    if dtype == torch.bfloat16:
        sizes = (config.prior_channels, config.prior_head_dim, config.prior_ffn, config.prior_head)
        return computes_in_bfloat16() and all(size % 2 == 0 for size in sizes)
    return dtype in (torch.float32, torch.float64)


class CompiledPass:
    """One pass of the network, all layers of codes or layer ``layer`` alone, with what ``cache`` keeps of it.

    From the first frame on keys are kept here, in the layout of the kernel, and no longer in ``cache``.
    """

    def __init__(self, prior: STPixelCNN, cache: NetworkCache, layer: int | None) -> None:
        self.prior, self.cache = prior, cache
        config = prior.config
        first, last = (0, config.layers) if layer is None else (layer, layer + 1)
        self.entering = [_rows(part) for i, part in enumerate(prior.embed) if layer is None or i == layer]
        self.entering += _affine(prior.mix[1])
        self.layers = [self._layer(index) for index in range(len(cache.layers))]
        self.leaving = [*_norm(prior.norm), *map(_rows, prior.parents)]
        self.leaving += [*_affine(prior.mlp[0]), *_affine(prior.mlp[2])]
        for head in prior.heads[first:last]:
            self.leaving += _affine(head)
        masks = [Mask3d("raster")]
        if len(prior.attentions):
            masks = prior.attentions[0].attention.masks  # type: ignore[union-attr, assignment]
        self.masks = [mask.name for mask in masks]
        self.windows = [radius for mask in masks for radius in mask.radii]
        every = config.prior_attention_every if len(prior.attentions) else 0
        self.sizes = [config.prior_channels, config.prior_blocks, every, config.prior_heads, config.prior_head_dim]
        self.sizes += [config.prior_ffn, config.prior_head, config.layers, config.codebook_size, first, last]
        self.sizes += [len(prior.parents), -1 if layer is None else layer]

    def sample(self, codes: Tensor, time: int, size: tuple[int, int], choice: Choice) -> bool:
        """Choose the codes of frame ``time``, (B, T H W, n), in place; False where logits are not finite.

        The cache has begun the frame.
        """
        stem, block = self.cache.stem, self.cache.layers[0].conv
        network = [stem.inputs, _known(stem.frame), _in_terms(stem.present), *self.entering]
        kept = [0]  # where in it the tensors are that the kernel writes into
        for before, conv, after in self.layers:
            kept.append(len(network) + len(before))
            network += [*before, conv.inputs, _known(conv.frame), _in_terms(conv.present), *after]
            if len(after) > 2:  # they end with keys and values
                kept += [len(network) - 2, len(network) - 1]
        length, cells = codes.shape[1], size[0] * size[1]
        tables = [stem.window.present, stem.window.own, block.window.present, block.window.own]
        network += self.leaving
        frame = (
            tables,
            choice.keys,
            [length // cells, *size],
            self.masks,
            self.windows,
            [*self.sizes, time, stem.window.frame, _RUN],
            choice.temperature,
            choice.top_k or self.prior.config.codebook_size,
        )
        if torch.compiler.is_compiling():  # it raises by itself where logits are not finite
            weights = [tensor for index, tensor in enumerate(network) if index not in kept]
            torch.ops.vpfast.sample_frame(codes, [network[index] for index in kept], weights, kept, *frame)
            return True
        finite: bool = torch.ops.vpfast.sample_codes(codes, network, *frame, torch.get_num_threads())
        return finite

    def _layer(self, index: int) -> tuple[list[Tensor], ConvCache, list[Tensor]]:
        """A block: the tensors before those of its convolution, the convolution, and those after it."""
        block, conv, attention, keys_values = self.cache.layers[index]
        after = _affine(block.out)
        if attention is not None and keys_values is not None:
            after += [*_norm(attention.norm1), *_affine(attention.attention.qkv), *_affine(attention.attention.output)]
            after += [*_norm(attention.norm2), *_affine(attention.ffn[0]), *_affine(attention.ffn[2])]
            after += [_keys_in_blocks(keys_values.keys), _values_in_blocks(keys_values.values)]
        return _norm(block.norm), conv, after


def _known(frame: Tensor | None) -> Tensor:
    assert frame is not None, "the cache has begun a frame"
    return frame


def _norm(norm: nn.Module) -> list[Tensor]:
    assert isinstance(norm, nn.LayerNorm)
    return [norm.weight.contiguous(), norm.bias.contiguous()]


def _rows(embedding: nn.Module) -> Tensor:
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.contiguous()


def _affine(layer: nn.Module) -> list[Tensor]:
    """The matrix, and the bias."""
    assert isinstance(layer, nn.Linear)
    return [_in_terms(layer.weight.t()), layer.bias.contiguous()]


def _in_terms(matrix: Tensor) -> Tensor:
    """(in, out) as a product takes it: in bfloat16 the terms of a sum lie in pairs, (in / 2, out, 2)."""
    if matrix.dtype != torch.bfloat16:
        return matrix.contiguous()
    pairs: Tensor = matrix.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
    return pairs


def _values_in_blocks(values: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, heads, blocks, d, keys of a block)."""
    block = 32 if values.dtype == torch.bfloat16 else 16
    padded = F.pad(values, (0, 0, 0, -values.shape[2] % block))
    blocks: Tensor = padded.unflatten(2, (-1, block)).transpose(-1, -2).contiguous()
    return blocks


def _keys_in_blocks(keys: Tensor) -> Tensor:
    """As values, but the components in the pairs in which scores take them: (B, heads, blocks, d / 2, keys, 2)."""
    blocks = _values_in_blocks(keys)
    if keys.dtype != torch.bfloat16:
        return blocks
    pairs: Tensor = blocks.unflatten(3, (-1, 2)).transpose(-1, -2).contiguous()
    return pairs
