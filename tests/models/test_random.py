"""The sampler's random stream: Philox as published, numbers by place alone, and draws of the right distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vpfast.models.shrvqvae.random import Choice, clip_keys, philox, uniform

# Random123's kat_vectors: counter, key, result of philox4x32 in 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    assert philox([torch.tensor(word) for word in words(counter)], words(key)).tolist() == words(result)


def test_philox_broadcasts_counters_and_keys() -> None:
    counters, keys = torch.arange(6).view(3, 2), torch.tensor([[7], [2**32 - 1], [0]])
    together = philox((counters, 1, 2, 3), (keys, 5))
    assert together.shape == (3, 2, 4)
    for row in range(3):
        for column in range(2):
            alone = philox((counters[row, column], 1, 2, 3), (int(keys[row, 0]), 5))
            assert torch.equal(together[row, column], alone)


def test_uniform_is_open_at_both_ends() -> None:
    ends = uniform(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-33]


def test_keys_are_seed_and_index_of_the_future() -> None:
    assert clip_keys(3, 2, 2).tolist() == [[3, 0], [3, 1], [3, 0], [3, 1]]
    assert clip_keys([2**32 - 1, 5], 2).tolist() == [[2**32 - 1, 0], [5, 0]]
    assert clip_keys(torch.tensor([1, 2]), 2).tolist() == [[1, 0], [2, 0]]
    assert clip_keys(1, 0).shape == (0, 2)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "got -1"),
        (2**32, ValueError, "got 4294967296"),
        ([1, 2, 3], ValueError, "each of the 2 clips, got 3"),
        (1.5, TypeError, r"got 1\.5"),
        ([1, "x"], TypeError, "got 'x'"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
    ],
)
def test_bad_seeds(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_keys(seed, 2)


def chosen(logits: Tensor, temperature: float, top_k: int | None = None, seed: int = 0) -> Tensor:
    """Codes of (P, M) logits at positions 0 .. P - 1 of frame 3, layer 1."""
    choice = Choice(temperature, top_k, clip_keys(seed, 1))
    times = torch.full((len(logits),), 3)
    return choice(logits[None], times, torch.arange(len(logits)), 1)[0]


@pytest.mark.parametrize("size", [2, 4, 7])
def test_a_draw_written_out(size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    scores = logits.double() / 0.7
    for position in range(5):
        for code in range(size):
            word = philox([torch.tensor(w) for w in (3, position, 1, code // 4)], (9, 0))[code % 4]
            scores[position, code] -= torch.log(-torch.log((word.double() + 0.5) / 2**32))
    assert torch.equal(chosen(logits, 0.7, seed=9), scores.argmax(-1))


@pytest.mark.parametrize("top_k", [None, 3, 1])
def test_draws_follow_the_softmax(top_k: int | None) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0])
    count, temperature = 20_000, 1.7
    found = torch.bincount(chosen(logits.expand(count, -1), temperature, top_k), minlength=5) / count
    kept = torch.zeros(5, dtype=torch.bool)
    kept[logits.topk(top_k or 5).indices] = True
    expected = (logits / temperature).masked_fill(~kept, -torch.inf).softmax(0)
    assert not found[~kept].any()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4.5 * deviation).all()


def test_no_temperature_takes_the_first_of_the_largest() -> None:
    assert chosen(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 0.0).item() == 1


def test_a_small_temperature_comes_near_to_none() -> None:
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(chosen(logits, 1e-9), chosen(logits, 0.0))


def test_the_smallest_temperature_takes_the_largest() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.9, 2.0]]])
    choice = Choice(5e-324, None, clip_keys(0, 1))
    assert choice(logits, torch.tensor([0]), torch.tensor([0]), 0).tolist() == [[1]]
