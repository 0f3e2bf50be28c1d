"""Configurations: what they accept, what they refuse and how, and the round trip through plain values."""

import pytest
import yaml

from vpfast.training.config import DataConfig, LossConfig, OptimConfig, SplitConfig, TrainConfig, from_dict, to_dict


def test_a_configuration_survives_yaml():
    config = TrainConfig(
        model={"preset": "compact", "channels": [4, 8]},
        data=DataConfig(kind="video-folder", root="videos", size=(96, 128), val=SplitConfig(include=("b*",))),
        loss=LossConfig(feedback="random", feedback_range=(1, 2)),
        optim=OptimConfig(clip_norm=1.0),
    )
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'horizn'; did you mean 'horizon'\?"):
        from_dict(TrainConfig, {"horizn": 3})


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": -1}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"optim": {"lr": 0.0}}, "optim.lr"),
        ({"optim": {"clip_norm": 0.0}}, "optim.clip_norm"),
        ({"optim": {"warmup": 20}, "steps": 10}, "optim.warmup"),
        ({"data": {"size": 0}}, "data.size"),
        ({"data": {"size": [32, 64]}}, "data.size"),
        ({"data": {"channels": 3}}, "data.channels"),
        ({"data": {"size": 16}}, "data.digit_size"),
        ({"data": {"speed": 1.0}}, "data.speed"),
        ({"data": {"kind": "video-folder"}}, "data.root"),
        ({"data": {"kind": "video-folder", "root": "x"}}, "data.val.include"),
        ({"optim": {"lr": float("inf")}}, "optim.lr"),
        ({"optim": {"lr": "1e-3"}}, "optim.lr"),
        ({"optim": {"clip_norm": float("nan")}}, "optim.clip_norm"),
        ({"data": {"speed": float("nan")}}, "data.speed"),
        ({"data": {"kind": "videos"}}, "data.kind"),
        ({"data": {"channels": 2}}, "data.channels"),
        ({"loss": {"norm": "l3"}}, "loss.norm"),
        ({"loss": {"level_weights": "none"}}, "loss.level_weights"),
        ({"loss": {"feedback": "foo"}}, "loss.feedback"),
        ({"optim": {"schedule": "step"}}, "optim.schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"model": "mspn"}, "model"),
        ({"stages": ["prior"]}, "stages"),
        ({"device": "cuda"}, "device"),
        ({"loss": {"feedback": "random", "feedback_range": [5, 3]}}, "loss.feedback_range"),
        ({"loss": {"feedback": "random", "feedback_range": [3, 20]}}, "loss.feedback_range"),
        ({"loss": {"sampling_steps": 0}}, "loss.sampling_steps"),
        ({"loss": {"sampling": "cosine"}}, "loss.sampling"),
        ({"adversarial": {"loss": "hinge"}}, "adversarial.loss"),
        ({"adversarial": {"enabled": 1}}, "adversarial.enabled"),
        ({"adversarial": {"cap": 0}}, "adversarial.cap"),
        ({"adversarial": {"window": 0}}, "adversarial.window"),
        ({"adversarial": {"weight": -1.0}}, "adversarial.weight"),
        ({"adversarial": {"lr": 0.0}}, "adversarial.lr"),
        ({"adversarial": {"weight_decay": -1.0}}, "adversarial.weight_decay"),
        ({"adversarial": {"upper_tolerance": 0.0}}, "adversarial.upper_tolerance"),
        ({"adversarial": {"lower_tolerance": 0.01}}, "adversarial.lower_tolerance"),
        ({"adversarial": {"channels": [8]}}, "adversarial.channels"),
        ({"adversarial": {"channels": [8, 0]}}, "adversarial.channels"),
        ({"adversarial": {"enabled": True}, "data": {"size": 48}}, "data.size"),
        ({"adversarial": {"enabled": True, "first_frame": 20}}, "adversarial.first_frame"),
        ({"adversarial": {"enabled": True}, "optim": {"accumulate": 2}}, "optim.accumulate"),
    ],
)
def test_the_impossible_is_refused_by_its_key(values, key):
    with pytest.raises(ValueError, match=rf"^{key}: .* must be "):
        from_dict(TrainConfig, values)
