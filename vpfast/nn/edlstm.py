"""The encoder-decoder LSTM of MSPN (paper, section III, Eq. 1-4): a recurrent cell whose gates come from a codec."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from vpfast.nn._common import (
    State,
    check_choice,
    check_counts,
    check_gate_order,
    check_joined,
    check_kernels,
    check_maps,
    check_widths,
    given_or_zeros,
    laid_out_as,
)
from vpfast.nn.bottleneck import activated
from vpfast.nn.codec import Decoder, Encoder, Widen
from vpfast.nn.convolution import Conv2d
from vpfast.ops import edlstm_gates


class EDLSTMCell(nn.Module):
    """An LSTM cell on maps that computes its gates with an encoder-decoder network, skips included.

    It can replace a ConvLSTM cell; its receptive field grows with the depth of the encoder. The LSTM gating is one
    kernel.

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of h and c.
        channels: widths of the encoder from full resolution down, at least two. Each further one halves the maps, so H
            and W must be multiples of ``2 ** (len(channels) - 1)``.
        shared_channels: channels of a coarser cell's bottleneck feature that is merged into this one's (Eq. 4); 0
            builds no merging layer.
        batch_norm: a BatchNorm2d after every convolution inside the Bottlenecks.
        input_kernel_size: of the first convolution, odd.
        widen: whether an encoder stage widens its maps before or after its max pool.
        gate_order: a permutation of ``"fiog"``, the order of the gates in the decoder's output.

    Raises:
        ValueError: fewer than two ``channels``, an even ``input_kernel_size``, or any other value that cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        channels: Sequence[int] = (32, 64, 128),
        *,
        shared_channels: int = 0,
        batch_norm: bool = False,
        input_kernel_size: int = 5,
        widen: Widen = "before_pool",
        gate_order: str = "ifog",
    ) -> None:
        super().__init__()
        check_counts("EDLSTMCell", in_channels=in_channels, hidden_channels=hidden_channels)
        check_counts("EDLSTMCell", lowest=0, shared_channels=shared_channels)
        check_widths("EDLSTMCell", channels)
        check_kernels("EDLSTMCell", input_kernel_size=input_kernel_size)
        check_choice("EDLSTMCell", "widen", widen, get_args(Widen))
        check_gate_order("EDLSTMCell", gate_order)
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.shared_channels = shared_channels
        self.gate_order = gate_order
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Encoder(in_channels + hidden_channels, channels, input_kernel_size, batch_norm, widen)
        self.share: Conv2d | None = None
        if shared_channels:
            self.share = Conv2d(channels[-1] + shared_channels, channels[-1], 3, bias=False)
        self.decoder = Decoder(channels, 4 * hidden_channels, batch_norm)

    def forward(self, x: Tensor, state: State | None = None, shared: Tensor | None = None) -> tuple[Tensor, State]:
        """One step: ``x`` (B, in_channels, H, W) and the state of the step before -> ``h, (h, c)``.

        Without ``state`` the cell starts from zeros. h and c are (B, hidden_channels, H, W); c stays float32 beside
        half-precision maps. ``shared`` (B, shared_channels, H/factor, W/factor) is a coarser cell's feature.

        Raises:
            ValueError: another shape or device of the input, the state or ``shared``, a size that does not divide, or
                ``shared`` given to a cell built without ``shared_channels``, or left out of one built with them.
            TypeError: a type that does not go with the weights.
        """
        state, _ = self.step(x, state, shared)
        return state[0], state

    def step(self, x: Tensor, state: State | None = None, shared: Tensor | None = None) -> tuple[State, Tensor]:
        """As ``forward``, but -> ``(h, c), feature`` with the bottleneck feature that a finer cell can share.

        The feature is (B, channels[-1], H/factor, W/factor), after the merge with ``shared``.
        """
        check_maps("EDLSTMCell", x, self.in_channels, self.encoder.stem.weight, self.factor)
        h, c = given_or_zeros("EDLSTMCell", state, x, (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3]))
        *skips, feature = self.encoder(torch.cat((laid_out_as(self.encoder.stem.weight, x), h), dim=1))
        feature = self._merge(feature, shared)  # Eq. 4
        gates = self.decoder(feature, skips)  # Eq. 1
        return edlstm_gates(gates, c, self.gate_order), feature  # Eq. 2-3

    def _merge(self, feature: Tensor, shared: Tensor | None) -> Tensor:
        if self.share is None:
            if shared is not None:
                raise ValueError("EDLSTMCell: got a shared feature, but the cell was built with shared_channels=0")
            return feature
        if shared is None:
            raise ValueError("EDLSTMCell: built with shared_channels, so every step needs the shared feature")
        expected = (feature.shape[0], self.shared_channels, feature.shape[2], feature.shape[3])
        check_joined("EDLSTMCell", "shared", shared, feature, expected)
        return activated(self.share, torch.cat((feature, shared), dim=1))
