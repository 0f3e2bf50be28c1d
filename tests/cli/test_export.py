"""``vpfast export``: the file predicts what the weights predict."""

import pytest
import torch

from vpfast.models import load
from vpfast.ops import _native

FRAMES = torch.rand(3, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["weights", "future_weights"])
def test_an_exported_program_predicts_as_the_weights(kind, request, command, tmp_path):
    if kind == "future_weights" and _native.extension is None:
        pytest.skip("needs the compiled extension")
    folder, out = request.getfixturevalue(kind), tmp_path / "model.pt2"
    code, said, err = command("export", "--weights", folder, "--horizon", 2, "--format", "export", "--out", out)
    assert code == 0, err
    assert "2 frames from 3 frames of 16x24" in said
    predict = torch.export.load(out).module()
    assert torch.equal(predict(FRAMES), load(folder).predict(FRAMES, 2))
    with pytest.raises(AssertionError, match=r"size\(\)\[1\] == 3"):
        predict(FRAMES[:, :2])


def test_other_frames_than_those_of_training(weights, command, tmp_path):
    out = tmp_path / "model.pt2"
    arguments = ("--frames", 1, "--size", 8, 12, "--format", "export", "--device", "cpu")
    code, _, err = command("export", "--weights", weights, "--horizon", 1, "--out", out, *arguments)
    assert code == 0, err
    frames = FRAMES[:, :1, :, :8, :12]
    assert torch.equal(torch.export.load(out).module()(frames), load(weights).predict(frames, 1))


def test_what_cannot_be_is_refused_in_one_line(weights, code_weights, refused, tmp_path):
    def tried(*changes, folder=weights, out="model.pt2"):
        arguments = ("--weights", folder, "--out", tmp_path / out, "--format", "export", *changes)
        return refused("export", "--horizon", 2, *arguments)

    assert "must end in .pt2" in tried(out="model.zip")
    assert "trained HRVQVAE" in tried(folder=code_weights)
    assert "multiple of" in tried("--size", 7, 8)
    assert "whole number of at least 1" in tried("--frames", 0)
    (tmp_path / "model.pt2").write_bytes(b"mine")
    assert "exists already; --force replaces it" in tried()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_the_size_must_be_known(weights, refused, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((weights / name).read_bytes())
    assert "--size is needed" in refused("export", "--weights", bare, "--horizon", 2, "--out", tmp_path / "m.pt2")
