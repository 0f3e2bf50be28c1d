"""MSPN's training strategies at work: on real clips, and against training without them. Short forms of what the models'
README reports."""

import json
from pathlib import Path

import torch

from vpfast.training import AdversarialConfig, DataConfig, LossConfig, OptimConfig, SplitConfig, checkpoint, train
from vpfast.training.clips import dataset


def log(config):
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_adversarial_training_on_kth_keeps_the_scores_where_the_algorithm_asks(tiny, shared, tmp_path):
    clips = SplitConfig(include=("walking/*", "boxing/person01*"))
    config = tiny(
        data=DataConfig("video-folder", str(shared / "data/kth"), size=16, cache=str(tmp_path / "cache"), train=clips),
        context=4,
        horizon=4,
        steps=30,
        val_every=0,
        save_every=0,
        optim=OptimConfig(lr=1e-3, clip_norm=1000.0),
        adversarial=AdversarialConfig(enabled=True, channels=(4, 8, 8), lr=1e-5, cap=8, first_frame=2),
    )
    train(config, progress=False)
    records = log(config)
    assert len(records) == 30
    updates = 0
    for record in records:
        updates += 1
        real, predicted, lower, upper = record["score"].values()
        assert abs(real) < 5
        assert abs(predicted) < 5
        low, high = predicted > lower, predicted < upper
        assert record["capped"] == (updates == 8 and not (low if record["generator"] else high))
        assert record["turn_ends"] == (record["capped"] or (low if record["generator"] else high))
        updates = 0 if record["turn_ends"] else updates
    turns = [record["generator"] for record in records if record["turn_ends"]]
    assert turns == [float(place % 2) for place in range(len(turns))]
    assert len(turns) >= 3
    assert any(record["turn_ends"] and not record["capped"] for record in records)


def test_long_term_training_beats_none_far_ahead(tiny, tmp_path):
    errors = {}
    for feedback in ("fixed", "none"):
        config = tiny(
            out=str(tmp_path / feedback),
            data=DataConfig(size=16, digit_size=8, digits=1, clips=200),
            context=4,
            horizon=10,
            steps=120,
            batch_size=4,
            val_every=0,
            save_every=0,
            optim=OptimConfig(lr=5e-3),
            loss=LossConfig(feedback=feedback),
        )
        model, _ = checkpoint.read_weights(train(config, progress=False), torch.nn.Module)
        clips = dataset(config.data, "test", 24, count=32)
        frames = torch.stack([clips[index] for index in range(32)])
        made = model.eval().predict(frames[:, :4], 20)
        errors[feedback] = (made.clamp(0, 1) - frames[:, 4:]).square().mean().item()
    assert errors["fixed"] < 0.9 * errors["none"], errors
