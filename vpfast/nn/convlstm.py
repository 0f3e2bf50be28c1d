"""The convolutional LSTM cell (Shi et al. 2015, without peepholes) with fused gating."""

import torch
from torch import Tensor, nn

from vpfast.nn._common import State, check_maps, zero_state
from vpfast.ops import edlstm_gates


class ConvLSTMCell(nn.Module):
    """One convolution over input and hidden state, then the LSTM gating in one kernel.

    Parameters are ``conv.weight`` (4 hidden, in + hidden, kh, kw) and ``conv.bias``, the gates one after another in
    ``gate_order``. With the default order that is the layout of most published PyTorch ConvLSTM cells.

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of h and c.
        kernel_size: odd, one number or (kh, kw); the maps keep their size.
        bias: whether the convolution has one.
        gate_order: a permutation of ``"fiog"`` (forget, input, output, candidate).

    Raises:
        ValueError: an even kernel, whose output would not have the size of its input.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        *,
        gate_order: str = "ifog",
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"ConvLSTMCell: kernel_size must be odd so that maps keep their size, got {kernel_size}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.gate_order = gate_order
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels + hidden_channels, 4 * hidden_channels, kernel, padding=padding, bias=bias)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: ``x`` (B, in_channels, H, W) and the state of the step before -> ``h, (h, c)``.

        Without ``state`` the cell starts from zeros. h and c are (B, hidden_channels, H, W); c stays float32 beside
        half-precision maps. Raises ValueError for another number of dimensions or channels.
        """
        check_maps("ConvLSTMCell", x, self.in_channels)
        h, c = state or zero_state(x, (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3]))
        h, c = edlstm_gates(self.conv(torch.cat((x, h), dim=1)), c, self.gate_order)
        return h, (h, c)
