"""Sampling of codes from the ST-PixelCNN: every layer's inputs are kept, so that a position costs one evaluation.

:func:`sample_naively` is the specification, a full forward pass for every code; :func:`sample` gives the same codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from vpfast.models._config import is_count, is_weight
from vpfast.models._frames import check_count
from vpfast.models.shrvqvae.random import Choice, clip_keys
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN

Order = Literal["pipelined", "plain"]


def sample(
    prior: STPixelCNN,
    codes: Tensor,
    horizon: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    num_futures: int | None = None,
    progress: bool = False,
) -> Tensor:
    return sample_naively(prior, codes, horizon, temperature, top_k, seed, num_futures, progress)


def sample_naively(
    prior: STPixelCNN,
    codes: Tensor,
    horizon: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    num_futures: int | None = None,
    progress: bool = False,
) -> Tensor:
    """What :func:`sample` is to give, by a forward pass over the whole clip for every code."""
    horizon = _check(prior, codes, horizon, temperature, top_k, num_futures)
    batch, context, height, width, layers = codes.shape
    futures = num_futures or 1
    choice = Choice(float(temperature), top_k, clip_keys(seed, batch, futures).to(codes.device))
    clip = torch.cat((codes, codes.new_zeros(batch, horizon, height, width, layers)), 1).repeat_interleave(futures, 0)
    cells, by_layer = range(height * width), prior.config.code_order == "layers"
    order = itertools.product(range(layers), cells) if by_layer else ((i, j) for j in cells for i in range(layers))
    with _quietly(codes), _bar(progress, horizon * len(cells) * layers) as update:
        for t, (layer, cell) in itertools.product(range(context, context + horizon if batch else 0), list(order)):
            place = (slice(None), t, cell // width, cell % width, layer)
            logits = prior(clip)[place].unsqueeze(1)
            times, position = clip.new_tensor([t]), clip.new_tensor([cell])
            clip[place] = choice(logits, times, position, layer).squeeze(1)
            update(1)
    return _split(clip[:, context:], num_futures)


def _check(
    prior: STPixelCNN, codes: Tensor, horizon: int, temperature: float, top_k: int | None, num_futures: int | None
) -> int:
    """``horizon`` as an int; raise unless everything fits."""
    layers, size = prior.config.layers, prior.config.codebook_size
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise TypeError(f"codes must be an int64 tensor, got {getattr(codes, 'dtype', type(codes).__name__)}")
    if codes.dim() != 5 or codes.shape[-1] != layers or 0 in codes.shape[2:4]:
        raise ValueError(f"codes must be (B, T, H, W, {layers}) with a row and a column, got {tuple(codes.shape)}")
    if codes.device != prior.norm.weight.device:
        raise ValueError(f"codes are on {codes.device} and the prior on {prior.norm.weight.device}; move one of them")
    if codes.numel():
        low, high = torch.stack(torch.aminmax(codes)).tolist()
        if low < 0 or high >= size:
            raise ValueError(f"codes must lie in 0..{size - 1}, as a codebook has {size} codewords, got {low}..{high}")
    if not is_weight(temperature):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")
    if top_k is not None and not (is_count(top_k) and top_k <= size):
        raise ValueError(f"top_k must be 1 to {size}, the codewords in a codebook, or None for all, got {top_k!r}")
    if num_futures is not None and not is_count(num_futures):
        raise ValueError(f"num_futures must be a positive integer, or None for one future, got {num_futures!r}")
    return check_count("horizon", horizon)


@contextmanager
def _quietly(codes: Tensor) -> Iterator[None]:
    """Without gradients, and in the type of the weights."""
    with torch.inference_mode(), torch.autocast(codes.device.type, enabled=False):
        yield


@contextmanager
def _bar(progress: bool, codes: int) -> Iterator[Callable[[int], object]]:
    """What is told how many codes were chosen since the last time."""
    if not progress:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install tqdm, or pass progress=False") from error
    with tqdm(total=codes, desc="sample", unit="code", leave=False) as bar:
        yield bar.update


def _split(clips: Tensor, num_futures: int | None) -> Tensor:
    """(B F, ...) -> (B, F, ...) where futures were asked for. A tensor that autograd may keep."""
    return clips.clone() if num_futures is None else clips.unflatten(0, (-1, num_futures)).clone()
