"""What lies between MSPN's convolutions, as few launches on a GPU: which the pass in vpfast/models/mspn alone calls.

For inference: no gradients. Elsewhere than on a GPU, and under ``vpfast.backend("native")`` or ``"reference"``, it is
plain PyTorch. The kernels are kernels/fused_maps.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vpfast.ops._backend import Backends, current_backend
from vpfast.ops._library import LIBRARY, refuse_vmap, register_fake, register_vmap, serve_by_triton

LIBRARY.define("leaky_sum__triton(Tensor(a!) x, Tensor bias, Tensor? y, float slope) -> ()")
LIBRARY.define("signed_errors_triton(Tensor prediction, Tensor frame) -> Tensor")
serve_by_triton("fused_maps", "leaky_sum_", "signed_errors")

backends = Backends("ops._fused_maps", native=(), triton=True, cuda_source=False)


def leaky_sum_(x: Tensor, bias: Tensor, y: Tensor | None = None, slope: float = 0.0) -> Tensor:
    """``x`` <- leaky(x + bias + y), and ``x`` back: (B, C, H, W) channels_last, ``bias`` (C,), ``y`` as ``x``.

    leaky(v) is v, or ``slope`` v where v < 0: 0 makes it ReLU. Half precision is summed in float32 by the kernel.
    """
    if not _by_triton(x):
        x += bias[:, None, None]
        if y is not None:
            x += y
        return F.leaky_relu_(x, slope) if slope else x.relu_()
    x = x.contiguous(memory_format=torch.channels_last)
    y = None if y is None else y.contiguous(memory_format=torch.channels_last)
    torch.ops.vpfast.leaky_sum__triton(x, bias.contiguous(), y, slope)
    return x


def signed_errors(prediction: Tensor, frame: Tensor) -> Tensor:
    """``prediction`` P and ``frame`` f (B, C, H, W), f of any strides -> relu(f - P) and after it, along dim 1,
    relu(P - f): (B, 2 C, H, W) channels_last. MSPN paper, Algorithm 1, lines 13-16."""
    if not _by_triton(prediction):
        errors = torch.cat((F.relu(frame - prediction), F.relu(prediction - frame)), dim=1)
        return errors.contiguous(memory_format=torch.channels_last)
    found: Tensor = torch.ops.vpfast.signed_errors_triton(
        prediction.contiguous(memory_format=torch.channels_last), frame
    )
    return found


def _by_triton(maps: Tensor) -> bool:
    return current_backend() in ("auto", "triton") and backends.select(maps.device) == "triton"


def _fake_errors(prediction: Tensor, frame: Tensor) -> Tensor:
    shape = (prediction.shape[0], 2 * prediction.shape[1], *prediction.shape[2:])
    return prediction.new_empty(shape).contiguous(memory_format=torch.channels_last)


register_fake("leaky_sum__triton", lambda *arguments: None)
register_fake("signed_errors_triton", _fake_errors)
refuse_vmap("leaky_sum__triton", "a batch of maps is one call: give it the whole batch")
register_vmap("signed_errors_triton", ("prediction", "frame"))
