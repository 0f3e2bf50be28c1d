"""The choices that make one MSPN, and the named sets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vpfast.models._config import ModelConfig, is_count
from vpfast.nn.codec import Widen

Recurrence = Literal["edlstm", "enc_lstm_dec"]
DownSampling = Literal["nearest", "average"]


@dataclass(frozen=True)
class MSPNConfig(ModelConfig):
    """What an MSPN is built from. The defaults are the preset ``released-default``.

    Attributes:
        in_channels: channels of a frame, 3 (RGB) or 1 (grey).
        channels: widths c0, .., cn of the finest level's encoder. Level l uses the first n + 1 - l of them, so every
            level's bottleneck is 2^n times smaller than the frame, and H and W are multiples of 2^n.
        levels: number of levels, 1 to n. Level l predicts the frame at 1/2^l of its size.
        hidden_channels: of the EDLSTM's h and c, the same at every level. Not used by ``enc_lstm_dec``.
        enc_info: hand each level's bottleneck feature down to the next finer level (Eq. 4). Not used by
            ``enc_lstm_dec``.
        batch_norm: BatchNorm2d inside the Bottlenecks.
        recurrence: ``"edlstm"``, or ``"enc_lstm_dec"``, the ablation with its LSTM at the bottleneck.
        gate_order: order of the gates in the layer that computes them, a permutation of ``"fiog"``.
        feed_frame: give level 0 the frame of the step before as a further input.
        down_sampling: of frames and errors, ``"nearest"`` (every 2nd pixel) or ``"average"`` (mean of 2x2).
        input_kernel_size: of each level's first convolution, odd.
        widen: whether an encoder stage widens its maps before or after its max pool.
        lstm_output_kernel_size: of the convolution after the LSTM of ``enc_lstm_dec``, odd.

    Raises:
        ValueError: a field that cannot be; the message names it and its value.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    levels: int = 4
    hidden_channels: int = 64
    enc_info: bool = True
    batch_norm: bool = False
    recurrence: Recurrence = "edlstm"
    gate_order: str = "ifog"
    feed_frame: bool = False
    down_sampling: DownSampling = "nearest"
    input_kernel_size: int = 5
    widen: Widen = "before_pool"
    lstm_output_kernel_size: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.channels, (list, tuple)):
            self._refuse("channels", "must be a list of widths")
        object.__setattr__(self, "channels", tuple(self.channels))
        if len(self.channels) < 2 or not all(is_count(width) for width in self.channels):
            self._refuse("channels", "must be at least two positive integers")
        self._check_counts("in_channels", "levels", "hidden_channels", "input_kernel_size", "lstm_output_kernel_size")
        if self.levels >= len(self.channels):
            self._refuse(
                "levels", f"must be at most {len(self.channels) - 1}, one less than the widths in {self.channels}"
            )
        for name in ("input_kernel_size", "lstm_output_kernel_size"):
            if getattr(self, name) % 2 == 0:
                self._refuse(name, "must be odd")
        self._check_flags("enc_info", "batch_norm", "feed_frame")
        self._check_choices(_CHOICES)
        if not isinstance(self.gate_order, str) or sorted(self.gate_order) != sorted("fiog"):
            self._refuse("gate_order", "must be a permutation of 'fiog'")

    @classmethod
    def presets(cls) -> Mapping[str, MSPNConfig]:
        """``released-default``, ``released-mnist``: the authors' code. ``paper``: the variant that has the parameter
        counts of the paper's Table VI, ``paper-enc-lstm-dec`` that table's En-LSTM-De. ``compact``: small enough to
        be trained on two CPU cores in minutes. Parameter counts stand in README.md beside this file.
        """
        return PRESETS

    @property
    def multiple(self) -> int:
        """H and W of every frame are multiples of this number, 2^n."""
        return int(2 ** (len(self.channels) - 1))

    def level_channels(self, level: int) -> tuple[int, ...]:
        """Encoder widths of one level, finest first."""
        return self.channels[: len(self.channels) - level]


_CHOICES: dict[str, tuple[str, ...]] = {
    "recurrence": get_args(Recurrence),
    "down_sampling": get_args(DownSampling),
    "widen": get_args(Widen),
}

_RELEASED_MNIST = MSPNConfig(in_channels=1, channels=(64, 128, 256, 512), levels=3, hidden_channels=32)

PRESETS: dict[str, MSPNConfig] = {
    "released-default": MSPNConfig(),
    "released-mnist": _RELEASED_MNIST,
    "paper": dataclasses.replace(_RELEASED_MNIST, gate_order="fiog", input_kernel_size=3, widen="after_pool"),
    "paper-enc-lstm-dec": dataclasses.replace(
        _RELEASED_MNIST, gate_order="fiog", recurrence="enc_lstm_dec", lstm_output_kernel_size=1
    ),
    "compact": MSPNConfig(in_channels=1, channels=(8, 16, 32), levels=2, hidden_channels=8, widen="after_pool"),
}
