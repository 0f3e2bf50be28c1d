"""Codes and their bytes: the layout written out, sizes that the paper promises, and nothing wrong ever read."""

import hashlib
import math
import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpfast.models import Codes
from vpfast.models.shrvqvae import PRESETS, CodesError

FINGERPRINT = b"\x00\x01modelx"


def make(shape: tuple[int, ...] = (3, 5, 7, 3), codebook_size: int = 8, seed: int = 0, **changes: Any) -> Codes:
    indices = torch.randint(codebook_size, shape, generator=torch.Generator().manual_seed(seed))
    fields = {"frame_size": (4 * shape[-3], 4 * shape[-2]), "channels": 3, "fingerprint": FINGERPRINT, **changes}
    return Codes(indices, codebook_size, **fields)


def checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def write(fields: bytes, layers: list[bytes]) -> bytes:
    """The container as README.md describes it, with checksums that fit whatever it holds."""
    digests = b"".join(checksum(fields + bytes([index]) + layer) for index, layer in enumerate(layers))
    return fields + digests + checksum(fields + digests) + b"".join(layers)


def fields_of(codes: Codes, **changes: Any) -> bytes:
    shape = codes.shape if len(codes.shape) == 5 else (1, *codes.shape)
    values = {
        "magic": b"VPCODES\n",
        "version": 1,
        "flags": (len(codes.shape) == 5) + 2 * (codes.fingerprint is not None),
        "layers": codes.layers,
        "codebook_size": codes.codebook_size,
        "channels": codes.channels,
        "height": codes.frame_size[0],
        "width": codes.frame_size[1],
        "batch": shape[0],
        "time": shape[1],
        "rows": shape[2],
        "columns": shape[3],
        "fingerprint": codes.fingerprint or bytes(8),
        **changes,
    }
    return struct.pack("<8sHBBIIIIIIII8s", *values.values())


def bits_of(codes: Codes) -> list[bytes]:
    """Every layer as a string of digits 0 and 1."""
    width = math.ceil(math.log2(codes.codebook_size))
    layers = []
    for layer in codes.indices.unbind(-1):
        digits = "".join(format(index, f"0{width}b") for index in layer.flatten().tolist())
        digits += "0" * (-len(digits) % 8)
        layers.append(bytes(int(digits[start : start + 8], 2) for start in range(0, len(digits), 8)))
    return layers


@pytest.mark.parametrize("codebook_size", [2, 3, 8, 256, 257, 40_000])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 3, 4, 4, 2), (1, 1, 1, 1), (0, 4, 4, 2), (2, 0, 4, 4, 2)])
@pytest.mark.parametrize("fingerprint", [FINGERPRINT, None])
def test_layout_written_out(shape: tuple[int, ...], codebook_size: int, fingerprint: bytes | None) -> None:
    codes = make(shape, codebook_size, fingerprint=fingerprint)
    assert codes.to_bytes() == write(fields_of(codes), bits_of(codes))


@pytest.mark.parametrize("preset", PRESETS)
def test_compression_of_the_papers_table_1(preset: str) -> None:
    """42.67 and 21.33 times fewer bytes than 8-bit frames, counted on the bytes; the header is small and constant."""
    config = PRESETS[preset]
    side, channels, ratio = (32, 3, 128 / 3) if preset.startswith("kth") else (16, 1, 64 / 3)
    header = None
    for time in (1, 20, 100):
        codes = make((time, side, side, config.layers), config.codebook_size, channels=channels)
        assert codes.frame_bytes == time * (4 * side) ** 2 * channels
        data = codes.to_bytes()
        assert codes.frame_bytes / (len(data) - codes.header_bytes) == pytest.approx(ratio, rel=1e-15)
        assert codes.payload_bytes == len(data) - codes.header_bytes
        assert codes.header_bytes < 150
        header = header or codes.header_bytes
        assert codes.header_bytes == header


@st.composite
def any_codes(draw: st.DrawFn) -> Codes:
    shape = draw(st.lists(st.integers(1, 6), min_size=4, max_size=5))
    shape[0 if len(shape) == 4 else 1] = draw(st.integers(0, 5))
    codebook_size = draw(st.one_of(st.integers(2, 70), st.integers(2, 2**31 - 1)))
    return make(
        tuple(shape),
        codebook_size,
        draw(st.integers(0, 2**32)),
        channels=draw(st.integers(1, 4)),
        fingerprint=draw(st.one_of(st.none(), st.binary(min_size=8, max_size=8))),
        frame_size=(draw(st.integers(1, 5)) * shape[-3], draw(st.integers(1, 5)) * shape[-2]),
    )


@settings(max_examples=300)
@given(any_codes(), st.data())
def test_round_trip_whole_and_by_layers(codes: Codes, data: st.DataObject) -> None:
    written = codes.to_bytes()
    read = Codes.from_bytes(written)
    assert read == codes
    assert torch.equal(read.indices, codes.indices)
    assert (read.fingerprint, read.frame_size, read.channels) == (codes.fingerprint, codes.frame_size, codes.channels)
    assert read.indices.dtype == torch.int64
    layers = data.draw(st.integers(1, codes.layers))
    beginning = written[: codes.header_bytes + layers * codes.layer_bytes]
    assert Codes.from_bytes(beginning, layers) == codes.first(layers)


def test_more_indices_than_one_block() -> None:
    for codebook_size in (8, 512, 100_000):
        codes = make((2, 37, 256, 9), codebook_size)[:5]
        long = Codes.cat([codes, codes, codes])
        assert long.indices[..., 0].numel() == 3 * 2 * 37 * 256
        assert Codes.from_bytes(long.to_bytes()) == long
    large = make((70, 32, 32, 2), 8)
    assert large.indices[..., 0].numel() > 2**16
    assert bits_of(large) == [
        large.to_bytes()[large.header_bytes + layer * large.layer_bytes :][: large.layer_bytes] for layer in (0, 1)
    ]


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodesError):
        Codes.from_bytes(data)
    with pytest.raises(CodesError):
        Codes.from_bytes(b"VPCODES\n" + data)


def test_thousands_of_damaged_files_are_refused() -> None:
    """Bits turned, bytes changed, removed, inserted, moved, cut off, and two files mixed."""
    random_ = random.Random(0)
    originals = [
        make((2, 4, 4, 3), 8).to_bytes(),
        make((2, 4, 4, 3), 8, seed=1).to_bytes(),
        make((2, 3, 5, 5, 2), 5).to_bytes(),
        make((9, 1, 1, 1), 1000, fingerprint=None).to_bytes(),
    ]
    refused = 0
    while refused < 12_000:
        data = bytearray(random_.choice(originals))
        for _ in range(random_.choice((1, 1, 1, 2, 5))):
            at, end = sorted(random_.choices(range(len(data) + 1), k=2))
            kind = random_.randrange(6)
            if kind == 0:
                data[min(at, len(data) - 1)] ^= 1 << random_.randrange(8)
            elif kind == 1:
                data[at:end] = random_.randbytes(end - at)
            elif kind == 2:
                del data[at:end]
            elif kind == 3:
                data[at:at] = random_.randbytes(random_.randrange(1, 9))
            elif kind == 4:
                data[at:end] = reversed(data[at:end])
            else:
                data[at:] = random_.choice(originals)[at:]
            data = data or bytearray(b"\0")
        if bytes(data) in originals:
            continue
        with pytest.raises(CodesError):
            Codes.from_bytes(bytes(data))
        refused += 1


def test_cut_off_anywhere_and_followed_by_anything() -> None:
    codes = make((2, 4, 4, 3))
    data = codes.to_bytes()
    for size in range(len(data)):
        with pytest.raises(CodesError, match=r"cut off|begin with b''"):
            Codes.from_bytes(data[:size])
    with pytest.raises(CodesError, match="2 bytes follow the codes"):
        Codes.from_bytes(data + b"\0\0")
    with pytest.raises(CodesError, match="1 bytes follow the codes"):
        Codes.from_bytes(data + b"\0", layers=1)


def test_damage_behind_the_layers_asked_for_does_no_harm() -> None:
    codes = make((2, 4, 4, 3))
    data = bytearray(codes.to_bytes())
    data[-1] ^= 1
    assert Codes.from_bytes(data, layers=2) == codes.first(2)
    with pytest.raises(CodesError, match="damaged: the checksum of layer 3 does not match"):
        Codes.from_bytes(data)
    for size in range(codes.header_bytes + 2 * codes.layer_bytes):
        with pytest.raises(CodesError):
            Codes.from_bytes(data[:size], layers=2)


def test_layers_of_another_file_or_place_are_refused() -> None:
    """Each layer's checksum holds in its own header and at its own place alone."""
    one, two = make((2, 4, 4, 2)), make((2, 4, 4, 2), channels=1)
    data, size = one.to_bytes(), one.layer_bytes
    swapped = bytearray(data)
    swapped[-2 * size :] = data[-size:] + data[-2 * size : -size]
    for other in (bytes(swapped), data[: -2 * size] + make((2, 4, 4, 2), seed=1).to_bytes()[-2 * size :]):
        with pytest.raises(CodesError, match="checksum of layer 1"):
            Codes.from_bytes(other)
    with pytest.raises(CodesError, match="header's checksum"):
        Codes.from_bytes(fields_of(two) + data[len(fields_of(two)) :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": 2**32 - 1}, "cut off: .* bytes given, .* are needed"),
        ({"rows": 2**16, "columns": 2**16}, "cut off: .* bytes given, .* are needed"),
        ({"time": 2**32 - 1, "rows": 2**32 - 1, "columns": 2**32 - 1}, "announce 2 layers of 1 x 4294967295 frames"),
        ({"codebook_size": 2**32 - 1}, "announce a codebook of 4294967295 codewords"),
        ({"codebook_size": 1}, "announce a codebook of 1 codewords"),
        ({"codebook_size": 0}, "announce a codebook of 0 codewords"),
        ({"flags": 0, "batch": 2}, "marks 0 beside a batch of 2, which do not go"),
        ({"layers": 0}, "announce 0 layers of 1 x 2 frames of 4x4"),
        ({"flags": 4}, "marks 4 beside a batch of 1, which do not go"),
        ({"rows": 3}, "follow the codes"),
        ({"rows": 0}, "announce 2 layers of 1 x 2 frames of 0x4"),
        ({"height": 17}, "frames of 17x16 do not divide into codes of 4x4"),
        ({"height": 0}, "frames of 0x16 do not divide"),
        ({"channels": 0}, "channels must be a positive integer"),
        ({"version": 2}, "of version 2; this version of vpfast reads version 1"),
        ({"magic": b"\x89PNG\r\n\x1a\n"}, r"no vpfast codes: they begin with b'\\x89PNG"),
    ],
)
def test_a_header_that_lies_with_valid_checksums(changes: dict[str, Any], message: str) -> None:
    codes = make((2, 4, 4, 2))
    with pytest.raises(CodesError, match=message):
        read_in_little_memory(write(fields_of(codes, **changes), bits_of(codes)[: changes.get("layers", 2)]))


def test_sides_of_no_frames_may_lie_too() -> None:
    """No payload is needed for them, however large they are."""
    most = 2**32 - 1
    sides = {"batch": most, "rows": most, "columns": most, "height": most, "width": most}
    data = write(fields_of(make((1, 0, 4, 4, 2)), **sides), [b"", b""])
    with pytest.raises(CodesError, match=f"announce 2 layers of {most} x 0 frames of {most}x{most} positions"):
        read_in_little_memory(data)


def read_in_little_memory(data: bytes) -> Codes:
    tracemalloc.start()
    try:
        return Codes.from_bytes(data)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


number = st.one_of(st.integers(0, 9), st.sampled_from((255, 256, 2**31 - 1, 2**31, 2**32 - 1)))
header = st.fixed_dictionaries(
    {},
    optional={
        "flags": st.integers(0, 4),
        "layers": st.integers(0, 3),
        **dict.fromkeys(("codebook_size", "channels", "height", "width", "batch", "time", "rows", "columns"), number),
    },
)


@settings(max_examples=1000)
@given(header, st.lists(st.binary(max_size=12), min_size=3, max_size=3))
def test_any_header_with_valid_checksums(changes: dict[str, Any], layers: list[bytes]) -> None:
    """Refused, or what it says is what comes out."""
    codes = make((1, 2, 4, 4, 2))
    fields = fields_of(codes, **changes)
    data = write(fields, layers[: changes.get("layers", 2)])
    try:
        read = read_in_little_memory(data)
    except CodesError:
        return
    assert len(data) == read.header_bytes + read.payload_bytes
    assert read.layers == changes.get("layers", 2)


def test_an_index_beyond_the_codebook_with_valid_checksums() -> None:
    """Three codewords take two bits, which could say 3."""
    codes = make((1, 2, 2, 1), 3)
    with pytest.raises(CodesError, match=r"must lie in \[0, 3\), but reach from 3 to 3"):
        Codes.from_bytes(write(fields_of(codes), [b"\xff"]))


def test_bytes_of_any_kind_are_read_and_nothing_else() -> None:
    codes = make()
    data = codes.to_bytes()
    for given_bytes in (bytearray(data), memoryview(data)):
        assert Codes.from_bytes(given_bytes) == codes
    with pytest.raises(TypeError, match="from bytes, got str"):
        Codes.from_bytes("VPCODES\n")  # type: ignore[arg-type]
    for layers in (0, 4, 1.0, True):
        with pytest.raises(CodesError, match=rf"layers must be 1 to 3, as many as these codes have, got {layers!r}"):
            Codes.from_bytes(data, layers)  # type: ignore[arg-type]


def test_time_is_sliced_and_joined() -> None:
    for shape in ((6, 2, 3, 2), (2, 6, 2, 3, 2)):
        codes = make(shape)
        assert len(codes) == 6
        assert torch.equal(codes[1:4].indices, codes.indices[..., 1:4, :, :, :])
        assert Codes.cat([codes[:2], codes[2:2], codes[2:]]) == codes
        assert codes.flatten().shape == (math.prod(shape[:-3]), 2, 3, 2)
    assert torch.equal(codes.flatten().indices, codes.indices.flatten(0, 1))
    with pytest.raises(TypeError, match=r"sliced over time, such as codes\[10:20\], got 3"):
        codes[3]  # type: ignore[index]
    with pytest.raises(CodesError, match="at least one"):
        Codes.cat([])
    for other in (make((1, 6, 2, 3, 2)), make(shape, 7), make(shape, channels=1), make(shape, fingerprint=None)):
        with pytest.raises(CodesError, match="two kinds cannot be joined"):
            Codes.cat([codes, other])


def test_layers_are_taken_from_the_front() -> None:
    codes = make((2, 3, 3, 3))
    assert torch.equal(codes.first(2).indices, codes.indices[..., :2])
    assert codes.first(3) == codes
    for layers in (0, 4, 1.5):
        with pytest.raises(CodesError, match=rf"layers must be 1 to 3.*got {layers}"):
            codes.first(layers)  # type: ignore[arg-type]


def test_a_value_is_compared_by_what_it_holds_and_never_changed() -> None:
    codes, same, other = make(), make(), make(seed=1)
    assert codes == same
    assert codes != other
    assert codes != make(fingerprint=None)
    assert codes != codes.indices
    codes.indices.zero_()
    assert codes == same
    mine = other.indices
    wrapped = Codes(mine, 8, other.frame_size, 3, FINGERPRINT)
    mine.zero_()
    assert wrapped == other
    assert repr(codes) == (
        "Codes((3, 5, 7, 3), codebook_size=8, frame_size=(20, 28), channels=3, fingerprint=00016d6f64656c78)"
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(codes)
    assert codes.to("cpu") == codes


@pytest.mark.parametrize(
    ("shape", "changes", "error", "message"),
    [
        ((5, 7, 3), {}, CodesError, r"\(T, h, w, n\) or \(B, T, h, w, n\), got shape \(5, 7, 3\)"),
        ((2, 0, 7, 3), {"frame_size": (4, 28)}, CodesError, r"no position or no layer: shape \(2, 0, 7, 3\)"),
        ((2, 5, 7, 0), {}, CodesError, "no position or no layer"),
        ((2, 1, 1, 256), {}, CodesError, "at most 255 layers of codes, got 256"),
        ((2, 5, 7, 3), {"frame_size": (20, 29)}, CodesError, "frames of 20x29 do not divide into codes of 5x7"),
        ((2, 5, 7, 3), {"frame_size": (20.0, 28)}, CodesError, "frames of 20.0x28 do not divide"),
        ((2, 5, 7, 3), {"channels": 0}, CodesError, "channels must be a positive integer, got 0"),
        ((2, 5, 7, 3), {"fingerprint": b"short"}, CodesError, "a fingerprint has 8 bytes, got 5"),
    ],
)
def test_refused(shape: tuple[int, ...], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(shape, **changes)


def test_indices_refused() -> None:
    indices = torch.tensor([0, 1, 2, 5]).reshape(1, 2, 2, 1)
    for codebook_size, message in ((5, r"\[0, 5\), but reach from 0 to 5"), (1, "2 to 2147483647, got 1")):
        with pytest.raises(CodesError, match=message):
            Codes(indices, codebook_size, (2, 2), 1)
    with pytest.raises(CodesError, match=r"reach from -5 to 0"):
        Codes(-indices, 8, (2, 2), 1)
    for wrong in (indices.float(), indices.bool(), indices.numpy()):
        with pytest.raises(TypeError, match="indices must be an integer tensor, got"):
            Codes(wrong, 8, (2, 2), 1)
    with pytest.raises(CodesError, match="too large to be written"):
        Codes(indices, 8, (2**33, 2), 1).to_bytes()
