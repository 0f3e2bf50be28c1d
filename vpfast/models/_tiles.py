"""Networks as lists of instructions for matrix tiles (csrc/tile_program), which says what each instruction does.

A network is written down once for each size of its input: where its maps lie in a working memory, and what is done with
them in which order. The weights are brought into the order of tiles before, for any size.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Channels of a map come in chunks of so many."""
LANES = 16
_PIECES_OF_A_FLOAT = 3
_KEPT_IN_PIECES = 2**20
"""Bytes of weights that the L2 cache holds beside maps. More are kept as floats, a third smaller, and split later."""
_PAGE = 4096
_PIXELS_BEHIND = 64
"""A block of pixels may reach so far beyond the last one."""


class Opcode(IntEnum):
    CONVOLVE, POOL, UPSAMPLE, GATE, GATHER, COMPARE, PATCHES = range(7)


class Activation(IntEnum):
    NONE, RELU, LEAKY_RELU = range(3)


class Target(IntEnum):
    MAP, ROWS, PLANES = range(3)


class Base(IntEnum):
    """The tensors of a call, as addresses name them; 0 stands for nothing."""

    ARENA, STATE, WEIGHTS, FRAME = range(1, 5)

    @property
    def start(self) -> int:
        """The address of its first byte."""
        return int(self) << 56


class Size(NamedTuple):
    batch: int
    height: int
    width: int

    def scaled(self, factor: float) -> Size:
        return Size(self.batch, int(self.height * factor), int(self.width * factor))

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width


class Map(NamedTuple):
    """Where a map lies, and what is needed to lay out another one like it."""

    address: int
    channels: int
    row: int
    image: int
    piece: int
    size: Size
    border: int

    @property
    def fields(self) -> tuple[int, ...]:
        return self[:5]

    def image_at(self, index: int, size: Size) -> Map:
        """``size`` of the images, from ``index`` on, as a map."""
        return self._replace(address=self.address + 2 * CHUNK * index * self.image, size=size)

    def moved(self, down: int, right: int) -> Map:
        """The map whose pixel (y, x) is pixel (y + down, x + right) of this one; borders must have room for it."""
        return self._replace(address=self.address + 2 * CHUNK * (down * self.row + right))


class Memory:
    """Room in one tensor of bytes, all 0 at the start. Maps that are released make room for others of their kind."""

    def __init__(self, base: Base, pieces: int) -> None:
        self.base, self.pieces, self.bytes = base, pieces, 0
        self._free: dict[tuple[Size, int, int], list[Map]] = {}

    def take(self, count: int) -> int:
        """The address of ``count`` bytes, on a cache line of its own."""
        address = self.base.start + self.bytes
        self.bytes += -(-count // 64) * 64
        return address

    def floats(self, *shape: int) -> int:
        return self.take(4 * torch.Size(shape).numel())

    def map(self, size: Size, channels: int, border: int) -> Map:
        """A map with ``border`` zeros around every image, which neighbours share."""
        channels = whole(channels, CHUNK)
        if self._free.get((size, channels, border)):
            return self._free[size, channels, border].pop()
        row = size.width + border
        image = (size.height + border) * row
        before = border * row + border
        piece = 2 * CHUNK * (before + size.batch * image + border + _PIXELS_BEHIND)
        address = self.take(channels // CHUNK * self.pieces * piece) + 2 * CHUNK * before
        return Map(address, channels, row, image, piece, size, border)

    def release(self, used: Map) -> None:
        self._free.setdefault((used.size, used.channels, used.border), []).append(used)


class Weights:
    """The weights of a network as the kernel reads them, in one tensor of bytes: added one by one, then finished."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self._parts: list[Tensor] = []
        self._bytes = 0

    def finish(self) -> Tensor:
        """All that was added, uint8."""
        memory = torch.cat(self._parts, out=room(self._bytes))
        self._parts.clear()
        return memory

    def sum(self, kernels: Sequence[Tensor], bias: Tensor | None) -> Sum:
        """A sum of convolutions (out, in, kh, kw), each of a map of its own."""
        outputs = len(kernels[0])
        if bias is None:
            bias = torch.zeros(outputs)
        size = 2 * self.pieces * sum(kernel.numel() for kernel in kernels)
        floats = self.pieces == _PIECES_OF_A_FLOAT and size > _KEPT_IN_PIECES
        placed = [self._convolution(kernel, floats) for kernel in kernels]
        return Sum(tuple(placed), self._bias(bias), outputs, floats)

    def _convolution(self, weight: Tensor, floats: bool) -> Kernel:
        """Tiles of ``weight`` (out, in, kh, kw): (out / 32, in / 32, kh, kw, piece, 2, 16, 16, 2).

        Floats are (out / 32, in / 32, kh, kw, 2, 16, 2, 16).
        """
        outputs, inputs, height, width = weight.shape
        padded = F.pad(weight.detach().float(), (0, 0, 0, 0, 0, -inputs % CHUNK, 0, -outputs % CHUNK))
        tiles = padded.unflatten(1, (-1, LANES, 2)).unflatten(0, (-1, 2, LANES))
        # From column, tile, output, chunk, row, pair, kh, kw.
        if floats:
            values = tiles.permute(0, 3, 6, 7, 1, 4, 5, 2)
        else:
            values = torch.stack(_split(tiles.permute(0, 3, 6, 7, 1, 4, 2, 5).contiguous(), self.pieces), dim=4)
        return Kernel(self._keep(values), height, width)

    def _bias(self, bias: Tensor) -> int:
        return self._keep(F.pad(bias.detach().float(), (0, -len(bias) % CHUNK)))

    def _keep(self, values: Tensor) -> int:
        address = Base.WEIGHTS.start + self._bytes
        flat = values.contiguous().view(torch.uint8).flatten()
        self._parts.append(F.pad(flat, (0, -len(flat) % 64)))
        self._bytes += len(self._parts[-1])
        return address


class Kernel(NamedTuple):
    address: int
    height: int
    width: int


class Sum(NamedTuple):
    """The kernels of a sum of convolutions, and what is added to it."""

    kernels: tuple[Kernel, ...]
    bias: int
    outputs: int
    floats: bool


class Code:
    """Instructions, as they are written down."""

    def __init__(self) -> None:
        self._words: list[int] = []

    def finish(self) -> Tensor:
        """What was written, int64; the next instruction begins another program."""
        words = torch.tensor(self._words, dtype=torch.int64)
        self._words = []
        return words

    def emit(self, opcode: Opcode, *fields: int) -> None:
        self._words += [opcode, len(fields) + 2, *fields]

    def convolve(
        self,
        weights: Sum,
        inputs: Sequence[Map],
        to: Map | int,
        activation: Activation,
        target: Target = Target.PLANES,
        also: Map | None = None,
    ) -> None:
        """``to`` = activation(bias + sum over inputs), a map or the address of ``target``; ``also`` = ReLU of it."""
        if isinstance(to, Map):
            target, fields = Target.MAP, to.fields
        else:
            fields = (to, whole(weights.outputs, CHUNK), 0, 0, 0)
        parts = [
            field
            for x, kernel in zip(inputs, weights.kernels, strict=True)
            for field in (*x.fields, kernel.height, kernel.width, kernel.address)
        ]
        relu = also.fields if also is not None else (0,) * 5
        sum_fields = (weights.outputs, weights.bias, weights.floats, len(inputs))
        header = (*inputs[0].size, activation, target, *fields, *relu, *sum_fields)
        self.emit(Opcode.CONVOLVE, *header, *parts)


class Turn:
    """A lock around a working memory. A child that is forked while another thread has it finds it open, and so does a
    copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _TURNS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

    def renew(self) -> None:
        self._lock = threading.Lock()


_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()


def _renew_turns() -> None:
    for turn in _TURNS:
        turn.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_turns)


def room(count: int) -> Tensor:
    """``count`` bytes, in large pages where the system has them: NumPy asks for those, torch does not."""
    memory = torch.from_numpy(np.empty(count + _PAGE, dtype=np.uint8))
    return memory[-memory.data_ptr() % _PAGE :][:count]


def whole(count: int, of: int) -> int:
    return -(-count // of) * of


def _split(values: Tensor, pieces: int) -> list[Tensor]:
    """bfloat16 tensors whose sum is ``values`` (float32), to 8 bits of the mantissa a piece."""
    found = []
    for _ in range(pieces):
        found.append(values.bfloat16())
        values = values - found[-1].float()
    return found
