"""An MSPN as a list of instructions for the compiled step (csrc/mspn_step), which says what each of them does."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models.mspn.config import MSPNConfig
from vpfast.models.mspn.network import MSPN
from vpfast.nn import EDLSTMCell
from vpfast.nn.bottleneck import Bottleneck
from vpfast.nn.codec import DecoderStage, EncoderStage

CHUNK = 32
"""Channels of a map come in chunks of so many."""
LANES = 16
_PAGE = 4096
_PIXELS_BEHIND = 64
"""A block of pixels may reach so far beyond the last one."""


class _Opcode(IntEnum):
    CONVOLVE, POOL, UPSAMPLE, GATE, GATHER, COMPARE = range(6)


class _Activation(IntEnum):
    NONE, RELU, LEAKY_RELU = range(3)


class _Target(IntEnum):
    MAP, ROWS, PLANES = range(3)


class _Base(IntEnum):
    """The tensors of a call, as addresses name them; 0 stands for nothing."""

    ARENA, STATE, WEIGHTS, FRAME = range(1, 5)


class Size(NamedTuple):
    batch: int
    height: int
    width: int

    def scaled(self, factor: float) -> Size:
        return Size(self.batch, int(self.height * factor), int(self.width * factor))


class _Map(NamedTuple):
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


class _Memory:
    """Room in one tensor of bytes, all 0 at the start. Maps that are released make room for others of their kind."""

    def __init__(self, base: _Base, pieces: int) -> None:
        self.base, self.pieces, self.bytes = base, pieces, 0
        self._free: dict[tuple[Size, int, int], list[_Map]] = {}

    def take(self, count: int) -> int:
        """The address of ``count`` bytes, on a cache line of its own."""
        address = (int(self.base) << 56) + self.bytes
        self.bytes += -(-count // 64) * 64
        return address

    def floats(self, *shape: int) -> int:
        return self.take(4 * torch.Size(shape).numel())

    def map(self, size: Size, channels: int, border: int) -> _Map:
        """A map with ``border`` zeros around every image, which neighbours share."""
        channels = _whole(channels, CHUNK)
        if self._free.get((size, channels, border)):
            return self._free[size, channels, border].pop()
        row = size.width + border
        image = (size.height + border) * row
        before = border * row + border
        piece = 2 * CHUNK * (before + size.batch * image + border + _PIXELS_BEHIND)
        address = self.take(channels // CHUNK * self.pieces * piece) + 2 * CHUNK * before
        return _Map(address, channels, row, image, piece, size, border)

    def release(self, used: _Map) -> None:
        self._free.setdefault((used.size, used.channels, used.border), []).append(used)


class Weights:
    """All weights of a network as the kernel reads them, in one tensor of bytes."""

    def __init__(self, model: MSPN, pieces: int) -> None:
        self.pieces = pieces
        self._parts: list[Tensor] = []
        self._bytes = 0
        self.levels = [_Level(self, model, level) for level in range(model.config.levels)]
        self.memory = torch.cat(self._parts, out=room(self._bytes))
        self._parts.clear()

    def convolution(self, weight: Tensor) -> _Kernel:
        """Tiles of ``weight`` (out, in, kh, kw): (out / 32, in / 32, kh, kw, piece, 2, 16, 16, 2)."""
        outputs, inputs, height, width = weight.shape
        padded = F.pad(weight.detach().float(), (0, 0, 0, 0, 0, -inputs % CHUNK, 0, -outputs % CHUNK))
        tiles = padded.unflatten(1, (-1, LANES, 2)).unflatten(0, (-1, 2, LANES))
        # From column, tile, output, chunk, row, pair, kh, kw.
        tiles = tiles.permute(0, 3, 6, 7, 1, 4, 2, 5).contiguous()
        return _Kernel(self._keep(torch.stack(_split(tiles, self.pieces), dim=4)), height, width)

    def bias(self, bias: Tensor) -> int:
        return self._keep(F.pad(bias.detach().float(), (0, -len(bias) % CHUNK)))

    def _keep(self, values: Tensor) -> int:
        address = (int(_Base.WEIGHTS) << 56) + self._bytes
        flat = values.contiguous().view(torch.uint8).flatten()
        self._parts.append(F.pad(flat, (0, -len(flat) % 64)))
        self._bytes += len(self._parts[-1])
        return address


class _Kernel(NamedTuple):
    address: int
    height: int
    width: int


class _Sum(NamedTuple):
    """The kernels of a sum of convolutions, and what is added to it."""

    kernels: tuple[_Kernel, ...]
    bias: int
    outputs: int


class _Block(NamedTuple):
    """A Bottleneck: its first convolution, and the second one with the skip's."""

    narrow: _Sum
    wide: _Sum


class _Level:
    """The weights of one level."""

    def __init__(self, weights: Weights, model: MSPN, level: int) -> None:
        module = model.levels[level]
        cell, head = module.cell, module.head
        assert isinstance(cell, EDLSTMCell)
        assert isinstance(head, nn.Conv2d)
        self.weights = weights
        self.hidden = cell.hidden_channels
        self.gate_rows = _whole(cell.hidden_channels, LANES)
        self.order = cell.gate_order
        stem = cell.encoder.stem
        inputs, state = stem.weight.split([cell.in_channels, cell.hidden_channels], dim=1)
        # Rows of the kernel side by side: what is gathered has a pixel's neighbours as channels.
        beside = inputs.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(-1)
        self.kernel_size = stem.kernel_size[0]
        self.inputs = cell.in_channels
        self.stem = self._sum([beside, state], stem.bias)
        self.encoder = [self._blocks(stage) for stage in _stages(cell.encoder.stages, EncoderStage)]
        self.share: _Sum | None = None
        if cell.share is not None:
            feature = cell.share.in_channels - cell.shared_channels
            self.share = self._sum(list(cell.share.weight.split([feature, cell.shared_channels], dim=1)), None)
        decoder = _stages(cell.decoder.stages, DecoderStage)
        self.decoder = [(*self._blocks(stage), self._merge(stage)) for stage in decoder[:-1]]
        self.decoder.append((*self._blocks(decoder[-1]), self._gates(decoder[-1])))
        self.head = self._sum([head.weight], head.bias)

    def _sum(self, kernels: list[Tensor], bias: Tensor | None) -> _Sum:
        outputs = len(kernels[0])
        if bias is None:
            bias = torch.zeros(outputs)
        return _Sum(tuple(map(self.weights.convolution, kernels)), self.weights.bias(bias), outputs)

    def _blocks(self, stage: EncoderStage | DecoderStage) -> tuple[_Block, _Block]:
        return self._block(stage.before), self._block(stage.after)

    def _block(self, block: nn.Module) -> _Block:
        assert isinstance(block, Bottleneck)
        narrow, wide = _folded(block.body)
        (skip,) = _folded(block.skip)
        return _Block(self._sum([narrow[0]], narrow[1]), self._sum([wide[0], skip[0]], wide[1] + skip[1]))

    def _merge(self, stage: DecoderStage) -> _Sum:
        return self._sum(list(stage.merge.weight.chunk(2, dim=1)), stage.merge.bias)

    def _gates(self, stage: DecoderStage) -> _Sum:
        """The convolution before the gates, each of which is brought to whole registers."""

        def whole(values: Tensor) -> Tensor:
            gates = values.detach().unflatten(0, (4, self.hidden))
            padding = (0, 0) * (gates.dim() - 2)
            return F.pad(gates, (*padding, 0, self.gate_rows - self.hidden)).flatten(0, 1)

        assert stage.merge.bias is not None
        return self._sum(list(whole(stage.merge.weight).chunk(2, dim=1)), whole(stage.merge.bias))


def _stages(modules: nn.ModuleList, kind: type) -> list:  # type: ignore[type-arg]
    assert all(isinstance(module, kind) for module in modules)
    return list(modules)


def _folded(layers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every convolution, those of the batch norm after it worked in."""
    assert isinstance(layers, nn.Sequential)
    found: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            found.append((layer.weight.detach(), layer.bias.detach()))
        elif isinstance(layer, nn.BatchNorm2d):
            weight, bias = found[-1]
            assert layer.running_mean is not None
            assert layer.running_var is not None
            gain = layer.weight.detach() * (layer.running_var + layer.eps).rsqrt()
            found[-1] = (weight * gain[:, None, None, None], (bias - layer.running_mean) * gain + layer.bias.detach())
    return found


class Program:
    """The instructions for clips of one size, and where things lie meanwhile.

    ``ahead`` predicts the next frame at every level; ``look`` compares it with a frame, ``follow`` with itself.
    ``state_bytes``: all that is remembered between frames. ``prediction``: where in it the finest prediction lies, in
    bytes. Both memories start as zeros.
    """

    def __init__(self, config: MSPNConfig, weights: Weights, size: Size) -> None:
        self.config, self.size = config, size
        self._arena = _Memory(_Base.ARENA, weights.pieces)
        self._state = _Memory(_Base.STATE, weights.pieces)
        self._code: list[int] = []
        channels = self.config.in_channels
        self._sizes = [size.scaled(0.5**level) for level in range(self.config.levels)]
        self._errors = [self._state.floats(s.batch, 2 * channels, s.height, s.width) for s in self._sizes]
        self._predictions = [self._state.floats(s.batch, channels, s.height, s.width) for s in self._sizes]
        self._frame = self._state.floats(size.batch, channels, size.height, size.width) if self.config.feed_frame else 0
        self.prediction = self._predictions[0] & ((1 << 56) - 1)
        feature: _Map | None = None
        for index in range(self.config.levels - 1, -1, -1):
            feature = self._level(weights.levels[index], index, feature)
        self.ahead = self._finish()
        self._compare(int(_Base.FRAME) << 56)
        self.look = self._finish()
        self._compare(self._predictions[0])
        self.follow = self._finish()
        self.arena_bytes, self.state_bytes = self._arena.bytes, self._state.bytes

    def zeros(self) -> Tensor:
        """The state before the first frame."""
        return torch.zeros(self.state_bytes, dtype=torch.uint8)

    def _emit(self, opcode: _Opcode, *fields: int) -> None:
        self._code += [opcode, len(fields) + 2, *fields]

    def _finish(self) -> Tensor:
        code = torch.tensor(self._code, dtype=torch.int64)
        self._code = []
        return code

    def _level(self, level: _Level, index: int, shared: _Map | None) -> _Map | None:
        """All of a level; returns the feature that the next finer one shares."""
        size, arena = self._sizes[index], self._arena
        border = max(level.kernel_size // 2, 2)  # the head's kernel is 5 wide
        hidden = self._state.map(size, level.hidden, border)
        gathered = arena.map(size, level.kernel_size * level.inputs, border)
        self._gather(level, index, gathered)
        x = arena.map(size, level.stem.outputs, border)
        self._convolve(level.stem, [gathered, hidden], x, _Activation.LEAKY_RELU)
        arena.release(gathered)
        skips = [x]
        for before, after in level.encoder:
            wide = self._bottleneck(before, x)
            small = arena.map(wide.size.scaled(0.5), wide.channels, 1)
            self._emit(_Opcode.POOL, *small.size, *wide.fields, *small.fields)
            arena.release(wide)
            x = self._bottleneck(after, small)
            arena.release(small)
            skips.append(x)
        feature = skips.pop()
        if level.share is not None:
            assert shared is not None
            merged = self._arena.map(feature.size, level.share.outputs, 1)
            self._convolve(level.share, [feature, shared], merged, _Activation.LEAKY_RELU)
            arena.release(feature)
            arena.release(shared)
            feature = merged
        self._decode(level, feature, skips, hidden)
        self._convolve(level.head, [hidden], self._predictions[index], _Activation.LEAKY_RELU)
        if self.config.enc_info and index > 0:
            return feature
        arena.release(feature)
        return None

    def _decode(self, level: _Level, feature: _Map, skips: list[_Map], hidden: _Map) -> None:
        arena, x = self._arena, feature
        size, rows = skips[0].size, 4 * level.gate_rows
        gates = arena.floats(*size, _whole(rows, CHUNK))
        for before, after, merge in level.decoder:
            skip = skips.pop()
            small = self._bottleneck(before, x)
            if x is not feature:
                arena.release(x)
            wide = arena.map(skip.size, small.channels, skip.border)
            self._emit(_Opcode.UPSAMPLE, *wide.size, *small.fields, *wide.fields)
            arena.release(small)
            up = self._bottleneck(after, wide)
            arena.release(wide)
            if skips:
                x = arena.map(skip.size, merge.outputs, skip.border)
                self._convolve(merge, [up, skip], x, _Activation.RELU)
            else:
                self._convolve(merge, [up, skip], gates, _Activation.NONE, _Target.ROWS)
            arena.release(up)
            arena.release(skip)
        cell = self._state.floats(*size, level.gate_rows)
        offsets = [level.order.index(gate) * level.gate_rows for gate in "fiog"]
        self._emit(_Opcode.GATE, *size, gates, cell, level.gate_rows, *offsets, *hidden.fields)

    def _bottleneck(self, block: _Block, x: _Map) -> _Map:
        middle = self._arena.map(x.size, block.narrow.outputs, x.border)
        self._convolve(block.narrow, [x], middle, _Activation.LEAKY_RELU)
        y = self._arena.map(x.size, block.wide.outputs, x.border)
        self._convolve(block.wide, [middle, x], y, _Activation.LEAKY_RELU)
        self._arena.release(middle)
        return y

    def _convolve(
        self,
        weights: _Sum,
        inputs: Sequence[_Map],
        to: _Map | int,
        activation: _Activation,
        target: _Target = _Target.PLANES,
    ) -> None:
        if isinstance(to, _Map):
            target, fields = _Target.MAP, to.fields
        else:
            fields = (to, _whole(weights.outputs, CHUNK), 0, 0, 0)
        parts = [
            field
            for x, kernel in zip(inputs, weights.kernels, strict=True)
            for field in (*x.fields, kernel.height, kernel.width, kernel.address)
        ]
        header = (*inputs[0].size, activation, target, *fields, weights.outputs, weights.bias, len(inputs))
        self._emit(_Opcode.CONVOLVE, *header, *parts)

    def _gather(self, level: _Level, index: int, to: _Map) -> None:
        config, last = self.config, self.config.levels - 1
        self._emit(
            _Opcode.GATHER,
            *self._sizes[index],
            config.in_channels,
            config.down_sampling == "average",
            level.kernel_size,
            self._errors[index],
            self._errors[index - 1] if index > 0 else 0,
            self._predictions[index + 1] if index < last else 0,
            self._frame if index == 0 else 0,
            *to.fields,
        )

    def _compare(self, frame: int) -> None:
        average = self.config.down_sampling == "average"
        for level, size in enumerate(self._sizes):
            kept = self._frame if level == 0 else 0
            where = (self._predictions[level], frame, self._errors[level], kept)
            self._emit(_Opcode.COMPARE, *size, self.config.in_channels, level, average, *where)


def room(count: int) -> Tensor:
    """``count`` bytes, in large pages where the system has them: NumPy asks for those, torch does not."""
    memory = torch.from_numpy(np.empty(count + _PAGE, dtype=np.uint8))
    return memory[-memory.data_ptr() % _PAGE :][:count]


def _whole(count: int, of: int) -> int:
    return -(-count // of) * of


def _split(values: Tensor, pieces: int) -> list[Tensor]:
    """bfloat16 tensors whose sum is ``values`` (float32), to 8 bits of the mantissa a piece."""
    found = []
    for _ in range(pieces):
        found.append(values.bfloat16())
        values = values - found[-1].float()
    return found
