"""MSPN for inference on a GPU: whole clips, and single steps, as CUDA graphs of few kernels on channels_last maps.

A clip is one graph for each batch size (a power of two), length, horizon and size of frames. Within it

- biases, activations and the sums of Bottlenecks are one kernel each, and batch norms are part of the weights;
- a level's inputs and its h are put together once.

**Levels across time.** Level l at time t needs level l + 1 at t, and its own and the next finer errors of t - 1. While
real frames last those are made of predictions of their own levels; so level l can begin as soon as level l - 1 at t - 1
is done, beside finer ones still at work on t - 1, and a step takes as long as the longest two neighbours, not as all
levels in turn: 5 of 6 Bottlenecks' time for ``released-mnist``, 7 of 10 for ``released-default``. Once predictions are
fed back every error needs the finest level, and nothing is left to overlap. ``overlap=True`` records each level in a
lane of its own; what the lanes' crossings cost against that has not been measured on a GPU, and it is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vpfast.models._frames import check_count, check_frames
from vpfast.models._graphs import CudaLanes, CudaRecorder, GraphCache, Lanes, OneLane, Recorder
from vpfast.models.mspn.config import MSPNConfig
from vpfast.models.mspn.network import MSPN, Ahead, MSPNState, shrink
from vpfast.nn import EDLSTMCell, EncLSTMDecCell
from vpfast.nn._as_made import check_as_made, check_without_hooks, plain_copy
from vpfast.nn._common import State
from vpfast.nn.bottleneck import LEAK, Bottleneck
from vpfast.nn.codec import Decoder, Encoder, upsample
from vpfast.ops import edlstm_gates
from vpfast.ops._fused_maps import leaky_sum_, signed_errors


class CapturedMSPN:
    """What :func:`vpfast.optimize` makes of an MSPN on a GPU. Frames and predictions keep the type of the model.

    Args:
        model: copied by :func:`prepared`.
        dtype: what is computed in; None: the type of the model.
        recorder: records what is replayed; None: CUDA graphs.
        lanes: where levels are at work; None: one after another.
    """

    def __init__(
        self, model: MSPN, dtype: torch.dtype | None, recorder: Recorder | None = None, lanes: Lanes | None = None
    ) -> None:
        self.config: MSPNConfig = model.config
        self._weight = model._weight.detach()[:0]
        self._network = prepared(model, dtype or model._weight.dtype)
        self._graphs = GraphCache(recorder or CudaRecorder(self._weight.device))
        self._lanes = lanes or OneLane()

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int) -> Tensor:
        """As :meth:`MSPN.predict`."""
        check_frames(frames, "B, T, C, H, W", self.config.in_channels, self.config.multiple, self._weight)
        horizon = check_count("horizon", horizon)
        if frames.shape[1] == 0:
            raise ValueError("frames hold no time step (T = 0); give at least one frame")
        if horizon == 0 or len(frames) == 0:
            return self._weight.new_empty((len(frames), horizon, *frames.shape[2:]))
        with torch.autocast(frames.device.type, enabled=False):
            (future,) = self._graphs.run(("clip", horizon), lambda frames: [self._future(frames, horizon)], [frames])
        return future

    def init_state(self, batch_size: int, height: int, width: int) -> MSPNState:
        """As :meth:`MSPN.init_state`."""
        return self._network.init_state(batch_size, height, width)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.step`."""
        if frame is not None:
            check_frames(frame, "B, C, H, W", self.config.in_channels, self.config.multiple, self._weight)
            expected = (len(state.errors[0]), self.config.in_channels, *state.errors[0].shape[2:])
            if tuple(frame.shape) != expected:
                raise ValueError(f"the state was made for frames of shape {expected}, got {tuple(frame.shape)}")
            frame = frame.to(self._network._weight.dtype, copy=self.config.feed_frame)  # which the state keeps
        ahead = state.ahead or self._look_ahead(state)
        state = self._looked_at(ahead, frame, OneLane())
        return ahead.predictions[0].to(self._weight.dtype, copy=True), state

    @torch.no_grad()
    def peek(self, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.peek`."""
        ahead = state.ahead or self._look_ahead(state)
        return ahead.predictions[0].to(self._weight.dtype, copy=True), state._replace(ahead=ahead)

    @torch.no_grad()
    def rollout(self, state: MSPNState, count: int) -> Tensor:
        """What ``count`` times ``step`` with None would predict, (B, count, C, H, W), without moving on, in one launch.

        Raises:
            TypeError, ValueError: ``count`` is no integer, or below 1.
        """
        count = check_count("count", count, lowest=1)
        given = self._flat(state.ahead or self._look_ahead(state))
        if count == 1 or len(given[0]) == 0:
            return torch.stack([given[0]] * count, dim=1).to(self._weight.dtype).contiguous()
        with torch.autocast(given[0].device.type, enabled=False):
            (frames,) = self._graphs.run(("rollout", count), lambda *flat: [self._rolled_out(flat, count)], given)
        return frames

    # -- what is recorded ----------------------------------------------------------------------------------------------

    def _future(self, frames: Tensor, horizon: int) -> Tensor:
        """(B, T, C, H, W) -> (B, horizon, C, H, W), T and the horizon at least 1."""
        batch, length, _, height, width = frames.shape
        seen = frames.movedim(2, -1).movedim(1, 0).to(self._network._weight.dtype).contiguous()
        state = self._network._zero_state(batch, height, width)
        made = []
        with self._lanes.forked():
            for time in range(length + horizon):
                ahead = self._ahead(state, self._lanes)
                if time >= length:
                    made.append(ahead.predictions[0])
                if time + 1 < length + horizon:
                    frame = seen[time].movedim(-1, 1) if time < length else None
                    state = self._looked_at(ahead, frame, self._lanes)
        return torch.stack(made, dim=1).to(self._weight.dtype).contiguous()

    def _rolled_out(self, flat: Sequence[Tensor], count: int) -> Tensor:
        """What an :class:`Ahead` leads to where no frame is looked at, its own prediction first."""
        ahead = self._of_flat(flat)
        made = [ahead.predictions[0]]
        with self._lanes.forked():
            for _ in range(count - 1):
                ahead = self._ahead(self._looked_at(ahead, None, self._lanes), self._lanes)
                made.append(ahead.predictions[0])
        return torch.stack(made, dim=1).to(self._weight.dtype).contiguous()

    def _look_ahead(self, state: MSPNState) -> Ahead:
        """Of a state that another call made: its tensors go in flat, and come out so."""
        given = [*(part for cell in state.cells for part in cell), *state.errors]
        given += [] if state.frame is None else [state.frame]
        if len(given[0]) == 0:
            return self._ahead(state, OneLane())
        with torch.autocast(given[0].device.type, enabled=False):
            return self._of_flat(self._graphs.run("step", lambda *flat: self._flat(self._stepped(flat)), given))

    def _stepped(self, flat: Sequence[Tensor]) -> Ahead:
        levels = self.config.levels
        errors, frame = tuple(flat[2 * levels : 3 * levels]), flat[-1] if self.config.feed_frame else None
        return self._ahead(MSPNState(_in_pairs(flat[: 2 * levels]), errors, frame), OneLane())

    def _flat(self, ahead: Ahead) -> list[Tensor]:
        return [*ahead.predictions, *(part for cell in ahead.cells for part in cell)]

    def _of_flat(self, flat: Sequence[Tensor]) -> Ahead:
        levels = self.config.levels
        return Ahead(tuple(flat[:levels]), _in_pairs(flat[levels:]))

    def _ahead(self, state: MSPNState, lanes: Lanes) -> Ahead:
        """The top-down pass (Algorithm 1, lines 4-12), each level in its lane."""
        config, top = self.config, self.config.levels - 1
        predictions: list[Tensor] = []
        cells: list[State] = []
        feature: Tensor | None = None
        for index in range(top, -1, -1):
            with lanes.lane(index, after=[index + 1] * (index < top) + [index - 1] * (index > 0)):
                inputs = [state.errors[index]]
                if index > 0:
                    inputs.append(shrink(state.errors[index - 1], 2, config.down_sampling))
                if index < top:
                    inputs.append(upsample(predictions[-1]))
                if index == 0 and state.frame is not None:
                    inputs.append(state.frame)
                prediction, cell, feature = _level(self._network.levels[index], inputs, state.cells[index], feature)
            lanes.keep(prediction, feature)
            predictions.append(prediction)
            cells.append(cell)
        return Ahead(tuple(reversed(predictions)), tuple(reversed(cells)))

    def _looked_at(self, ahead: Ahead, frame: Tensor | None, lanes: Lanes) -> MSPNState:
        """The bottom-up pass (Algorithm 1, lines 13-16): each level's errors in its lane."""
        real = ahead.predictions[0] if frame is None else frame
        errors = []
        for level, prediction in enumerate(ahead.predictions):
            with lanes.lane(level, after=[0] * (frame is None and level > 0)):
                target = shrink(real, 2**level, self.config.down_sampling)
                errors.append(signed_errors(prediction, target))
            lanes.keep(errors[-1])
        return MSPNState(ahead.cells, tuple(errors), real if self.config.feed_frame else None)


def optimize_mspn(model: MSPN, dtype: torch.dtype | None, overlap: bool = False) -> CapturedMSPN:
    """See :func:`vpfast.optimize`; ``overlap`` records each level in a lane of its own."""
    lanes = CudaLanes(model._weight.device, model.config.levels) if overlap else None
    return CapturedMSPN(model, dtype, lanes=lanes)


def prepared(model: MSPN, dtype: torch.dtype) -> MSPN:
    """A copy for inference that computes the same with less: batch norms are part of the convolutions before them, and
    the bias of a Bottleneck's skip is part of its last bias.

    Raises:
        TypeError: other layers than those of an MSPN, or any that somebody looks at or stands in for.
        ValueError: batch norms in training mode.
    """
    if any(isinstance(part, _BatchNorm) and part.training for part in model.modules()):
        raise ValueError("optimize takes a model with batch norms in evaluation mode; call model.eval() first")
    for method in ("forward", "predict", "init_state", "step", "peek"):
        if getattr(type(model), method) is not getattr(MSPN, method):
            raise TypeError(f"optimize does what MSPN does, and {type(model).__name__}.{method} is another")
    network = plain_copy(model)
    with torch.device("meta"):
        check_as_made("optimize", network, MSPN(model.config))
    check_without_hooks("optimize", network)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            first, second = _without_norms(module.body)
            (skip,) = _without_norms(module.skip)
            assert second.bias is not None
            assert skip.bias is not None
            second.bias += skip.bias
            skip.bias = None
            module.body, module.skip = nn.Sequential(first, nn.LeakyReLU(LEAK), second), nn.Sequential(skip)
    return network.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _without_norms(layers: nn.Sequential) -> list[nn.Conv2d]:
    found: list[nn.Conv2d] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            found.append(layer)
        elif isinstance(layer, _BatchNorm):
            found[-1] = fuse_conv_bn_eval(found[-1], layer)
    return found


def _in_pairs(flat: Sequence[Tensor]) -> tuple[State, ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


# --- a level, by few kernels ------------------------------------------------------------------------------------------


def _level(
    level: nn.Module, inputs: list[Tensor], state: State, shared: Tensor | None
) -> tuple[Tensor, State, Tensor | None]:
    """As the level's own ``forward``, its inputs not yet put together."""
    h, c = state
    cell = level.cell
    if isinstance(cell, EncLSTMDecCell):
        *skips, feature = _encoded(cell.encoder, torch.cat(inputs, dim=1))
        gates = _activated(cell.gates, torch.cat((feature, h), dim=1), LEAK)
        h, c = edlstm_gates(gates, c, cell.gate_order)
        return _decoded(cell.decoder, _activated(cell.out, h, LEAK), skips), (h, c), None
    assert isinstance(cell, EDLSTMCell)
    *skips, feature = _encoded(cell.encoder, torch.cat((*inputs, h), dim=1))
    if cell.share is not None:
        assert shared is not None
        feature = F.leaky_relu_(cell.share(torch.cat((feature, shared), dim=1)), LEAK)
    h, c = edlstm_gates(_decoded(cell.decoder, feature, skips), c, cell.gate_order)
    head = level.head
    assert isinstance(head, nn.Conv2d)
    return _activated(head, h, LEAK), (h, c), feature if level.enc_info else None


def _encoded(encoder: Encoder, x: Tensor) -> list[Tensor]:
    maps = [_activated(encoder.stem, x, LEAK)]
    for stage in encoder.stages:
        maps.append(_bottleneck(stage.after, F.max_pool2d(_bottleneck(stage.before, maps[-1]), 2)))
    return maps


def _decoded(decoder: Decoder, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
    last = len(skips) - 1
    for index, (stage, skip) in enumerate(zip(decoder.stages, reversed(skips), strict=True)):
        up = _bottleneck(stage.after, upsample(_bottleneck(stage.before, x)))
        both = torch.cat((up, skip), dim=1)
        merge = stage.merge
        assert isinstance(merge, nn.Conv2d)
        x = _activated(merge, both, 0.0) if index < last else merge(both)
    return x


def _bottleneck(block: object, x: Tensor) -> Tensor:
    assert isinstance(block, Bottleneck)
    first, _, second = block.body
    (skip,) = block.skip
    assert isinstance(second, nn.Conv2d)
    assert second.bias is not None
    return leaky_sum_(_convolved(second, _activated(first, x, LEAK)), second.bias, _convolved(skip, x), LEAK)


def _activated(layer: nn.Module, x: Tensor, slope: float) -> Tensor:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return leaky_sum_(_convolved(layer, x), bias, slope=slope)


def _convolved(layer: nn.Module, x: Tensor) -> Tensor:
    """Without the bias, which would be a kernel of its own."""
    assert isinstance(layer, nn.Conv2d)
    padding: tuple[int, int] = layer.padding  # type: ignore[assignment]
    return F.conv2d(x, layer.weight, None, padding=padding)
