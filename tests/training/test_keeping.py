"""What is saved is never lost: damage, full disks, folders that cannot be written, kills, signals at any moment."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vpfast._files import clear_up
from vpfast.training import OptimConfig, Stopped, checkpoint, engine, train
from vpfast.training.config import to_dict


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saved(config):
    return checkpoint.found(Path(config.out) / "checkpoints")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """A run of 6 steps with checkpoints after 2, 4 and 6. Its configuration."""
    config = dataclasses.replace(small(tmp_path_factory.mktemp("trained")), keep=3)
    train(config, progress=False)
    return config


@pytest.fixture
def halfway(tiny, trained):
    """A run killed after 4 of 6 steps, and the weights that it would have ended with."""
    root = Path(tiny().out)
    shutil.copytree(trained.out, root)
    for name in ("weights", "best", "checkpoints/step-00000006"):
        shutil.rmtree(root / name)
    (root / "config.yaml").write_text(yaml.safe_dump(to_dict(tiny())))
    return weights(Path(trained.out) / "weights")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(tiny, halfway, capsys, damage, name):
    if (damage, name) == (flip, "checkpoint.json"):
        name = "config.json"
    newest = saved(tiny())[-1]
    damage(newest / name)
    finished = train(tiny(), resume=True, progress=False)
    said = capsys.readouterr().err
    assert f"the checkpoint {newest} is damaged ({name}" in said
    assert "the one before is taken" in said
    assert same(weights(finished), halfway)
    assert newest.with_name("step-00000004.damaged").is_dir()
    assert [checkpoint.damage(path) for path in saved(tiny())] == [None, None]


def test_where_all_are_damaged_nothing_is_begun_anew(tiny, halfway):
    for path in saved(tiny()):
        truncate(path / "state.pt")
    with pytest.raises(ValueError, match=r"every checkpoint in .*/checkpoints is damaged; without them"):
        train(tiny(), resume=True, progress=False)
    assert len(saved(tiny())) == 2


def test_a_checkpoint_runs_no_code(tiny, halfway, tmp_path):
    """Though its digests are right: whoever sends a checkpoint makes those, too."""
    newest = saved(tiny())[-1]
    torch.save({"optimizers": Evil(tmp_path / "owned"), "scaler": {}, "random": []}, newest / "state.pt")
    told = json.loads((newest / "checkpoint.json").read_text())
    told["sha256"]["state.pt"] = checkpoint._digest(newest / "state.pt")
    (newest / "checkpoint.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="step-00000004 cannot be read"):
        train(tiny(), resume=True, progress=False)
    assert not (tmp_path / "owned").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# -- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json", "log.jsonl"])
def test_a_full_disk_loses_nothing_that_is_saved(tiny, halfway, monkeypatch, name):
    """Full while that file is written; once there is room the run goes on to the same end."""
    with monkeypatch.context() as patch:
        refuse(patch, name, errno.ENOSPC)
        with pytest.raises(OSError, match="No space left on device; step-00000004 is kept, and resume") as told:
            train(tiny(), resume=True, progress=False)
    assert str(told.value).startswith(f"{tiny().out} cannot be written")
    assert [checkpoint.step_of(path) for path in saved(tiny())] == [2, 4]
    assert [checkpoint.damage(path) for path in saved(tiny())] == [None, None]
    assert not list(Path(tiny().out).rglob(".*"))
    assert same(weights(train(tiny(), resume=True, progress=False)), halfway)


def refuse(patch, name, number):
    """Every write to a file of that name fails."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            self.file.close()

        def write(self, data):
            raise OSError(number, os.strerror(number))

    opened = Path.open

    def open_(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        asked = path.name == name or path.name.startswith(f".{name}.")
        return Full(file) if asked and set(mode) & set("wa") else file

    patch.setattr(Path, "open", open_)
    patch.setattr(Path, "write_bytes", lambda path, data: open_(path, "wb").write(data))
    patch.setattr(Path, "write_text", lambda path, text: open_(path, "w").write(text))


def test_data_that_cannot_be_read_is_not_told_as_a_full_disk(tiny, monkeypatch):
    def closed(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/clip.avi")

    monkeypatch.setattr("vpfast.data.MovingDigits.__getitem__", closed)
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied: '/elsewhere/clip.avi'$"):
        train(tiny(), progress=False)


def test_a_run_that_other_processes_began_says_so(tiny, halfway, monkeypatch, capsys):
    load = checkpoint.load

    def of_two(*args):
        state = load(*args)
        state.random *= 2
        return state

    monkeypatch.setattr(checkpoint, "load", of_two)
    train(tiny(), resume=True, progress=False)
    assert "step-00000004 was saved by 2 processes, 1 go on: a step has as many clips" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_data_is_read(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != tmp_path)
    monkeypatch.setattr(engine, "dataset", lambda *args: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=f"out: .* cannot be written: no permission to write in {tmp_path}$"):
        train(tiny(), progress=False)


def test_what_a_kill_left_behind_is_cleared_up(tmp_path):
    """A draft goes; a folder that had stepped aside for one returns, unless the draft had taken its place."""
    for name in (".best.a.partial", ".best.b.old/best", ".weights.c.old/weights", "weights", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".config.yaml.a.partial.yaml").touch()
    clear_up(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "best": ".best.b.old/best",
        "weights": "weights",
        "other": "other",
    }


# -- signals and kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["validate", "save"])
def test_a_signal_while_validating_or_saving_waits_its_turn(tiny, trained, monkeypatch, moment, signum):
    where = engine if moment == "validate" else checkpoint
    work, calls = getattr(where, moment), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signum)
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, moment, interrupted)
        with pytest.raises(Stopped, match=f"stopped by {signum.name} after step"):
            train(tiny(), progress=False)
    assert checkpoint.damage(saved(tiny())[-1]) is None
    assert same(weights(train(tiny(), resume=True, progress=False)), weights(Path(trained.out) / "weights"))


def killed_again_and_again(config, kills, seed):
    """Train in processes that are killed at random moments; -> the finished weights, and how far each process got."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vpfast.training.engine"])
    draws, steps = random.Random(seed), []
    while True:
        process = context.Process(target=train, args=(config, True, False))
        process.start()
        if len(steps) < kills and reached(Path(config.out), process, draws.uniform(0.0, 0.4)):
            process.kill()
            process.join()
            steps.append([checkpoint.step_of(each) for each in saved(config)][-1:])
            continue
        process.join(timeout=300)
        assert process.exitcode == 0
        return Path(config.out) / "weights", steps


def reached(out, process, seconds):
    """Wait until the run is under way and then for so many seconds; False where it ended before."""
    log = out / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    patience = time.monotonic() + 300
    while not log.exists() or log.stat().st_mtime_ns == before:
        if not process.is_alive():
            return False
        assert time.monotonic() < patience
        time.sleep(0.005)
    time.sleep(seconds)
    return process.is_alive()


def test_a_run_that_is_killed_at_random_moments_ends_the_same(tiny, tmp_path):
    """A checkpoint every step, averages and validations included."""
    optim = OptimConfig(schedule="cosine", warmup=2, ema_decay=0.9)
    config = tiny(out=str(tmp_path / "killed"), steps=40, save_every=1, val_every=7, optim=optim)
    finished, steps = killed_again_and_again(config, kills=3, seed=1)
    assert len(steps) == 3
    whole = train(tiny(out=str(tmp_path / "whole"), steps=40, save_every=0, val_every=7, optim=optim), progress=False)
    assert same(weights(finished), weights(whole))
    assert same(weights(finished.parent / "best"), weights(whole.parent / "best"))
    logged = [json.loads(line)["step"] for line in (finished.parent / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 41))
