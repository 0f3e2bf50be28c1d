"""codeword_search where float32 cannot tell the two nearest codewords apart, and in small trees of every size."""

import pytest
import torch
from codebooks import exact, inputs

from vpfast.ops import codeword_search


def assert_nearest_in_float64(indices, z, codebooks):
    """Of a tree, each code beside the codebook that it was chosen from."""
    z, codebooks = exact(z, codebooks)
    row = torch.zeros(len(z), dtype=torch.int64)
    for code, codebook in zip(indices.unbind(1), codebooks, strict=True):
        choice = codebook.unflatten(0, (-1, len(codebooks[0])))
        distances = (z[:, None] - choice[row]).square().sum(2)
        chosen = distances.gather(1, code[:, None])[:, 0]
        assert (chosen <= distances.amin(1) * (1 + 1e-12)).all()
        row = row * choice.shape[1] + code
        z = z - codebook[row]


@pytest.mark.parametrize(
    "case", [(100, 2, 5, 3), (250, 6, 7, 3), (97, 10, 6, 2), (145, 32, 8, 2), (500, 8, 8, 4), (60, 8, 8, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_of_up_to_eight_codewords(isa, poisoned, case, dtype):
    """The last is too large to be scanned by eights."""
    for seed in range(3):
        z, codebooks = inputs(*case, dtype=dtype, codebook_dtype=torch.float32, seed=seed)
        _, indices = codeword_search(z, codebooks)
        assert_nearest_in_float64(indices, z, codebooks)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 3e-7, 1e-6])
@pytest.mark.parametrize("case", [(500, 8, 8, 3), (500, 8, 6, 3), (500, 8, 2, 5), (500, 8, 40, 2)], ids=str)
def test_vectors_halfway_between_two_codewords(isa, case, noise):
    z, codebooks = inputs(*case)
    generator = torch.Generator().manual_seed(0)
    pairs = codebooks[0][torch.randint(case[2], (len(z), 2), generator=generator)]
    z = pairs.mean(1) + noise * z
    _, indices = codeword_search(z, codebooks)
    assert_nearest_in_float64(indices, z, codebooks)


@pytest.mark.parametrize("case", [(500, 8, 8, 3), (500, 8, 5, 3), (500, 8, 2, 5)], ids=str)
def test_codewords_closer_than_float32_tells_apart(isa, case):
    z, codebooks = inputs(*case)
    for codebook in codebooks:
        of_parent = codebook.unflatten(0, (-1, case[2]))
        codebook.copy_((of_parent[:, :1] + 1e-6 * of_parent).flatten(0, 1))
    _, indices = codeword_search(z, codebooks)
    assert_nearest_in_float64(indices, z, codebooks)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_of_codewords_whose_squares_overflow_float32(isa, poisoned, layer):
    z, codebooks = inputs(70, 8, 8, 3)
    codebooks[layer] *= 1e19
    _, indices = codeword_search(z, codebooks)
    assert_nearest_in_float64(indices, z, codebooks)
