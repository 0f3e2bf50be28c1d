"""Whatever is wrong with a configuration is told in one line that names the key, with exit code 2, before any data."""

import pytest

from vpfast.training import stages

STAGED = ["--model.name", "shrvqvae", "--model.preset", "mnist-3x4"]
YAML_STAGED = "model: {name: shrvqvae, preset: mnist-3x4}\n"

OPTIONS = [
    # unknown keys
    ("--stepz 3", "'--stepz'; did you mean '--steps'?"),
    ("--optim.lrr 1", "'--optim.lrr'; did you mean '--optim.lr'?"),
    ("--optim 3", "unknown key '--optim'; did you mean '--optim."),
    ("--data.train x", "unknown key '--data.train'"),
    ("--adversarial.wat 1", "did you mean '--adversarial.cap'?"),
    ("--model.layer 4", "'model.layer'; did you mean 'model.layers'?"),
    ("--model.a.b 3", "unknown key 'model.a'"),
    ("--stages.prio.steps 3", "'stages.prio'; did you mean 'stages.prior'?"),
    ("--stages.prior.stepz 3", "'stages.prior.stepz'; did you mean 'stages.prior.steps'?"),
    ("--stages.prior.optim.lrr 3", "did you mean 'stages.prior.optim.lr'?"),
    ("--stages.prior.optim 3", "did you mean 'stages.prior.optim."),
    ("--stages.prior.model.layers 3", "stages.prior.model.layers: must be left out"),
    ("--dryrun", "did you mean '--dry-run'?"),
    # wrong types
    ("--steps 3.5", "steps: Expected a int. Got value: 3.5"),
    ("--steps many", "steps: Expected a int. Got value: many"),
    ("--steps null", "steps: Expected a int"),
    ("--steps true", "steps: Expected a int"),
    ("--optim.lr fast", "optim.lr: Expected a float"),
    ("--optim.lr [1]", "optim.lr: Expected a float"),
    ("--channels_last maybe", "channels_last: Expected a bool"),
    ("--tensorboard x", "tensorboard: Expected a bool"),
    ("--data.size [1,2,3]", "data.size: Expected int, tuple[int, int]. Got value: [1, 2, 3]"),
    ("--data.size [a,b]", "data.size: Expected int, tuple[int, int]"),
    ("--data.size null", "data.size: Expected int"),
    ("--data.kind foo", "data.kind: Expected one of ['moving-digits', 'video-folder', 'prepared']. Got value: foo"),
    ("--loss.feedback_range 3", "loss.feedback_range: Expected a tuple"),
    ("--loss.feedback_range [1]", "loss.feedback_range: Expected a tuple with 2 elements"),
    ("--adversarial.channels x", "adversarial.channels: Expected a tuple"),
    ("--model mspn", "model: Expected a dict"),
    ("--model.channels x", "channels must be a list of"),
    ("--model.layers four", "layers must be a positive integer, got 'four'"),
    ("--model.strict_tree 3", "strict_tree must be true or false, got 3"),
    ("--stages 3", "stages: Expected a dict"),
    ("--stages.prior.optim.lr x", "stages.prior.optim.lr: 'x' given, must be a finite number"),
    ("--stages.prior.steps null", "stages.prior.steps: None given, must be a whole number"),
    ("--stages.prior.batch_size [1]", "stages.prior.batch_size: (1,) given, must be a whole number"),
    ("--stages.prior.data.size [1,x]", "stages.prior.data.size: (1, 'x') given, must be a whole number or ["),
    ("--stages.prior.data.train.include 3", "stages.prior.data.train.include: 3 given, must be"),
    ("--stages.prior.loss.feedback_range [1]", "stages.prior.loss.feedback_range: (1,) given, must be ["),
    ("--stages.prior.precision fp8", "stages.prior.precision: 'fp8' given, must be 'fp32' or"),
    # numbers that no run has
    ("--optim.lr nan", "optim.lr: "),
    ("--optim.lr inf", "optim.lr: "),
    ("--optim.lr 1e400", "optim.lr: inf given, must be a finite number"),
    ("--optim.lr -1", "optim.lr: -1.0 given, must be above 0"),
    ("--steps 0", "steps: 0 given, must be at least 1"),
    ("--steps 99999999999999999999", "steps: 99999999999999999999 given, must be at most 99999999"),
    ("--batch_size 1000000000000", "batch_size: 1000000000000 given, must be at most"),
    ("--seed -3", "seed: -3 given, must be at least 0"),
    ("--seed 99999999999999999999999", "seed: "),
    ("--strip_every -1", "strip_every: -1 given"),
    ("--stages.prior.optim.lr -1", "stages.prior.optim.lr: -1 given, must be above 0"),
    ("--stages.prior.steps nan", "stages.prior.steps: 'nan' given"),
    ("--stages.joint.optim.clip_norm 0", "stages.joint.optim.clip_norm: 0 given, must be above 0, or null"),
    ("--model.codebook_size 1", "codebook_size must be an integer >= 2, got 1"),
    ("--model.joint_weight -1", "joint_weight must be a finite number of at least 0, got -1"),
    # impossible together
    ("--patience 3 --val_every 0", "patience: 3 given, must be null where val_every is 0"),
    ("--optim.warmup 9999999", "optim.warmup: 9999999 given, must be from 0 to steps"),
    ("--data.channels 3", "data.channels: 3 given, must be 1 when data.kind is moving-digits"),
    ("--data.digit_size 100", "data.digit_size: 100 given, must be at most data.size (64)"),
    ("--data.size 62", "data.size: 62 given, must be a multiple of 4"),
    ("--model.in_channels 3", "data.channels: 1 given, but the model's in_channels is 3"),
    ("--loss.norm l2", "loss.norm: 'l2' given, must be left out"),
    ("--stages.prior.loss.norm l2", "stages.prior.loss.norm: 'l2' given, must be left out"),
    ("--adversarial.enabled true", "adversarial.enabled: True given"),
    ("--stages.autoencoder.horizon 3", "stages.autoencoder.horizon: 3 given, must be 0"),
    ("--stages.prior.horizon 0", "stages.prior.horizon: 0 given, must be at least 1"),
    ("--model.prior_attention_every 9", "prior_attention_every must be at most prior_blocks (6)"),
    ("--model.commitment_weight [1,2]", "one for each of the 3 layers"),
    ("--out=", "out: '' given, must be the name of a folder"),
    ("--init /nowhere", "init: /nowhere given, must be a folder of weights"),
    ("--config nope", "there are: "),
]

FILES = [
    ("optim: 3", "optim: 3 given, must hold keys of its own"),
    ("optim:", "optim: None given, must hold keys of its own"),
    ("data: {train: x}", "data.train: 'x' given, must hold keys of its own"),
    ("data: {train: {include: 3}}", "data.train.include: Expected"),
    ("data: {train: {inclde: x}}", "did you mean 'data.train.include'?"),
    ("data: {size: [1, 2, 3]}", "data.size: Expected int, tuple[int, int]"),
    ("steps: ten", "steps: Expected a int"),
    ("steps: null", "steps: None given, must be a whole number"),
    ("steps: .nan", "steps: Expected a int"),
    ("steps: 2001-01-01", "steps: Expected a int"),
    ("optim: {lr: null}", "optim.lr: None given, must be a finite number"),
    ("optim: {lr: .inf}", "optim.lr: inf given, must be a finite number"),
    ("model: null", "model: None given, must be keys and values"),
    ("model: {1: 2}", "unknown key 'model.1'"),
    ("1: 2", "unknown key '1'"),
    ("optim: {1: 2}", "unknown key 'optim.1'"),
    ("resume: true", "unknown key 'resume'"),
    ("config: x", "unknown key 'config'"),
    ("tensorboard: 1", "tensorboard: Expected a bool"),
    ("adversarial: true", "adversarial: True given, must hold keys of its own"),
    ("adversarial: {channels: [a]}", "adversarial.channels: Expected a int"),
    ("stages: {prior: {steps: 3}}", "stages: {'prior': {'steps': 3}} given, must be left out"),
    ("stages: {prior: {steps: &a [*a]}}", "something in it holds itself"),
    (YAML_STAGED + "stages: {prior: {optim: {lr: -1}}}", "stages.prior.optim.lr: -1 given, must be above 0"),
    (YAML_STAGED + "stages: {prior: {optim: 3}}", "did you mean 'stages.prior.optim."),
    (YAML_STAGED + "stages: {prior: null}", "stages: Expected a dict"),
    (YAML_STAGED + "stages: {1: {steps: 3}}", "unknown key 'stages.1'"),
    ("steps: 1\nseed: 0\nsteps: 2", "c.yaml: steps: given twice, in lines 1 and 3"),
    ("optim:\n  lr: 1\n  lr: 2", "c.yaml: optim.lr: given twice, in lines 2 and 3"),
    ("optim: {lr: 1}\nsteps: 3\noptim: {warmup: 1}", "c.yaml: optim: given twice, in lines 1 and 3"),
    (
        YAML_STAGED + "stages: {prior: {steps: 3, steps: 3}}",
        "c.yaml: stages.prior.steps: given twice, in lines 2 and 2",
    ),
    ("model: {channels: [{a: 1, a: 2}]}", "c.yaml: model.channels.a: given twice"),
    ("steps: [", "not readable as YAML"),
    ("a: b: c", "not readable as YAML"),
    ("", "must hold keys and values, got NoneType"),
    ("steps: !!python/object:os.system x", "could not determine a constructor"),
]


@pytest.fixture
def unread(monkeypatch):
    """Data that nobody may ask for."""

    def read(*args, **options):
        raise AssertionError("data was read")

    for name in ("dataset", "check_apart"):
        monkeypatch.setattr(stages.engine, name, read)


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_an_option_is_refused_by_its_name(refused, unread, tmp_path, options, message):
    assert message in refused("train", "--out", tmp_path / "run", *STAGED, *options.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_file_is_refused_by_the_name_of_its_key(refused, unread, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert message in refused("train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("spelling", ["--dry-run", "--dry_run"])
def test_either_spelling_of_an_option_will_do(command, unread, spelling):
    code, said, _ = command("train", spelling, "--model.preset", "compact", "--batch_size", "1", "--horizon", "1")
    assert code == 0
    assert "FLOPs a step" in said


def test_what_a_running_stage_says_names_the_keys_that_were_given(tmp_path, monkeypatch):
    from vpfast.training import DataConfig, TrainConfig, train

    small = {"channels": [4, 4], "residual_channels": 4, "prior_channels": 8, "prior_ffn": 8, "prior_head": 8}
    config = TrainConfig(
        out=str(tmp_path / "run"),
        model={"name": "shrvqvae", "preset": "mnist-3x4", **small},
        data=DataConfig(size=16, digit_size=8),
        stages={"autoencoder": {"optim": {"lr": 0.5}}},
    )

    def fail(*args):
        raise FloatingPointError("the loss is nan at step 1; a lower optim.lr (now 0.5) or optim.clip_norm may help")

    monkeypatch.setattr(stages.engine, "run", lambda *args, **options: fail())
    with pytest.raises(FloatingPointError, match=r"a lower stages\.autoencoder\.optim\.lr \(now 0.5\) or optim\.clip"):
        train(config, progress=False)
