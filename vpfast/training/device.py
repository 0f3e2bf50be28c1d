"""Where a model runs, and how its maps lie there."""

import sys
from functools import cache
from typing import Literal

import torch
from torch import nn

from vpfast.nn.convolution import is_faster_in_planes
from vpfast.ops._backend import BackendError
from vpfast.ops.codeword_search.register import backends as codeword_search
from vpfast.ops.edlstm_gates.register import backends as edlstm_gates
from vpfast.ops.masked_attention3d.register import backends as masked_attention3d
from vpfast.training.config import TrainConfig

Device = Literal["auto", "cpu"]

# The backends of every operator that a model calls.
OPERATORS = (edlstm_gates, codeword_search, masked_attention3d)


def pick_device(requested: Device = "auto") -> torch.device:
    """``auto`` takes the GPU where PyTorch sees one and every operator can be served on it, else the CPU.

    Why a GPU is left alone is said once a process, on stderr.

    Raises:
        BackendError: the backend that was chosen serves an operator on neither.
        ValueError: the environment's ``VPFAST_BACKEND`` is unknown.
    """
    if requested == "auto" and torch.cuda.is_available():
        try:
            return _serving("cuda")
        except BackendError as error:
            _say(f"vpfast: running on the CPU; on the GPU {' '.join(str(error).split())}")
    return _serving("cpu")


def _serving(device: str) -> torch.device:
    for operator in OPERATORS:
        operator.select(device)
    return torch.device(device)


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def lay_out(model: nn.Module, config: TrainConfig) -> None:
    """Lay the model's weights, and with them its maps, channels last where the run wants that and is faster so."""
    exact_on_cpu = config.precision == "fp32" and pick_device(config.device).type == "cpu"
    in_planes = exact_on_cpu and is_faster_in_planes(model, *config.data.frame_size)
    if config.channels_last and not in_planes:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
