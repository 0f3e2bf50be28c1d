"""Vector quantization in layers, each on what the layers before it left over (S-HR-VQVAE paper, Eq. 3-5)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._codebook_operators import share_statistics, snapshot, start_codebooks
from vpfast.nn._codebooks import Layout, average_, restart_
from vpfast.nn._common import check_choice, check_counts
from vpfast.ops import CodewordSearchTraining, codeword_search, codeword_search_train
from vpfast.ops._backend import is_differentiated, is_transformed

Reduction = Literal["mean", "sum"]

_OWNER = "HierarchicalResidualVQ"
_MOST_LAYERS = 16
_MOST_CODEWORDS = 2**24
"""Of all layers: beyond it float32 counts no longer tell one vector more, and a tree this large is a mistake."""
_RESTART_SAMPLES = 2048
"""Vectors of a batch, over all ranks, that dead codewords can restart from: at most as many restart in a step."""


class LossBreakdown(NamedTuple):
    """The terms of Eq. 4-5 without their weights, each over all vectors, reduced as ``loss_reduction`` says."""

    codebook: Tensor
    """(n,): |sg[xi^(i-1)] - e^i|^2 of each layer."""
    commitment: Tensor
    """(n,): |xi^(i-1) - sg[e^i]|^2 of each layer."""
    combined: Tensor
    """(): |sg[z] - e_C|^2."""
    combined_commitment: Tensor
    """(): |z - sg[e_C]|^2."""


class HierarchicalResidualVQ(nn.Module):
    """Vector quantization in n layers: replaces each vector by a sum of n codewords, in one kernel.

    Layer i takes the codeword nearest to the residual xi^(i-1) = z - e^1 - ... - e^(i-1) (Eq. 3). In a strict tree it
    searches only the codebook that belongs to the codeword of layer i - 1; with ``strict_tree=False`` every layer has
    one codebook, which is residual vector quantization, and with one layer plain vector quantization.

    Arguments, defaults and returned shapes are those of ``ResidualVQ`` of vector-quantize-pytorch, where it has them,
    and so are the codes, the averaged codebooks and the losses of ``ema_update``. Other than there, the gradient of a
    vector passes straight through once (not n-fold, and not rotated); learnable codebooks have a loss of their own
    (Eq. 5) beside the commitment; and a codeword that a vector of the batch chose is never restarted. A codebook of the
    tree that no vector of a batch reaches keeps its codewords and averages.

    Args:
        dim: D, the size of a vector.
        codebook_size: M, the codewords in a codebook, at least 2.
        num_quantizers: n, the layers, 1 to 16.
        strict_tree: whether the codeword of a layer decides which codebook the next one searches. Layer i then holds
            M^i codewords.
        decay: of the moving averages of codebooks and cluster sizes.
        eps: added to cluster sizes (Laplace smoothing within a codebook).
        commitment_weight: beta, of the commitment loss; one number, or one a layer, in an array or tensor too.
        kmeans_init: start from k-means of the first training batch, of 65,536 of its vectors at most, each codebook on
            the residuals of its parent. Until then, and without it, codewords are uniform in +-1/M. To start again,
            call :meth:`reset_parameters`; the buffer ``started`` records a start and is not looked at in every step.
        kmeans_iters: Lloyd iterations of that.
        threshold_ema_dead_code: a codeword that fewer vectors a batch choose, on average, and none of this batch, is
            put onto a residual that its codebook was searched for. 0 turns that off. 2,048 restart in a step at most.
            The average is over all ranks, and over the batches that reached the codebook.
        accept_image_fmap: take maps, (B, D, H, W) or (B, D, T, H, W).
        channel_last: where the D of (B, N, D) is; if False, take (B, D, N).
        ema_update: codebooks follow the average of what they were chosen by. None: where they are not learnable.
        learnable_codebook: codebooks are a parameter that the losses train.
        sync_codebook: statistics, start and restarts are those of all ranks, where torch.distributed has a process
            group at the time of the call. Then every rank makes the same calls, with any number of vectors, even none.
        combined_loss: Eq. 4's pair for the sum of the codewords e_C, in the last layer's loss.
        combined_commitment_weight: beta_0, of the second of that pair.
        loss_reduction: ``"mean"`` over vectors and dimensions, or ``"sum"``.
        attached_residual: the residual in the commitment losses carries the gradient of the codewords before it.

    Attributes:
        codewords: (R, D), the codebooks of all layers, layer 1 first; a parameter if learnable, else a buffer. It and
            the statistics beside it stay float32 when the module is cast to half precision.

    ``torch.compile(fullgraph=True)`` takes it in training and evaluation, ``torch.export`` in evaluation. Nothing waits
    for the device but the k-means of the first batch. In training mode codebooks move in the forward pass, under
    ``torch.no_grad`` too, as BatchNorm's statistics do.

    Activation checkpointing (``torch.utils.checkpoint``) would search codebooks that have moved since the first run,
    and give the gradients of other codewords: averages and restarts refuse it. Checkpoint what is before and behind the
    quantizer, or call it with ``freeze_codebook=True``. Codebooks that do neither can be checkpointed.

    Raises:
        ValueError: a value that cannot be, more than 2^24 codewords, or codebooks both averaged and learnable.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        *,
        strict_tree: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        commitment_weight: float | Iterable[float] = 1.0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0,
        accept_image_fmap: bool = False,
        channel_last: bool = True,
        ema_update: bool | None = None,
        learnable_codebook: bool = False,
        sync_codebook: bool = True,
        combined_loss: bool = False,
        combined_commitment_weight: float = 0.25,
        loss_reduction: Reduction = "mean",
        attached_residual: bool = False,
    ) -> None:
        super().__init__()
        check_counts(_OWNER, dim=dim, num_quantizers=num_quantizers)
        check_counts(_OWNER, lowest=2, codebook_size=codebook_size)
        check_counts(_OWNER, lowest=0, kmeans_iters=kmeans_iters)
        check_choice(_OWNER, "loss_reduction", loss_reduction, get_args(Reduction))
        if not eps > 0:
            raise ValueError(f"{_OWNER}: eps must be positive, got {eps}")
        _check_not_negative(
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            combined_commitment_weight=combined_commitment_weight,
        )
        if not 0 <= decay <= 1:
            raise ValueError(f"{_OWNER}: decay must be in [0, 1], got {decay}")
        if ema_update and learnable_codebook:
            raise ValueError(f"{_OWNER}: codebooks are averaged or learnable; got ema_update and learnable_codebook")
        _check_layers(codebook_size, num_quantizers, strict_tree)
        self.dim = int(dim)
        self.codebook_size = int(codebook_size)
        self.num_quantizers = int(num_quantizers)
        self.strict_tree = strict_tree
        self.layout = Layout(self.codebook_size, self.num_quantizers, strict_tree)
        self.decay = float(decay)
        self.eps = float(eps)
        self.commitment_weight = _one_a_layer(commitment_weight, num_quantizers)
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.threshold_ema_dead_code = float(threshold_ema_dead_code)
        self.accept_image_fmap = accept_image_fmap
        self.channel_last = channel_last
        self.ema_update = not learnable_codebook if ema_update is None else ema_update
        self.learnable_codebook = learnable_codebook
        self.sync_codebook = sync_codebook
        self.combined_loss = combined_loss
        self.combined_commitment_weight = float(combined_commitment_weight)
        self.loss_reduction = loss_reduction
        self.attached_residual = attached_residual

        rows, dtype = sum(self.layout.sizes), _wide_enough(torch.get_default_dtype())
        self.codewords: Tensor
        if learnable_codebook:
            self.codewords = nn.Parameter(torch.empty(rows, dim, dtype=dtype))
        else:
            self.register_buffer("codewords", torch.empty(rows, dim, dtype=dtype))
        self.cluster_size: Tensor
        self.register_buffer("cluster_size", torch.empty(rows, dtype=dtype))
        self.embed_avg: Tensor | None
        self.register_buffer("embed_avg", torch.empty(rows, dim, dtype=dtype) if self.ema_update else None)
        self.started: Tensor
        self.register_buffer("started", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codewords uniform in +-1/M, and statistics as if one vector had chosen each. With ``kmeans_init`` the next
        training batch starts them again."""
        self.codewords.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        self.cluster_size.fill_(1)
        if self.embed_avg is not None:
            self.embed_avg.copy_(self.codewords)
        self.started.fill_(not self.kmeans_init)
        self._may_start = self.kmeans_init

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The n codebooks: (M^i, D) in layer i from 1, row = parent's row M + local code; (M, D) without the tree."""
        return tuple(self.codewords.split(self.layout.sizes))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        return_loss_breakdown: bool = False,
        freeze_codebook: bool = False,
    ) -> tuple[Any, ...]:
        """Quantize every vector of ``x``; in training mode move the codebooks, too.

        Args:
            x: (*, D); with ``channel_last=False`` (B, D, *); with ``accept_image_fmap`` (B, D, H, W) or
                (B, D, T, H, W), a view and not a copy where it is channels_last. float32, float16 or bfloat16, or
                float64 beside a float64 module.
            mask: bool, of the shape of x without D: vectors where it is False take no part. They are quantized to 0,
                with indices of -1. How many take part depends on values, so fullgraph compilation refuses it.
            return_all_codes: return each layer's codewords.
            return_loss_breakdown: return the terms of the losses.
            freeze_codebook: in training mode, leave the codebooks as they are and without gradient.

        Returns:
            ``quantized``, of the shape of ``x``, channels_last for maps. In training its gradient goes to ``x`` as it
            is; in evaluation to learnable codebooks, and ``x`` has none.

            ``indices`` int64, (*, n): 0 to M - 1 in the codebook that was searched.

            ``losses`` (n,): in training each layer's codebook loss where codebooks learn, and commitment loss times its
            weight; the combined pair is part of the last. Their sum is what to train on. Zeros in evaluation. float32,
            or float64.

            Then, where asked for, codewords (n, *, D) and the :class:`LossBreakdown`, in this order.

        A vector with NaN or infinity gets indices 0, quantized NaN and makes the losses NaN; it moves no average and no
        restart.

        Raises:
            TypeError: no tensor, or a type that does not go with the codebooks; a mask that is not bool.
            ValueError: another shape or device.
            RuntimeError: averages or restarts within a backward pass, where activation checkpointing calls again.
        """
        vectors, shape = self._vectors(x)
        if mask is not None:
            self._check_mask(mask, x, shape)
            mask = mask.reshape(-1)
        kept = vectors if mask is None else vectors[mask]
        if self.training:
            quantized, indices, losses, breakdown = self._train_step(kept, freeze_codebook)
        else:
            table = self._kept_for_backward(self.codewords, kept)
            quantized, indices = codeword_search(kept, table.split(self.layout.sizes), self.strict_tree)
            losses = self.codewords.new_zeros(self.num_quantizers)
            breakdown = LossBreakdown(losses.clone(), losses.clone(), losses.new_zeros(()), losses.new_zeros(()))
        if mask is not None:
            quantized, indices = _spread_out(quantized, mask, 0), _spread_out(indices, mask, -1)
        indices = indices.reshape(*shape, self.num_quantizers)
        returned: tuple[Any, ...] = (self._as_given(quantized.reshape(*shape, self.dim)), indices, losses)
        if return_all_codes:
            returned += (self._codes(indices),)
        if return_loss_breakdown:
            returned += (breakdown,)
        return returned

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices (*, k) of all layers, or of the first k, -> their codewords (k, *, D), layer by layer.

        An index of -1, as a mask gives it, stands for a codeword of zeros, and in a strict tree ends the path.

        Raises:
            TypeError: indices that are no integer tensor.
            ValueError: more layers than there are, or an index outside -1 to M - 1. Values are not looked at under
                torch.compile and torch.export, and within a transform of torch.func.
        """
        self._check_indices(indices)
        return self._codes(indices)

    def get_output_from_indices(self, indices: Tensor, layers: int | None = None) -> Tensor:
        """Indices (*, k) -> the sum of their codewords: (*, D), or with the dimension first where ``x`` has it first.

        ``layers`` decodes from that many first layers alone. Errors as in :meth:`get_codes_from_indices`.
        """
        self._check_indices(indices)
        if layers is not None:
            if not 1 <= layers <= indices.shape[-1]:
                raise ValueError(
                    f"{_OWNER}: layers must be 1 to {indices.shape[-1]}, as the indices have, got {layers}"
                )
            indices = indices[..., :layers]
        codes = self._codes(indices)
        return self._as_given(sum(codes[1:], codes[0]))

    def usage(self, indices: Tensor) -> Tensor:
        """Of each layer the share of its codewords, over all its codebooks, that occur in ``indices`` (*, k): (k,)."""
        return torch.stack([(count > 0).float().mean() for count in self._counts(indices)])

    def perplexity(self, indices: Tensor) -> Tensor:
        """Of each layer the perplexity of its codewords, over all its codebooks, in ``indices`` (*, k): (k,).

        1 where all vectors share one codeword, the number of the layer's codewords where each is as frequent.
        """
        shares = [count / count.sum().clamp(min=1) for count in self._counts(indices)]
        return torch.stack([torch.special.entr(share).sum().exp() for share in shares])

    def extra_repr(self) -> str:
        update = "averaged" if self.ema_update else "learnable" if self.learnable_codebook else "fixed"
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, num_quantizers={self.num_quantizers}, "
            f"strict_tree={self.strict_tree}, {update} codebooks"
        )

    # --- one step of training -----------------------------------------------------------------------------------------

    def _train_step(self, z: Tensor, freeze: bool) -> tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        table = self.codewords
        moves = not freeze and (self.ema_update or self.threshold_ema_dead_code > 0)
        if not freeze:
            self._start(z)
        if freeze:
            table = table.detach()
        table = snapshot(table, moves=True) if moves else self._kept_for_backward(table, z)
        found = codeword_search_train(z, table.split(self.layout.sizes), self.strict_tree, self.attached_residual)
        if moves:
            self._move(z.detach(), found, table.detach())
        losses, breakdown = self._losses(found, z.numel(), self.learnable_codebook and not freeze)
        return found.quantized, found.indices, losses, breakdown

    def _kept_for_backward(self, table: Tensor, z: Tensor) -> Tensor:
        """The codewords that a search in ``table`` for ``z`` is to read: a copy if another step may move the table
        before backward reads them again. In an exported program nothing moves, and torch.func has its gradients when it
        returns."""
        moves_later = self.ema_update or self.threshold_ema_dead_code > 0 or self._may_start
        if not moves_later or not torch.is_grad_enabled() or not (z.requires_grad or table.requires_grad):
            return table
        return table if torch.compiler.is_exporting() or is_differentiated(z, table) else snapshot(table, moves=False)

    @torch.no_grad()
    def _start(self, z: Tensor) -> None:
        """Data-dependent start. Whether it is due stands in ``started``, which a check-point or another rank may set;
        the number beside it saves looking there in every step."""
        if not self._may_start:
            return
        start_codebooks(
            self.codewords.detach(),
            self.cluster_size,
            self.embed_avg,
            self.started,
            z.detach(),
            *self.layout,
            self.kmeans_iters,
            self.sync_codebook,
        )
        self._may_start = z.shape[0] == 0

    @torch.no_grad()
    def _move(self, z: Tensor, found: CodewordSearchTraining, searched: Tensor) -> None:
        """Averages and restarts, from the statistics of all ranks."""
        restarts = self.threshold_ema_dead_code > 0
        counts, sums, samples = share_statistics(
            found.counts,
            found.sums if self.ema_update else found.sums[:, :0],
            z,
            found.indices,
            _RESTART_SAMPLES if restarts else 0,
            self.sync_codebook,
        )
        average_(self.codewords, self.cluster_size, self.embed_avg, counts, sums, self.layout, self.decay, self.eps)
        if restarts:
            restart_(
                self.codewords,
                self.cluster_size,
                self.embed_avg,
                counts,
                samples,
                searched,
                self.layout,
                self.threshold_ema_dead_code,
            )

    def _losses(self, found: CodewordSearchTraining, numbers: int, learn: bool) -> tuple[Tensor, LossBreakdown]:
        """Eq. 4-5, per layer."""
        divisor = max(numbers, 1) if self.loss_reduction == "mean" else 1
        codebook, commitment, combined = (
            loss / divisor for loss in (found.codebook_losses, found.commitment_losses, found.combined_loss)
        )
        combined_commitment = commitment[-1]
        if self.attached_residual:  # the last commitment loss, without its gradient to codewords: they cancel exactly
            combined_commitment = combined_commitment + (codebook[-1] - combined)
        losses = torch.stack([w * loss for w, loss in zip(self.commitment_weight, commitment.unbind(), strict=True)])
        if learn:
            losses = losses + codebook
        if self.combined_loss:
            pair = self.combined_commitment_weight * combined_commitment
            pair = pair + combined if learn else pair
            losses = losses + F.pad(pair[None], (self.num_quantizers - 1, 0))
        return losses, LossBreakdown(codebook, commitment, combined, combined_commitment)

    # --- layouts and indices ------------------------------------------------------------------------------------------

    @property
    def _channel_first(self) -> bool:
        return self.accept_image_fmap or not self.channel_last

    def _vectors(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """-> (N, D) and the shape without D. A view where strides allow it."""
        self._check_input(x)
        if self._channel_first:
            x = x.movedim(1, -1)
        return x.reshape(-1, self.dim), x.shape[:-1]

    def _as_given(self, quantized: Tensor) -> Tensor:
        return quantized.movedim(-1, 1) if self._channel_first else quantized

    def _codes(self, indices: Tensor) -> Tensor:
        absent = indices < 0
        if self.strict_tree:
            absent = absent.cumsum(-1) > 0
        rows = self.layout.rows(indices.masked_fill(absent, 0))
        return self.codewords[rows].masked_fill(absent[..., None], 0).movedim(-2, 0)

    def _counts(self, indices: Tensor) -> list[Tensor]:
        """How often each codeword occurs, a tensor a layer."""
        self._check_indices(indices)
        absent = indices < 0
        nowhere = sum(self.layout.sizes)
        rows = self.layout.rows(indices.masked_fill(absent, 0)).masked_fill(absent, nowhere)
        counts = torch.bincount(rows.flatten(), minlength=nowhere + 1)[:-1]
        return list(counts.split(self.layout.sizes)[: indices.shape[-1]])

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OWNER} takes a tensor, got {type(x).__name__}")
        D = self.dim
        if self.accept_image_fmap:
            wanted, axis, fits = f"(B, {D}, H, W) or (B, {D}, T, H, W)", 1, x.dim() in (4, 5)
        elif self._channel_first:
            wanted, axis, fits = f"(B, {D}, *)", 1, x.dim() >= 2
        else:
            wanted, axis, fits = f"(*, {D})", -1, x.dim() >= 1
        if not fits or x.shape[axis] != D:
            raise ValueError(
                f"{_OWNER} takes vectors of shape {wanted}, got {tuple(x.shape)}; accept_image_fmap and channel_last "
                "say where the dimension is"
            )
        codewords = self.codewords
        if x.device != codewords.device:
            raise ValueError(f"{_OWNER}: the input is on {x.device}, the codebooks on {codewords.device}; move one")
        half = x.dtype in (torch.float16, torch.bfloat16)
        if x.dtype != codewords.dtype and not (half and codewords.dtype == torch.float32):
            raise TypeError(
                f"{_OWNER}: the input is {x.dtype} and the codebooks are {codewords.dtype}; give them one type, or "
                "half precision beside float32 codebooks"
            )

    def _check_mask(self, mask: Tensor, x: Tensor, shape: torch.Size) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{_OWNER}: mask must be a bool tensor of shape {tuple(shape)}, got {found}")
        if mask.shape != shape or mask.device != x.device:
            raise ValueError(
                f"{_OWNER}: mask must have shape {tuple(shape)} beside this input, on {x.device}, got "
                f"{tuple(mask.shape)} on {mask.device}"
            )

    def _check_indices(self, indices: Tensor) -> None:
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
            found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"{_OWNER}: indices must be an integer tensor, got {found}")
        if indices.dim() < 1 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"{_OWNER}: indices must be (*, k), k the number of layers, 1 to {self.num_quantizers}, got "
                f"{tuple(indices.shape)}"
            )
        if torch.compiler.is_compiling() or is_transformed(indices) or indices.numel() == 0:
            return
        lowest, highest = (int(bound) for bound in torch.aminmax(indices))
        if lowest < -1 or highest >= self.codebook_size:
            raise ValueError(
                f"{_OWNER}: indices must be 0 to {self.codebook_size - 1}, or -1 for no codeword, got values from "
                f"{lowest} to {highest}"
            )

    # --- what nn.Module asks for --------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HierarchicalResidualVQ":
        """Codebooks and averages stay float32 where the module is cast to half precision: sums would overflow in it."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = _wide_enough(moved.dtype)
            return moved if moved.dtype == wide else tensor.to(moved.device, wide)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Values of half precision become float32 where they are assigned, not copied, too."""
        halved = {
            name: value.detach().to(wide)
            for name, value in state_dict.items()
            if isinstance(value, Tensor) and value.dtype != (wide := _wide_enough(value.dtype))
        }
        super()._load_from_state_dict({**state_dict, **halved}, prefix, *args)  # type: ignore[no-untyped-call]
        self._may_start = self.kmeans_init


def _wide_enough(dtype: torch.dtype) -> torch.dtype:
    """The type of codebooks and averages in a module of type ``dtype``: float32 for half precision."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _spread_out(kept: Tensor, mask: Tensor, value: int) -> Tensor:
    """(K, columns) -> (N, columns): the rows where the mask (N,) is True, ``value`` elsewhere."""
    return kept.new_full((len(mask), kept.shape[1]), value).masked_scatter(mask[:, None], kept)


def _one_a_layer(weight: float | Iterable[float], layers: int) -> tuple[float, ...]:
    given = weight.tolist() if hasattr(weight, "tolist") else weight
    try:
        weights = tuple(map(float, given)) if isinstance(given, Iterable) else (float(given),) * layers
    except (TypeError, ValueError):
        weights = ()
    if len(weights) != layers:
        raise ValueError(f"{_OWNER}: commitment_weight must be one number or {layers}, one a layer, got {weight!r}")
    for one in weights:
        _check_not_negative(commitment_weight=one)
    return weights


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{_OWNER}: {name} must be a finite number of at least 0, got {value}")


def _check_layers(codebook_size: int, layers: int, strict_tree: bool) -> None:
    if layers > _MOST_LAYERS:
        raise ValueError(f"{_OWNER}: num_quantizers must be at most {_MOST_LAYERS}, got {layers}")
    codewords = sum(Layout(codebook_size, layers, strict_tree).sizes)
    if codewords > _MOST_CODEWORDS:
        instead = f"; strict_tree=False makes it {codebook_size * layers:,}" if strict_tree else ""
        raise ValueError(
            f"{_OWNER}: {layers} layers of {codebook_size} are {codewords:,} codewords with strict_tree={strict_tree}; "
            f"at most {_MOST_CODEWORDS:,} are possible{instead}"
        )
