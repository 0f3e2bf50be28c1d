"""Moving MNIST as a prepared set: generated from idx files, and the fixed test clips, as MovingDigits has them."""

import gzip
import struct

import numpy as np
import pytest

from vpfast.data import DataError, MovingDigits, PreparedClips
from vpfast.data.prepare import check, prepare
from vpfast.data.sets.moving_mnist import MovingMNIST

FEW = {"train": 5, "val": 3, "test": 4}


def write_idx(path, count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    data = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def mnist(tmp_path):
    """A folder with idx files of 48 and 12 noisy digits, one of them packed."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte.gz", 48, 1)
    write_idx(folder / "t10k-images-idx3-ubyte", 12, 2)
    return folder


@pytest.fixture
def fixed(tmp_path):
    clips = np.random.default_rng(3).integers(0, 256, (20, 6, 64, 64), dtype=np.uint8)
    path = tmp_path / "mnist_test_seq.npy"
    np.save(path, clips)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_are_those_of_moving_digits(mnist, tmp_path, workers):
    done = prepare(MovingMNIST(seed=7, **FEW), mnist, tmp_path / "out", workers=workers)
    assert [entry.name for entry in done.index.recordings][:5] == [*(f"test/{n:05}" for n in range(4)), "train/00000"]
    for split, count in FEW.items():
        prepared = PreparedClips(tmp_path / "out", split)
        digits = MovingDigits(mnist, split, count=count, seed=7)
        assert len(prepared) == len(digits) == count
        for index in range(count):
            assert np.array_equal(prepared[index], digits[index])
    assert check(tmp_path / "out") == []


def test_fixed_clips_are_the_test_split(mnist, fixed, tmp_path):
    fixed.rename(mnist / fixed.name)
    prepare(MovingMNIST(**FEW), mnist, tmp_path / "out")
    clips = np.load(mnist / fixed.name)
    prepared = PreparedClips(tmp_path / "out", "test")
    assert (len(prepared), len(PreparedClips(tmp_path / "out", "train"))) == (4, 5)
    for index in range(4):
        assert np.array_equal((prepared[index].numpy()[:, 0] * 255).round(), clips[:, index])


def test_fixed_clips_alone(fixed, tmp_path):
    done = prepare(MovingMNIST(channels=3), fixed, tmp_path / "out")
    assert {entry.split for entry in done.index.recordings} == {"test"}
    assert [entry.shape for entry in done.index.recordings] == [(20, 3, 64, 64)] * 6
    stored = np.load(tmp_path / "out/frames/test/00003.npy")
    assert (stored == np.load(fixed)[:, 3][:, None]).all()


def test_a_split_of_no_clips_is_left_out(mnist, tmp_path):
    done = prepare(MovingMNIST(train=2, val=0, test=0), mnist, tmp_path / "out")
    assert [entry.name for entry in done.index.recordings] == ["train/00000", "train/00001"]
    with pytest.raises(ValueError, match="length: 0 given, must be at least 1"):
        prepare(MovingMNIST(length=0), mnist, tmp_path / "out")
    with pytest.raises(ValueError, match="val: -1 given, must be at least 0"):
        prepare(MovingMNIST(val=-1), mnist, tmp_path / "out")


def test_a_folder_without_mnist(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds neither MNIST's idx files .* nor mnist_test_seq\.npy"):
            prepare(MovingMNIST(), place, tmp_path / "out")


def header_that_lies(path):
    path.write_bytes(path.read_bytes().replace(b"(20, 6, 64, 64)", b"(20, 9, 64, 64)"))


def header_of_a_giant(path):
    path.write_bytes(path.read_bytes().replace(b"(20, 6, 64, 64), }    ", b"(20, 60000, 64, 64), }"))


def objects(path):
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)


def other_type(path):
    np.save(path, np.load(path).astype(np.float32))


def other_order(path):
    np.save(path, np.load(path).swapaxes(0, 1))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a .npy file"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "not a .npy file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a .npy file that can be memory-mapped"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(500)), "not a .npy file"),
        (header_that_lies, "not a .npy file that can be memory-mapped"),
        (header_of_a_giant, "not a .npy file that can be memory-mapped"),
        (objects, "not a .npy file that can be memory-mapped"),
        (other_type, "expected uint8 .* found float32"),
        (other_order, "its clips have 6 frames, 20 were asked"),
        (lambda path: np.save(path, np.zeros((20, 6, 32, 32), np.uint8)), "holds 6 clips of 32x32"),
        (lambda path: np.save(path, np.zeros((20, 0, 64, 64), np.uint8)), "holds 0 clips"),
    ],
)
def test_fixed_clips_that_are_none(fixed, tmp_path, harm, message):
    harm(fixed)
    with pytest.raises(DataError, match=message):
        prepare(MovingMNIST(), fixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 10, 200])
def test_idx_files_cut_off(mnist, tmp_path, name, keep):
    path = mnist / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=path.name):
        prepare(MovingMNIST(**FEW), mnist, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_changed_within_a_process(mnist, tmp_path):
    prepare(MovingMNIST(**FEW), mnist, tmp_path / "out")
    before = np.load(tmp_path / "out/frames/test/00000.npy")
    write_idx(mnist / "t10k-images-idx3-ubyte", 12, 5)
    done = prepare(MovingMNIST(**FEW), mnist, tmp_path / "out")
    assert (done.decoded, done.kept) == (4, 8)
    assert not np.array_equal(np.load(tmp_path / "out/frames/test/00000.npy"), before)


def test_real_digits(shared, tmp_path):
    few = {"train": 3, "val": 2, "test": 2}
    prepare(MovingMNIST(**few), shared / "data/mnist", tmp_path / "out")
    for split, count in few.items():
        prepared = PreparedClips(tmp_path / "out", split)
        digits = MovingDigits(shared / "data/mnist", split, count=count)
        assert all(np.array_equal(prepared[index], digits[index]) for index in range(count))
