"""An MSPN as a list of instructions for matrix tiles (csrc/tile_program)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models._tiles import (
    CHUNK,
    LANES,
    Activation,
    Base,
    Code,
    Map,
    Memory,
    Opcode,
    Size,
    Sum,
    Target,
    Weights,
    whole,
)
from vpfast.models.mspn.config import MSPNConfig
from vpfast.models.mspn.network import MSPN
from vpfast.nn import EDLSTMCell
from vpfast.nn.bottleneck import Bottleneck
from vpfast.nn.codec import DecoderStage, EncoderStage


class _Block(NamedTuple):
    """A Bottleneck: its first convolution, and the second one with the skip's."""

    narrow: Sum
    wide: Sum


class _Level:
    """The weights of one level."""

    def __init__(self, weights: Weights, model: MSPN, level: int) -> None:
        module = model.levels[level]
        cell, head = module.cell, module.head
        assert isinstance(cell, EDLSTMCell)
        assert isinstance(head, nn.Conv2d)
        self._sum = weights.sum
        self.hidden = cell.hidden_channels
        self.gate_rows = whole(cell.hidden_channels, LANES)
        self.order = cell.gate_order
        stem = cell.encoder.stem
        inputs, state = stem.weight.split([cell.in_channels, cell.hidden_channels], dim=1)
        # Rows of the kernel side by side: what is gathered has a pixel's neighbours as channels.
        beside = inputs.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(-1)
        self.kernel_size = stem.kernel_size[0]
        self.inputs = cell.in_channels
        self.stem = self._sum([beside, state], stem.bias)
        self.encoder = [self._blocks(stage) for stage in _stages(cell.encoder.stages, EncoderStage)]
        self.share: Sum | None = None
        if cell.share is not None:
            feature = cell.share.in_channels - cell.shared_channels
            self.share = self._sum(list(cell.share.weight.split([feature, cell.shared_channels], dim=1)), None)
        decoder = _stages(cell.decoder.stages, DecoderStage)
        self.decoder = [(*self._blocks(stage), self._merge(stage)) for stage in decoder[:-1]]
        self.decoder.append((*self._blocks(decoder[-1]), self._gates(decoder[-1])))
        self.head = self._sum([head.weight], head.bias)

    def _blocks(self, stage: EncoderStage | DecoderStage) -> tuple[_Block, _Block]:
        return self._block(stage.before), self._block(stage.after)

    def _block(self, block: nn.Module) -> _Block:
        assert isinstance(block, Bottleneck)
        narrow, wide = (layer for layer in block.body if isinstance(layer, nn.Conv2d))
        (skip,) = (layer for layer in block.skip if isinstance(layer, nn.Conv2d))
        return _Block(self._sum([narrow.weight], narrow.bias), self._sum([wide.weight, skip.weight], wide.bias))

    def _merge(self, stage: DecoderStage) -> Sum:
        return self._sum(list(stage.merge.weight.chunk(2, dim=1)), stage.merge.bias)

    def _gates(self, stage: DecoderStage) -> Sum:
        """The convolution before the gates, each of which is brought to whole registers."""

        def in_registers(values: Tensor) -> Tensor:
            gates = values.detach().unflatten(0, (4, self.hidden))
            padding = (0, 0) * (gates.dim() - 2)
            return F.pad(gates, (*padding, 0, self.gate_rows - self.hidden)).flatten(0, 1)

        assert stage.merge.bias is not None
        return self._sum(list(in_registers(stage.merge.weight).chunk(2, dim=1)), in_registers(stage.merge.bias))


def _stages(modules: nn.ModuleList, kind: type) -> list:  # type: ignore[type-arg]
    assert all(isinstance(module, kind) for module in modules)
    return list(modules)


class MSPNWeights:
    """All weights of a network, a ``prepared`` one, as the kernel reads them: ``memory``, and where in it those of each
    level are."""

    def __init__(self, model: MSPN, pieces: int) -> None:
        weights = Weights(pieces)
        self.pieces = pieces
        self.levels = [_Level(weights, model, level) for level in range(model.config.levels)]
        self.memory = weights.finish()


class Program:
    """The instructions for clips of one size, and where things lie meanwhile.

    ``ahead`` predicts the next frame at every level; ``look`` compares it with a frame, ``follow`` with itself.
    ``state_bytes``: all that is remembered between frames. ``prediction``: where in it the finest prediction lies, in
    bytes. Both memories start as zeros.
    """

    def __init__(self, config: MSPNConfig, weights: MSPNWeights, size: Size) -> None:
        self.config = config
        self._arena = Memory(Base.ARENA, weights.pieces)
        self._state = Memory(Base.STATE, weights.pieces)
        self._code = Code()
        channels = self.config.in_channels
        self._sizes = [size.scaled(0.5**level) for level in range(self.config.levels)]
        self._errors = [self._state.floats(s.batch, 2 * channels, s.height, s.width) for s in self._sizes]
        self._predictions = [self._state.floats(s.batch, channels, s.height, s.width) for s in self._sizes]
        self._frame = self._state.floats(size.batch, channels, size.height, size.width) if self.config.feed_frame else 0
        self.prediction = self._predictions[0] & ((1 << 56) - 1)
        feature: Map | None = None
        for index in range(self.config.levels - 1, -1, -1):
            feature = self._level(weights.levels[index], index, feature)
        self.ahead = self._code.finish()
        self._compare(Base.FRAME.start)
        self.look = self._code.finish()
        self._compare(self._predictions[0])
        self.follow = self._code.finish()
        self.arena_bytes, self.state_bytes = self._arena.bytes, self._state.bytes

    def zeros(self) -> Tensor:
        """The state before the first frame."""
        return torch.zeros(self.state_bytes, dtype=torch.uint8)

    def _level(self, level: _Level, index: int, shared: Map | None) -> Map | None:
        """All of a level; returns the feature that the next finer one shares."""
        size, arena = self._sizes[index], self._arena
        border = max(level.kernel_size // 2, 2)  # the head's kernel is 5 wide
        hidden = self._state.map(size, level.hidden, border)
        gathered = arena.map(size, level.kernel_size * level.inputs, border)
        self._gather(level, index, gathered)
        x = arena.map(size, level.stem.outputs, border)
        self._code.convolve(level.stem, [gathered, hidden], x, Activation.LEAKY_RELU)
        arena.release(gathered)
        skips = [x]
        for before, after in level.encoder:
            wide = self._bottleneck(before, x)
            small = arena.map(wide.size.scaled(0.5), wide.channels, 1)
            self._code.emit(Opcode.POOL, *small.size, *wide.fields, *small.fields)
            arena.release(wide)
            x = self._bottleneck(after, small)
            arena.release(small)
            skips.append(x)
        feature = skips.pop()
        if level.share is not None:
            assert shared is not None
            merged = self._arena.map(feature.size, level.share.outputs, 1)
            self._code.convolve(level.share, [feature, shared], merged, Activation.LEAKY_RELU)
            arena.release(feature)
            arena.release(shared)
            feature = merged
        self._decode(level, feature, skips, hidden)
        self._code.convolve(level.head, [hidden], self._predictions[index], Activation.LEAKY_RELU)
        if self.config.enc_info and index > 0:
            return feature
        arena.release(feature)
        return None

    def _decode(self, level: _Level, feature: Map, skips: list[Map], hidden: Map) -> None:
        arena, x = self._arena, feature
        size, rows = skips[0].size, 4 * level.gate_rows
        gates = arena.floats(*size, whole(rows, CHUNK))
        for before, after, merge in level.decoder:
            skip = skips.pop()
            small = self._bottleneck(before, x)
            if x is not feature:
                arena.release(x)
            wide = arena.map(skip.size, small.channels, skip.border)
            self._code.emit(Opcode.UPSAMPLE, *wide.size, *small.fields, *wide.fields)
            arena.release(small)
            up = self._bottleneck(after, wide)
            arena.release(wide)
            if skips:
                x = arena.map(skip.size, merge.outputs, skip.border)
                self._code.convolve(merge, [up, skip], x, Activation.RELU)
            else:
                self._code.convolve(merge, [up, skip], gates, Activation.NONE, Target.ROWS)
            arena.release(up)
            arena.release(skip)
        cell = self._state.floats(*size, level.gate_rows)
        offsets = [level.order.index(gate) * level.gate_rows for gate in "fiog"]
        self._code.emit(Opcode.GATE, *size, gates, cell, level.gate_rows, *offsets, *hidden.fields)

    def _bottleneck(self, block: _Block, x: Map) -> Map:
        middle = self._arena.map(x.size, block.narrow.outputs, x.border)
        self._code.convolve(block.narrow, [x], middle, Activation.LEAKY_RELU)
        y = self._arena.map(x.size, block.wide.outputs, x.border)
        self._code.convolve(block.wide, [middle, x], y, Activation.LEAKY_RELU)
        self._arena.release(middle)
        return y

    def _gather(self, level: _Level, index: int, to: Map) -> None:
        config, last = self.config, self.config.levels - 1
        self._code.emit(
            Opcode.GATHER,
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
            self._code.emit(Opcode.COMPARE, *size, self.config.in_channels, level, average, *where)
