"""Moving digits: the same clip wherever it is made, no digit in two splits, physics of Moving MNIST."""

import gzip
import multiprocessing
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vpfast.data import DataError, MovingDigits


def write_idx(path, images):
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    """24 + 5 digits of 28x28, each filled with a number of its own, so that its clips tell which one it was."""
    for name, first, count in (("train-images-idx3-ubyte", 1, 24), ("t10k-images-idx3-ubyte", 101, 5)):
        write_idx(tmp_path / name, np.repeat(np.arange(first, first + count, dtype=np.uint8), 784).reshape(-1, 28, 28))
    return tmp_path


def digits_seen(source, split, **options):
    clips = MovingDigits(source, split=split, length=1, count=300, digits=1, **options)
    return {int(clip.max() * 255 + 0.5) for clip in clips}


def test_item_is_a_clip_in_the_unit_range():
    clip = MovingDigits(length=7, count=3)[2]
    assert (clip.shape, clip.dtype) == ((7, 1, 64, 64), torch.float32)
    assert clip.min() == 0
    assert 0.9 < clip.max() <= 1


def test_clips_do_not_depend_on_order_process_or_global_random_state():
    data = MovingDigits(count=12, seed=3)
    expected = [clip.clone() for clip in data]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(data[i], expected[i]) for i in reversed(range(12)))
    for context in ("fork", "spawn"):
        loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), torch.stack(expected))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        fresh = pool.apply(_clip_5)
    assert np.array_equal(fresh, expected[5].numpy())


def _clip_5():
    return MovingDigits(count=12, seed=3)[5].numpy()


def test_seed_split_and_index_each_matter():
    clips = [MovingDigits(seed=s, split=p, count=2)[i] for s in (0, 1) for p in ("train", "val") for i in (0, 1)]
    assert all(not torch.equal(a, b) for k, a in enumerate(clips) for b in clips[:k])


def test_the_same_numbers_on_every_machine():
    """Pinned: a change here changes every published number made with generated clips."""
    clip = MovingDigits(length=20, count=1, seed=0, speed=0.1)[0]
    pinned = [(clip[t, 0] > 0.5).nonzero().float().mean(dim=0).round().int().tolist() for t in (0, 9, 19)]
    assert pinned == [[31, 29], [31, 24], [23, 46]]


def test_length_only_cuts_a_clip():
    assert torch.equal(MovingDigits(length=20, count=4)[3][:8], MovingDigits(length=8, count=9)[3])


def test_splits_of_an_idx_folder_share_no_digit(idx_folder):
    seen = {split: digits_seen(idx_folder, split) for split in ("train", "val", "test")}
    assert seen["train"] == set(range(1, 23))
    assert seen["val"] == {23, 24}
    assert seen["test"] == set(range(101, 106))


def test_splits_of_one_file_share_no_digit(idx_folder):
    seen = {s: digits_seen(idx_folder / "train-images-idx3-ubyte", s) for s in ("train", "val", "test")}
    assert seen["train"] | seen["val"] | seen["test"] == set(range(1, 25))
    assert sum(map(len, seen.values())) == 24


def test_splits_of_scikit_learns_digits_are_disjoint_blocks():
    parts = [MovingDigits(split=split)._images for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1437, 180, 180]


@given(speed=st.floats(0, 0.99), size=st.integers(8, 40), index=st.integers(0, 10**6))
def test_a_digit_keeps_its_speed_and_never_leaves(tmp_path_factory, speed, size, index):
    path = tmp_path_factory.mktemp("one") / "digits"
    write_idx(path, np.full((10, 8, 8), 255, np.uint8))
    clip = MovingDigits(path, length=30, count=10**6 + 1, size=size, digits=1, digit_size=8, speed=speed)[index]
    assert torch.equal(clip.sum(dim=(1, 2, 3)), torch.full((30,), 64.0))  # whole in every frame
    corners = torch.stack([(clip[t, 0] > 0).nonzero()[0] for t in range(30)])
    steps = corners.diff(dim=0).abs().max().item()
    assert steps <= speed * (size - 8) + 1


def test_digits_bounce_and_merge_by_maximum(idx_folder):
    clip = MovingDigits(idx_folder, split="test", length=100, count=1, digits=1, speed=0.2)[0]
    corners = torch.stack([(frame[0] > 0).nonzero()[0] for frame in clip])
    for axis in (0, 1):
        turns = corners[:, axis].diff().sign()
        assert {-1, 1} <= set(turns.tolist())
        assert corners[:, axis].min() == 0
    merged = MovingDigits(idx_folder, split="test", length=1, count=50, digits=4)
    assert all(set((clip * 255).round().unique().tolist()) <= {0, *range(101, 106)} for clip in merged)


def test_fixed_clips(tmp_path):
    path = tmp_path / "mnist_test_seq.npy"
    clips = np.random.default_rng(0).integers(0, 256, (20, 7, 64, 64), dtype=np.uint8)
    np.save(path, clips)
    data = pickle.loads(pickle.dumps(MovingDigits(path, split="test", length=15)))
    assert len(data) == 7
    assert torch.equal((data[-1][:, 0] * 255).round().byte(), torch.from_numpy(clips[:15, 6]))
    assert len(pickle.dumps(data)) < 5000
    with pytest.raises(ValueError, match="fixed test clips"):
        MovingDigits(path, split="train")
    with pytest.raises(DataError, match="20 frames, 21 were asked"):
        MovingDigits(path, split="test", length=21)
    with pytest.raises(DataError, match="64x64, asked were clips of 32x32"):
        MovingDigits(path, split="test", size=32)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(30), b"\x93NUMPY\x01\0\x10\0{'descr': '|u1'}", b"\x93NUMPY\x09\0", b"not numpy at all"],
)
def test_a_damaged_npy_is_named(tmp_path, content):
    path = tmp_path / "mnist_test_seq.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match="mnist_test_seq"):
        MovingDigits(path, split="test")


def test_an_npy_of_objects_of_another_type_or_with_a_lie_in_its_header(tmp_path):
    path = tmp_path / "seq.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"seq\.npy"):
        MovingDigits(path, split="test")
    np.save(path, np.zeros((20, 2, 64, 64), np.float32))
    with pytest.raises(DataError, match="float32"):
        MovingDigits(path, split="test")
    np.save(path, np.zeros((20, 2, 64, 64), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"(20, 2, 64, 64)", b"(20, 9, 64, 64)"))
    with pytest.raises(DataError, match=r"seq\.npy"):
        MovingDigits(path, split="test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, "split must be one of train, val, test, got 'dev'"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": 20}, "size .20. must be at least digit_size .28."),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"speed": 1.0}, "speed must be in"),
        ({"speed": float("nan")}, "speed must be in"),
    ],
)
def test_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        MovingDigits(**options)


def test_missing_sources(tmp_path, idx_folder):
    with pytest.raises(DataError, match="cannot be read"):
        MovingDigits(tmp_path / "nothing-idx3-ubyte")
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="holds no t10k-images"):
        MovingDigits(idx_folder, split="test")
    write_idx(tmp_path / "few", np.ones((1, 28, 28), np.uint8))
    with pytest.raises(DataError, match="too few digit images"):
        MovingDigits(tmp_path / "few")


def test_scikit_learn_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'vpfast\[demo\]'"):
        MovingDigits()


def test_index_out_of_range():
    data = MovingDigits(count=3)
    assert torch.equal(data[-1], data[2])
    with pytest.raises(IndexError, match="index 3 in a set of 3"):
        data[3]


def test_gzipped_idx_and_another_digit_size(tmp_path, idx_folder):
    plain = (idx_folder / "t10k-images-idx3-ubyte").read_bytes()
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(plain))
    clip = MovingDigits(tmp_path, split="test", length=2, count=1, digits=1, digit_size=10, size=20)[0]
    assert (clip > 0).sum(dim=(1, 2, 3)).tolist() == [100, 100]


def test_real_mnist(shared):
    data = MovingDigits(shared / "data/mnist", split="val", count=5)
    assert len(data._images) == 5000
    clip = data[0]
    assert clip.shape == (20, 1, 64, 64)
    assert 50 < (clip[0] > 0.5).sum() < 500
