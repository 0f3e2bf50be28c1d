"""Random numbers that depend on nothing but where they are used, and the choice of a code by them.

A number of Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) is a function of a key
and a counter. The key is (seed of the clip, index of the future); the counter is (t, position in the frame, layer,
codeword // 4), and the four words that come of it serve four codewords. So a clip draws the same in any batch, in any
order of evaluation and on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpfast.nn._common import as_integer

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> Tensor:
    """Philox 4x32-10: four 32-bit words for every counter and key.

    Args:
        counter: four words, each an int64 tensor or an int in [0, 2^32); at least one tensor.
        key: two words, likewise. All six broadcast against each other.

    Returns:
        int64 (*, 4), in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around modulo 2^64, which leaves its bits right; the mask drops the copies of the sign.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, (c0, c1, c2, c3))), dim=-1)


def uniform(words: Tensor) -> Tensor:
    """32-bit words -> float64 in the open interval (0, 1), exactly (word + 1/2) / 2^32."""
    return (words.double() + 0.5) * 2.0**-32


def clip_keys(seed: int | Sequence[int], batch: int, num_futures: int = 1) -> Tensor:
    """The keys of a batch, int64 (batch * num_futures, 2): futures of a clip one after the other.

    Args:
        seed: one for all clips, or one a clip; integers in [0, 2^32).

    Raises:
        TypeError: no integers.
        ValueError: out of range, or not one a clip.
    """
    if as_integer(seed) is not None or not isinstance(seed, Iterable):
        seeds = torch.full((batch,), _checked(seed), dtype=torch.int64)
    else:
        given = [_checked(each) for each in seed]
        if len(given) != batch:
            raise ValueError(f"seed must be one integer, or one for each of the {batch} clips, got {len(given)}")
        seeds = torch.tensor(given, dtype=torch.int64)
    futures = torch.arange(num_futures).repeat(batch)
    return torch.stack([seeds.repeat_interleave(num_futures), futures], dim=1)


def _checked(seed: object) -> int:
    whole = as_integer(seed)
    if whole is None:
        raise TypeError(f"seed must be an integer, or one for each clip, got {seed!r}")
    if not 0 <= whole <= _WORD:
        raise ValueError(f"seed must lie in [0, 2^32), got {whole}")
    return whole


@dataclass(frozen=True)
class Choice:
    """How a code is chosen by its logits: the largest, or at random.

    Attributes:
        temperature: 0 takes the largest logit, the first of equals. Above it code m is drawn with probability
            softmax(logits / temperature)[m], as the largest of logits / temperature - log(-log u) (Gumbel-max).
        top_k: only codes whose logit is at least the ``top_k``-th largest can be drawn; None: all.
        keys: int64 (B, 2) of :func:`clip_keys`, on the device of the logits.
    """

    temperature: float
    top_k: int | None
    keys: Tensor

    def __call__(self, logits: Tensor, times: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Codes of P positions: ``logits`` (B, P, M), int64 ``times`` and ``positions`` (P,) -> int64 (B, P).

        ``times`` count from the first frame of the clip, ``positions`` in raster order from the first of the frame.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        codes = logits.shape[-1]
        group = torch.arange(-(-codes // 4), device=logits.device)
        counter = (times[:, None], positions[:, None], layer, group)
        words = philox(counter, (self.keys[:, 0, None, None], self.keys[:, 1, None, None]))
        noise = uniform(words.flatten(-2)[..., :codes]).log_().neg_().log_().neg_()
        scores = logits.double()
        scores = scores - scores.amax(-1, keepdim=True)  # so that no temperature overflows
        if self.top_k is not None and self.top_k < codes:
            lowest = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        return noise.add_(scores / self.temperature).argmax(-1)
