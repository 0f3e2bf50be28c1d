"""Statistics over the clips of all processes, so that several processes compute what one with all their clips would.

The parts replaced are those in which one frame of a batch reaches another: batch norm, and the standardisation at the
discriminator's entry. torch's own SyncBatchNorm serves GPUs alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from vpfast.models.mspn.discriminator import Standardise


def synced(network: nn.Module) -> nn.Module:
    """``network`` with every part that mixes the frames of a batch replaced by one that mixes those of all processes.

    Names and weights stay. All processes must give equally many frames.
    """
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            made = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
            made.load_state_dict(child.state_dict())
            setattr(network, name, made)
        elif isinstance(child, Standardise):
            setattr(network, name, SyncedStandardise())
        else:
            synced(child)
    return network


class SyncedStandardise(Standardise):
    """:class:`Standardise` over the maps of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() * dist.get_world_size()
        centred = x - _summed(x.sum()) / count
        variance = _summed(centred.square().sum()) / (count - 1)
        return self.scaled(centred, variance.sqrt())


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, while it is trained, takes mean and variance over the maps of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        wide = x.float()
        mean = _summed(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _summed(centred.square().sum(dim=(0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        made: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return made.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def _summed(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The sum over all processes of a tensor that each has one of. What is minimised is the sum of all their losses."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total
