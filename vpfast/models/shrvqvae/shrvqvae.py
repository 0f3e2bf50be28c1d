"""S-HR-VQVAE: codes of the frames seen, codes of the frames to come, frames of those (paper, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpfast.models._frames import check_count, check_frames, check_size
from vpfast.models._hub import Pretrained
from vpfast.models.shrvqvae.config import PRIOR_FIELDS, SHRVQVAEConfig
from vpfast.models.shrvqvae.hrvqvae import HRVQVAE
from vpfast.models.shrvqvae.loss import check_context, relaxed_latent
from vpfast.models.shrvqvae.sampler import sample
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN
from vpfast.models.storage import storable

CONTEXT = 10
"""How many frames a state remembers unless told otherwise: the context that the paper trains with."""


class SHRVQVAEOutput(NamedTuple):
    """What clips give in training.

    ``logits``: (B, T + k, h, w, n, M), of the codes that the prior was given. ``codes``: int64 (B, T + k, h, w, n),
    those of the frames. ``context``: T. ``prediction``: where frames were asked for, the k future ones of the codes
    that the logits choose, (B, k, C, H, W), on the scale of the frames and not clamped; else None. ``config``: how the
    losses are to be taken.
    """

    logits: Tensor
    codes: Tensor
    context: int
    prediction: Tensor | None
    config: SHRVQVAEConfig


class SHRVQVAEState(NamedTuple):
    """What the model keeps of a video between frames.

    ``codes``: int64 (B, t, h, w, n), of the frames so far, of no more than the last ``context`` once one was looked at.
    ``size``: (H, W) of the frames. ``ahead``: the next frame (B, C, H, W) and its codes (B, 1, h, w, n), where they
    were looked at already.
    """

    codes: Tensor
    size: tuple[int, int]
    ahead: tuple[Tensor, Tensor] | None
    context: int = CONTEXT


@storable("shrvqvae", SHRVQVAEConfig)
class SHRVQVAE(nn.Module, Pretrained):
    """Predicts video as codes: an HR-VQVAE encodes and decodes frames, a prior predicts the codes of the next ones.

    ``autoencoder`` is the :class:`HRVQVAE`, ``prior`` the :class:`STPixelCNN`. Both are trained one after the other
    (``hrvqvae_loss``, ``prior_loss``), then together (``joint_loss``).

    Frames are floating point in [0, 1] and of the type of the weights, (B, T, C, H, W), H and W multiples of
    ``config.multiple``.

    Args:
        config: its shape and variant, such as ``SHRVQVAEConfig.preset("kth-3x8")``; a TypeError for anything else.

    Paper: Adiban et al., "S-HR-VQVAE: Sequential Hierarchical Residual Learning Vector Quantized Variational
    Autoencoder for Video Prediction".
    """

    def __init__(self, config: SHRVQVAEConfig) -> None:
        super().__init__()
        self.config = config = SHRVQVAEConfig.checked(config)
        self.autoencoder = HRVQVAE(config)
        self.prior = STPixelCNN(config)

    @classmethod
    def from_autoencoder(cls, autoencoder: HRVQVAE, **fields: Any) -> SHRVQVAE:
        """A model with a copy of ``autoencoder`` and a new prior, of its type, on its device and in its mode.

        Args:
            fields: of the configuration, those of the prior; the rest is the autoencoder's.

        Raises:
            TypeError: no :class:`HRVQVAE`.
            ValueError: a field that is not of the prior, or a value that cannot be.
        """
        if not isinstance(autoencoder, HRVQVAE):
            raise TypeError(f"from_autoencoder takes an HRVQVAE, got {type(autoencoder).__name__}")
        for name in fields:
            if name not in PRIOR_FIELDS:
                raise ValueError(f"{name!r} is no field of the prior; those are {', '.join(PRIOR_FIELDS)}")
        model = cls(dataclasses.replace(autoencoder.config, **fields))
        model.to(autoencoder._weight).train(autoencoder.training)
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        return model

    def forward(self, frames: Tensor, context: int, generate: bool = False) -> SHRVQVAEOutput:
        """What the losses need of clips of ``context`` frames to be seen and at least one to be predicted.

        The prior gets the codes of the real frames. The autoencoder does not change, in training mode either, and no
        gradient reaches its encoder and codebooks.

        Args:
            frames: (B, T + k, C, H, W), k at least 1.
            context: T, at least 1.
            generate: make the future frames too, as ``config`` says: ``joint_relaxation`` is how gradients pass the
                choice of a code; ``joint_inputs="free"`` gives the prior its own choices as codes of the future;
                ``joint_trains="decoder"`` leaves the prior without gradient.

        Raises:
            TypeError: frames that are not floating point, or of another type than the weights; a context that is no
                integer.
            ValueError: another shape, a size that does not divide, values that are not finite or far outside [0, 1],
                or a context that leaves no frame to predict.
        """
        self._check_frames(frames)
        context = check_context(context, frames.shape[1])
        codes = self.autoencoder.indices(frames)
        given = codes
        if generate and self.config.joint_inputs == "free":
            future = sample(self.prior, codes[:, :context], codes.shape[1] - context)
            given = torch.cat((codes[:, :context], future), dim=1)
        trains = self.config.joint_trains == "prior_and_decoder" or not generate
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            logits = self.prior(given)
        prediction = self._generate(logits[:, context:], given[:, context:]) if generate else None
        return SHRVQVAEOutput(logits, codes, context, prediction, self.config)

    @torch.no_grad()
    def predict(
        self,
        frames: Tensor,
        horizon: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        num_futures: int | None = None,
        seed: int | Sequence[int] = 0,
        progress: bool = False,
    ) -> Tensor:
        """The frames that follow, without gradients and in [0, 1]: (B, T, C, H, W) -> (B, horizon, C, H, W).

        Args:
            frames: T of at least 1.
            horizon: how many frames to predict, 0 or more.
            temperature: 0 takes the likeliest code everywhere; above it codes are drawn from
                softmax(logits / temperature).
            top_k: draw from this many likeliest codewords of each codebook only; 1 to M.
            num_futures: draw as many futures of each clip: the result is (B, num_futures, horizon, C, H, W).
            seed: of what is drawn, one for all clips or one a clip, in [0, 2^32). What a clip draws depends on its seed
                and the index of the future alone, not on the clips beside it.
            progress: show a bar; needs tqdm.

        Raises:
            TypeError, ValueError: frames as in ``forward``, or another argument that cannot be; the message holds it.
            ImportError: a bar without tqdm.
        """
        self._check_frames(frames)
        if frames.shape[1] == 0:
            raise ValueError("frames hold no time step (T = 0); give at least one frame")
        horizon = check_count("horizon", horizon)
        codes = sample(
            self.prior, self._encode(frames), horizon, temperature, top_k, seed, num_futures, progress=progress
        )
        return self._decode(codes, frames.shape[-2:])

    def init_state(self, batch_size: int, height: int, width: int, context: int = CONTEXT) -> SHRVQVAEState:
        """The state before the first frame.

        Args:
            batch_size, height, width: of the frames to come.
            context: how many of them to remember, at least 1. Time and memory of a step are those of so many frames.

        Raises:
            TypeError: a batch size, height, width or context that is no integer.
            ValueError: a negative batch size, a height or width that does not divide, or a context below 1.
        """
        batch_size = check_count("batch_size", batch_size)
        context = check_count("context", context, lowest=1)
        size, multiple = (check_count("height", height), check_count("width", width)), self.config.multiple
        check_size(*size, multiple)
        shape = (batch_size, 0, size[0] // multiple, size[1] // multiple, self.config.layers)
        weight = self.autoencoder._weight
        return SHRVQVAEState(torch.zeros(shape, dtype=torch.int64, device=weight.device), size, None, context)

    @torch.no_grad()
    def step(self, frame: Tensor | None, state: SHRVQVAEState) -> tuple[Tensor, SHRVQVAEState]:
        """Predict the next frame, then look at it: ``frame`` (B, C, H, W) -> ``prediction, state``.

        The prediction (B, C, H, W), of the likeliest codes, is made before ``frame`` is looked at; with None it takes
        the frame's place. T frames and then k times None give what ``predict`` gives for the last ``context`` of the T.
        Older frames are forgotten when a frame is looked at; None forgets nothing. Errors as in ``forward``.
        """
        if frame is not None:
            check_frames(frame, "B, C, H, W", self.config.in_channels, self.config.multiple, self.autoencoder._weight)
            expected = (len(state.codes), self.config.in_channels, *state.size)
            if tuple(frame.shape) != expected:
                raise ValueError(f"the state was made for frames of shape {expected}, got {tuple(frame.shape)}")
        prediction, codes = state.ahead or self._look_ahead(state)
        kept = state.codes
        if frame is not None:
            codes = self._encode(frame.unsqueeze(1))
            kept = kept[:, max(0, kept.shape[1] + 1 - state.context) :]
        return prediction.clone(), state._replace(codes=torch.cat((kept, codes), dim=1), ahead=None)

    @torch.no_grad()
    def peek(self, state: SHRVQVAEState) -> tuple[Tensor, SHRVQVAEState]:
        """The prediction of the next frame without moving on: -> ``prediction, state``.

        The state returned is at the same point in time and holds the prediction, so that the ``step`` that follows does
        not compute it again.
        """
        ahead = state.ahead or self._look_ahead(state)
        return ahead[0].clone(), state._replace(ahead=ahead)  # the caller's, to change as they like

    @torch.no_grad()
    def rollout(self, state: SHRVQVAEState, count: int) -> Tensor:
        """The next ``count`` frames, (B, count, C, H, W), without moving on: what ``count`` steps with None predict.

        The codes known, and those that ``state`` holds ahead, are looked at once in place of ``count`` times.

        Raises:
            TypeError, ValueError: ``count`` is no integer, or below 1.
        """
        count, seen = check_count("count", count, lowest=1), state.codes.shape[1]
        known = state.codes if state.ahead is None else torch.cat((state.codes, state.ahead[1]), dim=1)
        codes = sample(self.prior, known, seen + count - known.shape[1])
        return self._decode(torch.cat((known[:, seen:], codes), dim=1), state.size)

    def _look_ahead(self, state: SHRVQVAEState) -> tuple[Tensor, Tensor]:
        codes = sample(self.prior, state.codes, 1)
        return self._decode(codes, state.size)[:, 0], codes

    def _check_frames(self, frames: Tensor) -> None:
        weight = self.autoencoder._weight
        check_frames(frames, "B, T, C, H, W", self.config.in_channels, self.config.multiple, weight)

    def _encode(self, frames: Tensor) -> Tensor:
        """(B, T, C, H, W) -> int64 (B, T, h, w, n), frame by frame: to the last bit what a stream sees."""
        return torch.cat([self.autoencoder.indices(frame) for frame in frames.split(1, dim=1)], dim=1)

    def _decode(self, codes: Tensor, size: Sequence[int]) -> Tensor:
        """int64 (*, k, h, w, n) -> (*, k, C, H, W) in [0, 1], frame by frame likewise."""
        clips = codes.flatten(0, -5)
        frames = [self.autoencoder._frames_of(clips[:, time]) for time in range(clips.shape[1])]
        shape = (*codes.shape[:-3], self.config.in_channels, *size)
        return torch.stack(frames, dim=1).reshape(shape) if frames else self.autoencoder._weight.new_empty(shape)

    def _generate(self, logits: Tensor, given: Tensor) -> Tensor:
        """The frames of the codes that the logits choose, with gradients to decoder and logits."""
        autoencoder = self.autoencoder
        latent = relaxed_latent(logits, given, autoencoder.quantizer, self.config).to(autoencoder._weight.dtype)
        frames = autoencoder._to_frames(autoencoder.decoder(latent.flatten(0, 1).movedim(-1, 1)))
        clips: Tensor = frames.unflatten(0, latent.shape[:2])
        return clips
