"""One step of a run: batches in parts, averages, precision, clipping, activations computed again; when a run ends."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vpfast.models import HRVQVAE, MSPN, MSPNConfig, SHRVQVAEConfig
from vpfast.models.mspn import pixel_loss
from vpfast.training import LossConfig, OptimConfig, checkpoint, engine, train
from vpfast.training.average import Average
from vpfast.training.network import build_model, recipe_for
from vpfast.training.update import Context, GradientUpdate, clip

STAGED = {
    **{"name": "shrvqvae", "preset": "mnist-3x4", "channels": [4, 4], "residual_channels": 4, "prior_channels": 8},
    **{"prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 2, "prior_head_dim": 4, "prior_ffn": 8},
    **{"prior_head": 8, "dead_codes": "ignore"},
}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def made(config):
    """The update of a run, and the model that it trains."""
    torch.manual_seed(0)
    recipe, model = recipe_for(config), build_model(config)
    context = Context(model, recipe.trained(model), config, engine.accelerator(config), recipe)
    return recipe.update(context), model


# -- batches in parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sum_squares", "l2", "mse"])
def test_a_batch_in_parts_is_one_batch(tiny, tmp_path, norm):
    """Losses, gradients and so weights, clipped ones too, whether clips are summed or averaged."""
    optim = OptimConfig(clip_norm=1.0)
    runs = [
        tiny(out=str(tmp_path / "whole"), batch_size=4, loss=LossConfig(norm=norm), optim=optim),
        tiny(
            out=str(tmp_path / "parts"),
            batch_size=2,
            loss=LossConfig(norm=norm),
            optim=dataclasses.replace(optim, accumulate=2),
        ),
    ]
    whole, parts = (log(train(config, progress=False).parent) for config in runs)
    assert [line["clips"] for line in parts] == [line["clips"] for line in whole] == [4] * 6
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stages_in_parts(tiny, tmp_path, reduction):
    changes = {"model": {**STAGED, "loss_reduction": reduction}, "val_every": 0, "steps": 3}
    train(tiny(out=str(tmp_path / "whole"), batch_size=4, **changes), progress=False)
    train(tiny(out=str(tmp_path / "parts"), batch_size=2, optim=OptimConfig(accumulate=2), **changes), progress=False)
    for stage in ("autoencoder", "prior", "joint"):
        whole, parts = (log(tmp_path / name / stage) for name in ("whole", "parts"))
        for one, other in zip(whole, parts, strict=True):
            for key in one.keys() - {"seconds", "step"}:
                assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("model", "why"), [({}, "dead_codes restart"), ({"codebook_update": "ema", "dead_codes": "ignore"}, "ema")]
)
def test_codebooks_that_move_once_a_batch_take_no_parts(tiny_codes, model, why):
    config = tiny_codes(model, optim=OptimConfig(accumulate=2))
    with pytest.raises(ValueError, match=rf"optim.accumulate: 2 given, must be 1 where .*{why}\); take a larger"):
        train(config, progress=False)
    assert not Path(config.out).exists()


# -- averages ------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula():
    model = nn.Linear(2, 1)
    average, expected = Average(model, [model], 0.3), model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(average.state_dict()["weight"], expected)
    now = model.weight.detach().clone()
    with average.in_place():
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, now)


def test_what_is_not_trained_and_codebooks_are_the_models_own():
    model = HRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(4,), codebook_update="gradient"))
    averaged = set(Average(model, [model.decoder, model.quantizer], 0.9).state_dict())
    assert averaged == {name for name, _ in model.named_parameters() if name.startswith("decoder.")}


def test_averages_are_validated_written_kept_and_go_on(tiny, tmp_path):
    optim = OptimConfig(lr=1e-2, ema_decay=0.9)
    whole = tiny(out=str(tmp_path / "whole"), optim=optim)
    finished = weights(train(whole, progress=False))
    last = tmp_path / "whole" / "checkpoints" / "step-00000006"
    raw, averages = weights(last), load_file(last / "average.safetensors")
    assert same(finished, averages)
    assert not same(finished, raw)

    plain = tiny(out=str(tmp_path / "plain"), optim=dataclasses.replace(optim, ema_decay=None))
    assert same(weights(train(plain, progress=False)), raw)
    assert [line["loss"] for line in log(plain.out)] == [line["loss"] for line in log(whole.out)]

    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    train(dataclasses.replace(broken, steps=4), progress=False)
    assert same(weights(train(broken, resume=True, progress=False)), finished)

    start = tiny(out=str(tmp_path / "start"), steps=1, val_every=1, init=str(finished_of(whole)), optim=STILL)
    train(start, progress=False)
    assert log(start.out)[0]["val_mse"] == pytest.approx(log(whole.out)[-1]["val_mse"], rel=1e-6)


STILL = OptimConfig(lr=1e-30)


def finished_of(config):
    return Path(config.out) / "weights"


# -- precision and clipping ----------------------------------------------------------------------------------------


def test_float16_is_refused_where_it_would_be_float32(tiny):
    with pytest.raises(ValueError, match="precision: 'fp16' given, must be 'fp32' or 'bf16' on the CPU"):
        train(tiny(precision="fp16"), progress=False)
    assert not Path(tiny().out).exists()


def scaled(update, growth_interval=2000):
    """As Accelerate sets it up for float16 on a GPU, with gradients scaled; arithmetic stays float32."""
    accelerator = update.context.accelerator
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_interval)
    accelerator.scaler = update._optimizer.scaler = scaler
    update._optimizer._optimizer_original_step_method = update._optimizer.optimizer.step
    update._optimizer._accelerate_step_called = False
    update._optimizer._optimizer_patched_step_method = patched(update._optimizer)
    return scaler


def patched(optimizer):
    from accelerate.optimizer import patch_optimizer_step

    return patch_optimizer_step(optimizer, optimizer.optimizer.step)


@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_scaled_gradients_are_clipped_at_their_true_size(tiny, norm, accumulate):
    """The weights are those of a step without scaling."""
    config, frames = tiny(optim=OptimConfig(clip_norm=norm, accumulate=accumulate)), torch.rand(4, 5, 1, 16, 16)
    plain, expected = made(config)
    told = [plain(frames, step) for step in range(2)]
    update, model = made(config)
    scaled(update)
    for step in range(2):
        record = update(frames, step)
        assert record.pop("scale") == 1024
        assert record == pytest.approx(told[step], rel=1e-6)
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_step_whose_gradient_overflows_is_left_out(tiny):
    update, model = made(tiny())
    scaler = scaled(update)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = next(model.parameters())
    handle = first.register_hook(lambda gradient: gradient * float("inf"))
    assert update(torch.rand(2, 5, 1, 16, 16), 0)["scale"] == 512
    assert same(before, model.state_dict())
    handle.remove()
    assert update(torch.rand(2, 5, 1, 16, 16), 1)["scale"] == 512
    assert not same(before, model.state_dict())
    assert scaler.state_dict()["scale"] == 512


def test_the_scale_is_kept(tiny, tmp_path, monkeypatch):
    seen = []
    accelerated = engine.accelerator

    def with_scaler(config):
        made = accelerated(config)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return made

    monkeypatch.setattr(engine, "accelerator", with_scaler)
    for steps in (4, 6):
        train(tiny(steps=steps), resume=steps == 6, progress=False)
        seen += [line["scale"] for line in log(tiny().out)]
    assert seen == [1024, 2048, 2048, 4096, 1024, 2048, 2048, 4096, 4096, 8192]


def test_clipping_touches_the_gradients_of_that_optimizer_alone(tiny):
    update, model = made(tiny())
    other = nn.Linear(1, 1)
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    clip(update.context.accelerator, update._optimizer, update.context.parameters, 1.0)
    total = torch.stack([parameter.grad.square().sum() for parameter in model.parameters()]).sum().sqrt()
    assert total.item() == pytest.approx(1.0, abs=1e-4)
    assert all((parameter.grad == 1).all() for parameter in other.parameters())


# -- activations computed again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("recurrence", ["edlstm", "enc_lstm_dec"])
def test_recomputing_saves_memory_and_changes_nothing(recurrence, batch_norm):
    """Bytes kept for the backward pass; gradients and running statistics bit for bit."""
    config = MSPNConfig(1, (4, 8, 8), 2, 4, batch_norm=batch_norm, recurrence=recurrence, feed_frame=True)
    frames, kept, results = torch.rand(2, 20, 1, 16, 16), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MSPN(config).train()
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = pixel_loss(model(frames[:, :10], 10, recompute=recompute), frames)
        loss.backward()
        kept.append(sum(sizes.values()))
        results.append([loss, *(p.grad for p in model.parameters()), *model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < kept[0] / 5


def test_a_run_with_recomputing_is_the_same_run(tiny, tmp_path):
    plain = tiny(out=str(tmp_path / "plain"))
    again = tiny(out=str(tmp_path / "again"), checkpoint_activations=True)
    assert same(weights(train(plain, progress=False)), weights(train(again, progress=False)))


def test_recomputing_is_refused_where_there_is_no_rollout(tiny_codes):
    with pytest.raises(ValueError, match="checkpoint_activations: True given, must be false"):
        train(tiny_codes(checkpoint_activations=True), progress=False)


# -- when a run ends -----------------------------------------------------------------------------------------------


@pytest.fixture
def validated(monkeypatch):
    """The errors that validations find, one after another."""

    def set_errors(*errors):
        left = iter(errors)
        monkeypatch.setattr(engine, "validate", lambda *args: {"val_mse": next(left)})

    return set_errors


def test_a_run_ends_when_validations_improve_no_more(tiny, validated):
    validated(0.3, 0.2, 0.2, 0.25)
    finished = train(tiny(steps=20, val_every=2, save_every=0, patience=2), progress=False)
    root = finished.parent
    assert [line["step"] for line in log(root)] == list(range(1, 9))
    (kept,) = checkpoint.found(root / "checkpoints")
    assert checkpoint.progress_of(kept) == (8, 0.2, 2)
    assert same(weights(finished), weights(kept))


def test_patience_is_remembered(tiny, validated):
    """Across a stop; and a run that ended goes on where it is given more."""
    validated(0.2, 0.3)
    train(tiny(steps=4, val_every=2), progress=False)
    validated(0.4, 0.5)
    train(tiny(steps=20, val_every=2, patience=2), resume=True, progress=False)
    assert log(tiny().out)[-1]["step"] == 6
    train(tiny(steps=20, val_every=2, patience=2), resume=True, progress=False)
    assert log(tiny().out)[-1]["step"] == 6
    train(tiny(steps=20, val_every=2, patience=3), resume=True, progress=False)
    assert log(tiny().out)[-1]["step"] == 8


def test_a_stage_that_ended_early_is_not_trained_again(tiny, validated):
    validated(0.2, 0.3, 0.1, 0.1, 0.1, 0.1)
    config = tiny(model=STAGED, steps=4, val_every=1, patience=1)
    train(config, progress=False)
    assert log(Path(config.out) / "autoencoder")[-1]["step"] == 2
    assert train(config, resume=True, progress=False) == Path(config.out) / "weights"


def test_the_test_split_is_never_looked_at(tiny, monkeypatch):
    """By nothing that decides: not by training, not by validating, not by ending early."""
    asked = []
    real = engine.dataset

    def recorded(config, split, *rest, **more):
        asked.append(split)
        return real(config, split, *rest, **more)

    monkeypatch.setattr(engine, "dataset", recorded)
    train(tiny(patience=1), progress=False)
    assert sorted(asked) == ["train", "val"]


def test_patience_needs_validations(tiny):
    with pytest.raises(ValueError, match="patience: 2 given, must be null where val_every is 0"):
        tiny(patience=2, val_every=0)


def test_an_ordinary_update_has_one_optimizer_and_no_network_of_its_own(tiny):
    update, _ = made(tiny())
    assert isinstance(update, GradientUpdate)
    assert (list(update.modules), list(update.optimizers)) == ([], ["model"])
