"""Recorded work, with a tape in the place of CUDA graphs: what is kept, copied, shared, given up and refused."""

import threading
from collections.abc import Callable

import pytest
import torch
from tape import NotRecordableError, TapeRecorder
from torch import Tensor

import vpfast
from vpfast.models._graphs import GraphCache, bucket


class Scaled:
    """Work on rows that notes what it is called with."""

    def __init__(self) -> None:
        self.weight = torch.tensor([1.0, 2.0, 3.0])
        self.read: list[Tensor] = []

    def __call__(self, x: Tensor) -> list[Tensor]:
        self.read.append(x)
        scaled = x * self.weight
        return [scaled, scaled.cumsum(1)]


@pytest.fixture
def recorder() -> TapeRecorder:
    return TapeRecorder()


@pytest.fixture
def graphs(recorder: TapeRecorder) -> GraphCache:
    return GraphCache(recorder, limit=3)


def rows(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(seed))


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_the_same_work_is_recorded_once(graphs: GraphCache, recorder: TapeRecorder) -> None:
    work = Scaled()
    for seed in range(4):
        assert_same(graphs.run("scaled", work, [rows(2, seed)]), Scaled()(rows(2, seed)))
    assert (recorder.captures, recorder.replays) == (1, 4)
    assert len({x.data_ptr() for x in work.read}) == 1  # it always reads from one place


def test_results_are_the_callers_own(graphs: GraphCache) -> None:
    work = Scaled()
    first = graphs.run("scaled", work, [rows(2, 1)])
    kept = [result.clone() for result in first]
    second = graphs.run("scaled", work, [rows(2, 2)])
    assert_same(first, kept)
    second[0].zero_()
    assert_same(graphs.run("scaled", work, [rows(2, 1)]), kept)


def test_weights_changed_in_place_are_seen(graphs: GraphCache) -> None:
    work = Scaled()
    graphs.run("scaled", work, [rows(2)])
    work.weight.mul_(-2)
    assert_same(graphs.run("scaled", work, [rows(2)]), work(rows(2)))


@pytest.mark.parametrize(("batch", "recorded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64), (65, 128)])
def test_batches_are_filled_up(graphs: GraphCache, batch: int, recorded: int) -> None:
    work = Scaled()
    assert bucket(batch) == recorded
    assert_same(graphs.run("scaled", work, [rows(batch)]), Scaled()(rows(batch)))
    assert all(len(x) == recorded for x in work.read)


def test_a_smaller_batch_leaves_nothing_of_the_one_before(graphs: GraphCache, recorder: TapeRecorder) -> None:
    work = Scaled()
    graphs.run("scaled", work, [rows(4, 1)])
    assert_same(graphs.run("scaled", work, [rows(3, 2)]), Scaled()(rows(3, 2)))
    assert recorder.captures == 1
    assert torch.equal(work.read[-1], torch.cat((rows(3, 2), torch.zeros(1, 3))))


def test_several_inputs_of_different_types_and_layouts(graphs: GraphCache) -> None:
    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.float64
        return [x * 2, y + x.mean((1, 2, 3))[:, None]]

    x = torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last)
    y = torch.randn(3, 6, dtype=torch.float64)[:, ::2]
    found = graphs.run("both", work, [x, y])
    assert_same(found, work(x, y))
    assert found[0].stride() == x.stride()


def test_other_names_shapes_types_and_layouts_are_recorded_apart(graphs: GraphCache, recorder: TapeRecorder) -> None:
    def work(x: Tensor) -> list[Tensor]:
        return [x + 1]

    graphs.limit = 100
    maps = torch.zeros(2, 3, 4, 5)
    for name, x in [
        ("one", maps), ("two", maps), ("one", maps.double()), ("one", maps[..., :4]), ("one", maps.flatten(2)),
        ("one", maps.contiguous(memory_format=torch.channels_last)),
    ]:  # fmt: skip
        graphs.run(name, work, [x])
        graphs.run(name, work, [x])
    assert (recorder.captures, recorder.replays, len(graphs)) == (6, 12, 6)


def test_settings_that_choose_kernels_are_recorded_apart(graphs: GraphCache, recorder: TapeRecorder) -> None:
    work = Scaled()
    graphs.run("scaled", work, [rows(2)])
    with vpfast.backend("reference"):
        graphs.run("scaled", work, [rows(2)])
        graphs.run("scaled", work, [rows(2)])
    torch.use_deterministic_algorithms(True)
    try:
        graphs.run("scaled", work, [rows(2)])
    finally:
        torch.use_deterministic_algorithms(False)
    graphs.run("scaled", work, [rows(2)])
    assert recorder.captures == 3


def test_the_least_recently_used_is_given_up(graphs: GraphCache, recorder: TapeRecorder) -> None:
    work = Scaled()
    for batch in (1, 2, 4, 1, 8):  # 2 is the one
        graphs.run("scaled", work, [rows(batch)])
    assert (recorder.captures, recorder.released, len(graphs)) == (4, 1, 3)
    for batch in (1, 4, 8):
        graphs.run("scaled", work, [rows(batch)])
    assert recorder.captures == 4
    assert_same(graphs.run("scaled", work, [rows(2)]), Scaled()(rows(2)))
    assert recorder.captures == 5


def test_a_failed_recording_leaves_nothing(graphs: GraphCache, recorder: TapeRecorder) -> None:
    work = Scaled()
    recorder.failing = MemoryError("no room")
    with pytest.raises(MemoryError, match="no room"):
        graphs.run("scaled", work, [rows(2)])
    assert len(graphs) == 0
    assert_same(graphs.run("scaled", work, [rows(2)]), Scaled()(rows(2)))
    assert (recorder.captures, len(graphs)) == (1, 1)


def test_within_a_recording_the_work_is_done_as_it_is(graphs: GraphCache, recorder: TapeRecorder) -> None:
    recorder.is_busy = True
    work = Scaled()
    x = rows(3)
    assert_same(graphs.run("scaled", work, [x]), Scaled()(x))
    assert work.read[0] is x
    assert (recorder.captures, recorder.turns, len(graphs)) == (0, 0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_with_and_without_inference_mode(graphs: GraphCache, recorder: TapeRecorder, first: bool) -> None:
    work = Scaled()
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            found = graphs.run("scaled", work, [rows(3)])
        assert_same(found, Scaled()(rows(3)))
        assert found[0].is_inference() == inference
    assert recorder.captures == 1


def test_gradients_are_not_recorded(graphs: GraphCache) -> None:
    work = Scaled()
    work.weight.requires_grad_()
    assert not any(result.requires_grad for result in graphs.run("scaled", work, [rows(2).requires_grad_()]))


def test_threads_take_turns(graphs: GraphCache, recorder: TapeRecorder) -> None:
    """The recorder fails where one turn begins in another."""
    work, wrong = Scaled(), []
    start = threading.Barrier(6)

    def call(seed: int) -> None:
        start.wait()
        for turn in range(20):
            batch = 1 + (seed + turn) % 4
            found = graphs.run("scaled", work, [rows(batch, seed)])
            wanted = Scaled()(rows(batch, seed))
            if not all(map(torch.equal, found, wanted)):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recorder.replays == 120


# --- the tape itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [lambda x: x[0, 0].item(), lambda x: x.nonzero(), lambda x: bool(x.sum() > 0)])
def test_a_tape_refuses_what_waits_for_a_value(graphs: GraphCache, waits: Callable[[Tensor], object]) -> None:
    def work(x: Tensor) -> list[Tensor]:
        waits(x)
        return [x]

    with pytest.raises(NotRecordableError):
        graphs.run("waits", work, [rows(2)])


def test_a_tape_knows_numbers_as_they_were(graphs: GraphCache) -> None:
    factor = 2.0

    def work(x: Tensor) -> list[Tensor]:
        return [x * factor]

    graphs.run("frozen", work, [rows(2)])
    factor = 5.0
    assert_same(graphs.run("frozen", work, [rows(2)]), [rows(2) * 2])
