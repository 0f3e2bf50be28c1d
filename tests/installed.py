"""What an installed vpfast must do: ``python installed.py native|reference``, by the interpreter it is installed for.

Run it where no checkout is near. It takes torch and vpfast alone, fails where something is wrong, and prints one line
of JSON that says what it found.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import vpfast
from vpfast.models import MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig
from vpfast.models.mspn import pixel_loss
from vpfast.models.shrvqvae import hrvqvae_loss, prior_loss
from vpfast.ops import _native

GRID = (3, 4, 4)


def gating(gates: Tensor, cell: Tensor) -> Sequence[Tensor]:
    return vpfast.ops.edlstm_gates(gates, cell)


def search(z: Tensor, *codebooks: Tensor) -> Sequence[Tensor]:
    found = vpfast.ops.codeword_search_train(z, list(codebooks))
    return [found.quantized, found.codebook_losses, found.commitment_losses]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    return [vpfast.ops.masked_attention3d(q, k, v, GRID, vpfast.ops.Mask3d("raster"))]


def operators() -> dict[str, tuple[Callable[..., Sequence[Tensor]], Sequence[Tensor]]]:
    torch.manual_seed(0)
    return {
        "edlstm_gates": (gating, [torch.randn(2, 12, 5, 7), torch.randn(2, 3, 5, 7)]),
        "codeword_search": (search, [torch.randn(50, 6), torch.randn(3, 6), torch.randn(9, 6)]),
        "masked_attention3d": (attention, [torch.randn(2, 2, 48, 8) for _ in range(3)]),
    }


def there_and_back(work: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results, and the gradients of their sum."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    results = work(*leaves)
    gradients = torch.autograd.grad(sum(each.square().sum() for each in results if each.requires_grad), leaves)
    return [*(each.detach() for each in results), *gradients]


def check_operators(backend: str) -> None:
    for name, (work, inputs) in operators().items():
        with vpfast.backend("reference"):
            expected = there_and_back(work, inputs)
        with vpfast.backend(backend):
            found = there_and_back(work, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_models() -> None:
    """Each takes a step of training, predicts, and says frame by frame what it says of the clip."""
    torch.manual_seed(0)
    mspn = MSPN(MSPNConfig(in_channels=1, channels=(4, 6), levels=1, hidden_channels=4))
    small = {"in_channels": 1, "channels": (4, 6), "residual_channels": 3, "latent_channels": 3, "codebook_size": 3}
    prior = {"prior_channels": 6, "prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 1, "prior_head_dim": 4}
    codes = SHRVQVAE(SHRVQVAEConfig(**small, **prior, prior_ffn=6, prior_head=6, layers=2))
    clip = torch.rand(2, 4, 1, 8, 12)
    step(mspn, lambda: pixel_loss(mspn(clip), clip))
    step(codes.autoencoder, lambda: hrvqvae_loss(codes.autoencoder(clip), clip))
    step(codes.prior, lambda: prior_loss(*codes(clip, context=2)[:3], codes.config))
    for model in (mspn.eval(), codes.eval(), vpfast.optimize(mspn)):
        predicted = model.predict(clip, horizon=2)
        stream = vpfast.Stream(model)
        for time in range(clip.shape[1]):
            stream.push(clip[:, time])
        torch.testing.assert_close(stream.rollout(2), predicted)
        if predicted.shape != (2, 2, 1, 8, 12) or not predicted.isfinite().all():
            raise AssertionError(f"{type(model).__name__} predicts {tuple(predicted.shape)}")


def step(network: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
    """One of gradient descent, which has to change what the loss is."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    optimizer.step()
    if not bool(loss() != before):
        raise AssertionError(f"a step of training changed nothing of {type(network).__name__}")


def main() -> None:
    backend = sys.argv[1]
    check_operators(backend)
    check_models()
    package = Path(vpfast.__file__).parent
    print(
        json.dumps(
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "package": str(package),
                "extension": getattr(_native.extension, "__file__", None),
                "built": _native.build_record()["built"],
                "writable": os.access(package, os.W_OK),
            }
        )
    )


if __name__ == "__main__":
    main()
