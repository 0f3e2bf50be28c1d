"""What a compiler must not look into: a copy, a start from data, and what the ranks of torch.distributed share.

A process group is looked for when an operator runs. Every rank makes the same calls with buffers of the same size,
whatever number of vectors it holds, none included.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vpfast.nn._codebooks import Layout, Samples, kmeans

START_SAMPLES = 2**16
"""How many vectors of the first batch, over all ranks, k-means looks at."""


def share_statistics(
    counts: Tensor, sums: Tensor, z: Tensor, indices: Tensor, samples: int, synchronize: bool
) -> tuple[Tensor, Tensor, Samples]:
    """Counts (R,) and sums (R, *) over all ranks, and up to ``samples`` of all ranks' vectors z (N, D) and codes."""
    totals, drawn = torch.ops.vpfast.share_statistics(counts, sums, z, indices, samples, synchronize)
    D, n = z.shape[1], indices.shape[1]
    valid, vectors, codes, luck = drawn.split((1, D, n, n), 1)
    return totals[:, 0], totals[:, 1:], Samples(vectors, codes.long(), luck, valid[:, 0] > 0)


@torch.library.custom_op("vpfast::share_statistics", mutates_args=())
def _share_statistics(
    counts: Tensor, sums: Tensor, z: Tensor, indices: Tensor, samples: int, synchronize: bool
) -> tuple[Tensor, Tensor]:
    ranks = _ranks(synchronize)
    totals = torch.cat((counts[:, None], sums), 1)
    if ranks > 1:
        dist.all_reduce(totals)
    share = -(-samples // ranks)
    picks = _spread(z, share)
    valid = z[picks].isfinite().all(1, keepdim=True)
    luck = torch.rand_like(indices[picks], dtype=totals.dtype)
    drawn = torch.cat([part.to(totals.dtype) for part in (valid, z[picks], indices[picks], luck)], 1)
    everyones = _gather(drawn.where(valid, 0), share, ranks)[:samples]
    return totals, F.pad(everyones, (0, 0, 0, samples - len(everyones)))


@_share_statistics.register_fake
def _(
    counts: Tensor, sums: Tensor, z: Tensor, indices: Tensor, samples: int, synchronize: bool
) -> tuple[Tensor, Tensor]:
    columns = 1 + z.shape[1] + 2 * indices.shape[1]
    return counts.new_empty(len(counts), 1 + sums.shape[1]), counts.new_empty(samples, columns)


@torch.library.custom_op("vpfast::start_codebooks", mutates_args=("codewords", "cluster_size", "embed_avg", "started"))
def start_codebooks(
    codewords: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor | None,
    started: Tensor,
    z: Tensor,
    codebook_size: int,
    layers: int,
    strict_tree: bool,
    iterations: int,
    synchronize: bool,
) -> None:
    """Put the table (R, D) onto the k-means of z (N, D) of all ranks, once: ``started`` says that it was, and is set.

    Without a single vector, and where ``started`` is true already, nothing changes. cluster_size becomes how many
    vectors of the batch chose a row, one at least; embed_avg goes with both.
    """
    if started.item():
        return
    ranks = _ranks(synchronize)
    share = -(-START_SAMPLES // ranks)
    numbers = z.new_tensor([len(z)], dtype=torch.int64)
    if ranks > 1:
        dist.all_reduce(numbers)
    picked = z[_spread(z, share)].to(codewords.dtype)
    valid = picked.isfinite().all(1, keepdim=True)
    drawn = _gather(torch.cat((valid.to(picked.dtype), picked), 1).where(valid, 0), share, ranks)
    vectors = drawn[drawn[:, 0] > 0, 1:]
    if len(vectors) and (ranks == 1 or dist.get_rank() == 0):
        table, counts = kmeans(vectors, codewords, Layout(codebook_size, layers, strict_tree), iterations)
        codewords.copy_(table)
        cluster_size.copy_((counts * numbers / len(vectors)).clamp(min=1))
    for tensor in (codewords, cluster_size) if ranks > 1 else ():
        dist.broadcast(tensor, 0)
    if embed_avg is not None:
        embed_avg.copy_(codewords * cluster_size[:, None])
    started.copy_(numbers[0] > 0)


@torch.library.custom_op("vpfast::snapshot", mutates_args=())
def snapshot(table: Tensor, moves: bool) -> Tensor:
    """A copy of codewords that backward reads once they have moved. No compiler takes it back: torch.compile drops a
    clone whose original is written to later, and backward would read what was written.

    Raises:
        RuntimeError: this very step ``moves`` them, and it is within a backward pass: activation checkpointing runs it
            again, for a gradient, and the codewords that the first run searched are gone.
    """
    if moves and torch._C._current_graph_task_id() != -1:  # the number of the backward pass that runs in this thread
        raise RuntimeError(
            "HierarchicalResidualVQ: activation checkpointing runs a training step again during backward, but its "
            "codebooks have moved since the first run, so gradients would be wrong. Checkpoint what is before and "
            "behind the quantizer, not the quantizer; or call it with freeze_codebook=True"
        )
    return table.clone()


@snapshot.register_fake
def _(table: Tensor, moves: bool) -> Tensor:
    return torch.empty_like(table)


snapshot.register_autograd(lambda ctx, grad: (grad, None))


def _ranks(synchronize: bool) -> int:
    """How many processes work on one batch: 1 unless there is a process group, now."""
    return dist.get_world_size() if synchronize and dist.is_available() and dist.is_initialized() else 1


def _spread(z: Tensor, most: int) -> Tensor:
    """The places of at most ``most`` of the vectors z (N, D), all different: one at random in each stretch of them."""
    taken = min(len(z), most)
    edges = torch.arange(taken + 1, device=z.device) * len(z) // max(taken, 1)
    stretch = edges.diff()
    return edges[:-1] + torch.minimum((torch.rand(taken, device=z.device) * stretch).long(), stretch - 1)


def _gather(rows: Tensor, share: int, ranks: int) -> Tensor:
    """Up to ``share`` rows from each rank -> the rows of all ranks; zeros fill up where a rank of several has fewer."""
    if ranks == 1:
        return rows
    rows = F.pad(rows, (0, 0, 0, share - len(rows)))
    everyones = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(everyones, rows)
    return torch.cat(everyones)
