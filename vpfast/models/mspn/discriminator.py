"""The network that scores single frames in MSPN's adversarial training (paper, section III-B)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models._config import is_count
from vpfast.models._frames import check_type
from vpfast.models.mspn.released import convert_discriminator
from vpfast.nn.bottleneck import LEAK, Bottleneck


class Standardise(nn.Module):
    """All frames together to mean 0 and standard deviation 1: (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x - x.mean(), x.std())

    def scaled(self, centred: Tensor, deviation: Tensor) -> Tensor:
        # A frame of one colour has no deviation; the bound keeps its score finite and changes no other.
        return centred / deviation.clamp_min(1e-6)


class Discriminator(nn.Module):
    """Frames (N, C, H, W) or clips (B, T, C, H, W) -> one score a frame: the higher, the more real.

    The whole input is first standardised by its own mean and standard deviation, so a score depends on the frames it
    comes with. Then a 7x7 convolution, and for every further width a Bottleneck with batch norm and a 2x2 max pool,
    one convolution over all that is left, two linear layers.

    The defaults are those of the released code, for 128x160 (40,812,097 parameters). At 128x128 it was used with
    ``channels=(64, 64, 128, 256, 256, 512), size=(4, 4)`` (14,812,609 parameters).

    Args:
        channels: widths, from full resolution down.
        size: (h, w) of the maps after the last pool: H and W are ``2 ** (len(channels) - 1)`` times that.
        in_channels: channels of a frame.

    Raises:
        ValueError: an argument that cannot be; the message names it.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        size: tuple[int, int] = (4, 5),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_positive("channels", channels, "a list of positive integers", len(channels) > 0)
        _check_positive("size", size, "two positive integers (h, w)", len(size) == 2)
        _check_positive("in_channels", [in_channels], "a positive integer")
        self.in_channels = in_channels
        factor = 2 ** (len(channels) - 1)
        self.frame_size = (size[0] * factor, size[1] * factor)
        self.standardise = Standardise()
        self.first = nn.Conv2d(in_channels, channels[0], 7, padding=3)
        self.blocks = nn.ModuleList(Bottleneck(i, o, batch_norm=True) for i, o in pairwise(channels))
        self.last = nn.Conv2d(channels[-1], 1024, size)
        self.score = nn.Sequential(nn.Linear(1024, 256), nn.LeakyReLU(LEAK), nn.Linear(256, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) -> (N,), or (B, T, C, H, W) -> (B, T).

        Raises:
            TypeError: frames that are not floating point, or of another type than the weights.
            ValueError: frames of another size, number of channels or dimensions, or on another device.
        """
        check_type(frames, self.first.weight)
        expected = (self.in_channels, *self.frame_size)
        if frames.dim() not in (4, 5) or tuple(frames.shape[-3:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(
                f"Discriminator takes frames of shape (N, {sizes}) or (B, T, {sizes}), which its `size` sets; "
                f"got {tuple(frames.shape)}"
            )
        x = self.first(self.standardise(frames.flatten(0, -4)))
        for block in self.blocks:
            x = F.max_pool2d(block(x), 2)
        scores: Tensor = self.score(self.last(x).flatten(1))
        return scores.view(frames.shape[:-3])

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a discriminator of the authors' released code, all of it or nothing: see ``MSPN.load_released``."""
        self.load_state_dict(convert_discriminator(state_dict, self.state_dict()))


def _check_positive(name: str, given: Sequence[int], accepted: str, fine: bool = True) -> None:
    if not fine or not all(map(is_count, given)):
        raise ValueError(f"Discriminator: {name} must be {accepted}, got {given!r}")
