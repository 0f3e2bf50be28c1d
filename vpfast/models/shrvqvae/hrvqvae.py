"""The hierarchical residual vector-quantized autoencoder of single frames (paper, section 4.1)."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vpfast.models._frames import check_count, check_device, check_float, check_frames, check_values, require
from vpfast.models._hub import Pretrained
from vpfast.models.shrvqvae import fused
from vpfast.models.shrvqvae.codec import make_decoder, make_encoder
from vpfast.models.shrvqvae.codes import Codes, CodesError
from vpfast.models.shrvqvae.config import Reduction, Scaling, SHRVQVAEConfig
from vpfast.models.storage import storable
from vpfast.nn import HierarchicalResidualVQ
from vpfast.nn.hierarchical_residual_vq import LossBreakdown
from vpfast.ops import codeword_search

_PIXELS_AT_ONCE = 2**20
"""Pixels that encode and decode send through the network in one go: 64 frames of 128x128."""

_PIXELS_IN_CACHE = 2**17
"""The same on the CPU, whose caches hold the maps of as many."""


class HRVQVAEOutput(NamedTuple):
    """What frames give in training.

    ``reconstruction``: of the shape and on the scale of the frames, not clamped. ``indices``: int64 (B, T, h, w, n) or
    (T, h, w, n). ``quantization_losses`` (n,): each layer's terms of Eqs. 4-5, weighted and reduced as the
    configuration says, the pair with e_C in the last one; their sum is trained on. ``terms``: the same by name, without
    weights. Both are zeros in evaluation mode. ``loss_reduction``, ``scaling``: how :func:`hrvqvae_loss` is to compare
    the reconstruction.
    """

    reconstruction: Tensor
    indices: Tensor
    quantization_losses: Tensor
    terms: LossBreakdown
    loss_reduction: Reduction
    scaling: Scaling


@storable("hrvqvae", SHRVQVAEConfig)
class HRVQVAE(nn.Module, Pretrained):
    """The autoencoder: turns each frame into a few integers per position, its codes, and back.

    The encoder turns a frame into a map (D, H / m, W / m), m = ``config.multiple``. The quantizer replaces the vector
    at every position by a sum e_C of n codewords, each from the codebook that the codeword before it selects (Eq. 3).
    The decoder turns the map of sums into a frame. The gradient of e_C is passed to the encoder unchanged
    (straight-through).

    Frames are floating point in [0, 1] and of the type of the weights, (B, T, C, H, W) or (T, C, H, W), H and W
    multiples of m.

    Args:
        config: its shape and variant, such as ``SHRVQVAEConfig.preset("kth-3x8")``; a TypeError for anything else.

    Paper: Adiban et al., "S-HR-VQVAE: Sequential Hierarchical Residual Learning Vector Quantized Variational
    Autoencoder for Video Prediction".
    """

    def __init__(self, config: SHRVQVAEConfig) -> None:
        super().__init__()
        self.config = config = SHRVQVAEConfig.checked(config)
        restart = config.dead_codes == "restart"
        self.encoder = make_encoder(config)
        self.quantizer = HierarchicalResidualVQ(
            dim=config.latent_channels,
            codebook_size=config.codebook_size,
            num_quantizers=config.layers,
            strict_tree=config.strict_tree,
            ema_update=config.codebook_update == "ema",
            learnable_codebook=config.codebook_update == "gradient",
            decay=config.ema_decay,
            commitment_weight=config.commitment_weight,
            combined_loss=config.combined_loss,
            combined_commitment_weight=config.combined_commitment_weight,
            loss_reduction=config.loss_reduction,
            attached_residual=config.residual == "attached",
            kmeans_init=restart,
            threshold_ema_dead_code=config.dead_code_threshold if restart else 0,
            accept_image_fmap=True,
        )
        self.decoder = make_decoder(config)

    def forward(self, frames: Tensor) -> HRVQVAEOutput:
        """Encode, quantize and decode with everything that training needs.

        In training mode codebooks start, move by averages and restart as the configuration says, under
        ``torch.no_grad`` too. In evaluation mode nothing moves, the quantizer's terms are zeros, and gradients reach no
        further back than the codebooks.

        Raises:
            TypeError: frames that are not floating point, or of another type than the weights.
            ValueError: another shape, a size that does not divide, values that are not finite or far outside [0, 1];
                see ``MSPN.forward``.
        """
        self._check_frames(frames)
        clips, flat = frames.shape[:-3], frames.flatten(0, -4)
        latent = self.encoder(self._to_network(flat))
        quantized, indices, losses, terms = self.quantizer(latent, return_loss_breakdown=True)
        reconstruction = self._to_frames(self.decoder(quantized))
        return HRVQVAEOutput(
            reconstruction.reshape(frames.shape),
            indices.reshape(*clips, *indices.shape[1:]),
            losses,
            terms,
            self.config.loss_reduction,
            self.config.scaling,
        )

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Codes:
        """The codes of ``frames``, on their device. Nothing in the model changes, in training mode either.

        Long clips pass in parts, so that memory beyond frames and codes does not grow with them. Errors as in
        ``forward``, and ValueError where the encoder gives values that are not finite.
        """
        indices, (height, width) = self.indices(frames), frames.shape[-2:]
        return Codes(indices, self.config.codebook_size, (height, width), self.config.in_channels, self._fingerprint())

    @torch.no_grad()
    def indices(self, frames: Tensor) -> Tensor:
        """Those of :meth:`encode` alone, int64 (B, T, h, w, n) or (T, h, w, n), for use beside the model."""
        self._check_frames(frames)
        *clips, _, height, width = frames.shape
        flat = frames.flatten(0, -4)
        engine = fused.engine_of(self.encoder, self.config, flat)
        indices = torch.cat([self._indices_of(part, engine) for part in _parts(flat, height, width)])
        return indices.reshape(*clips, *indices.shape[1:])

    @torch.no_grad()
    def decode(self, codes: Codes, layers: int | None = None) -> Tensor:
        """The frames of ``codes``, (B, T, C, H, W) or (T, C, H, W) in [0, 1], in the model's type and on its device.

        Args:
            codes: of this model, or without a fingerprint and of its sizes; on any device.
            layers: decode from the first ``layers`` layers alone. Codes of fewer layers than the model has are fine.

        Raises:
            TypeError: no codes.
            ValueError: codes that do not fit this model (:class:`CodesError`), or more layers than they have.
        """
        self._check_codes(codes)
        if layers is not None:
            codes = codes.first(check_count("layers", layers, lowest=1))
        weight, flat = self._weight, codes.flatten()
        frames = weight.new_empty((len(flat), self.config.in_channels, *codes.frame_size))
        size = _frames_at_once(*codes.frame_size)
        for start in range(0, len(flat), size):
            frames[start : start + size] = self._frames_of(flat[start : start + size].indices.to(weight.device))
        return frames.reshape(*codes.shape[:-3], *frames.shape[1:])

    @property
    def _weight(self) -> Tensor:
        return next(self.encoder.parameters())

    def _to_network(self, frames: Tensor) -> Tensor:
        return (frames - 0.5) * _GAIN[self.config.scaling]

    def _to_frames(self, output: Tensor) -> Tensor:
        return output / _GAIN[self.config.scaling] + 0.5

    def _indices_of(self, frames: Tensor, engine: fused.Engine | None) -> Tensor:
        """(N, C, H, W) -> (N, h, w, n)."""
        if engine is None:
            maps = self.encoder(self._to_network(frames))
        else:
            maps = engine.latent(frames, _GAIN[self.config.scaling])
        latent = maps.movedim(1, -1)
        require(
            torch.isfinite(latent).all(),
            "the encoder gives values that are not finite: its weights are not, or overflow in half precision",
        )
        _, indices = codeword_search(latent.flatten(0, -2), self.quantizer.codebooks, self.config.strict_tree)
        return indices.reshape(*latent.shape[:-1], self.config.layers)

    def _frames_of(self, indices: Tensor) -> Tensor:
        """(N, h, w, n) -> (N, C, H, W) in [0, 1]."""
        height, width = (self.config.multiple * size for size in indices.shape[1:3])
        frames = []
        for part in _parts(indices, height, width):
            latent = self.quantizer.get_output_from_indices(part).to(self._weight.dtype)
            frames.append(self._to_frames(self.decoder(latent)).clamp_(0, 1))
        return torch.cat(frames)

    def _fingerprint(self) -> bytes:
        """8 bytes that tell these codebooks from others. A copy of the model in another type has the same."""
        digest = hashlib.blake2b(digest_size=8)
        for codebook in self.quantizer.codebooks:
            digest.update(repr(tuple(codebook.shape)).encode())
            digest.update(codebook.detach().float().cpu().numpy().tobytes())
        return digest.digest()

    def _check_frames(self, frames: Tensor) -> None:
        names = "B, T, C, H, W"
        if isinstance(frames, Tensor) and frames.dim() != 5:
            if frames.dim() != 4:
                raise ValueError(
                    f"frames must be ({names}) or (T, C, H, W), got {frames.dim()} dimensions: {tuple(frames.shape)}"
                )
            names = "T, C, H, W"
        check_frames(frames, names, self.config.in_channels, self.config.multiple, self._weight)

    def _check_codes(self, codes: Codes) -> None:
        if not isinstance(codes, Codes):
            raise TypeError(f"decode takes Codes, got {type(codes).__name__}")
        config, (rows, columns), (height, width) = self.config, codes.latent_size, codes.frame_size
        for what, given, own in (
            ("codewords in a codebook", codes.codebook_size, config.codebook_size),
            ("channels of a frame", codes.channels, config.in_channels),
            ("pixels a position downwards", height // rows, config.multiple),
            ("pixels a position sideways", width // columns, config.multiple),
        ):
            if given != own:
                raise CodesError(f"these codes do not fit the model: {given} {what}, and the model has {own}")
        if codes.layers > config.layers:
            raise CodesError(f"these codes do not fit the model: {codes.layers} layers, and it has {config.layers}")
        if codes.fingerprint is not None and codes.fingerprint != self._fingerprint():
            raise CodesError(
                f"these codes were made with other codebooks ({codes.fingerprint.hex()}) than the model's "
                f"({self._fingerprint().hex()}); decode them with the model that encoded them"
            )


def hrvqvae_loss(output: HRVQVAEOutput, frames: Tensor) -> Tensor:
    """Eq. 4, as one number: the reconstruction's squared error and all terms of the quantizer.

    Args:
        output: what the model gave.
        frames: the frames to be reconstructed, of the same shape and in [0, 1].

    Squared errors are summed, or averaged over frames, pixels and channels, as ``output.loss_reduction`` says, on the
    network's scale, where ``scaling="unit"`` makes them four times as large. Sums are float32 for half-precision
    reconstructions. Of an output in evaluation mode it is the squared error alone.

    Raises:
        TypeError: frames that are not floating point.
        ValueError: frames of another shape or device, or with values as in ``HRVQVAE.forward``.
    """
    check_float(frames)
    if frames.shape != output.reconstruction.shape:
        raise ValueError(
            f"hrvqvae_loss: frames must have the shape of the reconstruction, {tuple(output.reconstruction.shape)}, "
            f"got {tuple(frames.shape)}"
        )
    check_device(frames, output.reconstruction, "reconstruction")
    check_values(frames)
    error = squared_error(output.reconstruction, frames, output.loss_reduction, output.scaling)
    return error + output.quantization_losses.sum()


def squared_error(made: Tensor, frames: Tensor, reduction: Reduction, scaling: Scaling) -> Tensor:
    """|x - made|^2 of frames on the network's scale, a scalar, in float32 or wider."""
    dtype = torch.promote_types(made.dtype, torch.float32)
    squares = (made.to(dtype) - frames.to(dtype)).square()
    error = squares.sum() if reduction == "sum" else squares.mean()
    return error * _GAIN[scaling] ** 2


_GAIN: dict[Scaling, float] = {"half": 1.0, "unit": 2.0}
"""How far frames in [0, 1], moved to be symmetric about 0, are stretched."""


def _frames_at_once(height: int, width: int) -> int:
    return max(_PIXELS_AT_ONCE // (height * width), 1)


def _parts(of_frames: Tensor, height: int, width: int) -> Sequence[Tensor]:
    """A tensor (N, ...) of N frames in parts of so many; in one where it is compiled, for any N."""
    if torch.compiler.is_compiling():
        return [of_frames]
    pixels = min(_PIXELS_AT_ONCE, _PIXELS_IN_CACHE) if of_frames.device.type == "cpu" else _PIXELS_AT_ONCE
    parts: Sequence[Tensor] = of_frames.split(max(pixels // (height * width), 1))
    return parts
