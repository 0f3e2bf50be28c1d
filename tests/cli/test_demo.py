"""The demonstration, with next to no training."""

import json
import sys

import pytest

import vpfast.models
from vpfast.cli import demo
from vpfast.models import MSPN, SHRVQVAE


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TEST_CLIPS", 2)
    monkeypatch.setattr(demo, "kernel_table", lambda: ["no times"])
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo"), "--scale", "0.001"])
    return tmp_path / "demo"


def test_a_second_run_replaces_the_first_and_nothing_else(out, monkeypatch):
    assert demo.main() == 0
    assert demo.main() == 0
    (out / "weights" / "notes.txt").write_text("x")
    monkeypatch.setattr(demo, "_train_mspn", lambda *args: pytest.fail("trained"))
    with pytest.raises(FileExistsError, match=r"--out .* weights/notes\.txt in it"):
        demo.main()
    assert (out / "weights" / "notes.txt").read_text() == "x"


def test_the_demo_leaves_pictures_and_numbers(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "TEST_CLIPS", 2)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(out), "--scale", "0.001"])
    demo.main()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["metrics.json", "metrics.md", "prediction.gif", "strip.png", "weights", "weights-shrvqvae"]
    )
    numbers = json.loads((out / "metrics.json").read_text())
    said = capsys.readouterr().out
    mse = {name: report["mean"]["mse"] for name, report in numbers.items()}
    assert list(mse) == ["MSPN", "S-HR-VQVAE", "repeat last frame"]
    told = f"of MSPN {mse['MSPN']:.4f}, of S-HR-VQVAE {mse['S-HR-VQVAE']:.4f}, of repeating the last frame"
    assert f"MSE of the prediction {told} {mse['repeat last frame']:.4f}" in said
    assert isinstance(vpfast.models.load(out / "weights"), MSPN)
    assert isinstance(vpfast.models.load(out / "weights-shrvqvae"), SHRVQVAE)
    assert (
        all(name in said for name in ("edlstm_gates", "codeword_search", "masked_attention3d"))
        or "no compiled kernel" in said
    )
