"""The choices that make one S-HR-VQVAE, and the named sets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vpfast.models._config import ModelConfig, is_count, is_weight

CodebookUpdate = Literal["gradient", "ema"]
Reduction = Literal["mean", "sum"]
Residual = Literal["detached", "attached"]
DeadCodes = Literal["restart", "ignore"]
Scaling = Literal["half", "unit"]
Conditioning = Literal["raster", "eq6", "past_frames"]
CodeOrder = Literal["depth", "independent", "layers"]
Attention = Literal["full", "axial", "window", "none"]
LossFrames = Literal["future", "all"]
JointTrains = Literal["prior_and_decoder", "decoder"]
JointRelaxation = Literal["softmax", "gumbel"]
JointInputs = Literal["teacher", "free"]

MAX_LAYERS = 16
MAX_CODEWORDS = 2**24
"""Codewords of all layers together; a tree of M codewords to a codebook has M^i of them in layer i."""


@dataclass(frozen=True)
class SHRVQVAEConfig(ModelConfig):
    """What an HR-VQVAE, and the ST-PixelCNN that predicts its codes, are built from. The defaults are ``kth-3x8``.

    Attributes:
        in_channels: channels of a frame, 3 (RGB) or 1 (grey).
        channels: widths of the strided convolutions, each of which halves the maps: H and W of a frame are multiples of
            2^len(channels).
        residual_channels: inner width of a residual block.
        residual_blocks: residual blocks in the encoder, and in the decoder; 0 or more.
        latent_channels: D, the length of a codeword.
        codebook_size: M, codewords in one codebook; 2 or more.
        layers: n, layers of codebooks, 1 to 16.
        strict_tree: layer i holds M^(i-1) codebooks, of which the codeword chosen in layer i - 1 selects one (Eq. 3);
            false: one codebook a layer, ordinary residual quantization.
        codebook_update: ``"gradient"``, the codebook terms of Eqs. 4-5, or ``"ema"``, exponential moving averages in
            their place; those terms are then not trained on.
        ema_decay: of the moving averages, which also tell dead codes; in [0, 1).
        commitment_weight: beta_i of Eq. 5, one for all layers or one a layer.
        combined_loss: with the pair of terms of Eq. 4 that pulls e_C, the sum of all layers, and the latent together.
        combined_commitment_weight: beta_0 of Eq. 4.
        loss_reduction: every |.|^2 of Eqs. 4-5 is a ``"mean"`` over frames, positions and channels, or the ``"sum"``.
        residual: what layer i quantizes, xi^i = xi^(i-1) - e^i, with e^i ``"detached"`` or ``"attached"``: the
            commitment term of a layer then also reaches the codewords of the layers before it.
        dead_codes: ``"restart"``: codebooks start from the first batch, and codewords that nobody chooses start again
            from residuals below their own parent; ``"ignore"``: random start, no restart.
        dead_code_threshold: a codeword is dead when it is chosen fewer times than this a batch, on average.
        scaling: the network sees frames as x - 0.5 (``"half"``) or 2x - 1 (``"unit"``), and Eq. 4 compares them there.
        prior_channels: width of the prior's maps.
        prior_blocks: its gated masked convolutions.
        prior_attention_every: an attention block follows each of this many of them.
        prior_heads, prior_head_dim: attention heads, and channels of one.
        prior_ffn: inner width of the two linear layers after an attention.
        prior_head: inner width of the two linear layers before the logits, which all depths share.
        conditioning: which codes of other positions p(code at frame t, raster position j) sees (Eq. 6): ``"raster"``:
            all of past frames, and those before j in frame t; ``"eq6"``: those before j in past frames; nothing of
            frame t; ``"past_frames"``: all of past frames, nothing of frame t.
        code_order: the n codes of one position come ``"depth"`` by depth, each seeing those of the layers before;
            ``"independent"`` of each other; or layer after layer for the whole frame (``"layers"``).
        attention: over every visible position (``"full"``); along time, columns and rows, head by head (``"axial"``);
            over positions no further away than ``attention_window``; or ``"none"``.
        attention_window: radii (t, y, x) of ``attention="window"``; None: no limit along that axis.
        prior_loss_frames: Eq. 7 on the ``"future"`` frames alone or on ``"all"``.
        prior_loss_layers: Eq. 7 is the ``"mean"`` or the ``"sum"`` over layers.
        joint_trains: what Eq. 9 trains.
        joint_relaxation: what gradients pass to the prior through: the straight-through ``"softmax"`` of its logits, or
            a straight-through ``"gumbel"`` sample.
        joint_inputs: in Eq. 9 the prior sees the true codes (``"teacher"``) or those it chose itself (``"free"``).
        joint_weight: lambda of Eq. 9.

    Raises:
        ValueError: a field that cannot be; the message names it and its value.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (32, 64)
    residual_channels: int = 32
    residual_blocks: int = 2
    latent_channels: int = 8
    codebook_size: int = 8
    layers: int = 3
    strict_tree: bool = True
    codebook_update: CodebookUpdate = "gradient"
    ema_decay: float = 0.9
    commitment_weight: float | tuple[float, ...] = 0.25
    combined_loss: bool = True
    combined_commitment_weight: float = 0.25
    loss_reduction: Reduction = "mean"
    residual: Residual = "detached"
    dead_codes: DeadCodes = "restart"
    dead_code_threshold: float = 1.0
    scaling: Scaling = "half"
    prior_channels: int = 64
    prior_blocks: int = 6
    prior_attention_every: int = 2
    prior_heads: int = 4
    prior_head_dim: int = 16
    prior_ffn: int = 256
    prior_head: int = 160
    conditioning: Conditioning = "raster"
    code_order: CodeOrder = "depth"
    attention: Attention = "full"
    attention_window: tuple[int | None, int | None, int | None] = (2, 3, 3)
    prior_loss_frames: LossFrames = "future"
    prior_loss_layers: Reduction = "mean"
    joint_trains: JointTrains = "prior_and_decoder"
    joint_relaxation: JointRelaxation = "softmax"
    joint_inputs: JointInputs = "teacher"
    joint_weight: float = 0.11

    def __post_init__(self) -> None:
        for name in ("channels", "commitment_weight", "attention_window"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.channels, tuple) or not self.channels or not all(map(is_count, self.channels)):
            self._refuse("channels", "must be a list of positive integers")
        self._check_counts("in_channels", "residual_channels", "latent_channels", "layers")
        self._check_counts("residual_blocks", lowest=0)
        self._check_counts("codebook_size", lowest=2)
        if self.layers > MAX_LAYERS:
            self._refuse("layers", f"must be at most {MAX_LAYERS}")
        if self.codewords > MAX_CODEWORDS:
            self._refuse(
                "layers", f"must leave at most {MAX_CODEWORDS} codewords, not {self.codewords} of {self.codebook_size}"
            )
        self._check_flags("strict_tree", "combined_loss")
        self._check_choices(_CHOICES)
        self._check_weights()
        self._check_prior()

    def _check_prior(self) -> None:
        self._check_counts("prior_channels", "prior_blocks", "prior_attention_every", "prior_heads", "prior_head_dim")
        self._check_counts("prior_ffn", "prior_head")
        if self.attention != "none" and self.prior_attention_every > self.prior_blocks:
            self._refuse(
                "prior_attention_every",
                f"must be at most prior_blocks ({self.prior_blocks}), or there is no attention, which attention 'none' "
                "says",
            )
        window = self.attention_window
        if not isinstance(window, tuple) or len(window) != 3 or not all(r is None or is_count(r, 0) for r in window):
            self._refuse("attention_window", "must be three radii (t, y, x), each an integer of at least 0 or None")

    def _check_weights(self) -> None:
        for name in ("combined_commitment_weight", "dead_code_threshold", "joint_weight"):
            if not is_weight(getattr(self, name)):
                self._refuse(name, "must be a finite number of at least 0")
        if not is_weight(self.ema_decay) or self.ema_decay >= 1:
            self._refuse("ema_decay", "must be a number in [0, 1)")
        weights = self.commitment_weight if isinstance(self.commitment_weight, tuple) else (self.commitment_weight,)
        if not all(map(is_weight, weights)):
            self._refuse("commitment_weight", "must be a finite number of at least 0, or one for each layer")
        if isinstance(self.commitment_weight, tuple) and len(weights) != self.layers:
            self._refuse("commitment_weight", f"must be one number, or one for each of the {self.layers} layers")

    @classmethod
    def presets(cls) -> Mapping[str, SHRVQVAEConfig]:
        """The six columns of the paper's Table 1: data set, layers x codewords in a codebook."""
        return PRESETS

    @property
    def multiple(self) -> int:
        """H and W of every frame are multiples of this number; the latent is this many times smaller."""
        return int(2 ** len(self.channels))

    @property
    def codewords(self) -> int:
        """Codewords of all layers together."""
        sizes = range(1, self.layers + 1) if self.strict_tree else [1] * self.layers
        return sum(self.codebook_size**size for size in sizes)


_CHOICES: dict[str, tuple[str, ...]] = {
    "codebook_update": get_args(CodebookUpdate),
    "loss_reduction": get_args(Reduction),
    "residual": get_args(Residual),
    "dead_codes": get_args(DeadCodes),
    "scaling": get_args(Scaling),
    "conditioning": get_args(Conditioning),
    "code_order": get_args(CodeOrder),
    "attention": get_args(Attention),
    "prior_loss_frames": get_args(LossFrames),
    "prior_loss_layers": get_args(Reduction),
    "joint_trains": get_args(JointTrains),
    "joint_relaxation": get_args(JointRelaxation),
    "joint_inputs": get_args(JointInputs),
}

PRIOR_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SHRVQVAEConfig)
    if field.name.startswith(("prior_", "joint_", "attention")) or field.name in ("conditioning", "code_order")
)
"""The fields that an HR-VQVAE alone has no use for."""

_KTH = SHRVQVAEConfig()
_MNIST = SHRVQVAEConfig(in_channels=1, latent_channels=4, codebook_size=4)

PRESETS: dict[str, SHRVQVAEConfig] = {
    "kth-3x8": _KTH,
    "mnist-3x4": _MNIST,
    "kth-1x512": dataclasses.replace(_KTH, layers=1, codebook_size=512),
    "kth-9x2": dataclasses.replace(_KTH, layers=9, codebook_size=2),
    "mnist-1x64": dataclasses.replace(_MNIST, layers=1, codebook_size=64),
    "mnist-6x2": dataclasses.replace(_MNIST, layers=6, codebook_size=2),
}
