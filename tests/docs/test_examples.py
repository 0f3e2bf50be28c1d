"""The programs in examples/ run as their heads say; load_package.py's test is with the export's."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from docs_pages import ROOT

from vpfast.models import MSPN, MSPNConfig, load, save
from vpfast.training import DataConfig, TrainConfig
from vpfast.training.checkpoint import read_training, write_weights
from vpfast.visual import write_mp4

HORIZON = 2


def run(name, *arguments, cwd=None):
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save(MSPN(MSPNConfig.preset("compact")).eval(), tmp_path / "weights")
    return tmp_path / "weights"


def video(path, frames=12):
    """A bright square that moves one pixel a frame."""
    film = torch.zeros(frames, 3, 32, 32)
    for t in range(frames):
        film[t, :, 10:18, t : t + 8] = 1.0
    path.parent.mkdir(exist_ok=True)
    write_mp4(path, film, fps=100)


def test_every_example_has_its_page_and_its_test():
    here = (ROOT / "tests/docs/test_examples.py").read_text() + (ROOT / "tests/export/test_predictor.py").read_text()
    pages = "".join(page.read_text() for page in (ROOT / "docs/examples").glob("*.md"))
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in here, path.name
        assert f"<!-- include: examples/{path.name} -->" in pages, path.name


def test_swap_vector_quantize_pytorch():
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch, which it compares with")
    lines = run("swap_vector_quantize_pytorch.py", "20", "4096").splitlines()
    errors = [float(line.split()[-1]) for line in lines]
    assert len(errors) == 3
    assert errors[1] < 2 * errors[0]
    assert errors[2] < errors[1]  # as many comparisons, more leaves


def test_swap_convlstm():
    assert "after 5 frames" in run("swap_convlstm.py")


def test_predict_camera(weights, tmp_path):
    video(tmp_path / "clip.mp4")
    told = run("predict_camera.py", weights, tmp_path / "clip.mp4", "--pace")
    assert 1 <= int(told.split()[0]) <= 12
    assert float(told.split()[-1]) < 2


def test_finetune_folder(weights, tmp_path):
    for name in ("a", "b", "c"):
        video(tmp_path / "videos" / f"{name}.mp4")
    told = run(
        *("finetune_folder.py", weights, tmp_path / "videos", tmp_path / "tuned", "--cache", tmp_path / "cache"),
        *("--steps", 20, "--every", 10, "--batch", 2, "--size", 16, "--context", 3, "--horizon", HORIZON, "--lr", 3e-3),
    )
    before, *after = [float(line.split(": ")[1].split(",")[0]) for line in told.splitlines()]
    assert len(after) == 2
    assert min(after) < before
    changed = load(tmp_path / "tuned").state_dict()
    assert any(not torch.equal(changed[key], value) for key, value in load(weights).state_dict().items())


def test_publish_model(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: pip install 'vpfast[demo]'")
    torch.manual_seed(0)
    model = MSPN(MSPNConfig.preset("compact"))
    config = TrainConfig(out=str(tmp_path), data=DataConfig(size=32, digits=1, digit_size=20), seed=7)
    write_weights(tmp_path / "run" / "weights", model, config)
    (tmp_path / "run" / "log.jsonl").write_text("{}\n" * 12)
    told = run(
        *("publish_model.py", tmp_path / "run", tmp_path / "shared", "--name", "me/digits", "--license", "mit"),
        *("--about", "Digits.", "--command", "vpfast train --out run", "--took", "A minute."),
        *("--context", 2, "--horizon", HORIZON, "--clips", 3),
    )
    assert told.endswith("shared: README.md, config.json, model.safetensors, training.json\n")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "license: mit\n" in card
    assert "# digits\n\nDigits.\n" in card
    assert "```\nvpfast train --out run\n```\n\nSeed 7, 12 steps, torch" in card
    assert "A minute.\n\n## Quality\n\n3 clips of the test split, 2 frames from 2, protocol `default`:" in card
    assert "| repeat last frame | 0." in card
    assert read_training(tmp_path / "shared") == replace(config, out=tmp_path.name)
    loaded = MSPN.from_pretrained(tmp_path / "shared").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
