"""The multi-scale predictive network (paper, section III-A and Algorithm 1)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vpfast.models._frames import check_count, check_frames, check_size
from vpfast.models._hub import Pretrained
from vpfast.models.mspn.config import DownSampling, MSPNConfig
from vpfast.models.mspn.released import convert_network
from vpfast.models.storage import storable
from vpfast.nn import EDLSTMCell, EncLSTMDecCell
from vpfast.nn._common import State, check_choice, memory_format, zero_state
from vpfast.nn.bottleneck import LEAK
from vpfast.nn.codec import upsample
from vpfast.nn.convolution import Conv2d, Transforms, weights_in_use
from vpfast.ops._backend import Name, backend, current_backend

Feedback = Literal["attached", "detached"]


class MSPNOutput(NamedTuple):
    """What a whole clip gives.

    ``predictions``: one tensor a level, finest first, (B, T + horizon, C, H / 2^l, W / 2^l). Entry t is the prediction
    of frame t, made before that frame was seen; the first one is made from nothing. Values are not clamped.
    ``down_sampling``: how the frames were made that the coarser levels predict, for the loss.
    """

    predictions: tuple[Tensor, ...]
    down_sampling: DownSampling


class Ahead(NamedTuple):
    """The prediction of the next frame at every level, and the recurrent states that it leaves behind."""

    predictions: tuple[Tensor, ...]
    cells: tuple[State, ...]


class MSPNState(NamedTuple):
    """All that an MSPN remembers between two frames. Treat it as a whole; no method changes it in place."""

    cells: tuple[State, ...]
    errors: tuple[Tensor, ...]
    frame: Tensor | None
    ahead: Ahead | None = None


def shrink(maps: Tensor, factor: int, mode: DownSampling) -> Tensor:
    """(B, C, H, W) -> (B, C, H / factor, W / factor): every factor-th pixel, or the mean of each square."""
    if factor == 1:
        return maps
    if mode == "nearest":
        return maps[..., ::factor, ::factor]
    return F.avg_pool2d(maps, factor)


@storable("mspn", MSPNConfig)
class MSPN(nn.Module, Pretrained):
    """Predicts the next frame at several scales, coarse to fine, from its own prediction errors.

    In each step the levels run from the coarsest to the finest. The inputs of a level are its own last error, the last
    error of the next finer level and the prediction of the next coarser one. Then the frame is compared with the
    predictions, which gives the errors. After the last real frame, the finest prediction is used as the frame.

    Frames are floating point in [0, 1] and of the type of the weights, H and W multiples of ``config.multiple``.
    Under autocast and in half precision the cell states stay float32. A model in channels_last keeps that layout. With
    ``batch_norm`` call ``eval()`` before predicting, as for any network.

    Args:
        config: its shape and variant, such as ``MSPNConfig.preset("released-mnist")``; a TypeError for anything else.

    Paper: Ling et al., "Predictive Coding Based Multiscale Network with Encoder-Decoder LSTM for Video Prediction".
    """

    def __init__(self, config: MSPNConfig) -> None:
        super().__init__()
        self.config = config = MSPNConfig.checked(config)
        level = _EDLSTMLevel if config.recurrence == "edlstm" else _EncLSTMDecLevel
        self.levels = nn.ModuleList(level(config, index) for index in range(config.levels))

    def forward(
        self,
        frames: Tensor,
        horizon: int = 0,
        feedback: Feedback = "attached",
        seen: Sequence[bool] | None = None,
        recompute: bool = False,
    ) -> MSPNOutput:
        """Run over a clip and ``horizon`` frames beyond it.

        Args:
            frames: (B, T, C, H, W), T at least 1.
            horizon: how many frames to predict after the last real one, 0 or more.
            feedback: whether gradients flow through predictions that take the place of frames.
            seen: for each of the T frames whether it is looked at; where not, the prediction takes its place already.
                None: all of them are.
            recompute: keep for the backward pass only what one step hands to the next, and compute each step again
                there: less memory, more time, the same gradients. Nothing changes where no gradient is needed.

        Returns:
            the predictions of all T + horizon steps at every level.

        Raises:
            TypeError: frames that are not floating point, or of another type than the weights.
            ValueError: another shape, a size that does not divide, values that are not finite or far outside [0, 1]
                (below -0.5 or above 1.5); the message holds the number. Values are looked at once a clip, and not
                while compiling, exporting or capturing a CUDA graph. Or ``seen`` that does not hold T values.
        """
        check_frames(frames, "B, T, C, H, W", self.config.in_channels, self.config.multiple, self._weight)
        horizon = check_count("horizon", horizon)
        check_choice("MSPN", "feedback", feedback, get_args(Feedback))
        batch_size, length, _, height, width = frames.shape
        if length == 0:
            raise ValueError("frames hold no time step (T = 0); give at least one frame")
        if seen is not None and len(seen) != length:
            raise ValueError(f"seen must hold one value for each of the {length} frames, got {len(seen)}")
        state = self._zero_state(batch_size, height, width)
        steps: list[tuple[Tensor, ...]] = []
        with weights_in_use() as transforms:
            for time in range(length + horizon):
                looks = time < length and (seen is None or seen[time])
                frame = frames[:, time] if looks else None
                if recompute and torch.is_grad_enabled():
                    predictions, state = self._step_again(frame, state, feedback, transforms)
                else:
                    predictions, state = self._step(frame, state, feedback)
                steps.append(predictions)
        return MSPNOutput(tuple(_stack(maps) for maps in zip(*steps, strict=True)), self.config.down_sampling)

    @torch.no_grad()
    def predict(self, frames: Tensor, horizon: int) -> Tensor:
        """The next frames, without gradients: (B, T, C, H, W) -> (B, horizon, C, H, W). Errors as in ``forward``."""
        finest: Tensor = self(frames, horizon).predictions[0]
        return finest[:, frames.shape[1] :]

    def init_state(self, batch_size: int, height: int, width: int) -> MSPNState:
        """The state before the first frame: zeros, on the device and in the type and layout of the weights.

        Raises:
            TypeError: a batch size, height or width that is no integer.
            ValueError: a negative batch size, or a height or width that does not divide.
        """
        batch_size = check_count("batch_size", batch_size)
        height, width = check_count("height", height), check_count("width", width)
        check_size(height, width, self.config.multiple)
        return self._zero_state(batch_size, height, width)

    def step(self, frame: Tensor | None, state: MSPNState, feedback: Feedback = "attached") -> tuple[Tensor, MSPNState]:
        """Predict the next frame, then look at it: ``frame`` (B, C, H, W) -> ``prediction, state``.

        The prediction (B, C, H, W) is made before ``frame`` is looked at; with None it takes the frame's place. Frame
        by frame this gives exactly what ``forward`` gives. Errors as in ``forward``.
        """
        check_choice("MSPN", "feedback", feedback, get_args(Feedback))
        if frame is not None:
            check_frames(frame, "B, C, H, W", self.config.in_channels, self.config.multiple, self._weight)
            expected = (state.errors[0].shape[0], self.config.in_channels, *state.errors[0].shape[2:])
            if tuple(frame.shape) != expected:
                raise ValueError(f"the state was made for frames of shape {expected}, got {tuple(frame.shape)}")
            if self.config.feed_frame:
                frame = frame.clone()  # the state keeps it, and the caller may write into theirs
        predictions, state = self._step(frame, state, feedback)
        return predictions[0].clone(), state  # likewise, as the state may keep it

    def peek(self, state: MSPNState) -> tuple[Tensor, MSPNState]:
        """The prediction of the next frame without moving on: -> ``prediction, state``.

        The state returned is at the same point in time and holds the prediction, so that the ``step`` that follows does
        not compute it again.
        """
        ahead = state.ahead or self._look_ahead(state)
        return ahead.predictions[0].clone(), state._replace(ahead=ahead)  # the caller's, to change as they like

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the MSPN authors' released code, all of it or nothing.

        Keys may carry the prefix ``module.`` of DataParallel. Weights that the released code registers and never uses
        are left out. Gates are brought from their order, ``"ifog"``, into ``config.gate_order``.

        Raises:
            TypeError: not a mapping of names to tensors.
            ValueError: a tensor that is missing, not known, or of another shape; the message names it and both shapes.
        """
        self.load_state_dict(convert_network(state_dict, self.state_dict(), self.config))

    @property
    def _weight(self) -> Tensor:
        """A convolution's weight: every activation takes its type, device and layout from it."""
        weight: Tensor = self.levels[0].cell.encoder.stem.weight  # type: ignore[union-attr, assignment]
        return weight

    def _zero_state(self, batch_size: int, height: int, width: int) -> MSPNState:
        weight, config = self._weight, self.config
        layout = memory_format(weight)

        def zeros(channels: int, level: int) -> Tensor:
            shape = (batch_size, channels, height >> level, width >> level)
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device).contiguous(memory_format=layout)

        cells = []
        for index, level in enumerate(self.levels):
            factor = config.multiple if config.recurrence == "enc_lstm_dec" else 2**index
            hidden: int = level.cell.hidden_channels  # type: ignore[union-attr, assignment]
            cells.append(zero_state(weight, (batch_size, hidden, height // factor, width // factor)))
        errors = tuple(zeros(2 * config.in_channels, level) for level in range(config.levels))
        return MSPNState(tuple(cells), errors, zeros(config.in_channels, 0) if config.feed_frame else None)

    def _step(self, frame: Tensor | None, state: MSPNState, feedback: Feedback) -> tuple[tuple[Tensor, ...], MSPNState]:
        ahead = state.ahead or self._look_ahead(state)
        if frame is None:
            frame = ahead.predictions[0] if feedback == "attached" else ahead.predictions[0].detach()
        errors = self._compare(ahead.predictions, frame)
        return ahead.predictions, MSPNState(ahead.cells, errors, frame if self.config.feed_frame else None)

    def _step_again(
        self, frame: Tensor | None, state: MSPNState, feedback: Feedback, transforms: Transforms
    ) -> tuple[tuple[Tensor, ...], MSPNState]:
        """:meth:`_step`, whose activations are not kept but computed again in the backward pass."""
        chosen = current_backend()
        contexts: dict[str, Any] = {"context_fn": lambda: (nullcontext(), _as_before(self, transforms, chosen))}
        made: tuple[tuple[Tensor, ...], MSPNState] = checkpoint(
            self._step,
            frame,
            state,
            feedback,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a step is drawn
            **({} if torch.compiler.is_compiling() else contexts),  # the compiler knows none, and counts a batch once
        )
        return made

    def _look_ahead(self, state: MSPNState) -> Ahead:
        """Top-down pass (Algorithm 1, lines 4-12)."""
        top = self.config.levels - 1
        predictions: list[Tensor] = []
        cells: list[State] = []
        feature: Tensor | None = None
        for index in range(top, -1, -1):
            inputs = [state.errors[index]]
            if index > 0:
                inputs.append(shrink(state.errors[index - 1], 2, self.config.down_sampling))
            if index < top:
                inputs.append(upsample(predictions[-1]))
            if index == 0 and state.frame is not None:
                inputs.append(state.frame)
            prediction, cell, feature = self.levels[index](torch.cat(inputs, dim=1), state.cells[index], feature)
            predictions.append(prediction)
            cells.append(cell)
        return Ahead(tuple(reversed(predictions)), tuple(reversed(cells)))

    def _compare(self, predictions: tuple[Tensor, ...], frame: Tensor) -> tuple[Tensor, ...]:
        """Bottom-up pass (Algorithm 1, lines 13-16): positive and negative errors of every level."""
        layout = memory_format(self._weight)
        errors = []
        for level, prediction in enumerate(predictions):
            target = shrink(frame, 2**level, self.config.down_sampling)
            error = torch.cat((F.relu(target - prediction), F.relu(prediction - target)), dim=1)
            errors.append(error.contiguous(memory_format=layout))
        return tuple(errors)


def _input_channels(config: MSPNConfig, level: int) -> int:
    """Own error, the error of the level below, the prediction of the level above, the frame: as far as they exist."""
    own, below = 2, 2 * (level > 0)
    above, frame = int(level < config.levels - 1), int(level == 0 and config.feed_frame)
    return (own + below + above + frame) * config.in_channels


class _EDLSTMLevel(nn.Module):
    """One level: EDLSTM, then the head that makes a frame of h."""

    def __init__(self, config: MSPNConfig, level: int) -> None:
        super().__init__()
        channels = config.level_channels(level)
        shares = config.enc_info and level < config.levels - 1
        self.enc_info = config.enc_info
        self.cell = EDLSTMCell(
            _input_channels(config, level),
            config.hidden_channels,
            channels,
            shared_channels=config.level_channels(level + 1)[-1] if shares else 0,
            batch_norm=config.batch_norm,
            input_kernel_size=config.input_kernel_size,
            widen=config.widen,
            gate_order=config.gate_order,
        )
        self.head = Conv2d(config.hidden_channels, config.in_channels, 5)

    def forward(self, x: Tensor, state: State, shared: Tensor | None) -> tuple[Tensor, State, Tensor | None]:
        state, feature = self.cell.step(x, state, shared)
        return F.leaky_relu(self.head(state[0]), LEAK), state, feature if self.enc_info else None


class _EncLSTMDecLevel(nn.Module):
    """One level of the ablation: the decoder's output is the frame, and nothing is handed down."""

    def __init__(self, config: MSPNConfig, level: int) -> None:
        super().__init__()
        self.cell = EncLSTMDecCell(
            _input_channels(config, level),
            config.in_channels,
            config.level_channels(level),
            batch_norm=config.batch_norm,
            input_kernel_size=config.input_kernel_size,
            widen=config.widen,
            gate_order=config.gate_order,
            output_kernel_size=config.lstm_output_kernel_size,
        )

    def forward(self, x: Tensor, state: State, shared: Tensor | None) -> tuple[Tensor, State, Tensor | None]:
        prediction, state = self.cell(x, state)
        return prediction, state, None


@contextmanager
def _as_before(network: nn.Module, transforms: Transforms, chosen: Name) -> Iterator[None]:
    """For a second time: batch norms in training mode normalize as ever, but do not count this batch into their running
    statistics, weights are transformed once for all steps, and the backend is the one that was chosen."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [(module.momentum, module.num_batches_tracked.clone()) for module in norms]  # type: ignore[union-attr]
    for module in norms:
        module.momentum = 0.0
    try:
        with weights_in_use(transforms), nullcontext() if chosen == current_backend() else backend(chosen):
            yield
    finally:
        for module, (momentum, batches) in zip(norms, kept, strict=True):
            module.momentum = momentum
            module.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def _stack(maps: tuple[Tensor, ...]) -> Tensor:
    """T maps (B, C, H, W) -> (B, T, C, H, W), each time step in the layout of the maps."""
    if memory_format(maps[-1]) is torch.channels_last:
        return torch.stack([x.movedim(1, -1) for x in maps], dim=1).movedim(-1, 2)
    return torch.stack(maps, dim=1)
