"""The spatiotemporal PixelCNN that predicts codes from the codes before them (paper, section 4.2)."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models._frames import values_can_be_read
from vpfast.models.shrvqvae.config import SHRVQVAEConfig
from vpfast.nn import MaskedAttention3d, MaskedConv3d, sinusoidal_positions
from vpfast.nn._as_made import renew_weights
from vpfast.ops import Mask3d


class STPixelCNN(nn.Module):
    """p(code at frame t, raster position j, layer i | the codes before it), for every code of a clip at once.

    ``embed`` (one a layer, summed) and ``mix`` make a feature of the n codes of each position; ``stem``, a masked
    convolution of kind A, hides from every position its own code, ``carry`` adds the position before it, and
    sinusoidal positions are added; ``blocks`` are gated masked convolutions of kind B, with ``attentions`` in between;
    ``norm``, the embeddings ``parents`` of the codes of earlier layers at the same position, ``mlp`` and a linear
    layer of ``heads`` give the logits of each layer. There is no normalisation over t, y or x and no residual around
    the stem, which would both leak.

    Without ``carry`` some codes would stay unseen however far attention reaches: the features up to j know, through the
    3x3 taps of the stem, neither the last code of the row above j nor, at the start of a frame, the last code of the
    frame before. It takes the code before j in raster order over the whole clip; with ``conditioning="eq6"`` that
    before j in the frame before; with ``"past_frames"`` there is none.

    With ``code_order="layers"`` layer i of a whole frame comes before layer i + 1 of it, so that every layer has a pass
    through the network of its own, all in one batch: in pass i the present taps of the stem (and ``carry``) see the
    codes of layer i alone, the past taps those of all layers, ``context`` (3x3, unmasked) those of the layers before i
    in the present frame, and a vector of ``layer`` tells the passes apart.

    What the code of layer i at (t, j) sees, attention being full (with any other, as much of it as taps and attention
    reach):

    - of other places, by ``conditioning``: ``"raster"``: all of past frames, and in frame t what comes before j;
      ``"eq6"``: of past frames what comes before j, the paper's Eq. 6 as it is printed; ``"past_frames"``: all of past
      frames, but of frame t - 1 alone only so far after j as the convolutions reach, one row for each;
    - at its own place, by ``code_order``: the layers before i (``"depth"``, ``"layers"``) or none (``"independent"``);
    - with ``"layers"`` all this holds for layer i. The layers before i are seen in frame t as well, and of frame t - 1
      those after i, each no further after j than the convolutions reach.

    Args:
        config: its shape and variant, such as ``SHRVQVAEConfig.preset("kth-3x8")``; a TypeError for anything else.

    Paper: Eq. 6.
    """

    def __init__(self, config: SHRVQVAEConfig) -> None:
        super().__init__()
        self.config = config = SHRVQVAEConfig.checked(config)
        width, size, conditioning = config.prior_channels, config.codebook_size, config.conditioning
        self.embed = nn.ModuleList(nn.Embedding(size, width) for _ in range(config.layers))
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.stem = MaskedConv3d(width, width, mask="A", conditioning=conditioning)
        self.carry = None if conditioning == "past_frames" else nn.Linear(width, width, bias=False)
        by_layer = config.code_order == "layers"
        self.context = nn.Conv2d(width, width, 3, padding=1) if by_layer and config.layers > 1 else None
        self.layer = nn.Embedding(config.layers, width) if by_layer else None
        self.blocks = nn.ModuleList(GatedBlock(config) for _ in range(config.prior_blocks))
        every = config.prior_attention_every
        attentions = 0 if config.attention == "none" else config.prior_blocks // every
        self.attentions = nn.ModuleList(AttentionBlock(config) for _ in range(attentions))
        self.norm = nn.LayerNorm(width)
        parents = 0 if config.code_order == "independent" else config.layers - 1
        self.parents = nn.ModuleList(nn.Embedding(size, width) for _ in range(parents))
        hidden = nn.Linear(width, config.prior_head)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Linear(config.prior_head, width))
        self.heads = nn.ModuleList(nn.Linear(width, size) for _ in range(config.layers))
        self._start()

    def forward(self, codes: Tensor) -> Tensor:
        """The logits of every code, given the codes before it: int64 (B, T, H, W, n) -> (B, T, H, W, n, M).

        Raises:
            TypeError: codes of another type.
            ValueError: another shape, an empty grid, another device, or a code that is not in [0, M).
        """
        self._check(codes)
        layers = range(self.config.layers)
        features = self._features(self._inputs_of_blocks(codes))
        if self.config.code_order == "layers":
            of_layers = features.unflatten(0, (-1, len(layers))).unbind(1)
        else:
            of_layers = (features,) * len(layers)
        return torch.stack([self._logits_of(of_layers[i], i, codes[..., :i]) for i in layers], dim=-2)

    def _inputs_of_blocks(self, codes: Tensor) -> Tensor:
        """The input of the first block for a whole clip: codes (B, T, H, W, n) -> (B P, T, H, W, C).

        P is 1, or with ``code_order="layers"`` n, the passes of a clip one after another.
        """
        if self.config.code_order == "layers":
            return self._inputs_by_layer(codes)
        embedded = self._embedded(codes)
        return self._after_stem(embedded, embedded)

    def _embedded(self, codes: Tensor, layers: range | None = None) -> Tensor:
        """What the stem reads of each position, for itself: codes (..., n) -> (..., C).

        ``layers``: those that are looked at, all of them when None; ``codes`` needs to hold no others.
        """
        layers = range(self.config.layers) if layers is None else layers
        added = [self.embed[layer](codes[..., layer]) for layer in layers]
        mixed: Tensor = self.mix(sum(added[1:], added[0]))
        return mixed

    def _after_stem(self, past: Tensor, present: Tensor) -> Tensor:
        """Stem, ``carry`` and positions, the input of the first block: (B P, T, H, W, C) as ``present``.

        ``past`` (B, T, H, W, C) is :meth:`_embedded` as later frames see it, ``present`` (B P, T, H, W, C) as the same
        frame does: the same tensor, but for ``code_order="layers"``, where it is that of P passes for each clip.
        """
        passes = present.shape[0] // past.shape[0] if past.shape[0] else 1
        renew_weights(self.stem)  # whose parts are called, and not itself
        x = self.stem.from_past(past.movedim(-1, 1)).movedim(1, -1).repeat_interleave(passes, 0)
        x = x + self.stem.from_present(present.movedim(-1, 1)).movedim(1, -1)
        if self.carry is not None:
            x = x + self.carry(self._before(past, present, passes))
        grid = (x.shape[1], x.shape[2], x.shape[3])
        return x + sinusoidal_positions(grid, x.shape[4], x.dtype, x.device)

    def _features(self, x: Tensor) -> Tensor:
        """All blocks and attentions: (B, T, H, W, C) -> (B, T, H, W, C)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self._attends_after(index):
                x = self.attentions[index // self.config.prior_attention_every](x)
        return x

    def _attends_after(self, block: int) -> bool:
        """Whether ``attentions[block // prior_attention_every]`` follows ``blocks[block]`` (from 0)."""
        return len(self.attentions) > 0 and (block + 1) % self.config.prior_attention_every == 0

    def _logits_of(self, feature: Tensor, layer: int, codes_before: Tensor) -> Tensor:
        """The logits of one layer, (..., M), at positions where the last block gave ``feature`` (..., C).

        ``codes_before`` (..., layer) are the codes there of the layers before; ``layer`` counts from 0.
        ``code_order="independent"`` ignores them.
        """
        x = self.norm(feature)
        for parent, codes in zip(self.parents, codes_before.unbind(-1), strict=False):
            x = x + parent(codes)
        logits: Tensor = self.heads[layer](self.mlp(x))
        return logits

    def _inputs_by_layer(self, codes: Tensor) -> Tensor:
        """The input of the first block in every pass: (B n, T, H, W, C), the n passes of a clip one after another."""
        assert self.layer is not None
        layers = self.config.layers
        alone = torch.stack([self._embedded(codes, range(i, i + 1)) for i in range(layers)], 1)
        x: Tensor = self._after_stem(self._embedded(codes), alone.flatten(0, 1)).unflatten(0, (-1, layers))
        x = x + self.layer.weight[:, None, None, None]
        if self.context is not None:
            below = torch.stack([self._embedded(codes, range(i)) for i in range(1, layers)], 1)
            seen: Tensor = self.context(below.flatten(0, 2).movedim(-1, 1))
            seen = seen.movedim(1, -1).unflatten(0, below.shape[:3])
            x = torch.cat((x[:, :1], x[:, 1:] + seen), 1)
        return x.flatten(0, 1)

    def _before(self, past: Tensor, present: Tensor, passes: int) -> Tensor:
        """What ``carry`` takes to every position, zeros where there is none: shaped as ``present``."""
        before: Tensor
        past, flat = past.flatten(2, 3), present.flatten(2, 3)
        if self.config.conditioning == "eq6":
            before = F.pad(past[:, :-1, :-1], (0, 0, 1, 0, 1, 0)).repeat_interleave(passes, 0)
        else:
            last = F.pad(past[:, :-1, -1:], (0, 0, 0, 0, 1, 0)).repeat_interleave(passes, 0)
            before = torch.cat((last, flat[:, :, :-1]), 2)
        before = before.unflatten(2, present.shape[2:4])
        return before

    @torch.no_grad()
    def _start(self) -> None:
        """Features begin with variance 1, to which all residual branches together add little; logits begin small."""
        config, width = self.config, self.config.prior_channels
        for embedding in (*self.embed, *self.parents):
            nn.init.normal_(embedding.weight, std=config.layers**-0.5)
        nn.init.kaiming_normal_(self.mix[1].weight, nonlinearity="relu")  # type: ignore[arg-type]
        entering = [weight for weight in (self.stem.past, self.stem.present) if weight is not None]
        taps = sum(weight[0, 0].numel() for weight in entering) + (self.carry is not None)
        for weight in (*entering, *(() if self.carry is None else (self.carry.weight,))):
            nn.init.normal_(weight, std=(taps * width) ** -0.5)
        branches: list[nn.Linear] = []
        for module in self.modules():
            if isinstance(module, (GatedBlock, AttentionBlock)):
                branches += module.branches
        for branch in branches:
            branch.weight.mul_(len(branches) ** -0.5)
            nn.init.zeros_(branch.bias)

    def _check(self, codes: Tensor) -> None:
        layers, size = self.config.layers, self.config.codebook_size
        if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
            given = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes must be an int64 tensor (B, T, H, W, {layers}), got {given}")
        if codes.dim() != 5 or codes.shape[-1] != layers or 0 in codes.shape[1:4]:
            raise ValueError(
                f"codes must be (B, T, H, W, {layers}), of at least one frame, row and column, got {tuple(codes.shape)}"
            )
        weight = self.norm.weight
        if codes.device != weight.device:
            raise ValueError(f"codes are on {codes.device} and the model on {weight.device}; move one of them")
        if codes.numel() and values_can_be_read(codes):
            low, high = torch.stack(torch.aminmax(codes)).tolist()
            if low < 0 or high >= size:
                raise ValueError(
                    f"codes must lie in 0..{size - 1}, as the codebooks have {size} codewords, got {low}..{high}"
                )


@lru_cache(maxsize=4)
def as_made(config: SHRVQVAEConfig) -> STPixelCNN:
    """The layers of such a network, without weights."""
    with torch.device("meta"):
        return STPixelCNN(config)


class GatedBlock(nn.Module):
    """x + out(tanh(a) sigmoid(b)), where a and b are halves of a masked convolution of norm(x): (B, T, H, W, C)."""

    def __init__(self, config: SHRVQVAEConfig) -> None:
        super().__init__()
        width = config.prior_channels
        self.norm = nn.LayerNorm(width)
        self.conv = MaskedConv3d(width, 2 * width, mask="B", conditioning=config.conditioning)
        self.out = nn.Linear(width, width)

    @property
    def branches(self) -> list[nn.Linear]:
        """The layers whose output is added to x."""
        return [self.out]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(self.norm(x).movedim(-1, 1)).movedim(1, -1).chunk(2, -1)
        added: Tensor = self.out(a.tanh() * b.sigmoid())
        return x + added


class AttentionBlock(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x)): (B, T, H, W, C).

    The features that it attends to do not know the code at their own place, so the mask lets a position see itself.
    ``conditioning="eq6"`` takes the mask ``separable``: a feature at t' <= t and j' <= j knows codes of earlier frames
    before j' only, so that together they are just what Eq. 6 lets (t, j) see. ``"raster"`` and ``"past_frames"`` take
    ``raster``; under the latter it hides, without need, the features of frame t after j, so that of the codes of frame
    t - 1 alone some are out of sight: those further after j than the convolutions reach, one row for each.
    """

    def __init__(self, config: SHRVQVAEConfig) -> None:
        super().__init__()
        width = config.prior_channels
        mask = Mask3d(
            "separable" if config.conditioning == "eq6" else "raster",
            config.attention_window if config.attention == "window" else None,
        )
        axial = config.attention == "axial"
        self.norm1 = nn.LayerNorm(width)
        self.attention = MaskedAttention3d(
            width, config.prior_heads, config.prior_head_dim, mask, axial=axial, positions=False
        )
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, config.prior_ffn), nn.GELU(), nn.Linear(config.prior_ffn, width))

    @property
    def branches(self) -> list[nn.Linear]:
        """The layers whose output is added to x."""
        last: nn.Linear = self.ffn[-1]  # type: ignore[assignment]
        return [self.attention.output, last]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x).movedim(-1, 1)).movedim(1, -1)
        added: Tensor = self.ffn(self.norm2(x))
        return x + added
