"""Which clips are seen when: shuffled epochs, nothing skipped, the same for any start and any number of processes."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from vpfast.training.clips import StepBatches

sizes = st.integers(1, 30)


@given(size=sizes, batch=st.integers(1, 8), seed=st.integers(0, 5))
def test_every_epoch_holds_every_clip_once(size, batch, seed):
    steps = range(-(-3 * size // batch))
    seen = [index for indices in StepBatches(size, batch, steps, seed) for index in indices]
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=sizes, batch=st.integers(1, 8), start=st.integers(0, 20))
def test_a_later_start_goes_on_where_the_first_would_be(size, batch, start):
    whole = list(StepBatches(size, batch, range(25), 1))
    assert list(StepBatches(size, batch, range(start, 25), 1)) == whole[start:]


@given(size=sizes, batch=st.integers(1, 4), processes=st.integers(2, 4))
def test_processes_share_one_larger_batch(size, batch, processes):
    parts = [StepBatches(size, batch, range(6), 2, rank, processes) for rank in range(processes)]
    together = [list(chain(*step)) for step in zip(*parts, strict=True)]
    assert together == list(StepBatches(size, batch * processes, range(6), 2))


def test_epochs_and_seeds_differ():
    first, second = StepBatches(50, 50, range(2), 0)
    assert first != second
    assert next(iter(StepBatches(50, 50, range(1), 1))) != first
