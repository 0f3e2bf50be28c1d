"""The quantizer on two processes: one batch in two parts is one batch, and nobody waits for ever."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vpfast.nn import HierarchicalResidualVQ

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

RANKS = 2
SPLITS = ((70, 30), (0, 100), (100, 0), (1, 5), (0, 0))
"""How many vectors each rank holds, step by step."""


def batch(step: int, rank: int | None = None) -> Tensor:
    """A rank's vectors (N, 4) of a step, or those of all ranks."""
    parts = torch.randn(sum(SPLITS[step]), 4, generator=torch.Generator().manual_seed(step)).split(SPLITS[step])
    return torch.cat(parts) if rank is None else parts[rank]


def quantizer(**options: Any) -> HierarchicalResidualVQ:
    torch.manual_seed(7)
    vq = HierarchicalResidualVQ(4, 3, 2, **options)
    with torch.no_grad():
        vq.codewords.normal_()
        if vq.embed_avg is not None:
            vq.embed_avg.copy_(vq.codewords)
    return vq


def state(vq: HierarchicalResidualVQ) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vq.state_dict().items()}


def steps(vq: HierarchicalResidualVQ, rank: int | None, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    call = vq if call is None else call
    torch.manual_seed(100 + (rank or 0))  # no rank draws what another one draws
    for step in range(len(SPLITS)):
        call(batch(step, rank))
    return state(vq)


def averaged(vq: HierarchicalResidualVQ, rank: int) -> dict[str, Tensor]:
    return steps(vq, rank)


def moving(rank: int, **options: Any) -> dict[str, Tensor]:
    """Starts from a batch that one rank has nothing of, restarts, and averages or learns."""
    vq = quantizer(kmeans_init=True, threshold_ema_dead_code=4, **options)
    if rank == 1:
        vq.reset_parameters()  # a start of its own: k-means must bring the ranks together
    torch.manual_seed(rank)
    vq(batch(4, rank))
    assert not vq.started
    vq(batch(1, rank))
    assert vq.started
    return steps(vq, rank)


def compiled(rank: int) -> dict[str, Tensor]:
    """Compiled code finds the group, too."""
    vq = quantizer()
    return steps(vq, rank, torch.compile(vq, fullgraph=True, backend="aot_eager"))


def learned(rank: int) -> dict[str, Tensor]:
    """Under DistributedDataParallel, after a step: gradients and restarts."""
    model = nn.Sequential(
        nn.Linear(4, 4), quantizer(learnable_codebook=True, kmeans_init=True, threshold_ema_dead_code=4)
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.1)
    for step in (0, 1, 3):
        quantized, _, losses = parallel(batch(step, rank))
        optimizer.zero_grad()
        (losses.sum() + quantized.square().sum()).backward()
        optimizer.step()
    return state(model[1])


def resumed(rank: int) -> dict[str, Tensor]:
    """One rank alone has loaded a check-point; DistributedDataParallel hands it on, and nobody starts again."""
    vq = quantizer(kmeans_init=True, learnable_codebook=True)
    if rank == 0:
        vq.load_state_dict({**quantizer(learnable_codebook=True).state_dict(), "started": torch.tensor(True)})
    parallel = nn.parallel.DistributedDataParallel(vq)
    parallel(batch(0, rank))[2].sum().backward()
    return state(vq)


def work(rank: int, folder: Path) -> None:
    early = quantizer()  # made before there is a group
    alone = steps(quantizer(), rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    results = {
        "alone": alone,
        "early": averaged(early, rank),
        "late": averaged(quantizer(), rank),
        "unsynchronized": averaged(quantizer(sync_codebook=False), rank),
        "flat": averaged(quantizer(strict_tree=False), rank),
        "compiled": compiled(rank),
        "moving": moving(rank),
        "moving-learnable": moving(rank, learnable_codebook=True),
        "learned": learned(rank),
        "resumed": resumed(rank),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Of each rank, what each scenario left in the module. A process that hangs is ended, and an error."""
    folder = tmp_path_factory.mktemp("ranks")
    context = spawn(work, (folder,), nprocs=RANKS, join=False)
    try:
        for _ in range(24):
            if context.join(timeout=10):
                break
        else:
            pytest.fail("the ranks still wait for one another after four minutes")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


SCENARIOS = ["early", "late", "flat", "compiled", "moving", "moving-learnable", "learned", "resumed"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_codebooks_are_the_same_on_every_rank(results: Any, scenario: str) -> None:
    """To the bit: differences would never go away again."""
    first, second = (result[scenario] for result in results)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert first["codewords"].isfinite().all()


@pytest.mark.parametrize("scenario", ["early", "late", "compiled"])
def test_parts_are_averaged_like_the_whole(results: Any, scenario: str) -> None:
    """Also by a module that was made before the process group was."""
    expected = steps(quantizer(), None)
    torch.testing.assert_close(results[0][scenario], expected)


def test_without_synchronization_a_rank_is_alone(results: Any) -> None:
    for result in results:
        torch.testing.assert_close(result["unsynchronized"], result["alone"], rtol=0, atol=0)
    assert not torch.equal(results[0]["alone"]["codewords"], results[1]["alone"]["codewords"])


def test_a_check_point_on_one_rank_is_everyones(results: Any) -> None:
    torch.testing.assert_close(results[1]["resumed"]["codewords"], quantizer().codewords, rtol=0, atol=0)
