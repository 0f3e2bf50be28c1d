"""LPIPS by its authors' package `lpips`, which is imported when it is asked for and not before.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

BACKBONE = "alexnet-owt-7be5be79.pth"
_ADDRESS = f"https://download.pytorch.org/models/{BACKBONE}"

SMALLEST = 31  # pixels a side: below it AlexNet's second pooling finds nothing to pool

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two (N, 3, H, W) on the scale [-1, 1] -> (N,)."""


class Perceptual:
    """LPIPS, version 0.1 with AlexNet, of each frame: 0 for equal frames.

    The weights of the backbone are read from torch.hub's folder, and downloaded into it if they are missing.

    Raises:
        ImportError: `lpips` or torchvision is not installed, or they do not go with this torch.
        FileNotFoundError: the backbone's weights are neither there nor to be downloaded.
    """

    def __init__(self) -> None:
        self._network = _network().eval().requires_grad_(False)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two (N, C, H, W), C 1 or 3, where [-1, 1] is the network's own scale -> (N,) float64.

        A grey frame is taken for one whose three channels are the same.

        Raises:
            ValueError: another number of channels, or frames too small for the network.
        """
        self._check(target)
        self._network.to(target.device)
        frames = [each.float().expand(-1, 3, -1, -1) for each in (prediction, target)]
        distance: Tensor = self._network(*frames)
        return distance.double().flatten()

    def _check(self, frames: Tensor) -> None:
        channels, height, width = frames.shape[1:]
        if channels not in (1, 3):
            raise ValueError(f"LPIPS is of frames with 1 or 3 channels, got {channels}")
        if min(height, width) < SMALLEST:
            raise ValueError(f"LPIPS needs frames of at least {SMALLEST}x{SMALLEST} pixels, got {height}x{width}")


def _network() -> nn.Module:
    with warnings.catch_warnings():
        # Of no use to whoever measures: how lpips calls torchvision, and what torchvision reads pictures with.
        warnings.filterwarnings("ignore", message=".*(pretrained|weights|image Python extension)", category=UserWarning)
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with RuntimeError
            raise ImportError(
                f"LPIPS needs the packages lpips and torchvision, which cannot be imported ({error}). First install "
                "the torchvision that goes with your torch, from where your torch came from, then pip install "
                "'vpfast[lpips]'; in the other order pip replaces torch"
            ) from error
        try:
            network: nn.Module = lpips.LPIPS(net="alex", verbose=False)
        except (OSError, RuntimeError) as error:
            path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
            raise FileNotFoundError(
                f"LPIPS needs the weights of its backbone AlexNet, which could not be read or downloaded ({error}). "
                f"Download {_ADDRESS} once, on any machine, and place it at {path}"
            ) from error
    return network
