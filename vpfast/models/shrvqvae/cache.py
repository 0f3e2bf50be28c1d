"""The ST-PixelCNN evaluated at a few positions at a time, from the inputs of its layers kept so far.

Every masked convolution keeps its inputs, (B, cells, C), with the frames one after another and each of them in a border
of zeros, so that its taps are gathered without asking where the frame ends. What past frames add to a frame is computed
for all of it before its first position; a position then costs its present taps alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vpfast.models.shrvqvae.st_pixelcnn import AttentionBlock, GatedBlock, STPixelCNN
from vpfast.nn import MaskedConv3d, sinusoidal_positions
from vpfast.nn.masked_attention3d import AttentionCache

Grid = tuple[int, int, int]


class Places(NamedTuple):
    """P positions to be evaluated together, and where in the kept inputs they are and find their taps.

    ``positions``: int64 (P,), in the clip; ``times`` and ``cells`` (P,): the same as frame and raster position in it.
    ``own`` (P,): where their own inputs are kept. ``stem`` and ``block`` (P * taps,): the taps of mask A, ``carry``
    with them, and of mask B.
    """

    positions: Tensor
    times: Tensor
    cells: Tensor
    own: Tensor
    stem: Tensor
    block: Tensor

    def each(self) -> list[Places]:
        """The positions one by one."""
        count = len(self.positions)
        return [Places(*parts) for parts in zip(*(table.tensor_split(count) for table in self), strict=True)]


class Window:
    """Where the taps of a masked convolution, and of ``carry`` beside it, lie for each position of frame 0.

    ``past`` (H W, taps), ``present`` (H W, taps) and ``own`` (H W,) count cells; frame t is t times ``frame`` further.
    Cell 0 is in the border and holds zeros.
    """

    def __init__(self, conv: MaskedConv3d, grid: Grid, carries: bool, device: torch.device) -> None:
        times, height, width = grid
        lags, kernel_height, kernel_width = conv.kernel_size[0] - 1, *conv.kernel_size[1:]
        row = width + kernel_width - 1
        self.frame = (height + kernel_height - 1) * row
        self.total = (times + lags) * self.frame
        first = (torch.arange(height, device=device)[:, None] * row + torch.arange(width, device=device)).flatten()
        tap = torch.arange(kernel_height * kernel_width, device=device)
        tap = tap // kernel_width * row + tap % kernel_width
        of_frame = torch.arange(lags + 1, device=device) * self.frame
        self.own = first + kernel_height // 2 * row + kernel_width // 2 + of_frame[-1]
        self.past = self._taps(first, of_frame[:-1], tap, conv.past)
        self.present = self._taps(first, of_frame[-1:], tap, conv.present)
        if carries:
            self._carry(conv.conditioning == "raster")

    @staticmethod
    def _taps(first: Tensor, of_frame: Tensor, tap: Tensor, weight: Tensor | None) -> Tensor:
        taps = tap[: 0 if weight is None else weight.shape[-1]]
        return first[:, None] + (of_frame[:, None] + taps).flatten()

    def _carry(self, raster: bool) -> None:
        """One more tap: the position before in raster order, or with ``eq6`` before it in the frame before."""
        before = self.own.roll(1)
        before[0] = 0
        if not raster:
            self.past = torch.column_stack((self.past, (before - self.frame).clamp(min=0)))
            return
        last = torch.zeros_like(before)
        last[0] = self.own[-1] - self.frame
        self.past = torch.column_stack((self.past, last))
        self.present = torch.column_stack((self.present, before))


class ConvCache:
    """A masked convolution, its weights as matrices and its inputs.

    Attributes:
        inputs: (B, cells, C).
        past, present: (taps * C, out), a tap's C rows together, in the order of the window.
        frame: (B, H W, out), what the bias and past frames add to the frame that is being evaluated; None where
            positions of several frames are evaluated together, and past taps are gathered with the present ones.
    """

    def __init__(self, conv: MaskedConv3d, window: Window, batch: int, carry: Tensor | None = None) -> None:
        weight = next(conv.parameters())
        self.window = window
        self.inputs = weight.new_zeros(batch, window.total, conv.in_channels)
        matrices = [
            weight.new_empty(0, conv.out_channels) if part is None else part.movedim((0, 1), (-1, -2)).flatten(0, -2)
            for part in (conv.past, conv.present)
        ]
        if carry is not None:
            matrices[0] = torch.cat((matrices[0], carry.t()))
            if conv.conditioning == "raster":
                matrices[1] = torch.cat((matrices[1], carry.t()))
        self.past, self.present = (matrix.contiguous() for matrix in matrices)
        self.whole = torch.cat(matrices)
        self.bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        self.frame: Tensor | None = None

    def begin_frame(self, time: int, past_inputs: Tensor) -> None:
        """Compute ``frame`` for frame ``time``, all of whose past frames are known."""
        taps = (self.window.past + time * self.window.frame).flatten()
        self.frame = _gathered(
            past_inputs, taps, self.past, self.bias.expand(past_inputs.shape[0], len(self.window.own), -1)
        )

    def at(self, taps: Tensor, cells: Tensor) -> Tensor:
        """The output (B, P, out) at positions whose taps are ``taps`` (P * taps,)."""
        if self.frame is None:
            return _gathered(self.inputs, taps, self.whole, self.bias.expand(self.inputs.shape[0], len(cells), -1))
        base = self.frame.index_select(1, cells)
        return _gathered(self.inputs, taps, self.present, base) if len(taps) else base


def _gathered(inputs: Tensor, taps: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """``base`` (B, P, out) + the inputs at ``taps`` (P * taps,) times ``weight``."""
    gathered = inputs.index_select(1, taps).view(base[..., 0].numel(), -1)
    return torch.addmm(base.reshape(-1, base.shape[-1]), gathered, weight).view(base.shape)


class Layer(NamedTuple):
    """A block with its cache, and the attention that follows it with its own, if one does."""

    block: GatedBlock
    conv: ConvCache
    attention: AttentionBlock | None
    keys_values: AttentionCache | None


class NetworkCache:
    """The network from the stem to the features that logits are made of, at a few positions at a time.

    Attributes:
        stem: its inputs are what the present frame shows of its own codes.
        layers: the blocks and attentions, in order.
    """

    def __init__(self, prior: STPixelCNN, windows: tuple[Window, Window], batch: int, grid: Grid) -> None:
        weight = prior.norm.weight
        self.stem = ConvCache(prior.stem, windows[0], batch, None if prior.carry is None else prior.carry.weight)
        self.encoding = sinusoidal_positions(grid, len(weight), weight.dtype, weight.device).flatten(0, 2)
        self.layers: list[Layer] = []
        for index, block in enumerate(prior.blocks):
            nth = index // prior.config.prior_attention_every
            attention = prior.attentions[nth] if prior._attends_after(index) else None
            assert isinstance(block, GatedBlock)
            assert attention is None or isinstance(attention, AttentionBlock)
            keys_values = None if attention is None else attention.attention.init_cache(batch, grid)
            self.layers.append(Layer(block, ConvCache(block.conv, windows[1], batch), attention, keys_values))

    def look_at(self, x: Tensor, own: Tensor) -> None:
        """Keep what the layers have of the first T frames of the clip, whose codes are known, evaluated densely.

        ``x`` (B, T, H, W, C) is the input of the first block, ``own`` (T H W,) where the inputs at its positions go.
        """
        positions = torch.arange(len(own), device=own.device)
        for block, conv, attention, keys_values in self.layers:
            conv.inputs.index_copy_(1, own, block.norm(x).flatten(1, 3))
            x = block(x)
            if attention is not None and keys_values is not None:
                attention.attention.keep(attention.norm1(x).flatten(1, 3), positions, keys_values)
                x = attention(x)

    def begin_frame(self, time: int, past_inputs: Tensor, added: Tensor | None = None) -> None:
        """Bring in what past frames, and ``added`` (B, H W, C) to the stem, say about every position of ``time``.

        ``past_inputs`` are the stem's as later frames see them.
        """
        self.stem.begin_frame(time, past_inputs)
        assert self.stem.frame is not None
        cells = self.stem.frame.shape[1]
        self.stem.frame += self.encoding[time * cells : (time + 1) * cells]
        if added is not None:
            self.stem.frame += added
        for layer in self.layers:
            layer.conv.begin_frame(time, layer.conv.inputs)

    def end_frames(self) -> None:
        """From here on positions of several frames are evaluated together."""
        for conv in (self.stem, *(layer.conv for layer in self.layers)):
            conv.frame = None

    def evaluate(self, places: Places) -> Tensor:
        """The features (B, P, C) at ``places``, all of whose taps and visible keys are kept or among them."""
        x = self.stem.at(places.stem, places.cells)
        if self.stem.frame is None:
            x += self.encoding.index_select(0, places.positions)
        for block, conv, attention, keys_values in self.layers:
            conv.inputs.index_copy_(1, places.own, block.norm(x))
            a, b = conv.at(places.block, places.cells).chunk(2, -1)
            x += block.out(a.tanh() * b.sigmoid())
            if attention is not None and keys_values is not None:
                x += attention.attention.extend(attention.norm1(x), places.positions, keys_values)
                x += attention.ffn(attention.norm2(x))
        return x

    def repeat(self, times: int) -> None:
        """Every clip ``times`` times, one after another."""
        for conv in (self.stem, *(layer.conv for layer in self.layers)):
            conv.inputs, conv.frame = conv.inputs.repeat_interleave(times, 0), None
        self.layers = [
            layer._replace(keys_values=layer.keys_values and repeated(layer.keys_values, times))
            for layer in self.layers
        ]


def repeated(cache: AttentionCache, times: int) -> AttentionCache:
    """Every clip of ``cache`` ``times`` times, one after another."""
    return cache._replace(keys=cache.keys.repeat_interleave(times, 0), values=cache.values.repeat_interleave(times, 0))
