"""The convolutional LSTM cell (Shi et al. 2015, without peepholes) with fused gating."""

import torch
from torch import Tensor, nn

from vpfast.nn._common import State, check_counts, check_gate_order, check_kernels, check_maps, given_or_zeros
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
        ValueError: channels below 1, a kernel that is not odd, whose output would not have the size of its input, or
            a ``gate_order`` that is none.
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
        check_counts("ConvLSTMCell", in_channels=in_channels, hidden_channels=hidden_channels)
        check_gate_order("ConvLSTMCell", gate_order)
        kernel = _pair(kernel_size)
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.gate_order = gate_order
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels + hidden_channels, 4 * hidden_channels, kernel, padding=padding, bias=bias)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step: ``x`` (B, in_channels, H, W) and the state of the step before -> ``h, (h, c)``.

        Without ``state`` the cell starts from zeros. h and c are (B, hidden_channels, H, W); c stays float32 beside
        half-precision maps. Raises ValueError for another shape or device of the
        input or the state, TypeError for a type that does not go with the weights.
        """
        check_maps("ConvLSTMCell", x, self.in_channels, self.conv.weight)
        h, c = given_or_zeros("ConvLSTMCell", state, x, (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3]))
        h, c = edlstm_gates(self.conv(torch.cat((x, h), dim=1)), c, self.gate_order)
        return h, (h, c)


def _pair(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(sizes) != 2:
        raise ValueError(f"ConvLSTMCell: kernel_size must be one number or (kh, kw), got {kernel_size!r}")
    for size in sizes:
        check_kernels("ConvLSTMCell", kernel_size=size)
    return sizes
