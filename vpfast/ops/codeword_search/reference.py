"""The specification of ``codeword_search``: plain torch, to be read beside the equations.

S-HR-VQVAE paper, Eq. 3-5 (Adiban et al., "S-HR-VQVAE: Sequential Hierarchical Residual Learning Vector Quantized
Variational Autoencoder for Video Prediction"). Every kernel is tested against these functions in float64. They hold
every distance in memory at once; kernels do not.

Layer i (from 1) of a strict tree holds M^(i-1) codebooks of M codewords, one a codeword of the layer before, as the
rows of one (M^i, D) tensor: row = path * M + local code, where path is the row chosen in the layer before. Without the
tree every layer holds one codebook (M, D), and path is always 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CodewordSearchTraining(NamedTuple):
    """What ``codeword_search_train`` returns. R is the number of rows of all codebooks, layer 1 first.

    ``quantized`` is of the type of ``z``; everything but it and ``indices`` is float32, or float64 for float64 ``z``.
    """

    quantized: Tensor
    """(N, D), the sum of the chosen codewords. Its gradient goes to ``z`` as it is (straight-through)."""
    indices: Tensor
    """(N, n) int64, the local code of each layer, 0..M-1."""
    codebook_losses: Tensor
    """(n,): of each layer the sum of |sg[xi^(i-1)] - e^i|^2 over all vectors, for the codebooks."""
    commitment_losses: Tensor
    """(n,): of each layer the sum of |xi^(i-1) - sg[e^i]|^2 over all vectors, for ``z``."""
    combined_loss: Tensor
    """(): the sum of |sg[z] - e_C|^2 over all vectors, for the codebooks of all layers."""
    counts: Tensor
    """(R,): how many vectors chose that row. No gradient."""
    sums: Tensor
    """(R, D): the sum of the residuals xi^(i-1) of the vectors that chose that row. No gradient."""


def working_dtype(z: Tensor) -> torch.dtype:
    """Arithmetic is float64 for float64 vectors, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def codeword_search(z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True) -> tuple[Tensor, Tensor]:
    """(N, D) vectors -> their quantized form (N, D) and the local codes (N, n), Eq. 3 layer by layer."""
    residual = working(z)
    M = len(codebooks[0])
    path = torch.zeros_like(residual[:, 0], dtype=torch.int64)
    quantized, codes = torch.zeros_like(residual), []
    for codebook in codebooks:
        children = codebook.to(residual.dtype).unflatten(0, (-1, M))  # (parents, M, D)
        choice = children if len(children) == 1 else children[path]  # (1 or N, M, D)
        squares = (residual[:, None] - choice).detach().square()
        code = nearest(squares.contiguous().sum(-1))  # k = argmin |xi^(i-1) - e^i|; dense, equal rows have equal sums
        row = path * M + code
        codeword = codebook.to(residual.dtype)[row]
        residual = residual - codeword.detach()
        quantized = quantized + codeword
        codes.append(code)
        path = row if strict_tree else path
    return finish(quantized, z), torch.stack(codes, 1)


def working(z: Tensor) -> Tensor:
    """``z`` in the working type. A vector that holds NaN or infinity becomes NaN as a whole."""
    return z.to(working_dtype(z)).masked_fill(~finite(z), math.nan)


def finite(z: Tensor) -> Tensor:
    """(N, 1): which vectors hold neither NaN nor infinity."""
    return z.isfinite().all(1, keepdim=True)


def finish(quantized: Tensor, z: Tensor) -> Tensor:
    """The sum of codewords in the type of ``z``, NaN for a vector that holds NaN or infinity."""
    return quantized.to(z.dtype).masked_fill(~finite(z), math.nan)


def nearest(distance: Tensor) -> Tensor:
    """Of (N, M) distances the lowest index of the smallest. NaN and infinity never win; 0 where nothing is left."""
    return distance.nan_to_num(nan=math.inf, posinf=math.inf).argmin(1)


def chosen_rows(indices: Tensor, codebooks: Sequence[Tensor], strict_tree: bool) -> list[Tensor]:
    """Local codes (N, n) -> for each layer the (N,) rows of its codebook."""
    rows: list[Tensor] = []
    for layer, code in enumerate(indices.unbind(1)):
        rows.append(rows[-1] * len(codebooks[0]) + code if strict_tree and layer else code)
    return rows


def chosen_codewords(
    indices: Tensor, codebooks: Sequence[Tensor], strict_tree: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Local codes (N, n) -> for each layer the (N, D) codewords e^i."""
    rows = chosen_rows(indices, codebooks, strict_tree)
    return [codebook.to(dtype)[row] for codebook, row in zip(codebooks, rows, strict=True)]


def residuals(z: Tensor, indices: Tensor, codebooks: Sequence[Tensor], strict_tree: bool) -> list[Tensor]:
    """xi^0 = z, xi^1 = z - e^1, ..., xi^n = z - e_C: n + 1 tensors (N, D)."""
    found = [working(z)]
    for codeword in chosen_codewords(indices, codebooks, strict_tree, found[0].dtype):
        found.append(found[-1] - codeword)
    return found


def codeword_search_backward(
    grad_quantized: Tensor, indices: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True
) -> list[Tensor]:
    """The gradient of the sum of the chosen codewords, one tensor a codebook."""
    gradient = grad_quantized.to(working_dtype(grad_quantized))
    rows = chosen_rows(indices, codebooks, strict_tree)
    return [scatter(gradient, row, codebook) for row, codebook in zip(rows, codebooks, strict=True)]


def scatter(values: Tensor, rows: Tensor, codebook: Tensor) -> Tensor:
    """Add the (N, D) ``values`` up by the row of ``codebook`` that each belongs to."""
    return torch.zeros_like(codebook, dtype=values.dtype).index_add(0, rows, values).to(codebook.dtype)


def codeword_search_train(
    z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The search with all that training needs of it -> (quantized, indices, errors (n,), counts (R,), sums (R, D))."""
    quantized, indices = codeword_search(z, codebooks, strict_tree)
    return quantized, indices, *statistics(z, indices, codebooks, strict_tree)


def statistics(
    z: Tensor, indices: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The errors sum |xi^i|^2 (n,), and of each row how many vectors chose it (R,) and the sum of their xi^(i-1)."""
    xi = residuals(z, indices, codebooks, strict_tree)
    errors = torch.stack([after.square().sum(1).sum() for after in xi[1:]])
    counted = finite(z).to(xi[0].dtype)
    counts, sums = [], []
    for before, row, codebook in zip(xi, chosen_rows(indices, codebooks, strict_tree), codebooks, strict=False):
        counts.append(xi[0].new_zeros(len(codebook)).index_add(0, row, counted[:, 0]))
        sums.append(xi[0].new_zeros(codebook.shape).index_add(0, row, before.masked_fill(counted == 0, 0)))
    return errors, torch.cat(counts), torch.cat(sums)


def codeword_search_train_backward(
    grad_quantized: Tensor | None,
    weights_z: Tensor,
    weights_codebooks: Tensor,
    z: Tensor,
    indices: Tensor,
    codebooks: Sequence[Tensor],
    counts: Tensor,
    sums: Tensor,
    strict_tree: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Every gradient of the training op is a weighted sum of the residuals xi^1..xi^n.

    grad_z = grad_quantized + sum_i weights_z[i] xi^i; the gradient of a row of layer j is the sum over the vectors that
    chose it of sum_i weights_codebooks[j, i] xi^i, i >= j: no loss has a weight below the diagonal, and kernels look at
    none. ``counts`` and ``sums`` give a kernel the rows of a tree without the vectors (README.md beside this file says
    how); here they are not needed.
    """
    xi = torch.stack(residuals(z, indices, codebooks, strict_tree)[1:])  # (n, N, D)
    grad_z = torch.einsum("i,ivd->vd", weights_z, xi)
    if grad_quantized is not None:
        grad_z = grad_z + grad_quantized
    pulls = torch.einsum("ji,ivd->jvd", weights_codebooks, xi.masked_fill(~finite(z), 0))
    rows = chosen_rows(indices, codebooks, strict_tree)
    return grad_z.to(z.dtype), [scatter(*of_layer) for of_layer in zip(pulls, rows, codebooks, strict=True)]


def training(
    z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True, attached: bool = False
) -> CodewordSearchTraining:
    """Eq. 4-5 with their stop-gradients, for PyTorch to differentiate: what ``vpfast.backend("reference")`` runs."""
    sg = Tensor.detach
    quantized, indices, _, counts, sums = codeword_search_train(sg(z), [sg(c) for c in codebooks], strict_tree)
    z_ = working(z)
    codewords = chosen_codewords(indices, codebooks, strict_tree, z_.dtype)
    e_C = sum(codewords, torch.zeros_like(z_))

    xi, codebook_losses, commitment_losses = z_, [], []
    for e in codewords:
        codebook_losses.append((sg(xi) - e).square().sum())  # Eq. 5, first term
        commitment_losses.append((xi - sg(e)).square().sum())  # Eq. 5, second term, before beta
        xi = xi - (e if attached else sg(e))
    return CodewordSearchTraining(
        quantized + (z - sg(z)),  # straight-through: of quantized's value, with z's gradient
        indices,
        torch.stack(codebook_losses),
        torch.stack(commitment_losses),
        (sg(z_) - e_C).square().sum(),  # Eq. 4, second term
        counts,
        sums,
    )
