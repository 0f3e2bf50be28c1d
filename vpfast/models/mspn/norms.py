"""Batch norms of a trained network, worked into the convolutions before them."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def without_norms(layers: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of ``layers``: those that a batch norm follows as copies that do its work too."""
    assert isinstance(layers, nn.Sequential)
    found: list[nn.Conv2d] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            found.append(layer)
        elif isinstance(layer, nn.BatchNorm2d):
            found[-1] = fuse_conv_bn_eval(found[-1], layer)
    return found
