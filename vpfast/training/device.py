"""Where a model runs."""

import sys
from functools import cache
from typing import Literal

import torch

from vpfast.ops._backend import BackendError
from vpfast.ops.codeword_search.register import backends as codeword_search
from vpfast.ops.edlstm_gates.register import backends as edlstm_gates
from vpfast.ops.masked_attention3d.register import backends as masked_attention3d

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
