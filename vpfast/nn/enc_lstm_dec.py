"""Encoder, ConvLSTM at the bottleneck, decoder: the frame that the MSPN paper compares with ("En-LSTM-De")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._common import State, check_maps, zero_state
from vpfast.nn.bottleneck import LEAK
from vpfast.nn.codec import Decoder, Encoder, Widen
from vpfast.ops import edlstm_gates


class EncLSTMDecCell(nn.Module):
    """The recurrent cell of the ablation in the paper's Table VI: the LSTM sees the encoded maps alone.

    Its state is (B, channels[-1], H/factor, W/factor) with factor = ``2 ** (len(channels) - 1)``, its output
    (B, out_channels, H, W).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        channels: widths of the encoder from full resolution down, at least two.
        batch_norm, input_kernel_size, widen, gate_order: as in :class:`~vpfast.nn.EDLSTMCell`.
        output_kernel_size: of the convolution between the LSTM and the decoder, odd.

    Raises:
        ValueError: fewer than two ``channels`` or an even kernel.
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
        if len(channels) < 2:
            raise ValueError(f"EncLSTMDecCell: channels needs at least two widths, got {tuple(channels)}")
        for name, size in (("input_kernel_size", input_kernel_size), ("output_kernel_size", output_kernel_size)):
            if size % 2 == 0:
                raise ValueError(f"EncLSTMDecCell: {name} must be odd, got {size}")
        self.in_channels = in_channels
        self.hidden_channels = hidden = channels[-1]
        self.gate_order = gate_order
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Encoder(in_channels, channels, input_kernel_size, batch_norm, widen)
        self.gates = nn.Conv2d(2 * hidden, 4 * hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, hidden, output_kernel_size, padding=output_kernel_size // 2)
        self.decoder = Decoder(channels, out_channels, batch_norm)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: ``x`` (B, in_channels, H, W) and the state of the step before -> ``output, (h, c)``.

        Without ``state`` the cell starts from zeros. Raises ValueError for another number of dimensions or channels,
        or a size that does not divide.
        """
        check_maps("EncLSTMDecCell", x, self.in_channels, self.factor)
        *skips, feature = self.encoder(x)
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        h, c = state or zero_state(feature, (x.shape[0], self.hidden_channels, *size))
        gates = F.leaky_relu(self.gates(torch.cat((feature, h), dim=1)), LEAK)
        h, c = edlstm_gates(gates, c, self.gate_order)
        return self.decoder(F.leaky_relu(self.out(h), LEAK), skips), (h, c)
