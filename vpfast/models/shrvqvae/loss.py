"""What S-HR-VQVAE is trained with: Eq. 7 for the prior, Eq. 9 for prior and decoder together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models._frames import check_count
from vpfast.models.shrvqvae.config import SHRVQVAEConfig
from vpfast.models.shrvqvae.hrvqvae import squared_error
from vpfast.nn import HierarchicalResidualVQ

if TYPE_CHECKING:
    from vpfast.models.shrvqvae.shrvqvae import SHRVQVAEOutput


class JointTerms(NamedTuple):
    """Eq. 9, scalars: ``prior`` is L_p, ``reconstruction`` |x - D(e_C)|^2, ``total`` is L_p + lambda |x - D(e_C)|^2."""

    total: Tensor
    prior: Tensor
    reconstruction: Tensor


def prior_loss(logits: Tensor, codes: Tensor, context: int, config: SHRVQVAEConfig) -> Tensor:
    """Eq. 7: the cross-entropy of the codes, a scalar in nats, in float32 or wider.

    Args:
        logits: (B, T, H, W, n, M), what the prior gives for ``codes``.
        codes: int64 (B, T, H, W, n), those of the real frames.
        context: frames at the beginning that are given, not predicted: 1 to T - 1.
        config: ``prior_loss_frames`` takes the frames after the context or all of them, ``prior_loss_layers`` the mean
            over layers or their sum. Over clips, frames and positions it is the mean.

    Raises:
        TypeError: a context that is no integer.
        ValueError: shapes that do not go together, or a context that leaves no frame to predict.
    """
    if logits.dim() != 6 or logits.shape[:-1] != codes.shape:
        raise ValueError(
            "prior_loss: logits must be (B, T, H, W, n, M) and codes (B, T, H, W, n), got "
            f"{tuple(logits.shape)} and {tuple(codes.shape)}"
        )
    first = 0 if config.prior_loss_frames == "all" else check_context(context, codes.shape[1])
    entropy = F.cross_entropy(
        logits[:, first:].flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
        codes[:, first:].flatten(),
    )
    return entropy * codes.shape[-1] if config.prior_loss_layers == "sum" else entropy


def joint_loss(model: nn.Module, frames: Tensor, context: int) -> Tensor:
    """Eq. 9: L_p + lambda |x - D(e_C)|^2 over the frames after the context, a scalar.

    Gradients reach the prior and the decoder, with ``joint_trains="decoder"`` the decoder alone; encoder and codebooks
    stay as they are. lambda is ``joint_weight``; the squared error is reduced as ``loss_reduction`` says, on the scale
    of the network.

    Args:
        model: an :class:`SHRVQVAE`, or what wraps one and is called alike.
        frames: (B, T + k, C, H, W) in [0, 1].
        context: T, the frames that are given.

    Errors as in ``SHRVQVAE.forward``.
    """
    return joint_terms(model, frames, context).total


def joint_terms(model: nn.Module, frames: Tensor, context: int) -> JointTerms:
    """:func:`joint_loss` and what it is made of."""
    output: SHRVQVAEOutput = model(frames, context, generate=True)
    assert output.prediction is not None
    config = output.config
    prior = prior_loss(output.logits, output.codes, output.context, config)
    future = frames[:, output.context :]
    reconstruction = squared_error(output.prediction, future, config.loss_reduction, config.scaling)
    return JointTerms(prior + config.joint_weight * reconstruction, prior, reconstruction)


def relaxed_latent(logits: Tensor, given: Tensor, quantizer: HierarchicalResidualVQ, config: SHRVQVAEConfig) -> Tensor:
    """e_C of the codes that ``logits`` (..., n, M) choose, (..., D), with gradients to the logits.

    Forward it is the sum of the chosen codewords; backward it is that of all codewords weighted by softmax(logits): the
    straight-through estimator. With ``joint_relaxation="gumbel"`` both are made of logits plus Gumbel noise, drawn from
    PyTorch's generator. The codewords get no gradient.

    Args:
        logits: of n layers.
        given: int64 (..., n), the codes that the prior was given there. Logits of a layer suppose the codes of the
            layers above it, so those select the codebook; for ``code_order="independent"`` the chosen codes do.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.joint_relaxation == "gumbel":
        logits = logits - torch.empty_like(logits).exponential_().log()
    chosen, soft = logits.argmax(-1), logits.softmax(-1)
    weights = F.one_hot(chosen, logits.shape[-1]) + soft - soft.detach()
    groups = quantizer.layout.rows(chosen if config.code_order == "independent" else given) // config.codebook_size
    codebooks = quantizer.codewords.detach().unflatten(0, (-1, config.codebook_size)).to(weights.dtype)
    parts = []
    for layer in range(logits.shape[-2]):
        if layer == 0 or not config.strict_tree:  # one codebook for all positions
            parts.append(weights[..., layer, :] @ codebooks[layer])
        else:
            parts.append(torch.einsum("...m,...md->...d", weights[..., layer, :], codebooks[groups[..., layer]]))
    latent: Tensor = sum(parts[1:], parts[0])
    return latent


def check_context(context: int, length: int) -> int:
    """``context`` as an int; raise TypeError or ValueError unless it is 1 to ``length`` - 1."""
    context = check_count("context", context, lowest=1)
    if context >= length:
        raise ValueError(
            f"context must leave a frame to predict: {context} frames given as context of a clip of {length}"
        )
    return context
