"""The idx reader believes nothing that the bytes do not bear out."""

import contextlib
import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpfast.data import DataError, read_idx


def idx_bytes(shape, values=None):
    values = bytes(i % 256 for i in range(int(np.prod(shape)))) if values is None else values
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + values


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)), data=st.data())
def test_what_is_written_is_read(tmp_path_factory, pack, shape, data):
    size = int(np.prod(shape))
    values = data.draw(st.binary(min_size=size, max_size=size))
    path = tmp_path_factory.mktemp("idx") / "images"  # gzip is known by its bytes, not by an ending
    path.write_bytes(pack(idx_bytes(shape, values)))
    images = read_idx(path)
    assert images.dtype == np.uint8
    assert images.shape == shape
    assert images.tobytes() == values


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes long"),
        (b"\0\0\x08", "3 bytes long"),
        (b"\x89PNG" + bytes(40), "offset 0 reads 89 50 4e 47"),
        (struct.pack(">4B3I", 0, 0, 13, 3, 1, 1, 1) + bytes(4), "unsigned bytes"),
        (struct.pack(">4BI", 0, 0, 8, 1, 3) + b"abc", "3 dimensions"),
        (idx_bytes((2, 3, 3))[:9], "ends at offset 9, inside its header"),
        (idx_bytes((2, 0, 3)), "dimension 1 .offset 8. is 0"),
        (idx_bytes((2, 3, 3))[:-1], "promises 2 x 3 x 3 = 18 values, more than the file can hold"),
        (idx_bytes((2, 3, 3)) + b"x", "more data at offset 34"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the"),
    ],
)
def test_refusals_name_file_and_place(tmp_path, content, words):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "checksum", "body"])
def test_damaged_gzip(tmp_path, damage):
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(4000).join([idx_bytes((40, 10, 10), b""), b""])))
    if damage == "truncated":
        packed = packed[: len(packed) // 2]
    else:
        packed[-6 if damage == "checksum" else len(packed) // 2] ^= 0xFF
    path = tmp_path / "images.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="gzip") as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_gzip_that_holds_less_than_promised_says_where_it_ends(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes((2, 3, 3))[:-4]))
    with pytest.raises(DataError, match="ends at offset 30; its header promises 18 values, 14 are there"):
        read_idx(path)


def test_a_boastful_header_allocates_nothing(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 1_000_000, 28, 28) + bytes(900_000)))
    tracemalloc.start()
    with pytest.raises(DataError):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("name", ["missing", "."])
def test_missing_file_and_folder(tmp_path, name):
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: cannot be read \(not a regular file\)"):
        read_idx(tmp_path / "pipe")


@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.builds(lambda tail: b"\0\0\x08\x03" + tail, st.binary(max_size=60)),
        st.builds(lambda tail: b"\x1f\x8b\x08\0" + tail, st.binary(max_size=60)),
        st.builds(lambda head, tail: gzip.compress(b"\0\0\x08\x03" + head + tail), *[st.binary(max_size=20)] * 2),
    ),
    ndim=st.integers(1, 4),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ndim):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        images = read_idx(path, ndim)
        assert images.ndim == ndim
        assert images.size <= 1032 * len(content)


def test_mnist(shared):
    train = read_idx(shared / "data/mnist/train-images-idx3-ubyte.gz")
    test = read_idx(shared / "data/mnist/t10k-images-idx3-ubyte.gz")
    labels = read_idx(shared / "data/mnist/t10k-labels-idx1-ubyte.gz", ndim=1)
    assert (train.shape, test.shape, labels.shape) == ((60000, 28, 28), (10000, 28, 28), (10000,))
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.max() == 255
