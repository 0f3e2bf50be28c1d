"""MSPN for inference on the CPU: by the compiled step where the processor has matrix tiles, else by its modules."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpfast.models._frames import check_count, check_frames, check_size
from vpfast.models._tiles import Size, Turn, room
from vpfast.models.mspn.captured import prepared
from vpfast.models.mspn.config import MSPNConfig
from vpfast.models.mspn.network import MSPN, MSPNState
from vpfast.models.mspn.program import MSPNWeights, Program
from vpfast.nn.convolution import Transforms, is_mostly_narrow, weights_in_use
from vpfast.ops import _native
from vpfast.ops._backend import current_backend
from vpfast.ops._plane_convolution import has_whole_rows

_PIECES = {"highest": 3, "high": 2, "medium": 1}
"""bfloat16 numbers that stand for a float32, by ``torch.get_float32_matmul_precision()``."""
_PROGRAMS_KEPT = 4


def optimize_mspn(model: MSPN, dtype: torch.dtype | None) -> TiledMSPN | LaidOutMSPN:
    """See :func:`vpfast.optimize`."""
    return TiledMSPN(model, dtype) if _tiles_serve(model) else LaidOutMSPN(model, dtype)


def _tiles_serve(model: MSPN) -> bool:
    return (
        current_backend() in ("auto", "native")
        and _native.extension is not None
        and _native.extension.isa() == "amx"
        and model.config.recurrence == "edlstm"
        and model._weight.dtype in (torch.float32, torch.bfloat16)
    )


class TiledState(NamedTuple):
    """What a :class:`TiledMSPN` remembers between two frames: in one memory, laid out by the program for ``size``.

    ``ahead``: whether it holds the prediction of the next frame already.
    """

    memory: Tensor
    size: Size
    ahead: bool


class TiledMSPN:
    """An MSPN whose steps are one call each (csrc/tile_program). Weights are copied; the model stays as it is.

    float32 models compute as exactly as ``torch.get_float32_matmul_precision()`` asks at the time of the copy:
    ``"highest"`` with the accuracy of float32, ``"high"`` with products of 16 significant bits, ``"medium"`` and
    bfloat16 with products of 8. Sums, gates and cell states are float32 in each case.
    """

    def __init__(self, model: MSPN, dtype: torch.dtype | None) -> None:
        self.config: MSPNConfig = model.config
        self._weight = model._weight.new_empty(0)
        half = torch.bfloat16 in (dtype, self._weight.dtype)
        self._pieces = 1 if half else _PIECES[torch.get_float32_matmul_precision()]
        self._weights = MSPNWeights(prepared(model, torch.float32), self._pieces)
        self._programs: dict[Size, tuple[Program, Tensor]] = {}
        self._lock = Turn()

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int) -> Tensor:
        """The future alone: (B, T, C, H, W) -> (B, horizon, C, H, W). Errors as in :meth:`MSPN.forward`."""
        self._check(frames, "B, T, C, H, W")
        horizon = check_count("horizon", horizon)
        batch, length, _, height, width = frames.shape
        if length == 0:
            raise ValueError("frames hold no time step (T = 0); give at least one frame")
        future = frames.new_empty(batch, horizon, *frames.shape[2:])
        if future.numel() == 0:
            return future
        size = Size(batch, height, width)
        memory = self._program(size)[0].zeros()
        for time in range(length + horizon):
            self._predict_next(memory, size)
            if time >= length:
                future[:, time - length] = self._prediction(memory, size)
            if time < length + horizon - 1:
                self._look_at(frames[:, time] if time < length else None, memory, size)
        return future

    def init_state(self, batch_size: int, height: int, width: int) -> TiledState:
        """The state before the first frame. Errors as in :meth:`MSPN.init_state`."""
        size = Size(*(check_count(*each) for each in zip(Size._fields, (batch_size, height, width), strict=True)))
        check_size(size.height, size.width, self.config.multiple)
        return TiledState(self._program(size)[0].zeros(), size, False)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: TiledState) -> tuple[Tensor, TiledState]:
        """As :meth:`MSPN.step`: predict the next frame, then look at it; None stands for the prediction."""
        if frame is not None:
            self._check(frame, "B, C, H, W")
            expected = (state.size.batch, self.config.in_channels, *state.size[1:])
            if tuple(frame.shape) != expected:
                raise ValueError(f"the state was made for frames of shape {expected}, got {tuple(frame.shape)}")
        prediction, ahead = self.peek(state)
        memory = ahead.memory.clone() if state.ahead else ahead.memory
        self._look_at(frame, memory, state.size)
        return prediction, TiledState(memory, state.size, False)

    @torch.no_grad()
    def peek(self, state: TiledState) -> tuple[Tensor, TiledState]:
        """As :meth:`MSPN.peek`: the prediction of the next frame without moving on."""
        if not state.ahead:
            memory = state.memory.clone()
            self._predict_next(memory, state.size)
            state = TiledState(memory, state.size, True)
        return self._prediction(state.memory, state.size).to(self._weight.dtype, copy=True), state

    def _check(self, frames: Tensor, names: str) -> None:
        check_frames(frames, names, self.config.in_channels, self.config.multiple, self._weight)

    def _program(self, size: Size) -> tuple[Program, Tensor]:
        """The program for ``size``, and the memory that it works in; those of the last few sizes are kept."""
        with self._lock:
            found = self._programs.pop(size, None)
            if found is None:
                program = Program(self.config, self._weights, size)
                found = program, room(program.arena_bytes).zero_()
                if len(self._programs) == _PROGRAMS_KEPT:
                    del self._programs[next(iter(self._programs))]
            self._programs[size] = found
            return found

    def _prediction(self, memory: Tensor, size: Size) -> Tensor:
        start = self._program(size)[0].prediction
        shape = (size.batch, self.config.in_channels, size.height, size.width)
        return memory[start : start + 4 * torch.Size(shape).numel()].view(torch.float32).view(shape)

    def _predict_next(self, memory: Tensor, size: Size) -> None:
        self._run(self._program(size)[0].ahead, memory, size, memory[:0])

    def _look_at(self, frame: Tensor | None, memory: Tensor, size: Size) -> None:
        program = self._program(size)[0]
        if frame is None:
            self._run(program.follow, memory, size, memory[:0])
        else:
            self._run(program.look, memory, size, frame.float().contiguous())

    def _run(self, code: Tensor, memory: Tensor, size: Size, frame: Tensor) -> None:
        arena = self._program(size)[1]
        weights, threads = self._weights.memory, torch.get_num_threads()
        with self._lock:  # the arena is one for all who call
            torch.ops.vpfast.tile_program(code, arena, memory, weights, frame, self._pieces, threads)


class LaidOutMSPN:
    """An MSPN in the type asked for and the layout that is faster, its weights transformed once: a copy of the model.

    Maps are in channels_last, or in planes where the kernels for few channels serve most of the convolutions. In place
    of bfloat16 it computes in float32 where the processor has no instructions for that type: imitated, it takes ten
    times as long.
    """

    def __init__(self, model: MSPN, dtype: torch.dtype | None) -> None:
        self.config: MSPNConfig = model.config
        self._dtype = model._weight.dtype
        self._weight = model._weight.new_empty(0)
        computed = dtype or self._dtype
        with torch.inference_mode(False):  # for weights with versions, by which their transforms are known
            self._network = prepared(model, computed if _is_fast(computed) else torch.float32)
            self._in_planes = _in_planes(self._network)
        self._transforms: Transforms = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transforms": {}}  # a copy's weights are others

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int) -> Tensor:
        """As :meth:`MSPN.predict`."""
        with weights_in_use(self._transforms):
            frames = self._converted(frames, "B, T, C, H, W")
            return self._laid_out(frames).predict(frames, horizon).to(self._dtype)

    def init_state(self, batch_size: int, height: int, width: int) -> MSPNState:
        """As :meth:`MSPN.init_state`."""
        state = self._network.init_state(batch_size, height, width)
        network = self._laid_out(state.errors[0])
        return state if network is self._network else network.init_state(batch_size, height, width)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.step`."""
        with weights_in_use(self._transforms):
            seen = None if frame is None else self._converted(frame, "B, C, H, W")
            prediction, state = self._laid_out(state.errors[0]).step(seen, state)
        return prediction.to(self._dtype), state

    @torch.no_grad()
    def peek(self, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """As :meth:`MSPN.peek`."""
        with weights_in_use(self._transforms):
            prediction, state = self._laid_out(state.errors[0]).peek(state)
        return prediction.to(self._dtype), state

    def _laid_out(self, frames: Tensor) -> MSPN:
        """The network in the layout that is faster for frames of this size."""
        if self._in_planes is None or frames.dim() < 2 or not has_whole_rows(*frames.shape[-2:]):
            return self._network
        return self._in_planes

    def _converted(self, frames: Tensor, names: str) -> Tensor:
        if not isinstance(frames, Tensor) or frames.dtype != self._dtype:
            check_frames(frames, names, self.config.in_channels, self.config.multiple, self._weight)
        return frames.to(self._network._weight.dtype)


def _in_planes(network: MSPN) -> MSPN | None:
    """A copy for frames whose rows fill registers, where that is the faster layout for them."""
    if network._weight.dtype != torch.float32 or not is_mostly_narrow(network):
        return None
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def _is_fast(dtype: torch.dtype) -> bool:
    """Has the processor instructions for it?"""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return True
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported
