"""HR-VQVAE's encoder as a program for matrix tiles (csrc/tile_program), with the accuracy of float32.

A convolution with stride 2 is a sum of sixteen convolutions without, each of the pixels that one kernel position sees.
Those lie together: where s strides follow, a map is kept as 2^s by 2^s images, one for each place in a square of so
many pixels. Every map has the height and width of the latent then.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vpfast.models._tiles import (
    CHUNK,
    Activation,
    Base,
    Code,
    Map,
    Memory,
    Opcode,
    Size,
    Sum,
    Target,
    Turn,
    Weights,
    room,
    whole,
)
from vpfast.models.shrvqvae.codec import ResidualBlock

_PIECES = 3
_KERNEL = 4  # of the strided convolutions
_PROGRAMS_KEPT = 4


class _Program(NamedTuple):
    """``code`` leaves the latent, (N, h, w, channels in whole chunks) float32, ``at`` so many bytes in ``arena``."""

    code: Tensor
    arena: Tensor
    at: int


class TiledEncoder:
    """The weights of an encoder as they are now. Several threads may call it; they wait for each other."""

    def __init__(self, encoder: nn.Sequential) -> None:
        convolutions = [module for module in encoder if isinstance(module, nn.Conv2d)]
        *strided, widest, last = convolutions
        weights = Weights(_PIECES)
        first, *others = strided
        self._first = weights.sum([first.weight.flatten(1)[:, :, None, None]], first.bias)
        self._strided = [weights.sum(_positions(module.weight), module.bias) for module in others]
        self._widest = weights.sum([widest.weight], widest.bias)
        blocks = [module for module in encoder if isinstance(module, ResidualBlock)]
        self._blocks = [_block(weights, block) for block in blocks]
        self._last = weights.sum([last.weight], last.bias)
        self._weights = weights.finish()
        self._channels, self._multiple = first.in_channels, 2 ** len(strided)
        self._programs: dict[tuple[Size, float], _Program] = {}
        self._lock = Turn()

    def latent(self, frames: Tensor, gain: float) -> Tensor:
        """The encoder's map of ``(frames - 0.5) * gain``, float32 (N, C, H, W) -> (N, D, H / m, W / m)."""
        count, _, height, width = frames.shape
        size = Size(count, height // self._multiple, width // self._multiple)
        with self._lock:  # the arena is one for all who call
            code, arena, at = self._program(size, gain)
            state, threads = arena[:0], torch.get_num_threads()
            torch.ops.vpfast.tile_program(code, arena, state, self._weights, frames.contiguous(), _PIECES, threads)
            rows = arena[at:].view(torch.float32)[: size.pixels * whole(self._last.outputs, CHUNK)]
            latent = rows.view(*size, -1)[..., : self._last.outputs].clone()  # the arena is used again
        return latent.movedim(-1, 1)

    def _program(self, size: Size, gain: float) -> _Program:
        """The program for ``size``, the latent's, and the memory that it works in; the last few are kept."""
        found = self._programs.pop((size, gain), None)
        if found is None:
            found = self._written(size, gain)
            if len(self._programs) == _PROGRAMS_KEPT:
                del self._programs[next(iter(self._programs))]
        self._programs[size, gain] = found
        return found

    def _written(self, size: Size, gain: float) -> _Program:
        memory, code = Memory(Base.ARENA, _PIECES), Code()
        lattice = self._multiple // 2
        seen = memory.map(_images(size, lattice), _KERNEL**2 * self._channels, 1)
        (bits,) = struct.unpack("q", struct.pack("d", gain))
        code.emit(Opcode.PATCHES, *size, self._channels, lattice, bits, Base.FRAME.start, *seen.fields)
        x = memory.map(seen.size, self._first.outputs, 1)
        code.convolve(self._first, [seen], x, Activation.RELU)
        memory.release(seen)
        for weights in self._strided:
            finer, lattice = x, lattice // 2
            x = memory.map(_images(size, lattice), weights.outputs, 1)
            for row in range(lattice):
                for column in range(lattice):
                    parts = _seen(finer, size, 2 * lattice, row, column)
                    to = x.image_at(size.batch * (row * lattice + column), size)
                    code.convolve(weights, parts, to, Activation.RELU)
            memory.release(finer)
        at = self._top(memory, code, x)
        return _Program(code.finish(), room(memory.bytes).zero_(), at - Base.ARENA.start)

    def _top(self, memory: Memory, code: Code, x: Map) -> int:
        """What follows the strided convolutions, on maps of the latent's size; the address of the latent."""

        def like(weights: Sum) -> Map:
            return memory.map(x.size, weights.outputs, x.border)

        y, positive = like(self._widest), like(self._widest)
        if self._blocks:
            code.convolve(self._widest, [x], y, Activation.NONE, also=positive)
        else:
            code.convolve(self._widest, [x], positive, Activation.RELU)
        for narrow, widen in self._blocks:
            inner, added, of_added = like(narrow), like(widen), like(widen)
            code.convolve(narrow, [positive], inner, Activation.RELU)
            code.convolve(widen, [inner, y], added, Activation.NONE, also=of_added)
            for used in (inner, y, positive):
                memory.release(used)
            y, positive = added, of_added
        latent = memory.floats(*x.size, whole(self._last.outputs, CHUNK))
        code.convolve(self._last, [positive], latent, Activation.NONE, Target.ROWS)
        return latent


def _positions(weight: Tensor) -> list[Tensor]:
    """A kernel (out, in, 4, 4) position by position, as 1x1 kernels."""
    return [weight[:, :, row, column, None, None] for row in range(_KERNEL) for column in range(_KERNEL)]


def _block(weights: Weights, block: ResidualBlock) -> tuple[Sum, Sum]:
    """A residual block: what is added is a sum with the block's input, by an identity kernel."""
    narrow, widen = block.narrow, block.widen
    same = torch.eye(widen.out_channels)[:, :, None, None]
    return weights.sum([narrow.weight], narrow.bias), weights.sum([widen.weight, same], widen.bias)


def _images(size: Size, lattice: int) -> Size:
    return Size(lattice**2 * size.batch, size.height, size.width)


def _seen(finer: Map, size: Size, lattice: int, row: int, column: int) -> Sequence[Map]:
    """What each kernel position sees of ``finer``, ``lattice`` squared images a frame, at one place of the output.

    Position r of output row Y sees row 2 Y + r - 1.
    """
    found = []
    for down in range(2 * row - 1, 2 * row - 1 + _KERNEL):
        for right in range(2 * column - 1, 2 * column - 1 + _KERNEL):
            place = down % lattice * lattice + right % lattice
            found.append(finer.image_at(size.batch * place, size).moved(down // lattice, right // lattice))
    return found
