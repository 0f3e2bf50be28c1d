"""Streams of hundreds of frames: what they remember has one size, is what it says, and keeps nothing else alive."""

import gc
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vpfast
from vpfast import Stream
from vpfast.models import MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig

pytestmark = pytest.mark.alone  # all that the process holds is counted

CONTEXT = 4


def mspn(**changes: Any) -> MSPN:
    fields = {"in_channels": 1, "channels": (4, 6), "levels": 1, "hidden_channels": 4, **changes}
    torch.manual_seed(0)
    return MSPN(MSPNConfig(**fields)).eval()


def shrvqvae() -> SHRVQVAE:
    prior = {"prior_channels": 6, "prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 1, "prior_head_dim": 4}
    small = {"in_channels": 1, "channels": (4, 6), "residual_channels": 3, "latent_channels": 3, "codebook_size": 3}
    torch.manual_seed(0)
    made = SHRVQVAE(SHRVQVAEConfig(**{**small, **prior, "prior_ffn": 6, "prior_head": 6, "layers": 2}))
    made.autoencoder.train()(torch.rand(64, 1, 1, 8, 12))  # the first batch spreads the codebooks
    return made.eval()


KINDS = {
    "MSPN": lambda: Stream(mspn()),
    "MSPN that sees frames": lambda: Stream(mspn(feed_frame=True)),
    "optimized MSPN": lambda: Stream(vpfast.optimize(mspn())),
    "S-HR-VQVAE": lambda: Stream(shrvqvae(), context=CONTEXT),
}


@pytest.fixture(params=KINDS, ids=list(KINDS))
def stream(request: pytest.FixtureRequest) -> Stream[Any]:
    made: Stream[Any] = KINDS[request.param]()
    return made


def frames(count: int) -> Iterator[Tensor]:
    """Noise, each frame in memory of its own."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(1, 8, 12, generator=generator)


def tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in tuples in tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for each in state:
            yield from tensors(each)


def state_bytes(stream: Stream[Any]) -> int:
    """Of the memory that the state keeps alive, which may be more than what its tensors show of it."""
    storages = [tensor.untyped_storage() for tensor in tensors(stream._state)]
    assert storages
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held() -> tuple[int, int, int]:
    """What this process holds: objects that hold others, the bytes of lists and the like, and those of all tensors.

    A list that grows by a number a frame would show in the second, a tensor that is kept in all of them.
    """
    gc.collect()
    objects = gc.get_objects()
    tensors = (each for each in objects if issubclass(type(each), Tensor))
    return (
        len(objects),
        sum(sys.getsizeof(each) for each in objects if type(each) in (list, dict, set, deque)),
        sum(each.untyped_storage().nbytes() for each in tensors),
    )


def test_nothing_grows(stream: Stream[Any]) -> None:
    """Of the last 200 frames there is nothing left: not half an object a frame, not half a number, no tensor."""
    sizes, alive = [0] * 4, [(0, 0, 0)] * 4
    for number, frame in enumerate(frames(400)):
        prediction = stream.push(frame)
        if number % 100 == 99:
            stream.rollout(3)
            sizes[number // 100] = state_bytes(stream)
            alive[number // 100] = held()
    assert prediction.shape == (1, 8, 12)
    assert sizes == [sizes[0]] * 4
    objects, numbers, tensors = (after - before for before, after in zip(alive[1], alive[3], strict=True))
    assert objects < 100
    assert numbers < 100 * 8
    assert tensors <= 0


def test_the_state_of_an_shrvqvae_is_that_of_its_context() -> None:
    stream = Stream(shrvqvae(), context=CONTEXT)
    for number, frame in enumerate(frames(3 * CONTEXT), start=1):
        stream.push(frame)
        assert stream._state is not None
        codes = stream._state.codes
        assert codes.shape == (1, min(number, CONTEXT), 2, 3, 2)
        assert codes.untyped_storage().nbytes() == codes.numel() * 8


def test_an_shrvqvae_predicts_from_its_context() -> None:
    model, seen = shrvqvae(), torch.stack(list(frames(2 * CONTEXT + 3))).unsqueeze(0)
    stream = Stream(model, context=CONTEXT)
    differs = False
    for time in range(seen.shape[1]):
        pushed = stream.push(seen[0, time])
        recent = seen[:, max(0, time + 1 - CONTEXT) : time + 1]
        assert torch.equal(pushed, model.predict(recent, 1)[0, 0])
        assert torch.equal(stream.rollout(CONTEXT + 2), model.predict(recent, CONTEXT + 2)[0])
        differs |= not torch.equal(pushed, model.predict(seen[:, : time + 1], 1)[0, 0])
    assert differs, "the test's model does not tell a long memory from a short one"


def test_an_shrvqvae_remembers_ten_frames_unless_told_otherwise() -> None:
    model, seen = shrvqvae(), torch.stack(list(frames(12))).unsqueeze(0)
    stream = Stream(model)
    for time in range(12):
        pushed = stream.push(seen[0, time])
    assert torch.equal(pushed, model.predict(seen[:, 2:], 1)[0, 0])


def test_steps_of_a_rollout_are_those_of_the_model() -> None:
    model = shrvqvae()
    state = model.init_state(1, 8, 12, context=CONTEXT)
    for frame in frames(CONTEXT + 1):
        _, state = model.step(frame.unsqueeze(0), state)
    together, stepped = model.rollout(state, 3), state
    for time in range(3):
        prediction, stepped = model.step(None, stepped)
        assert torch.equal(prediction, together[:, time])
    assert stepped.codes.shape[1] == CONTEXT + 3
    _, stepped = model.step(frame.unsqueeze(0), stepped)
    assert stepped.codes.shape[1] == CONTEXT


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 1, 8, 12)], ids=["one video", "two videos"])
def test_neither_gradients_nor_what_made_a_frame_are_kept(stream: Stream[Any], shape: tuple[int, ...]) -> None:
    seed = torch.rand(shape, requires_grad=True)
    for _ in range(3):
        prediction = stream.push(seed * 0.5)
        assert not prediction.requires_grad
        assert not stream.rollout(2).requires_grad
        assert all(not each.requires_grad and each.grad_fn is None for each in tensors(stream._state))


@pytest.mark.parametrize("part", ["step", "peek"])
def test_a_failure_in_the_model_leaves_the_stream_where_it_was(
    stream: Stream[Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = frames(2)
    stream.push(first)
    before = stream._state
    with monkeypatch.context() as patched:
        patched.setattr(stream.model, part, _fails)
        with pytest.raises(MemoryError):
            stream.push(second)
    assert stream._state is before
    expected = stream.push(second)
    stream.reset()
    stream.push(first)
    assert torch.equal(stream.push(second), expected)


def _fails(*arguments: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("make", "context", "error", "message"),
    [
        (shrvqvae, 0, ValueError, "context must be 1 or more, got 0"),
        (shrvqvae, 2.5, TypeError, r"context must be an integer, got 2\.5"),
        (mspn, 5, ValueError, "context: 5 given, must be left out: MSPN keeps a state of one size"),
    ],
)
def test_contexts_that_cannot_be(make: Any, context: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Stream(make(), context)
