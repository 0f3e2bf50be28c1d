"""The parsers of foreign bytes under fire: small whole files, ways to spoil them, and what must hold all the same.

``fuzz.py`` beside this file lets a fuzzer at the same targets; ``test_fuzz.py`` runs a short, seeded part of it.
"""

import contextlib
import gzip
import hashlib
import io
import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vpfast.data import DataError, VideoError, read_idx
from vpfast.data.norpix import iter_seq, read_seq_header
from vpfast.models import Codes
from vpfast.models.shrvqvae import CodesError

_CODES_FIELDS = 52
_DIGEST = 8


def idx_file(shape: tuple[int, ...], values: bytes | None = None) -> bytes:
    """An idx file of unsigned bytes."""
    values = bytes(i % 251 for i in range(int(np.prod(shape)))) if values is None else values
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + values


def jpeg(height: int = 8, width: int = 16, seed: int = 0, **options: object) -> bytes:
    """A small picture of noise, or grey with ``mode="L"``."""
    mode = options.pop("mode", "RGB")
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(str(mode)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def seq_file(jpegs: list[bytes], trailer: int = 8, height: int = 8, width: int = 16, **changes: float) -> bytes:
    """A Norpix ``.seq`` of JPEG frames; ``changes`` are fields of its header: kind, frames, fps, header_bytes."""
    fields = {"kind": 201, "frames": len(jpegs), "fps": 30.0, "header_bytes": 1024, **changes}
    header = bytearray(1024)
    header[:24] = b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le")
    struct.pack_into("<iI", header, 28, 3, int(fields["header_bytes"]))
    raw = height * width * 3
    sizes = (width, height, 24, 8, raw, int(fields["kind"]), int(fields["frames"]), 0, raw + 512)
    struct.pack_into("<9Id", header, 548, *sizes, fields["fps"])
    time = struct.pack("<IHH", 1_000_000, 40, 0).ljust(trailer, b"\0")
    return bytes(header) + b"".join(struct.pack("<I", 4 + len(frame)) + frame + time for frame in jpegs)


def codes_file(shape: tuple[int, ...] = (2, 3, 3, 2), codebook_size: int = 5, **options: bytes | None) -> bytes:
    """Codes as they are written, of random indices."""
    indices = torch.randint(codebook_size, shape, generator=torch.Generator().manual_seed(0))
    return Codes(indices, codebook_size, (4 * shape[-3], 4 * shape[-2]), 3, **options).to_bytes()


def with_checksums(data: bytes) -> bytes:
    """Codes whose checksums are made to fit whatever the bytes are: else no damage gets past the first."""
    layers = data[11] if len(data) > 11 else 0
    start = _CODES_FIELDS + (layers + 1) * _DIGEST
    if len(data) < start or layers == 0:
        return data
    fields, payload = data[:_CODES_FIELDS], data[start:]
    *_, codebook, _, _, _, batch, time, rows, columns, _ = struct.unpack("<8sHBBIIIIIIII8s", fields)
    size = -(-batch * time * rows * columns * max(codebook - 1, 0).bit_length() // 8)
    parts = [payload[size * layer : size * (layer + 1)] for layer in range(layers)]
    digests = b"".join(_digest(fields + bytes([layer]) + part) for layer, part in enumerate(parts))
    return fields + digests + _digest(fields + digests) + payload


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def meet_idx(data: bytes) -> None:
    """As it is, and as what a gzip file unpacks to."""
    for content in (data, gzip.compress(data, 1)):
        with _file(content) as path:
            array, why = attempt(lambda path=path: read_idx(path), DataError)
            if why:
                assert str(path) in why
            else:
                assert idx_file(array.shape, array.tobytes()) == _unpacked(content)


def meet_seq(data: bytes) -> None:
    """All frames; what the header alone is refused for, they are too."""
    with _file(data) as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header, why = attempt(lambda: read_seq_header(path), VideoError)
        shapes, late = attempt(lambda: [(frame.shape, frame.dtype) for frame in iter_seq(path)], VideoError)
        if why:
            assert why == late
            assert str(path) in why
        elif late:
            assert f"{path}: " in late
            assert "offset" in late
        else:
            assert set(shapes) == {((header.height, header.width, 3), np.dtype(np.uint8))}
            assert header.frames in (None, len(shapes))


def meet_codes(data: bytes) -> None:
    """As they are, and with checksums that fit; whole, and the first layer alone."""
    for content in (data, with_checksums(data)):
        for layers in (None, 1):
            codes, why = attempt(lambda content=content, layers=layers: Codes.from_bytes(content, layers), CodesError)
            if not why:
                assert codes.indices.numel() <= 8 * len(content)
                assert Codes.from_bytes(codes.to_bytes()) == codes


def attempt(call: Callable[[], Any], refusal: type[Exception]) -> tuple[Any, str]:
    """What ``call`` gives, or None and what it says in refusing. Anything else that it raises is a finding."""
    try:
        return call(), ""
    except refusal as error:
        return None, str(error) or "nothing said"


TARGETS: dict[str, Callable[[bytes], None]] = {"idx": meet_idx, "seq": meet_seq, "codes": meet_codes}


def seeds() -> dict[str, dict[str, bytes]]:
    """Whole files of every kind, by target and name: what the kept corpus begins with."""
    frames = [jpeg(seed=seed) for seed in range(3)]
    return {
        "idx": {
            "images": idx_file((2, 3, 4)),
            "images.gz": gzip.compress(idx_file((2, 3, 4)), mtime=0),
            "labels": idx_file((5,)),
            "boastful": idx_file((1_000_000, 28, 28), b""),
        },
        "seq": {
            "trailer-8": seq_file(frames),
            "trailer-16": seq_file(frames, trailer=16),
            "count-unknown": seq_file(frames, frames=0),
            "grey": seq_file([jpeg(mode="L")], kind=102),
            "progressive": seq_file([jpeg(progressive=True)]),
            "more-than-announced": seq_file(frames, frames=2),
            "cut-off": seq_file(frames)[:-200],
        },
        "codes": {
            "clip": codes_file(fingerprint=b"codebook"),
            "batch": codes_file((2, 2, 3, 3, 1), 300),
            "no-frames": codes_file((0, 2, 2, 1)),
            "one-bit": codes_file((1, 4, 4, 3), 2),
        },
    }


def spoiled(data: bytes, source: random.Random) -> bytes:
    """``data`` with one to four blows: bits, bytes, 4-byte sizes, cuts, repeats, moves."""
    spoilt = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(spoilt) + 1)
        blow = source.randrange(7)
        if blow == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << source.randrange(8)
        elif blow == 1 and at < len(spoilt):
            spoilt[at] = source.choice((0, 1, 0x7F, 0x80, 0xD8, 0xD9, 0xFF, source.randrange(256)))
        elif blow == 2:
            number = source.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, source.randrange(2**32), len(data)))
            spoilt[at : at + 4] = number.to_bytes(4, source.choice(("big", "little")))
        elif blow == 3:
            del spoilt[at:]
        elif blow == 4:
            del spoilt[at : at + source.randint(1, 16)]
        elif blow == 5:
            spoilt[at:at] = spoilt[at : at + source.randint(1, 64)]
        else:
            spoilt[at:at] = source.randbytes(source.randint(1, 8))
    return bytes(spoilt)


_PLACE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[Path]:
    path = _PLACE / f"vpfast-hostile-{os.getpid()}"
    path.write_bytes(content)
    try:
        yield path
    finally:
        path.unlink()


def _unpacked(data: bytes) -> bytes:
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
