"""Which clips are seen when: shuffled epochs, nothing skipped, the same for any start and any number of processes."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpfast.data import MovingDigits
from vpfast.training import DataConfig, SplitConfig
from vpfast.training.clips import StepBatches, check_apart, dataset

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


def test_supersampled_digits_are_the_average_of_larger_ones():
    large = MovingDigits(split="val", length=3, count=2, seed=4, size=64, digits=1, digit_size=32)
    clips = dataset(DataConfig(size=16, digit_size=8, digits=1, supersample=4), "val", 3, 2, seed=4)
    assert len(clips) == 2
    expected = large[1].reshape(3, 1, 16, 4, 16, 4).mean(dim=(3, 5))
    torch.testing.assert_close(clips[1], expected)


def test_a_file_in_two_splits_is_refused(tmp_path):
    for name in ("a1.avi", "a2.avi", "b1.avi"):
        (tmp_path / name).touch()

    def config(**splits):
        chosen = {name: SplitConfig(include=patterns) for name, patterns in splits.items()}
        return DataConfig(kind="video-folder", root=str(tmp_path), **chosen)

    check_apart(config(train=("a*",), val=("b*",), test=("c*",)))
    with pytest.raises(ValueError, match=r"data\.val\.include: .*a2\.avi is in the train split too"):
        check_apart(config(train=("a*",), val=("?2*",)))
    with pytest.raises(ValueError, match=r"data\.test\.include: .*b1\.avi is in the val split too"):
        check_apart(config(train=("a*",), val=("b*",), test=("b*",)))


def test_epochs_and_seeds_differ():
    first, second = StepBatches(50, 50, range(2), 0)
    assert first != second
    assert next(iter(StepBatches(50, 50, range(1), 1))) != first
