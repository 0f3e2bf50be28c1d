"""Encoder, ConvLSTM at the bottleneck, decoder: the frame that the MSPN paper compares with ("En-LSTM-De")."""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._common import (
    State,
    check_choice,
    check_counts,
    check_gate_order,
    check_kernels,
    check_maps,
    check_widths,
    given_or_zeros,
)
from vpfast.nn.bottleneck import LEAK
from vpfast.nn.codec import Decoder, Encoder, Widen
from vpfast.nn.convolution import Conv2d
from vpfast.ops import edlstm_gates


class EncLSTMDecCell(nn.Module):
    """The recurrent cell of the ablation in the paper's Table VI: the LSTM runs on the encoded maps only.

    Its state is (B, channels[-1], H/factor, W/factor) with factor = ``2 ** (len(channels) - 1)``, its output
    (B, out_channels, H, W).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        channels: widths of the encoder from full resolution down, at least two.
        batch_norm, input_kernel_size, widen, gate_order: as in :class:`~vpfast.nn.EDLSTMCell`.
        output_kernel_size: of the convolution between the LSTM and the decoder, odd.

    Raises:
        ValueError: fewer than two ``channels``, an even kernel, or any other value that cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 128),
        *,
        batch_norm: bool = False,
        input_kernel_size: int = 5,
        widen: Widen = "before_pool",
        gate_order: str = "ifog",
        output_kernel_size: int = 3,
    ) -> None:
        super().__init__()
        check_counts("EncLSTMDecCell", in_channels=in_channels, out_channels=out_channels)
        check_widths("EncLSTMDecCell", channels)
        check_kernels("EncLSTMDecCell", input_kernel_size=input_kernel_size, output_kernel_size=output_kernel_size)
        check_choice("EncLSTMDecCell", "widen", widen, get_args(Widen))
        check_gate_order("EncLSTMDecCell", gate_order)
        self.in_channels = in_channels
        self.hidden_channels = hidden = channels[-1]
        self.gate_order = gate_order
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Encoder(in_channels, channels, input_kernel_size, batch_norm, widen)
        self.gates = Conv2d(2 * hidden, 4 * hidden, 3)
        self.out = Conv2d(hidden, hidden, output_kernel_size)
        self.decoder = Decoder(channels, out_channels, batch_norm)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: ``x`` (B, in_channels, H, W) and the state of the step before -> ``output, (h, c)``.

        Without ``state`` the cell starts from zeros. Raises ValueError for another shape or device of the input or
        the state, or a size that does not divide, TypeError for a type that does not go with the weights.
        """
        check_maps("EncLSTMDecCell", x, self.in_channels, self.encoder.stem.weight, self.factor)
        *skips, feature = self.encoder(x)
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        h, c = given_or_zeros("EncLSTMDecCell", state, feature, (x.shape[0], self.hidden_channels, *size))
        gates = F.leaky_relu(self.gates(torch.cat((feature, h), dim=1)), LEAK)
        h, c = edlstm_gates(gates, c, self.gate_order)
        return self.decoder(F.leaky_relu(self.out(h), LEAK), skips), (h, c)
