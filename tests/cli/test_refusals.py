"""What was once served in part, waited for, or answered with a traceback, and is refused in one line."""

import json
import os

import pytest
import safetensors.torch
import torch

from vpfast.models import load

SMALL = ("--data.size=16", "--data.digit_size=8", "--context=2", "--horizon=1", "--steps=1", "--val_every=0")
STAGED = (*SMALL, "--model.name=shrvqvae", "--model.preset=mnist-3x4", "--device=cpu")


@pytest.fixture
def copy(weights, tmp_path):
    """Weights to spoil."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(refused, copy, video, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert f"{copy / name} " in refused("predict", video, "--weights", copy, "--out", copy / "o")


def test_codes_and_prepared_sets_are_not_waited_for(refused, code_weights, tmp_path):
    os.mkfifo(tmp_path / "index.json")
    assert "index.json: cannot be read" in refused("data", "check", tmp_path)
    said = refused("decode", tmp_path / "index.json", "--weights", code_weights, "--out", tmp_path / "o")
    assert "index.json: cannot be read (not a regular file)" in said


def test_nothing_but_a_file_is_replaced_by_a_file(refused, weights, video, tmp_path):
    os.mkfifo(tmp_path / "out.json")
    said = refused("evaluate", "--weights", weights, "--out", tmp_path / "out.json")
    assert "out.json is a device or a pipe, must be a file" in said
    assert (tmp_path / "out.json").is_fifo()


def test_the_root_of_all_folders_is_not_replaced(refused, weights, video):
    assert "--out / is the root of all folders" in refused(
        "predict", video, "--weights", weights, "--out", "/", "--force"
    )


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", "[" * 100_000])
def test_what_weights_say_of_themselves_is_not_believed(refused, copy, video, text):
    path = copy / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"vpfast": text})
    said = refused("predict", video, "--weights", copy, "--out", copy / "o")
    assert f"{path} is damaged or no safetensors file" in said


@pytest.mark.parametrize(
    ("kind", "message"), [(torch.int64, "must be of a type such as"), (torch.float64, "all must be of one type")]
)
def test_weights_are_of_one_type(copy, kind, message):
    path = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(iter(load(copy).state_dict()))
    safetensors.torch.save_file({**tensors, name: tensors[name].to(kind)}, path)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load(copy)


def test_a_configuration_without_end_is_refused(refused, copy, video):
    (copy / "config.json").write_text("[" * 100_000)
    assert "config.json is not JSON" in refused("predict", video, "--weights", copy, "--out", copy / "o")
    (copy / "training.json").write_text("[" * 100_000)
    assert "config.json is not JSON" in refused("predict", video, "--weights", copy, "--out", copy / "o")


def test_a_few_aliases_cannot_stand_for_more_than_there_is_memory(refused, tmp_path):
    lines = [
        "a: &a [x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert "holds more than 100000 values" in refused("train", "--config", tmp_path / "c.yaml")


def test_the_place_of_a_value_is_not_empty(refused, weights, video, tmp_path):
    assert refused("train", "--steps=--") == "vpfast: --steps=--: -- is no value\n"
    said = refused("predict", video, "--weights", weights, "--out", tmp_path / "o", "--fps=--")
    assert said == "vpfast: --fps=--: -- is no value\n"


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "\x1b[31m"])
def test_no_name_breaks_the_line(refused, weights, tmp_path, name):
    said = refused("predict", tmp_path / name, "--weights", weights, "--out", tmp_path / "o")
    assert said[:-1].isprintable()
    assert len(said) < 1100


@pytest.mark.parametrize("number", ["9" * 30, "100000000", "9" * 5000, "٣"])
def test_numbers_are_digits_and_have_an_end(refused, weights, video, number):
    said = refused("predict", video, "--weights", weights, "--out", "o", "--horizon", number)
    assert "argument --horizon: " in said
    assert "must be " in said


def test_frames_have_a_largest_size(refused, weights, video):
    given = ("--weights", weights, "--out", "o")
    assert "--size: 8194 given, must be at most 8192" in refused("predict", video, *given, "--size", 8194, 16)
    assert "size: [8194, 16] given, must be from 1 to 8192" in refused("visualize", video, *given, "--size", 8194, 16)
    assert "data.size: 8196 given, must be at most 8192" in refused("train", "--data.size", 8196)
    assert "data.size: 4100 given" in refused("train", "--data.size", 4100, "--data.supersample", 2)


@pytest.mark.parametrize("wrong", [("--data.root", "/nowhere"), ("--stage", "joint", "--init")])
def test_a_run_that_cannot_begin_leaves_no_folder(refused, weights, tmp_path, wrong):
    last = (weights,) if wrong[-1] == "--init" else ()
    refused("train", *STAGED, *wrong, *last, "--out", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_told_in_one_line(command, refused, tmp_path):
    run = ("train", *SMALL, "--model.preset=compact", "--batch_size=1", "--device=cpu", "--out", tmp_path / "run")
    assert command(*run)[0] == 0
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    (path / "state.pt").write_bytes(b"")
    said = refused("train", "--resume", "--out", tmp_path / "run")
    assert f"every checkpoint in {path.parent} is damaged" in said
    assert f"({path.name}: state.pt is not what was written)" in said
    (tmp_path / "run" / "config.yaml").write_text("[")
    (tmp_path / "other.yaml").write_text("keep: 1")
    said = refused(*run, "--resume", "--config", tmp_path / "other.yaml")
    assert "config.yaml does not describe the run that is to go on" in said


def test_a_preparation_of_which_nothing_came_leaves_nothing(refused, video, tmp_path):
    source = tmp_path / "source" / "train"
    source.mkdir(parents=True)
    (source / "film.avi").write_bytes(video.read_bytes()[:300])
    refused("data", "prepare", "folder", "--src", source.parent, "--out", tmp_path / "set", "--workers", 0)
    assert not (tmp_path / "set").exists()
    (source / "good.avi").write_bytes(video.read_bytes())
    refused("data", "prepare", "folder", "--src", source.parent, "--out", tmp_path / "set", "--workers", 0)
    assert (tmp_path / "set" / "frames" / "train" / "good.avi.npy").is_file()  # from where it goes on


def test_what_a_model_that_predicts_nothing_is_shown_is_checked(refused, code_weights, video):
    said = refused("visualize", video, "--weights", code_weights, "--out", "o", "--context", -9)
    assert "context: -9 given, must be at least 1" in said


def test_too_little_memory_is_a_failure_and_no_defect(command, monkeypatch):
    import vpfast.cli.doctor as doctor

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        monkeypatch.setattr(doctor, "report", lambda error=error: (_ for _ in ()).throw(error))
        code, _, said = command("doctor")
        assert (code, said.count("\n")) == (1, 1)
        assert "not enough memory" in said


def test_a_record_is_of_numbers(refused, tmp_path):
    row = {"case": "a", "contender": "vpfast", "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "peak_bytes": "x"}
    record = {"format": 1, "name": "x", "device": "cpu", "machine": {}, "slopes": [], "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    said = refused("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert "peak_bytes of row 0 is 'x'" in said


def test_demo_speaks_as_the_other_commands_do(capsys):
    from vpfast.cli import answered, demo

    for wrong in (["--scale", "nan"], ["--scale", "x"], ["--scale=--"], ["--steps", "3"]):
        assert answered(lambda wrong=wrong: demo.main(wrong), "demo") == 2
        said = capsys.readouterr().err
        assert said.startswith("vpfast: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize("option", ["out", "strip"])
def test_a_name_that_is_empty_is_no_name_left_out(refused, weights, option):
    said = refused("evaluate", "--weights", weights, f"--{option}=")
    assert said == f"vpfast: {option}: '' given, must be the name of a file\n"


def test_processes_have_an_end(refused, tmp_path):
    said = refused("data", "prepare", "folder", "--src", tmp_path, "--out", tmp_path / "set", "--workers", 10**30)
    assert "must be at most 4096" in said
