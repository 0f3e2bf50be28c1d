"""Replace vector-quantize-pytorch's ResidualVQ: both are trained on the same vectors and compared.

    pip install vector-quantize-pytorch
    python examples/swap_vector_quantize_pytorch.py

Only the class changes. ``strict_tree=False`` is the quantizer that was there before. By default every codeword has its
own codebook in the next layer, so that the same number of comparisons chooses among far more sums of codewords.
"""

import sys

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from vpfast.nn import HierarchicalResidualVQ

SHARED = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, "kmeans_init": True, "threshold_ema_dead_code": 2}


def quantizers() -> dict[str, nn.Module]:
    return {
        "vector-quantize-pytorch": ResidualVQ(**SHARED),
        "vpfast, the same": HierarchicalResidualVQ(**SHARED, strict_tree=False),
        "vpfast, a tree": HierarchicalResidualVQ(**SHARED),
    }


def vectors(count: int, generator: torch.Generator) -> Tensor:
    """(1, count, 8), of eight clouds of different widths."""
    centres = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(8, (count,), generator=generator)
    spread = 0.05 * (1 + chosen)[:, None]
    return (centres[chosen] + spread * torch.randn(count, 8, generator=generator)).unsqueeze(0)


def error_after(quantizer: nn.Module, steps: int, count: int) -> float:
    """Mean squared error on held-out vectors. Both packages have the same calls and results."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        quantizer(vectors(count, generator))  # its losses are for the encoder, where there is one
    with torch.no_grad():
        x = vectors(count, generator)
        quantized, indices, _ = quantizer.eval()(x)
    assert torch.allclose(quantizer.get_output_from_indices(indices), quantized, atol=1e-5)
    return float((quantized - x).square().mean())


def main(steps: str = "50", count: str = "8192") -> None:
    torch.manual_seed(0)
    for name, quantizer in quantizers().items():
        print(f"{name:24} {error_after(quantizer, int(steps), int(count)):.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
