"""The codes of a video, and the bytes they are kept in: README.md beside this file has the layout."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpfast.models._config import is_count

VERSION = 1

_MAGIC = b"VPCODES\n"
# magic, version, flags, layers, codebook size, frame channels, height, width, batch, time, latent height, width, model
_FIELDS = struct.Struct("<8sHBBIIIIIIII8s")
_DIGEST = 8
_HAS_BATCH, _HAS_FINGERPRINT = 1, 2
_MAX_LAYERS = 255
_MAX_CODEBOOK = 2**31 - 1
_BLOCK = 2**16
"""Indices packed at a time, which bounds memory. A multiple of 8, so that every block ends with a byte."""


class CodesError(ValueError):
    """Bytes that are no codes, are damaged or cut off, or codes that do not fit a model."""


class Codes:
    """The codeword indices of a clip or of a batch of clips, and what is needed to turn them into frames again.

    Args:
        indices: (T, h, w, n) or (B, T, h, w, n), any integer type, in [0, ``codebook_size``): the local index of every
            layer, layer 1 first. n is 1 to 255.
        codebook_size: M, codewords in one codebook.
        frame_size: (H, W) of the frames, multiples of h and w.
        channels: C of the frames.
        fingerprint: 8 bytes that tell which codebooks the indices are of; None fits any of this size.

    Slicing is over time: ``codes[10:20]`` are the codes of ten frames. The value is never changed in place.

    Raises:
        TypeError: indices that are no integer tensor.
        CodesError: anything else that cannot be; the message holds the number.
    """

    def __init__(
        self,
        indices: Tensor,
        codebook_size: int,
        frame_size: tuple[int, int],
        channels: int,
        fingerprint: bytes | None = None,
    ) -> None:
        _check_indices(indices, codebook_size)
        rows, columns = indices.shape[-3:-1]
        height, width = frame_size
        if not (is_count(height) and is_count(width)) or height % rows or width % columns:
            raise CodesError(f"frames of {height}x{width} do not divide into codes of {rows}x{columns}")
        if not is_count(channels):
            raise CodesError(f"channels must be a positive integer, got {channels!r}")
        if fingerprint is not None and len(fingerprint) != _DIGEST:
            raise CodesError(f"a fingerprint has {_DIGEST} bytes, got {len(fingerprint)}")
        self._indices = indices.to(_storage(codebook_size))
        self.codebook_size, self.channels = codebook_size, channels
        self.frame_size = (height, width)
        self.fingerprint = fingerprint

    @property
    def indices(self) -> Tensor:
        """int64 (T, h, w, n) or (B, T, h, w, n), a new tensor. Kept are 1, 2 or 4 bytes an index."""
        return self._indices.to(torch.int64, copy=True)

    @property
    def shape(self) -> torch.Size:
        """Of ``indices``."""
        return self._indices.shape

    @property
    def layers(self) -> int:
        """n, or how many layers are left of it."""
        return self.shape[-1]

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.shape[-3], self.shape[-2]

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return self._indices.device

    def __len__(self) -> int:
        """T, the number of frames of each clip."""
        return self.shape[-4]

    def __getitem__(self, times: slice) -> Codes:
        if not isinstance(times, slice):
            raise TypeError(f"codes are sliced over time, such as codes[10:20], got {times!r}")
        return self._with(self._indices[..., times, :, :, :])

    def first(self, layers: int) -> Codes:
        """The codes of the first ``layers`` layers alone; they decode to the coarser frame."""
        if not is_count(layers) or layers > self.layers:
            raise CodesError(f"layers must be 1 to {self.layers}, as many as these codes have, got {layers!r}")
        return self._with(self._indices[..., :layers])

    def flatten(self) -> Codes:
        """The clips of a batch one after the other, as the codes of one clip."""
        return self._with(self._indices.flatten(0, -4))

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on ``device``."""
        return self._with(self._indices.to(device))

    @staticmethod
    def cat(parts: Sequence[Codes]) -> Codes:
        """One clip after the other, along time.

        Raises:
            CodesError: nothing given, or parts that differ in anything but their length.
        """
        if not parts:
            raise CodesError("codes of no parts: give at least one")
        kind = parts[0][:0]
        for part in parts:
            if part[:0] != kind:
                raise CodesError(f"codes of two kinds cannot be joined: {parts[0]!r} and {part!r}")
        return kind._with(torch.cat([part._indices for part in parts], dim=-4))

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer in :meth:`to_bytes`: ceil(log2 M) bits an index, filled up to a whole byte."""
        return -(-self._indices[..., 0].numel() * _bits(self.codebook_size) // 8)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all indices in :meth:`to_bytes`, which follow the header."""
        return self.layers * self.layer_bytes

    @property
    def header_bytes(self) -> int:
        """Bytes before the indices in :meth:`to_bytes`; the same for any number of frames."""
        return _header_bytes(self.layers)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the same frames with 8 bits a sample."""
        return math.prod(self.shape[:-3]) * math.prod(self.frame_size) * self.channels

    def to_bytes(self) -> bytes:
        """Header and bit-packed indices, layer after layer, so that a beginning of it holds the first layers."""
        flat = self._indices.detach().cpu().flatten(0, -2).numpy()
        bits = _bits(self.codebook_size)
        layers = [_pack(flat[:, layer], bits) for layer in range(self.layers)]
        fields = self._fields()
        digests = b"".join(_layer_digest(fields, index, layer) for index, layer in enumerate(layers))
        return b"".join((fields, digests, _digest(fields, digests), *layers))

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview, layers: int | None = None) -> Codes:
        """The codes that :meth:`to_bytes` wrote, on the CPU.

        Args:
            data: the bytes; every one of them is covered by a checksum.
            layers: read the first ``layers`` layers alone. ``data`` may then end, or be damaged, after them.

        Nothing is allocated before the sizes that the header announces are found in ``data``.

        Raises:
            TypeError: ``data`` are no bytes.
            CodesError: they are no codes, of an unknown version, damaged, cut off, or more follows them.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"codes are read from bytes, got {type(data).__name__}")
        view = memoryview(data).cast("B")
        fields, digests = _read_header(view)
        return _read_payload(view, fields, digests, layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        return (
            self._fields() == other._fields()
            and self.device == other.device
            and torch.equal(self._indices, other._indices)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Codes({tuple(self.shape)}, codebook_size={self.codebook_size}, frame_size={self.frame_size}, "
            f"channels={self.channels}, fingerprint={self.fingerprint.hex() if self.fingerprint else None})"
        )

    def _with(self, indices: Tensor) -> Codes:
        """These codes with other indices of the same kind, which are not looked at again."""
        made = Codes.__new__(Codes)
        made.__dict__.update(self.__dict__, _indices=indices)
        return made

    def _fields(self) -> bytes:
        batch = self.shape[0] if len(self.shape) == 5 else 1
        flags = _HAS_BATCH * (len(self.shape) == 5) + _HAS_FINGERPRINT * (self.fingerprint is not None)
        try:
            return _FIELDS.pack(
                *(_MAGIC, VERSION, flags, self.layers, self.codebook_size, self.channels),
                *(*self.frame_size, batch, len(self), *self.latent_size, self.fingerprint or bytes(_DIGEST)),
            )
        except struct.error as error:
            raise CodesError(f"{self!r} is too large to be written: {error}") from error


def _check_indices(indices: Tensor, codebook_size: int) -> None:
    if not isinstance(indices, Tensor) or indices.dtype not in _INTEGERS:
        raise TypeError(f"indices must be an integer tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() not in (4, 5):
        raise CodesError(f"indices must be (T, h, w, n) or (B, T, h, w, n), got shape {tuple(indices.shape)}")
    if 0 in indices.shape[-3:]:
        raise CodesError(f"indices hold no position or no layer: shape {tuple(indices.shape)}")
    if indices.shape[-1] > _MAX_LAYERS:
        raise CodesError(f"at most {_MAX_LAYERS} layers of codes, got {indices.shape[-1]}")
    if not is_count(codebook_size, 2) or codebook_size > _MAX_CODEBOOK:
        raise CodesError(f"codebook_size must be an integer of 2 to {_MAX_CODEBOOK}, got {codebook_size!r}")
    if indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= codebook_size:
            raise CodesError(f"indices must lie in [0, {codebook_size}), but reach from {low} to {high}")


def _read_header(view: memoryview) -> tuple[bytes, bytes]:
    """The fields and the layers' digests, both covered by the header's digest."""
    if bytes(view[: len(_MAGIC)]) != _MAGIC[: len(view)] or not view:
        raise CodesError(f"these bytes are no vpfast codes: they begin with {bytes(view[: len(_MAGIC)])!r}")
    _require(view, _FIELDS.size)
    fields = bytes(view[: _FIELDS.size])
    _, version, _, layers, *_ = _FIELDS.unpack(fields)
    if version != VERSION:
        raise CodesError(f"these codes are of version {version}; this version of vpfast reads version {VERSION}")
    size = _header_bytes(layers)
    _require(view, size)
    digests = bytes(view[_FIELDS.size : size - _DIGEST])
    if _digest(fields, digests) != view[size - _DIGEST : size]:
        raise CodesError("these codes are damaged: the header's checksum does not match")
    return fields, digests


def _read_payload(view: memoryview, fields: bytes, digests: bytes, wanted: int | None) -> Codes:
    values = _FIELDS.unpack(fields)
    _, _, flags, layers, codebook_size, channels, height, width, batch, time, rows, columns, fingerprint = values
    if wanted is None:
        wanted = layers
    elif not is_count(wanted) or wanted > layers:
        raise CodesError(f"layers must be 1 to {layers}, as many as these codes have, got {wanted!r}")
    _check_announced(flags, layers, codebook_size, (batch, time, rows, columns))
    bits, count = _bits(codebook_size), batch * time * rows * columns
    layer_bytes = -(-count * bits // 8)
    start = _header_bytes(layers)
    _require(view, start + wanted * layer_bytes)
    if len(view) > start + layers * layer_bytes:
        raise CodesError(f"{len(view) - start - layers * layer_bytes} bytes follow the codes and are none of them")
    indices = np.empty((count, wanted), _NUMPY[_storage(codebook_size)])
    for index in range(wanted):
        packed = view[start + index * layer_bytes : start + (index + 1) * layer_bytes]
        if _layer_digest(fields, index, packed) != digests[index * _DIGEST : (index + 1) * _DIGEST]:
            raise CodesError(f"these codes are damaged: the checksum of layer {index + 1} does not match")
        _unpack(packed, bits, indices[:, index])
    shape = (batch, time, rows, columns, wanted) if flags & _HAS_BATCH else (time, rows, columns, wanted)
    return Codes(
        torch.from_numpy(indices).reshape(shape),
        codebook_size,
        (height, width),
        channels,
        fingerprint if flags & _HAS_FINGERPRINT else None,
    )


def _check_announced(flags: int, layers: int, codebook_size: int, sizes: tuple[int, int, int, int]) -> None:
    """Refuse what no writer of this version writes, before anything is computed with it."""
    batch, time, rows, columns = sizes
    if flags & ~(_HAS_BATCH | _HAS_FINGERPRINT) or (batch != 1 and not flags & _HAS_BATCH):
        raise CodesError(f"these codes carry the marks {flags} beside a batch of {batch}, which do not go together")
    if not 2 <= codebook_size <= _MAX_CODEBOOK:
        raise CodesError(f"these codes announce a codebook of {codebook_size} codewords")
    # With no frames there are no bytes to be missed; a tensor's sides must fit all the same.
    if 0 in (layers, rows, columns) or max(batch, 1) * max(time, 1) * rows * columns * layers >= 2**62:
        raise CodesError(
            f"these codes announce {layers} layers of {batch} x {time} frames of {rows}x{columns} positions"
        )


def _require(view: memoryview, size: int) -> None:
    if len(view) < size:
        raise CodesError(f"these codes are cut off: {len(view)} bytes given, {size} are needed")


def _header_bytes(layers: int) -> int:
    return _FIELDS.size + (layers + 1) * _DIGEST


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _layer_digest(fields: bytes, index: int, packed: bytes | memoryview) -> bytes:
    # Bound to its header and its place: layers of two files, or of one in another order, are not taken for each other.
    return _digest(fields, bytes([index]), packed)


def _bits(codebook_size: int) -> int:
    """ceil(log2 M)."""
    return (codebook_size - 1).bit_length()


def _storage(codebook_size: int) -> torch.dtype:
    bits = _bits(codebook_size)
    return torch.uint8 if bits <= 8 else torch.int16 if bits <= 15 else torch.int32


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NUMPY = {torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32}


def _pack(indices: NDArray[np.integer], bits: int) -> bytes:
    """The low ``bits`` bits of every index, highest bit first, without gaps; zeros fill the last byte."""
    size = indices.dtype.itemsize
    packed = []
    for start in range(0, len(indices), _BLOCK):
        big_endian = indices[start : start + _BLOCK].astype(f">u{size}")
        unpacked = np.unpackbits(big_endian.view(np.uint8).reshape(-1, size), axis=1)
        packed.append(np.packbits(unpacked[:, 8 * size - bits :]).tobytes())
    return b"".join(packed)


def _unpack(packed: memoryview, bits: int, indices: NDArray[np.integer]) -> None:
    """Fill ``indices`` with what :func:`_pack` was given."""
    size, data = indices.dtype.itemsize, np.frombuffer(packed, np.uint8)
    for start in range(0, len(indices), _BLOCK):
        block = indices[start : start + _BLOCK]
        first = start * bits // 8
        taken = np.unpackbits(data[first : first + _BLOCK * bits // 8], count=len(block) * bits)
        unpacked = np.zeros((len(block), 8 * size), np.uint8)
        unpacked[:, 8 * size - bits :] = taken.reshape(-1, bits)
        block[:] = np.packbits(unpacked, axis=1).view(f">u{size}").ravel()
