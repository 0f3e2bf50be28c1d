"""The codebooks of all layers as one table, and what moves it: averages, restarts, a start from data.

The table is (R, D), layer 1 first, and R = G M: rows g M to g M + M - 1 are one codebook, called group g, that a search
chooses from. In a strict tree the children of row r are group r + 1; else the group of a layer is its place, from 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vpfast.ops import codeword_search, codeword_search_train


class Layout(NamedTuple):
    """How many codebooks there are and which rows they are."""

    codebook_size: int
    layers: int
    strict_tree: bool

    @property
    def sizes(self) -> list[int]:
        """The number of codewords of each layer."""
        return [self.codebook_size ** (layer if self.strict_tree else 1) for layer in range(1, self.layers + 1)]

    def rows(self, indices: Tensor) -> Tensor:
        """Local codes (..., k) of the first k layers -> the rows of the table that they stand for, (..., k)."""
        rows: list[Tensor] = []
        for layer, code in enumerate(indices.long().unbind(-1)):  # a narrow type of codes does not hold rows
            group = rows[-1] + 1 if self.strict_tree and layer else layer
            rows.append(group * self.codebook_size + code)
        return torch.stack(rows, -1)


class Samples(NamedTuple):
    """A few vectors of a batch with what a restart needs of them; the same on every rank."""

    vectors: Tensor
    """(S, D)"""
    indices: Tensor
    """(S, n) int64"""
    luck: Tensor
    """(S, n) uniform in [0, 1): one random number for each layer."""
    valid: Tensor
    """(S,) bool: where there is a vector at all."""


def average_(
    codewords: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    layout: Layout,
    decay: float,
    eps: float,
) -> None:
    """Average how often each row is chosen and, with ``embed_avg``, move the table (R, D) to what chose it, in place.

    cluster_size (R,) and embed_avg (R, D) are exponential moving averages of counts and sums; a codeword is their
    quotient, the sizes of each codebook smoothed by ``eps`` (Laplace). A codebook that no vector reached stays as it
    is, averages included.
    """
    groups = (-1, layout.codebook_size)
    reached = (counts.view(groups).sum(1, keepdim=True) > 0).expand(groups).reshape(-1)
    weight = reached.to(counts.dtype) * (1 - decay)
    cluster_size.lerp_(counts, weight)
    if embed_avg is None:
        return
    embed_avg.lerp_(sums, weight[:, None])
    sizes = cluster_size.view(groups)
    total = sizes.sum(1, keepdim=True)
    smoothed = ((sizes + eps) / (total + layout.codebook_size * eps) * total).view(-1, 1)
    codewords.copy_(torch.where(reached[:, None], embed_avg / smoothed, codewords))


def restart_(
    codewords: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    counts: Tensor,
    samples: Samples,
    searched: Tensor,
    layout: Layout,
    threshold: float,
) -> None:
    """Put dead codewords onto residuals that their codebook was searched for in this batch, in place.

    Dead is a row whose average ``cluster_size`` is below ``threshold`` and that no vector of the batch chose. Each
    takes another of the samples, with a probability proportional to the squared error that the layer leaves there;
    where a codebook has fewer samples than dead codewords, the rest waits. ``searched`` is the table that the codes of
    the samples are of.
    """
    dead = (cluster_size < threshold) & (counts == 0)
    rows = layout.rows(samples.indices)
    vectors = samples.vectors[:, None]
    after = vectors - searched[rows].cumsum(1)
    before = torch.cat((vectors, after[:, :-1]), 1)
    error = after.square().sum(2) * samples.valid[:, None]
    taken, source = _assign(dead.view(-1, layout.codebook_size), rows // layout.codebook_size, error, samples.luck)
    fresh = before.flatten(0, 1)[source]
    codewords.copy_(torch.where(taken[:, None], fresh, codewords))
    cluster_size.masked_fill_(taken, threshold)
    if embed_avg is not None:
        embed_avg.copy_(torch.where(taken[:, None], fresh * threshold, embed_avg))


def _assign(vacant: Tensor, groups: Tensor, weights: Tensor, luck: Tensor) -> tuple[Tensor, Tensor]:
    """Which vacant row takes which candidate of its group, each candidate once at most.

    Candidates, of any shape, are drawn without replacement by ``weights``: of exponential variables with these rates
    the smallest come first. A weight of 0 is no candidate.

    Args:
        vacant: (G, M) bool.
        groups: of each candidate the group that it is in, int64.
        weights: of each candidate, not negative.
        luck: of each candidate, uniform in [0, 1).

    Returns:
        taken (G M,) bool, and source (G M,), the place of the candidate among all; any place where nothing is taken.
    """
    arrival = (-torch.log1p(-luck) / weights).flatten()
    order = arrival.argsort()
    place = torch.where(weights > 0, groups, len(vacant)).flatten()[order]
    place, by_group = place.sort(stable=True)
    order = order[by_group]
    every_group = torch.arange(len(vacant), device=place.device)
    first = torch.searchsorted(place, every_group)[:, None]
    last = torch.searchsorted(place, every_group, right=True)[:, None]
    candidate = first + vacant.cumsum(1) - 1
    taken = vacant & (candidate < last)
    return taken.flatten(), order[candidate.clamp(0, len(order) - 1).flatten()]


def kmeans(z: Tensor, codewords: Tensor, layout: Layout, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means of the vectors z (S, D), S > 0, layer by layer, each codebook on the residuals of its parent.

    A codebook starts from vectors drawn at random; a codeword that wins nothing is put onto a vector, drawn by its
    squared error. Codewords that there is no vector for stay as they are in ``codewords`` (R, D).

    Returns:
        the new table (R, D) and how many vectors choose each row of it, (R,).
    """
    tables = list(codewords.split(layout.sizes))
    residual, path = z, torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for layer, start in enumerate(tables):
        everyone = torch.ones_like(start[:, 0], dtype=torch.bool)
        centres = _put(start, everyone, residual, path, torch.ones_like(z[:, 0]), layout)
        for _ in range(iterations):
            found = codeword_search_train(z, [*tables[:layer], centres], layout.strict_tree)
            counts, sums = found.counts[-len(centres) :], found.sums[-len(centres) :]
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
            error = (z - found.quantized).square().sum(1)
            centres = _put(centres, counts == 0, residual, path, error, layout)
        tables[layer] = centres
        quantized, indices = codeword_search(z, tables[: layer + 1], layout.strict_tree)
        residual = z - quantized
        path = path * layout.codebook_size + indices[:, layer] if layout.strict_tree else path
    return torch.cat(tables), codeword_search_train(z, tables, layout.strict_tree).counts


def _put(centres: Tensor, vacant: Tensor, residual: Tensor, path: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    taken, source = _assign(vacant.view(-1, layout.codebook_size), path, weights, torch.rand_like(weights))
    return torch.where(taken[:, None], residual[source], centres)
