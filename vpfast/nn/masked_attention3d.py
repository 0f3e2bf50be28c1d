"""Multi-head self-attention over the positions of a clip under a causal rule, for whole clips and step by step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vpfast.nn._common import as_integer, check_counts, check_type, check_volumes
from vpfast.nn.positions import sinusoidal_positions
from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode

Grid = tuple[int, int, int]


class AttentionCache(NamedTuple):
    """The keys and values that :meth:`MaskedAttention3d.extend` has computed so far.

    ``keys`` and ``values`` (B, heads, T H W, head_dim) hold anything where nothing has been written. ``grid``: (T, H,
    W). ``positions`` (T H W, dim): what is added to the input; None where the module adds nothing.
    """

    keys: Tensor
    values: Tensor
    grid: Grid
    positions: Tensor | None


class MaskedAttention3d(nn.Module):
    """Self-attention of maps (B, dim, T, H, W) under a mask of rules on (t, y, x), in O(T H W) memory.

    One linear layer, ``qkv``, computes queries, keys and values; another, ``output``, maps the heads back to ``dim``.
    There is no normalisation and no residual.

    Args:
        dim: channels of input and output.
        heads: attention heads.
        head_dim: channels of a head; ``dim // heads`` when None.
        mask: a :class:`vpfast.ops.Mask3d`, or the name of one without window.
        axial: heads 0, 3, 6.. look along time alone, 1, 4.. along their column, 2, 5.. along their row, within the
            mask and its window.
        positions: add :func:`sinusoidal_positions` to the input; False where its features hold them already.
        bias: whether the two linear layers have one.

    Raises:
        TypeError: ``mask`` is neither a name nor a Mask3d.
        ValueError: a size below 1, an unknown mask, or no ``head_dim`` given and more heads than channels.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        head_dim: int | None = None,
        mask: str | Mask3d = "raster",
        axial: bool = False,
        positions: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_counts(_OWNER, dim=dim, heads=heads)
        if head_dim is None and heads > dim:
            raise ValueError(f"{_OWNER}: {dim} channels do not share out among {heads} heads; give head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        check_counts(_OWNER, head_dim=head_dim)
        if not isinstance(mask, (str, Mask3d)):
            raise TypeError(f"{_OWNER}: mask must be a vpfast.ops.Mask3d or the name of one, got {mask!r}")
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.mask = Mask3d(mask) if isinstance(mask, str) else mask
        self.axial, self.positions = axial, positions
        self.masks = _along_axes(self.mask)[:heads] if axial else [self.mask]
        grouped = sorted(range(heads), key=lambda head: (head % len(self.masks), head))
        self._ungrouped = sorted(range(heads), key=grouped.__getitem__)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=bias)
        self.output = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, T, H, W) -> (B, dim, T, H, W), position-major in memory; input of that layout is read as it is.

        A position that sees nothing gives the bias of ``output``.

        Raises:
            TypeError: not floating point, or another type than the weights outside of autocast.
            ValueError: another shape, an empty grid, or another device.
        """
        check_volumes(_OWNER, x, self.dim, self.qkv.weight)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        x = x.movedim(1, -1)
        if self.positions:
            x = x + sinusoidal_positions(grid, self.dim, x.dtype, x.device)
        q, k, v = self._project(x.flatten(1, 3))
        attended = self._by_axis(lambda mask, q, k, v: masked_attention3d(q, k, v, grid, mask), q, k, v)
        out: Tensor = self._merge(attended).unflatten(1, grid)
        return out.movedim(-1, 1)

    def init_cache(self, batch: int, grid: Grid) -> AttentionCache:
        """An empty cache for ``batch`` clips of (T, H, W) positions, in the type and on the device of the weights."""
        check_counts(_OWNER, lowest=0, batch=batch)
        if len(grid) != 3 or not all((as_integer(size) or 0) > 0 for size in grid):
            raise ValueError(f"{_OWNER}: grid must be (T, H, W), three positive integers, got {grid!r}")
        weight = self.qkv.weight
        times, height, width = grid
        shape = (batch, self.heads, times * height * width, self.head_dim)
        # Two tensors and no views of one: a trace, which turns writing into copying, keeps an open batch open only so.
        keys, values = weight.new_empty(shape), weight.new_empty(shape)
        encoding = None
        if self.positions:
            encoding = sinusoidal_positions((times, height, width), self.dim, weight.dtype, weight.device).flatten(0, 2)
        return AttentionCache(keys, values, (times, height, width), encoding)

    @torch.no_grad()
    def extend(self, x: Tensor, positions: Tensor, cache: AttentionCache) -> Tensor:
        """The output at a few positions, whose keys and values are written into ``cache`` first, in place.

        Called in any order in which a position comes after all those that it sees, or together with them, it gives the
        rows of ``forward`` on the whole clip. For inference: no gradient.

        Args:
            x: (B, n, dim), the input at ``positions``.
            positions: (n,) int64 on the device of ``x``: raster positions in the grid of the cache, no two alike.
            cache: of :meth:`init_cache`, for the same B.

        Returns:
            (B, n, dim).

        Raises:
            TypeError: positions that are no int64 tensor, or input of another type than the weights.
            ValueError: shapes that do not fit; the message holds them.
            IndexError: a position outside of the grid.
        """
        self._check_extension(x, positions, cache)
        q, k, v = self._project(x if cache.positions is None else x + cache.positions[positions])
        _write(cache, positions, k, v)
        attended = self._by_axis(
            lambda mask, q, k, v: masked_attention3d_decode(q, k, v, cache.grid, positions, mask),
            *(q, cache.keys, cache.values),
        )
        return self._merge(attended)

    @torch.no_grad()
    def keep(self, x: Tensor, positions: Tensor, cache: AttentionCache) -> None:
        """Write keys and values as :meth:`extend` does, for positions whose output is known or of no interest.

        Arguments and errors of :meth:`extend`.
        """
        self._check_extension(x, positions, cache)
        _, k, v = self._project(x if cache.positions is None else x + cache.positions[positions])
        _write(cache, positions, k, v)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, head_dim={self.head_dim}, mask={self.mask}, axial={self.axial}, "
            f"positions={self.positions}"
        )

    def _check_extension(self, x: Tensor, positions: Tensor, cache: AttentionCache) -> None:
        batch = cache.keys.shape[0]
        if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
            given = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"{_OWNER}: positions must be an int64 tensor, got {given}")
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OWNER}: extend takes a tensor ({batch}, n, {self.dim}), got {type(x).__name__}")
        if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != self.dim or positions.shape != x.shape[1:2]:
            raise ValueError(
                f"{_OWNER}: extend takes x ({batch}, n, {self.dim}) and positions (n,) beside this cache, got "
                f"{tuple(x.shape)} and {tuple(positions.shape)}"
            )
        check_type(_OWNER, x, self.qkv.weight)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, dim) -> q, k, v, each (B, heads, n, head_dim), views of one tensor."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).movedim(1, 3).unbind(1)
        return q, k, v

    def _by_axis(self, attend: Callable[[Mask3d, Tensor, Tensor, Tensor], Tensor], *qkv: Tensor) -> Tensor:
        """``attend`` for all heads at once, or for those of each axis with the mask along it."""
        if not self.axial:
            return attend(self.mask, *qkv)
        step = len(self.masks)
        parts = [attend(mask, *(heads[:, axis::step] for heads in qkv)) for axis, mask in enumerate(self.masks)]
        heads = torch.cat(parts, dim=1).unbind(1)
        # Not by a list as index, which is copied from the host: a CUDA graph cannot record that.
        return torch.stack([heads[head] for head in self._ungrouped], dim=1)

    def _merge(self, attended: Tensor) -> Tensor:
        """(B, heads, n, head_dim) -> (B, n, dim)."""
        merged: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return merged


def _write(cache: AttentionCache, positions: Tensor, k: Tensor, v: Tensor) -> None:
    cache.keys.index_copy_(2, positions, k.to(cache.keys.dtype))
    cache.values.index_copy_(2, positions, v.to(cache.values.dtype))


_OWNER = "MaskedAttention3d"


def _along_axes(mask: Mask3d) -> list[Mask3d]:
    """The mask cut down to the line through the query: along time, along its column, along its row."""
    window = mask.window or (None, None, None)
    t, y, x = window
    return [Mask3d(mask.name, (t, 0, 0)), Mask3d(mask.name, (0, y, 0)), Mask3d(mask.name, (0, 0, x))]
