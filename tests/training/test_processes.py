"""Several processes: together they are one with a larger batch, and none waits for one that failed.

All of it in one pair of processes, which take longer to start than to work.
"""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from vpfast.models.mspn import Discriminator
from vpfast.training import AdversarialConfig, LossConfig, OptimConfig, Stopped, checkpoint, engine, log, train
from vpfast.training.adversarial import discriminator_loss
from vpfast.training.synced import SyncedBatchNorm2d, synced

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

RANKS = 2
STAGES = ("autoencoder", "prior", "joint")
STAGED = {
    **{"name": "shrvqvae", "preset": "mnist-3x4", "channels": [4, 4], "residual_channels": 4, "prior_channels": 8},
    **{"prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 2, "prior_head_dim": 4, "prior_ffn": 8},
    **{"prior_head": 8, "dead_codes": "ignore"},
}
# The discriminator at the paper's rate: biases before a batch norm have no gradient but rounding, of which Adam makes
# steps as large as any, so that at a high rate its float32 scores differ whatever the processes do.
ADVERSARY = AdversarialConfig(enabled=True, channels=(4, 4), first_frame=1, cap=2, lr=1e-7)
OPTIM = OptimConfig(lr=1e-3, clip_norm=1.0, ema_decay=0.9)

# Together the same clips a step: of one process the batch is doubled.
ALIKE = {
    "pixel": {"optim": OPTIM},
    "norms": {"optim": OPTIM, "loss": LossConfig(norm="l2")},
    "mean": {"optim": OPTIM, "loss": LossConfig(norm="mse", feedback="random", feedback_range=(1, 2))},
    "parts": {"optim": dataclasses.replace(OPTIM, accumulate=2), "checkpoint_activations": True},
    "adversarial": {"optim": OptimConfig(lr=1e-3), "adversarial": ADVERSARY},
    "gradient": {"model": STAGED, "optim": OPTIM},
    "ema": {"model": {**STAGED, "codebook_update": "ema"}, "optim": OPTIM},
    "sum": {"model": {**STAGED, "loss_reduction": "sum"}, "optim": OptimConfig(lr=1e-3)},
}


def work(rank, base, answers):
    """What one of the processes does: every run of ``ALIKE``, then everything that can go wrong in one process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    # They meet in a file, for a port that was free may be another's by now; Accelerate wants an address all the same.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{answers}/meet", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    log.write_curves = lambda *args, **how: None
    folder = Path(base.out)
    for name, changes in ALIKE.items():
        train(dataclasses.replace(base, out=str(folder / name), **changes), progress=False)
    told = {}
    for scenario in (resumed, signalled, unsaved, unreadable, damaged):
        told[scenario.__name__] = scenario(rank, dataclasses.replace(base, out=str(folder / scenario.__name__)))
    Path(answers, f"{rank}.json").write_text(json.dumps(told))
    torch.save(half_of_the_frames(rank), Path(answers, f"{rank}.pt"))
    dist.destroy_process_group()


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


def half_of_the_frames(rank):
    real, made = frames()
    mine = slice(2 * rank, 2 * rank + 2)
    return one_step(synced(judge()), real[mine], made.detach()[mine].requires_grad_())


def resumed(rank, config):
    train(dataclasses.replace(config, steps=2), progress=False)
    train(config, resume=True, progress=False)
    return ""


def failing(module, name, instead, config, resume=False):
    """How a run ends in which that function is another one."""
    real = getattr(module, name)
    setattr(module, name, lambda *args: instead(real, *args))
    try:
        train(config, resume=resume, progress=False)
    except (Stopped, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(module, name, real)
    return "it went through"


def signalled(rank, config):
    """One process is asked to stop, at step 2."""

    def validate(real, *args):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    return failing(engine, "validate", validate, dataclasses.replace(config, val_every=2))


def unsaved(rank, config):
    """The disk is full, where one process sees it."""

    def save(real, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return failing(checkpoint, "save", save, config)


def unreadable(rank, config):
    """One process cannot load."""

    def load(real, *args):
        if rank == 1:
            raise ValueError("no such luck")
        return real(*args)

    train(dataclasses.replace(config, steps=2), progress=False)
    return failing(checkpoint, "load", load, config, resume=True)


def damaged(rank, config):
    """One process finds the newest checkpoint damaged, and so both take the one before."""
    train(dataclasses.replace(config, save_every=2), progress=False)

    def damage(real, path):
        return "it is strange" if rank == 1 and checkpoint.step_of(path) == 4 else real(path)

    return failing(checkpoint, "damage", damage, config, resume=True)


@pytest.fixture(scope="module")
def together(small, tmp_path_factory):
    """The folder of all runs of two processes, and what each process told."""
    folder = tmp_path_factory.mktemp("together")
    base = dataclasses.replace(small(folder), out=str(folder), steps=4, val_every=4, save_every=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vpfast.training.engine"])
    processes = [context.Process(target=work, args=(rank, base, str(folder))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    ends = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ends == [0, 0]
    return base, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def logged(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_are_one_with_the_doubled_batch(together, tmp_path, name):
    """Every number of the log, to 1e-5 of it: losses, their parts, what validation found; to 1e-6 the scores of a
    discriminator, which are means of either sign."""
    base, _ = together
    train(
        dataclasses.replace(base, out=str(tmp_path / "one"), batch_size=RANKS * base.batch_size, **ALIKE[name]),
        progress=False,
    )
    runs = STAGES if "model" in ALIKE[name] else ("",)
    for run in runs:
        one, two = logged(tmp_path / "one" / run), logged(Path(base.out) / name / run)
        assert len(one) == len(two) == base.steps
        for alone, both in zip(one, two, strict=True):
            for scores in (False, True):
                expected = {key: value for key, value in flat(alone).items() if is_score(key) == scores}
                found = {key: value for key, value in flat(both).items() if is_score(key) == scores}
                assert found == pytest.approx(expected, rel=1e-5, abs=1e-6 if scores else 1e-12)


def test_scores_gradients_and_statistics_of_halves_are_those_of_all_frames(together):
    base, _ = together
    first, second = (torch.load(Path(base.out) / f"{rank}.pt") for rank in range(RANKS))
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


def test_what_is_made_for_several_processes_keeps_names_and_weights():
    plain, made = judge(), synced(judge())
    assert plain.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in plain.state_dict().items())
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(module, SyncedBatchNorm2d) for module in norms)


def test_the_discriminators_gradients_are_those_of_the_doubled_batch(together, tmp_path):
    """Adam's first moments after two steps, as its rate is too low to be seen in the scores.

    A unit whose rectifier sits on its edge falls to either side by rounding, which moves every gradient before it by
    some thousandths. What mixed the clips of one process only, or scaled by their number, would be off by far more.
    """
    base, _ = together
    changes = {**ALIKE["adversarial"], "batch_size": RANKS * base.batch_size, "steps": 2}
    train(dataclasses.replace(base, out=str(tmp_path / "one"), **changes), progress=False)
    one, two = (
        torch.load(Path(root) / "checkpoints" / "step-00000002" / "state.pt", weights_only=True)["optimizers"]
        for root in (tmp_path / "one", Path(base.out) / "adversarial")
    )
    compared, close = 0, 0
    for place, state in one["discriminator"]["state"].items():
        alone, both = state["exp_avg"], two["discriminator"]["state"][place]["exp_avg"]
        if alone.abs().max() > 1e-5:
            compared += alone.numel()
            close += int(((alone - both).abs() < 1e-2 * alone.abs().max()).sum())
    assert close / compared > 0.99
    assert compared > 0.9 * sum(state["exp_avg"].numel() for state in one["discriminator"]["state"].values())


def is_score(key):
    return key.startswith("score/")


def flat(record):
    return {
        f"{key}/{name}": number
        for key, value in record.items()
        for name, number in (value.items() if isinstance(value, dict) else [("", value)])
    }


def test_two_processes_go_on_bit_for_bit(together):
    base, _ = together
    whole, resumed = (Path(base.out) / name / "weights" for name in ("damaged", "resumed"))
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_signal_to_one_process_stops_all_at_the_same_step(together):
    _, told = together
    assert [each["signalled"].partition(";")[0] for each in told] == ["Stopped: stopped by SIGTERM after step 2"] * 2


def test_no_process_waits_for_one_that_failed(together):
    base, (first, second) = together
    assert "cannot be written: No space left on device; nothing was saved before" in first["unsaved"]
    assert second["unsaved"] == "OSError: another process failed: [Errno 28] No space left on device"
    assert second["unreadable"] == "ValueError: no such luck"
    assert first["unreadable"] == "OSError: another process failed: no such luck"
    assert first["damaged"] == second["damaged"] == "it went through"
    assert (Path(base.out) / "damaged" / "checkpoints" / "step-00000004.damaged").is_dir()
