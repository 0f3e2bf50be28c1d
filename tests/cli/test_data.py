"""vpfast data, and what it prepares in the hands of train and evaluate."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import vpfast
import vpfast.cli.predict
from vpfast.cli._options import Options, config_file
from vpfast.data import PreparedClips, read_video
from vpfast.data.prepared import read_index
from vpfast.data.sets import SOURCES
from vpfast.training import TrainConfig, checkpoint
from vpfast.training.clips import dataset
from vpfast.training.config import from_dict

CONFIGS = Path(vpfast.__file__).parent / "configs"
ON_PREPARED = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if "kind: prepared" in path.read_text()
)
TINY = ["--model.channels", "[4,8]", "--model.levels", "1", "--model.hidden_channels", "4", "--device", "cpu"]


@pytest.fixture
def films(tmp_path, video):
    """train/, val/ and test/ with one film each, 12 frames of 16x24."""
    for split in ("train", "val", "test"):
        (tmp_path / "src" / split).mkdir(parents=True)
        (tmp_path / "src" / split / "film.avi").write_bytes(video.read_bytes())
    return tmp_path / "src"


@pytest.fixture
def prepared(command, films, tmp_path):
    out = tmp_path / "prepared"
    code, said, err = command("data", "prepare", "folder", "--src", films, "--out", out, "--size", "[16,24]")
    assert code == 0, err
    assert "3 recordings decoded, 0 already there" in said
    assert "| val | 1 | 12 | 12 | 12 | 0.0 |" in said
    return out


def test_prepare_check_train_evaluate(command, prepared, read_json, tmp_path):
    code, said, _ = command("data", "check", prepared)
    assert code == 0
    assert said.startswith("folder, 16x24 (height x width) RGB\n")
    data = ["--data.kind", "prepared", "--data.root", prepared, "--data.size", "[16,24]", "--data.channels", "3"]
    lengths = ["--context", "3", "--horizon", "2", "--steps", "2", "--batch_size", "1", "--val_every", "1"]
    code, _, err = command("train", *data, *lengths, *TINY, "--out", tmp_path / "run")
    assert code == 0, err
    weights = tmp_path / "run/weights"
    code, said, err = command("evaluate", "--weights", weights, "--out", tmp_path / "e.json", "--device", "cpu")
    assert code == 0, err
    assert "2 clips of the test split, 2 frames from 3" in said
    code, said, _ = command("evaluate", "--weights", weights, "--device", "cpu", "--data.stride", "1")
    assert "8 clips of the test split" in said
    assert np.isfinite(read_json(tmp_path / "e.json")["prediction"]["mean"]["mse"])


def test_the_same_command_goes_on(command, films, prepared, tmp_path):
    (prepared / "frames/val/film.avi.npy").write_bytes(b"")
    args = ["data", "prepare", "folder", "--src", films, "--out", prepared, "--size", "[16,24]"]
    code, said, _ = command("data", "check", prepared)
    assert code == 2
    assert "film.avi.npy: 0 bytes long, must be 13952" in said
    code, said, _ = command(*args, "--workers", "0")
    assert code == 0
    assert "1 recordings decoded, 2 already there" in said
    code, said, _ = command("data", "check", prepared, "--workers", "0")
    assert code == 0


def test_a_configuration_file_holds_options(command, films, tmp_path):
    (tmp_path / "c.yaml").write_text(f"src: {films}\nsize: [8, 12]\nfit: crop\nchannels: 1\ntest: ['val/*']\nval: []\n")
    code, _, err = command("data", "prepare", "folder", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    assert code == 0, err
    index = read_index(tmp_path / "out")
    assert (index.size, index.fit, index.channels) == ((8, 12), "crop", 1)
    assert [(entry.name, entry.split) for entry in index.recordings] == [
        ("train/film.avi", "train"),
        ("val/film.avi", "test"),
    ]


WRONG = [
    ([], "prepare|check"),
    (["prepare"], "NAME"),
    (["prepare", "imagenet"], "no such data set; there are caltech, folder, human36m, kitti, kth, moving-mnist"),
    (["prepare", "kth"], "--src is missing (`vpfast data prepare kth --help`"),
    (["prepare", "kth", "--src", "/nowhere"], "--out is missing"),
    (["prepare", "kth", "--src", "/nowhere", "--out", "x"], "/nowhere: no such folder"),
    (["prepare", "kth", "--src", "/nowhere", "--out", "x", "--strides", "3"], "did you mean '--stride'?"),
    (["prepare", "kth", "--src", "/nowhere", "--out", "x", "--stride", "3"], "stride: "),
    (["prepare", "folder", "--src", "/nowhere", "--out", "x", "--size", "[0,4]"], "got (0, 4)"),
    (["prepare", "folder", "--src", "/nowhere", "--out", "x", "--size", "16,24"], "given as a list: [1,2]"),
    (["prepare", "folder", "--src", "/nowhere", "--out", "x", "--size", "[9000,9]"], "at most 8192"),
    (["prepare", "folder", "--src", "/nowhere", "--out", "x", "--workers", "-1"], "workers: -1 given"),
    (["check"], "folder"),
    (["check", "/nowhere"], "/nowhere: no such folder; `vpfast data prepare NAME --src FOLDER --out /nowhere`"),
    (["check", "/nowhere", "--workers", "x"], "x given, must be a whole number of at least 0"),
    (["wash"], "invalid choice: 'wash'"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_what_cannot_be_served_is_refused(refused, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("data", *args)
    assert not list(tmp_path.iterdir())


def test_damaged_videos_are_named(refused, films, tmp_path):
    (films / "val/film.avi").write_bytes((films / "val/film.avi").read_bytes()[:3000])
    said = refused("data", "prepare", "folder", "--src", films, "--out", tmp_path / "out")
    assert said.startswith(f"vpfast: 1 of 3 recordings cannot be prepared: {films}/val/film.avi: ")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_set_has_help(command, name):
    code, said, _ = command("data", "prepare", name, "--help")
    assert code == 0
    for option in ("--src", "--out", "--size", "--fit", "--channels", "--workers", "--force"):
        assert option in said


def loaded(args):
    options = Options("test", "")
    options.add_config(TrainConfig)
    return from_dict(TrainConfig, options.parse(args))


@pytest.mark.parametrize("name", ON_PREPARED)
def test_a_configuration_fits_the_set_that_its_head_prepares(name):
    head = config_file(name).read_text()
    command = re.search(r"^#   vpfast data prepare (.*)$", head, re.MULTILINE)[1]
    kind, *args = shlex.split(command)
    options = Options("test", "")
    source = SOURCES[kind]()
    given = {"size": source.size, "fit": source.fit, "channels": source.channels}
    for key in ("src", "out"):
        options.add(key, str, "", "")
    for key, value in vars(source).items():
        options.add(key, object if key not in given else type(value), value, "")
    values = options.parse(args)
    config = loaded(["--config", name, "--data.root", values["out"]])
    assert config.data.frame_size == tuple(values["size"])
    assert (config.data.fit, config.data.channels) == (values["fit"], values["channels"])
    assert f"--data.root {values['out']} " in head


def test_there_is_a_configuration_for_every_set_of_the_papers():
    heads = [config_file(name).read_text() for name in ON_PREPARED]
    for kind in set(SOURCES) - {"folder"}:
        assert any(f"vpfast data prepare {kind} " in head for head in heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 16}, r"data\.size: \[16, 16\] and data\.fit squash given, .* give data\.size \[16, 24\]"),
        ({"fit": "crop"}, r"data\.fit crop given, but .* and data\.fit squash, or prepare it again"),
        ({"train": {"include": "x*"}}, "none of the 1 recordings of the train split left by"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(prepared, change, message):
    data = {"kind": "prepared", "root": str(prepared), "size": (16, 24), "channels": 3}
    config = from_dict(TrainConfig, {"data": {**data, **change}})
    with pytest.raises(ValueError, match=message):
        dataset(config.data, "train", 5)


def test_clips_evenly_spaced(prepared):
    data = {"kind": "prepared", "root": str(prepared), "size": (16, 24), "channels": 1, "stride": 1}
    config = from_dict(TrainConfig, {"data": data})
    few, all_of_them = dataset(config.data, "val", 5, count=3), PreparedClips(prepared, "val", 5, 1, channels=1)
    assert len(few) == 3
    assert [np.array_equal(few[i], all_of_them[j]) for i, j in enumerate((0, 4, 7))] == [True] * 3


def test_a_folder_of_videos_is_cropped_where_asked(films, tmp_path):
    data = {"kind": "video-folder", "root": str(films), "size": 16, "cache": str(tmp_path / "cache"), "fit": "crop"}
    crop = dataset(from_dict(TrainConfig, {"data": data, "val_every": 0}).data, "train", 5)[0]
    squash = dataset(from_dict(TrainConfig, {"data": {**data, "fit": "squash"}, "val_every": 0}).data, "train", 5)[0]
    assert crop.shape == squash.shape == (5, 1, 16, 16)
    assert not np.array_equal(crop, squash)


@pytest.fixture
def cropped(tmp_path):
    """Rewrites weights as if they had been trained on 16x16 frames that were cropped."""

    def rewrite(folder):
        model, trained = checkpoint.read_weights(folder, nn.Module)
        data = dataclasses.replace(trained.data, size=(16, 16), fit="crop")
        checkpoint.write_weights(tmp_path / "cropped", model, dataclasses.replace(trained, data=data))
        return tmp_path / "cropped"

    return rewrite


def test_predict_brings_a_video_to_size_as_training_did(command, cropped, weights, video, tmp_path, monkeypatch):
    seen = []

    class Seeing:
        def __init__(self, model):
            self.model = model

        def predict(self, frames, horizon):
            seen.append(frames)
            return self.model.predict(frames, horizon)

    monkeypatch.setattr(vpfast.cli.predict, "optimize", Seeing)
    for start in ("0", "-12"):
        args = ["--weights", cropped(weights), "--start", start, "--out", tmp_path / start, "--device", "cpu"]
        code, _, err = command("predict", video, *args)
        assert code == 0, err
        expected = read_video(video, 16, 1, count=3, fit="crop").float().div(255)
        assert np.array_equal(seen.pop()[0], expected)


def test_encode_brings_a_video_to_size_as_training_did(command, cropped, code_weights, video, tmp_path):
    code, _, err = command(
        "encode", video, "--weights", cropped(code_weights), "--out", tmp_path / "c", "--device", "cpu"
    )
    assert code == 0, err
    model, _ = checkpoint.read_weights(code_weights, nn.Module)
    codes = model.eval().encode(read_video(video, 16, 1, fit="crop").float().div(255))
    assert (tmp_path / "c").read_bytes() == codes.to_bytes()


def test_real_videos_from_the_command_line_alone(command, shared, read_json, tmp_path):
    """KTH at 64x64, and Moving MNIST: prepare, check, train two steps, evaluate."""
    few = ["--train", "8", "--val", "2", "--test", "3"]
    for name, options, clips in (("kth", ["--size", "[64,64]", "--channels", "1"], 18), ("moving-mnist", few, 3)):
        source = shared / "data" / {"kth": "kth", "moving-mnist": "mnist"}[name]
        prepared, run = tmp_path / name, tmp_path / f"{name}-run"
        assert command("data", "prepare", name, "--src", source, "--out", prepared, *options)[0] == 0
        assert command("data", "check", prepared)[0] == 0
        data = ["--config", f"mspn/{name}", "--data.root", prepared, "--data.size", "64"]
        brief = ["--steps", "2", "--optim.warmup", "0", "--batch_size", "2", "--val_every", "2", "--val_clips", "2"]
        code, _, err = command("train", *data, *brief, *TINY, "--out", run)
        assert code == 0, err
        code, said, err = command("evaluate", "--weights", run / "weights", "--out", run / "e.json", "--device", "cpu")
        assert code == 0, err
        assert f"{clips} clips of the test split, 10 frames from 10" in said
        assert read_json(run / "e.json")["repeat last frame"]["mean"]["psnr"] > 10


@pytest.mark.parametrize("damaged", [False, True])
def test_frames_of_a_seq_file_beyond_its_header_are_told(command, shared, tmp_path, damaged):
    """Of the file that announces fewer frames, also where another film of the same run cannot be read."""
    content = bytearray((shared / "data/caltech_style/set06/V000.seq").read_bytes())
    content[572:576] = (28).to_bytes(4, "little")
    (tmp_path / "set06").mkdir()
    (tmp_path / "set06/V000.seq").write_bytes(content)
    if damaged:
        (tmp_path / "set06/V001.seq").write_bytes(content[: len(content) // 2])
    code, said, err = command(
        "data", "prepare", "caltech", "--src", tmp_path, "--out", tmp_path / "out", "--size", "[16,16]"
    )
    assert (code == 0) is not damaged
    assert ("V001.seq: frame 1" in err) is damaged
    assert f"note: {tmp_path}/set06/V000.seq: goes on with frames at offset " in said
    assert "behind the 28 that its header announces; left out" in said
