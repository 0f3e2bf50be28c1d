"""What a run tells: lines, progress, TensorBoard, curves; and that a run which is gone on with tells one story."""

import json
import sys
from pathlib import Path

import pytest
import torch

from vpfast.training import Stopped, log, train
from vpfast.training.log import RunLog, scalars

RECORD = {"step": 1, "loss": 2.0, "accuracy": 0.5, "lr": 1e-3, "clips": 4, "seconds": 0.5}
CHECKED = {"val_mse": 0.1, "val_psnr": {"prediction": 20.0, "repeat last frame": None}}


def lines(config):
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to write_curves, call by call, in place of a picture."""
    calls = []
    monkeypatch.setattr(log, "write_curves", lambda path, panels, **how: calls.append((path, panels, how)))
    return calls


def test_a_run_ends_with_curves_of_all_it_told(tiny, drawn):
    config = tiny(steps=4, val_every=2)
    train(config, progress=False)
    ((path, panels, how),) = drawn
    assert path == Path(config.out) / "curves.png"
    assert list(panels) == ["loss", "val_mse", "val_psnr", "lr"]
    assert panels["loss"]["loss"].steps == [1, 2, 3, 4]
    assert panels["loss"]["loss"].values == [record["loss"] for record in lines(config)]
    assert list(panels["val_psnr"]) == ["prediction", "repeat last frame"]
    assert panels["val_mse"]["val_mse"].steps == [2, 4]
    assert how["linear"] == {"lr"}
    assert how["title"].endswith("run: 4 steps")


def test_a_stopped_run_is_drawn_and_one_that_goes_on_draws_all(tiny, drawn, monkeypatch):
    config = tiny(steps=4)
    opened = log.RunLog.write

    def stop_at_2(self, record):
        opened(self, record)
        if record["step"] == 2:
            raise Stopped(2, 15, config.out)

    with monkeypatch.context() as patch:
        patch.setattr(log.RunLog, "write", stop_at_2)
        with pytest.raises(Stopped):
            train(config, progress=False)
    assert [len(panels["loss"]["loss"].steps) for _, panels, _ in drawn] == [2]
    train(config, resume=True, progress=False)
    assert drawn[-1][1]["loss"]["loss"].steps == [1, 2, 3, 4]


def test_a_run_of_no_step_draws_nothing(tiny, drawn):
    config = tiny()
    Path(config.out).mkdir()
    with RunLog(config, main=True, progress=False).opened(0):
        pass
    assert not drawn
    assert lines(config) == []


def test_a_disk_that_takes_no_picture_takes_no_weights_away(tiny, monkeypatch, capsys):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "write_curves", full)
    assert (train(tiny(steps=1), progress=False) / "model.safetensors").is_file()
    assert "no curves were drawn: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_line_cut_short_is_no_part_of_the_story(tiny, drawn):
    """As a disk that is full leaves one, and that error is not to be hidden by another."""
    config = tiny()
    Path(config.out).mkdir()

    def full():
        with RunLog(config, main=True, progress=False).opened(0) as told:
            for step in (1, 2):
                told.write(RECORD | {"step": step})
            told._lines.write('{"step": 3, "loss": 0.')
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        full()
    assert [panels["loss"]["loss"].steps for _, panels, _ in drawn] == [[1, 2]]
    with RunLog(config, main=True, progress=False).opened(2):
        pass
    assert [record["step"] for record in lines(config)] == [1, 2]


def test_other_processes_write_nothing(tiny):
    with RunLog(tiny(), main=False, progress=True).opened(0) as quiet:
        quiet.write(RECORD)
        assert not quiet.wants_strip(500)
    assert not Path(tiny().out).exists()


def test_the_bar_shows_loss_and_speed(tiny, capsys):
    config = tiny()
    Path(config.out).mkdir()
    with RunLog(config, main=True, progress=True).opened(0) as told:
        told.write(RECORD | CHECKED)
        told._bar.refresh()
    said = capsys.readouterr().err
    assert "1/6" in said
    for shown in ("loss=2", "clips/s=8.0", "val_mse=0.1"):
        assert shown in said
    assert lines(config) == [RECORD | CHECKED]


def test_scalars_have_tags_that_group_them():
    assert scalars(RECORD | CHECKED) == {
        "train/clips_per_second": 8.0,
        "train/loss": 2.0,
        "train/accuracy": 0.5,
        "train/lr": 1e-3,
        "val/mse": 0.1,
        "val/psnr/prediction": 20.0,
    }


def test_without_tensorboard_one_line_before_any_data(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr("vpfast.training.engine.dataset", None)
    config = tiny(tensorboard=True)
    with pytest.raises(ImportError, match=r"tensorboard: true given, .* pip install 'vpfast\[tensorboard\]'"):
        train(config, progress=False)
    assert not Path(config.out).exists()


def events(folder):
    """tag -> steps, of scalars and of images, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"images": 0})
    read.Reload()
    steps = {tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return steps, {tag: read.Images(tag) for tag in read.Tags()["images"]}


@pytest.mark.parametrize("codes", [False, True])
def test_tensorboard_shows_scalars_and_strips(tiny, tiny_codes, codes):
    pytest.importorskip("tensorboard")
    config = (tiny_codes if codes else tiny)(steps=4, val_every=2, tensorboard=True, strip_every=2)
    train(config, progress=False)
    steps, images = events(Path(config.out) / "tensorboard")
    assert steps["train/loss"] == [1, 2, 3, 4]
    assert steps["val/mse"] == [2, 4]
    (strips,) = images.values()
    assert [image.step for image in strips] == [2, 4]
    assert min(strips[0].width, strips[0].height) > 100
    assert strips[0].encoded_image_string[:4] == b"\x89PNG"


def test_a_strip_changes_nothing_about_the_run(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    told, quiet = tiny(tensorboard=True, strip_every=3, out=str(tmp_path / "told")), tiny(out=str(tmp_path / "quiet"))
    for config in (told, quiet):
        train(config, progress=False)

    def numbers(config):
        return [{key: value for key, value in record.items() if key != "seconds"} for record in lines(config)]

    assert numbers(told) == numbers(quiet)


def test_what_was_told_after_the_last_checkpoint_is_hidden(tiny):
    pytest.importorskip("tensorboard")
    config = tiny(tensorboard=True, steps=4)
    Path(config.out).mkdir()
    for behind, until in ((0, 3), (2, 4)):
        with RunLog(config, main=True, progress=False).opened(behind) as told:
            for step in range(behind + 1, until + 1):
                told.write(RECORD | {"step": step, "loss": float(torch.rand(()))})
    steps, _ = events(Path(config.out) / "tensorboard")
    assert steps["train/loss"] == [1, 2, 3, 4]
    assert [record["step"] for record in lines(config)] == [1, 2, 3, 4]
