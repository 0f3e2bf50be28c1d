"""The operators: functions with compiled kernels, each with a plain PyTorch reference in a folder of its own."""

from vpfast.ops import _plane_convolution as _plane_convolution  # these register operators that are not public
from vpfast.ops import _sample_codes as _sample_codes
from vpfast.ops import _tile_program as _tile_program
from vpfast.ops import _winograd_convolution as _winograd_convolution
from vpfast.ops._backend import backend, current_backend
from vpfast.ops.codeword_search import CodewordSearchTraining, codeword_search, codeword_search_train
from vpfast.ops.edlstm_gates import edlstm_gates
from vpfast.ops.masked_attention3d import Mask3d, masked_attention3d, masked_attention3d_decode

__all__ = [
    "CodewordSearchTraining",
    "Mask3d",
    "backend",
    "codeword_search",
    "codeword_search_train",
    "current_backend",
    "edlstm_gates",
    "masked_attention3d",
    "masked_attention3d_decode",
]
