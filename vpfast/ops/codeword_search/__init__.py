"""The search for codewords down a tree of codebooks in one pass: see README.md beside this file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vpfast.ops._backend import autocast_is_on, current_backend, is_differentiated
from vpfast.ops._library import operator
from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.reference import CodewordSearchTraining
from vpfast.ops.codeword_search.register import backends, to_float32

__all__ = ["CodewordSearchTraining", "codeword_search", "codeword_search_train"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_LAYERS = 16


def codeword_search(z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True) -> tuple[Tensor, Tensor]:
    """The nearest codeword in every layer; each layer quantizes the residual of the layers before it.

    S-HR-VQVAE paper, Eq. 3; ``strict_tree=False`` is residual vector quantization, one codebook is plain vector
    quantization. Layer i takes the codeword nearest to the residual xi^(i-1) = z - e^1 - ... - e^(i-1).

    Args:
        z: (N, D), any strides, N may be 0. float64, float32, float16 or bfloat16.
        codebooks: n tensors, 1 to 16, of M >= 2 codewords a search. Of a strict tree the i-th (from 1) is (M^i, D): the
            codewords below row p of the layer before are rows p M to p M + M - 1. Else each is (M, D). All of one type:
            that of ``z``, or float32 beside half-precision ``z``.
        strict_tree: whether the codeword of a layer decides which codebook the next one searches.

    Returns:
        ``quantized`` (N, D) in the type of ``z``, the sum of the chosen codewords; ``indices`` (N, n) int64, each 0 to
        M - 1, the place in the codebook that was searched. Of equally near codewords the lowest index; those of a
        search in float64 wherever that can tell the two nearest apart. Sums are float32 for half precision.

    Differentiable once, in the codebooks: ``quantized`` gives its gradient to each codeword it is the sum of. ``z``
    gets none, for the codes are piecewise constant in it; :func:`codeword_search_train` has the straight-through one.
    ``torch.func.vmap`` over ``z`` makes one search; over codebooks, one search for each. ``torch.func``'s derivatives
    and forward-mode differentiation use the plain PyTorch reference. Results are bitwise repeatable whatever the number
    of threads. Under autocast the search is float32.

    A distance that is NaN or infinite never wins, and where none wins the index is 0. A vector that holds NaN or
    infinity gets indices 0 and a quantized vector of NaN.

    Raises:
        TypeError: a type that is not supported, or two that do not go together.
        ValueError: shapes that do not fit; the message holds the numbers.
        BackendError: (a RuntimeError) the chosen backend cannot serve this device; the message says why.
    """
    codebooks = _checked("codeword_search", z, codebooks, strict_tree)
    backend = backends.select(z.device)
    if _is_plain(z, codebooks):
        return reference.codeword_search(*_as_autocast(z, codebooks), strict_tree)
    result: tuple[Tensor, Tensor] = operator("codeword_search", backend)(z, codebooks, strict_tree)
    return result


def codeword_search_train(
    z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool = True, attached: bool = False
) -> CodewordSearchTraining:
    """:func:`codeword_search` with the losses and statistics that codebooks are trained by, in the same pass.

    S-HR-VQVAE paper, Eq. 4-5. Losses are sums over all vectors and dimensions, to be divided and weighted by the
    caller; ``counts`` and ``sums`` are all that an exponential moving average of the codebooks needs.

    Args:
        z: as for :func:`codeword_search`.
        codebooks: as for :func:`codeword_search`.
        strict_tree: as for :func:`codeword_search`.
        attached: whether the residual xi^(i-1) of the commitment losses carries the gradient of the codewords before
            layer i, or of ``z`` alone.

    Returns:
        A :class:`CodewordSearchTraining`, whose fields say their shapes and where their gradients go. Per layer, counts
        and sums are ``counts.split([len(c) for c in codebooks])``. The commitment twin of the combined loss,
        |z - sg[e_C]|^2, is ``commitment_losses[-1]`` in value and in the gradient of ``z``.

    Differentiable once. Backward reads ``z`` and the codebooks again, so change neither in place before it has run.
    A vector that holds NaN or infinity makes the losses NaN and their gradients meaningless; the counts and sums leave
    it out. Counts are exact up to 2^24 vectors a codeword. All else as for :func:`codeword_search`.

    Raises:
        TypeError: a type that is not supported, or two that do not go together.
        ValueError: shapes that do not fit; the message holds the numbers.
        BackendError: (a RuntimeError) the chosen backend cannot serve this device; the message says why.
    """
    codebooks = _checked("codeword_search_train", z, codebooks, strict_tree)
    backend = backends.select(z.device)
    if _is_plain(z, codebooks):
        return reference.training(*_as_autocast(z, codebooks), strict_tree, attached)
    return CodewordSearchTraining(*operator("codeword_search_losses", backend)(z, codebooks, strict_tree, attached))


def _is_plain(z: Tensor, codebooks: list[Tensor]) -> bool:
    """Is plain PyTorch asked for? On a CPU without a kernel the operators are served by the reference, but in bounded
    memory."""
    return current_backend() == "reference" or is_differentiated(z, *codebooks)


def _as_autocast(z: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if not autocast_is_on(z):
        return z, codebooks
    return to_float32(z), [to_float32(codebook) for codebook in codebooks]


def _checked(op: str, z: Tensor, codebooks: Sequence[Tensor], strict_tree: bool) -> list[Tensor]:
    """The codebooks as a list, when all is as the docstrings say."""
    if isinstance(codebooks, Tensor) or not all(isinstance(codebook, Tensor) for codebook in codebooks):
        raise TypeError(f"{op}: codebooks must be a sequence of tensors, one a layer, got {type(codebooks).__name__}")
    codebooks = list(codebooks)
    if not 1 <= len(codebooks) <= _MAX_LAYERS:
        raise ValueError(f"{op}: codebooks must hold 1 to {_MAX_LAYERS} tensors, got {len(codebooks)}")
    _check_types(op, z, codebooks)
    if z.dim() != 2 or z.shape[1] < 1:
        raise ValueError(f"{op}: z must be (N, D) with D at least 1, got {tuple(z.shape)}")
    M = codebooks[0].shape[0] if codebooks[0].dim() else 0
    if M < 2:
        raise ValueError(f"{op}: a codebook needs at least 2 codewords, got one of shape {tuple(codebooks[0].shape)}")
    for layer, codebook in enumerate(codebooks, 1):
        expected = (M**layer if strict_tree else M, z.shape[1])
        if tuple(codebook.shape) != expected:
            raise ValueError(
                f"{op}: layer {layer} of codebooks must be {expected}, got {tuple(codebook.shape)} (z is "
                f"{tuple(z.shape)}, layer 1 holds M = {M} codewords, and strict_tree={strict_tree} asks for "
                f"{'M^i' if strict_tree else 'M'} in layer i)"
            )
    return codebooks


def _check_types(op: str, z: Tensor, codebooks: list[Tensor]) -> None:
    if z.dtype not in _DTYPES:
        raise TypeError(f"{op}: z must be float64, float32, float16 or bfloat16, got {z.dtype}")
    for layer, codebook in enumerate(codebooks, 1):
        if codebook.dtype != codebooks[0].dtype:
            raise TypeError(
                f"{op}: codebooks must be of one type, got {codebooks[0].dtype} in layer 1 and {codebook.dtype} in "
                f"layer {layer}"
            )
        if codebook.device != z.device:
            raise ValueError(
                f"{op}: z is on {z.device} and layer {layer} of codebooks on {codebook.device}; move one of them"
            )
    if codebooks[0].dtype != z.dtype and not _go_together(z, codebooks[0]):
        raise TypeError(
            f"{op}: codebooks must have the type of z ({z.dtype}), or float32 beside half-precision z, "
            f"got {codebooks[0].dtype}"
        )


def _go_together(z: Tensor, codebook: Tensor) -> bool:
    """Of two different types: float32 beside half precision, or any two short of float64 where autocast will cast."""
    if torch.float64 in (z.dtype, codebook.dtype) or codebook.dtype not in _DTYPES:
        return False
    return codebook.dtype == torch.float32 or autocast_is_on(z)
