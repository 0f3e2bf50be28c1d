"""What the recurrent cells share: the state they start from and the checks of what they are given."""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
"""(h, c) of a recurrent cell."""


def zero_state(like: Tensor, shape: tuple[int, int, int, int]) -> State:
    """h and c of zeros, both of ``shape``, on the device and with the dtype and layout of ``like`` (4-D).

    The cell state is float32 beside half-precision maps: it is a sum over all steps.
    """
    cell_dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
    h, c = (
        torch.zeros(shape, dtype=dtype, device=like.device).contiguous(memory_format=memory_format(like))
        for dtype in (like.dtype, cell_dtype)
    )
    return h, c


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where ``x`` (4-D) is that and nothing else, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def check_maps(owner: str, x: Tensor, channels: int, multiple: int = 1) -> None:
    """Raise ValueError unless ``x`` is (B, channels, H, W) with H and W multiples of ``multiple``."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{owner} takes maps of shape (B, {channels}, H, W), got {tuple(x.shape)}")
    for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
        if size % multiple != 0:
            raise ValueError(
                f"{owner} halves its maps until they are 1/{multiple} as large: "
                f"{name} {size} is not a multiple of {multiple}"
            )
