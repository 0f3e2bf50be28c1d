"""Vectors, codebooks and the float64 oracle for the tests of codeword_search."""

import pytest
import torch

from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.register import backends

native = pytest.mark.skipif("cpu" not in backends.native, reason="needs the compiled kernel of codeword_search")

# Type of the vectors, of the codebooks.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# Vectors N, dim D, size M, layers n, strict_tree: the paper's, sizes with remainders, plain VQ, deep and wide ones.
CASES = [
    (300, 8, 8, 3, True),
    (257, 8, 2, 9, True),
    (100, 4, 4, 3, True),
    (77, 5, 3, 2, True),
    (19, 1, 2, 16, True),
    (300, 8, 512, 1, False),
    (130, 64, 100, 2, False),
    (61, 3, 5, 16, False),
    (33, 512, 17, 1, True),
    (1, 7, 6, 2, True),
]


def rows(size, layers, strict_tree):
    return [size ** (layer + 1) if strict_tree else size for layer in range(layers)]


def inputs(vectors, dim, size, layers, strict_tree=True, dtype=torch.float32, codebook_dtype=None, seed=0):
    """Normal vectors, and codebooks whose codewords halve from layer to layer, as residuals do."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(vectors, dim, generator=generator, dtype=torch.float64).to(dtype)
    tables = [
        torch.randn(count, dim, generator=generator, dtype=torch.float64) * 0.5**layer
        for layer, count in enumerate(rows(size, layers, strict_tree))
    ]
    return z, [table.to(codebook_dtype or dtype) for table in tables]


def exact(z, codebooks):
    return z.double(), [codebook.double() for codebook in codebooks]


def assert_codes_of_a_float64_search(indices, z, codebooks, strict_tree):
    """Equal, but where two distances differ by less than a millionth: looked at in the layer where codes first part."""
    z, codebooks = exact(z, codebooks)
    wanted = reference.codeword_search(z, codebooks, strict_tree)[1]
    assert (indices.shape, indices.dtype) == (wanted.shape, torch.int64)
    M = len(codebooks[0])
    assert ((indices >= 0) & (indices < M)).all()
    apart = (indices != wanted).any(1).nonzero().flatten()
    if not len(apart):
        return
    z, found, wanted = z[apart], indices[apart], wanted[apart]
    xi = torch.stack(reference.residuals(z, wanted, codebooks, strict_tree))
    layer = (found != wanted).int().argmax(1)
    for v, i in enumerate(layer.tolist()):
        parent = reference.chosen_rows(wanted[v : v + 1], codebooks, strict_tree)[i].item() // M
        choice = codebooks[i].unflatten(0, (-1, M))[parent if strict_tree else 0]
        distance = (xi[i, v] - choice).square().sum(1)
        chosen, best = distance[found[v, i]], distance[wanted[v, i]]
        assert chosen - best < 1e-6 * best, f"vector {apart[v]}, layer {i + 1}: {chosen:.9g} is not {best:.9g}"


def tied_but_for_rounding(vectors, dim, size, strict_tree, dtype=torch.float32):
    """Vectors that all codewords of layer 2 are equally far from, but for the order in which squares are added up and
    rounded: the codewords hold the same numbers in different orders, and a residual one number `dim` times."""
    generator = torch.Generator().manual_seed(dim)
    steps = torch.arange(size)[:, None] * 8.0
    z = steps[torch.randint(size, (vectors,), generator=generator)] + torch.rand(vectors, 1, generator=generator)
    numbers = torch.randn(dim, generator=generator)
    orders = [torch.randperm(dim, generator=generator) for _ in range(size**2 if strict_tree else size)]
    codebooks = [steps.expand(size, dim), numbers[torch.stack(orders)]]
    return z.expand(vectors, dim).to(dtype), [codebook.to(dtype) for codebook in codebooks]


def codes_term_by_term(z, codebooks, strict_tree):
    """The codes (N, n) of a search in float64 that adds up one component after another, rounding every product and sum;
    of equal distances the first."""
    z, codebooks = exact(z, codebooks)
    M, codes, residual, parent = len(codebooks[0]), [], z, torch.zeros(len(z), dtype=torch.int64)
    for codebook in codebooks:
        choice = codebook.unflatten(0, (-1, M))[parent if strict_tree else torch.zeros_like(parent)]
        distance = torch.zeros(len(z), M, dtype=torch.float64)
        for d in range(z.shape[1]):
            square = (residual[:, None, d] - choice[:, :, d]).square()
            distance = distance + square
        code = distance.argmin(1)
        codes.append(code)
        residual = residual - choice[torch.arange(len(z)), code]
        parent = parent * M + code
    return torch.stack(codes, 1)


def relative_error(found, truth):
    """Of lists of tensors, taken together: a few numbers alone are too few to compare two errors by."""
    off = sum((f.double() - t).square().sum() for f, t in zip(found, truth, strict=True))
    return (off / sum(t.square().sum() for t in truth)).sqrt().item()


def assert_error_at_most_twice(found, same_precision, truth, dtype):
    """Against ``truth``, in float64, beside plain PyTorch in the same precision, with arithmetic in ``dtype``. Where
    that is float64 nothing more exact stands beside the two: a sum may differ by its order."""
    terms = 4 if dtype == torch.float32 else 64
    limit = max(2 * relative_error(same_precision, truth), terms * torch.finfo(dtype).eps)
    assert relative_error(found, truth) <= limit


def strided_cases():
    """Name -> z of every kind of stride, with D = 6."""
    z, _ = inputs(20, 6, 2, 1)
    return {
        "contiguous": z,
        "transposed": torch.randn(6, 20).t(),
        "channels first": torch.randn(2, 6, 5, 4)[0].flatten(1).t(),
        "sliced rows": torch.randn(40, 6)[::2],
        "sliced columns": torch.randn(20, 12)[:, ::2],
        "sliced columns of a row": torch.randn(20, 9)[:, 2:8],
        "both": torch.randn(12, 40).t()[::2, 1::2],
        "one vector": z[:1].expand(20, 6),
        "one number": z[:, :1].expand(20, 6),
        "overlapping": torch.randn(25).as_strided((20, 6), (1, 1)),
        "negated": torch._neg_view(torch.randn(20, 6)),
        "unaligned": torch.randn(121)[1:].view(20, 6),
        "empty": z[:0],
        "single": z[3:4],
    }
