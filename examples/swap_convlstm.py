"""Replace the usual ConvLSTM cell by the one of vpfast, with the same weights.

python examples/swap_convlstm.py
"""

import torch
from torch import Tensor, nn

from vpfast.nn import ConvLSTMCell


class PlainConvLSTMCell(nn.Module):
    """One convolution, four gates in the order input, forget, output, candidate, five passes over memory."""

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels + hidden_channels, 4 * hidden_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.conv(torch.cat((x, h), dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def main() -> None:
    torch.manual_seed(0)
    plain = PlainConvLSTMCell(3, 16, 3)
    fused = ConvLSTMCell(3, 16, 3)  # gate_order="ifog"; any other order of an old checkpoint can be named
    fused.load_state_dict(plain.state_dict())

    frames = torch.randn(2, 5, 3, 32, 32)  # (B, T, C, H, W)
    old = (torch.zeros(2, 16, 32, 32), torch.zeros(2, 16, 32, 32))
    new = None  # zeros
    with torch.no_grad():
        for frame in frames.unbind(1):
            old = plain(frame, old)
            h, new = fused(frame, new)
    difference = float((h - old[0]).abs().max())
    assert difference < 1e-5, f"the two cells differ by {difference}"
    print(f"after {frames.shape[1]} frames the two differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
