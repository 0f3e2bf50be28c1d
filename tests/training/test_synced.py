"""Two processes that each score half of the frames compute what one computes with all of them."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vpfast.models.mspn import Discriminator
from vpfast.training.adversarial import discriminator_loss
from vpfast.training.synced import SyncedBatchNorm2d, synced


def judge():
    torch.manual_seed(0)
    return Discriminator((4, 6), (4, 4), 1)


def frames():
    real, made = torch.rand(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return real, (made * torch.linspace(0.1, 1, 4)[:, None, None, None]).requires_grad_()


def one_step(network, real, made):
    """Scores, gradients and running statistics of one update in training, and a score after it in evaluation."""
    scores = network(real), network(made)
    discriminator_loss(*scores).backward()
    learned = {"scores": torch.stack(scores).detach(), "made": made.grad.clone()}
    learned |= {name: parameter.grad for name, parameter in network.named_parameters()}
    learned |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    made.grad = None
    network.eval()(made).square().mean().backward()
    return learned | {"made in evaluation": made.grad}


def half(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    real, made = frames()
    mine = slice(2 * rank, 2 * rank + 2)
    found = one_step(synced(judge()), real[mine], made.detach()[mine].requires_grad_())
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_scores_gradients_and_statistics_are_those_of_all_frames(tmp_path):
    mp.spawn(half, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = one_step(judge(), *frames())
    for name, expected in whole.items():
        a, b = first[name], second[name]
        if name == "scores":
            found = torch.cat((a, b), dim=1)
        elif name.startswith("made"):  # what is minimised is the mean over processes of their own means
            found = torch.cat((a, b)) / 2
        elif name in dict(judge().named_parameters()):
            found = (a + b) / 2
        else:
            assert torch.equal(a, b)
            found = a
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_names_and_weights_stay():
    plain, made = judge(), synced(judge())
    assert plain.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in plain.state_dict().items())
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(module, SyncedBatchNorm2d) for module in norms)
