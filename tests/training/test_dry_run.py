"""What a run would take, told without data: the counts are a real step's, the memory of its order."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vpfast.ops import Mask3d, codeword_search, masked_attention3d
from vpfast.training import OptimConfig
from vpfast.training.config import AdversarialConfig
from vpfast.training.dry_run import _FORMULAS, Cost, cost, dry_run, report
from vpfast.training.engine import accelerator
from vpfast.training.network import build_model, recipe_for
from vpfast.training.update import Context

STAGED = {
    **{"name": "shrvqvae", "preset": "mnist-3x4", "channels": [4, 4], "residual_channels": 4, "prior_channels": 8},
    **{"prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 2, "prior_head_dim": 4},
    **{"prior_ffn": 8, "prior_head": 8},
}


def real_step(config):
    """FLOPs of a step with values, and the bytes that the forward pass of one keeps beside weights."""
    recipe, model = recipe_for(config), build_model(config)
    context = Context(model, recipe.trained(model), config, accelerator(config), recipe)
    update = recipe.update(context)
    frames = torch.rand(config.batch_size, config.clip_length, config.data.channels, *config.data.frame_size)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        update(frames, 0)
    with FlopCounterMode(display=False) as counter:  # it hooks every module, and then nothing is activated in place
        update(frames, 0)
    return counter.get_total_flops(), sum(s.nbytes() for place, s in kept.items() if place not in own)


def test_a_step_without_values_costs_what_a_real_one_does(tiny):
    config = tiny(channels_last=False)
    found = cost(config)
    flops, kept = real_step(config)
    model = build_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found.flops == flops
    assert found.parameters == {"MSPN": (parameters, 0)}
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert kept <= found.activations <= 3 * kept
    assert found.weights + found.optimizer + found.activations <= found.peak
    assert found.peak <= found.weights + found.optimizer + found.activations + found.gradients


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_less(tiny, precision):
    whole, half = cost(tiny()), cost(tiny(precision=precision))
    assert half.activations < 0.9 * whole.activations
    assert half.weights == whole.weights


def test_options_that_trade_memory_are_seen(tiny):
    plain = cost(tiny(horizon=8))
    assert cost(tiny(horizon=8, checkpoint_activations=True)).peak < 0.7 * plain.peak
    parts = cost(tiny(horizon=8, optim=OptimConfig(accumulate=3)))
    assert parts.flops == pytest.approx(3 * plain.flops)
    assert parts.peak < 1.5 * plain.peak
    assert cost(tiny(horizon=8, optim=OptimConfig(ema_decay=0.9))).optimizer == 1.5 * plain.optimizer


def test_a_discriminator_is_a_network_of_its_own(tiny):
    plain = cost(tiny())
    found = cost(tiny(adversarial=AdversarialConfig(enabled=True, channels=(4, 8), first_frame=2)))
    assert list(found.parameters) == ["MSPN", "discriminator"]
    assert found.parameters["MSPN"] == plain.parameters["MSPN"]
    judge = found.parameters["discriminator"][0]
    assert judge > 0
    assert found.gradients == plain.gradients + 4 * judge
    assert found.flops > plain.flops


def test_every_stage_trains_its_part(tiny):
    found = dry_run(tiny(model=STAGED))
    assert list(found) == ["autoencoder", "prior", "joint"]
    moved = {stage: {name for name, (some, _) in each.parameters.items() if some} for stage, (_, each) in found.items()}
    assert moved == {
        "autoencoder": {"encoder", "quantizer", "decoder"},
        "prior": {"prior"},
        "joint": {"prior", "autoencoder.decoder"},
    }
    assert all(each.flops > 0 < each.activations for _, each in found.values())
    assert found["joint"][1].flops > found["prior"][1].flops
    for stage in ("prior", "joint"):
        config = dataclasses.replace(tiny(model=STAGED), stage=stage, channels_last=False)
        assert found[stage][1].flops == real_step(config)[0]


def test_every_way_to_train_in_stages_can_be_told(tiny):
    change = {"joint_inputs": "free", "codebook_update": "ema", "joint_relaxation": "gumbel"}
    assert all(each.flops for _, each in dry_run(tiny(model={**STAGED, **change})).values())


def test_no_data_is_read_and_nothing_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("vpfast.training.engine.dataset", None)
    dry_run(tiny())
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--dry-run: started in several processes"):
        dry_run(tiny())


def test_the_report_is_for_people(tiny):
    found = Cost({"MSPN": (1234567, 89)}, 10**6, 2 * 10**6, 3 * 10**6, 4 * 10**6, 5 * 10**6, 6 * 10**9)
    said = report({"": (tiny(), found)})
    assert "model mspn: 6 steps of 2 clips (T, C, H, W) = (5, 1, 16, 16), fp32" in said
    for shown in ("1,234,567", "89", "1.0 MB", "5.0 MB", "6.00 G"):
        assert shown in said


@pytest.mark.parametrize("name", ["raster", "raster_strict", "past_frames", "separable", "eq6"])
@pytest.mark.parametrize("window", [None, (1, 0, 2), (None, 1, None), (0, 9, 9)])
def test_the_pairs_that_a_mask_leaves_are_counted(name, window):
    for grid in ((3, 4, 5), (1, 1, 1), (5, 2, 3)):
        mask = Mask3d(name, window)
        assert mask.pairs(grid) == int(mask.visible(grid).sum())


def test_formulas_of_the_operators():
    for module in _FORMULAS:
        __import__(module)
    q = torch.rand(2, 3, 12, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = masked_attention3d(q, q, q, (3, 2, 2), Mask3d("raster"))
    pairs = 12 * 13 // 2
    assert counter.get_total_flops() == 2 * 3 * pairs * 4 * 8
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * pairs * 10 * 8
    with FlopCounterMode(display=False) as counter:
        codeword_search(torch.rand(10, 4), [torch.rand(3, 4), torch.rand(9, 4)])
    assert counter.get_total_flops() == 2 * 10 * 4 * 3 * 2
