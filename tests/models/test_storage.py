"""Saving and loading: nothing lost on the way, and every damaged folder named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize, prune

import vpfast
from vpfast.models import HRVQVAE, MSPN, MSPNConfig, SHRVQVAEConfig, load, save

CONFIG = MSPNConfig(
    in_channels=1, channels=(2, 3, 4), levels=2, hidden_channels=2, batch_norm=True, gate_order="gofi", feed_frame=True
)
FRAMES = torch.rand(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> MSPN:
    torch.manual_seed(0)
    model = MSPN(CONFIG)
    model(FRAMES, 1)  # moves the statistics of batch norm
    return model.eval()


def test_round_trip(model: MSPN, tmp_path: Path) -> None:
    save(model, tmp_path / "a" / "b")
    loaded = load(tmp_path / "a" / "b")
    assert isinstance(loaded, MSPN)
    assert loaded.config == CONFIG
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.predict(FRAMES, 2), model.predict(FRAMES, 2))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    description = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert description["model"] == "mspn"
    assert description["config"]["channels"] == [2, 3, 4]
    assert description["vpfast"] == vpfast.__version__


def test_types_and_layouts_survive(model: MSPN, tmp_path: Path) -> None:
    model.bfloat16().to(memory_format=torch.channels_last)
    save(model, tmp_path)
    loaded = load(tmp_path).state_dict()
    for key, value in model.state_dict().items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)


def test_saving_again_replaces_both_files_and_nothing_else(model: MSPN, tmp_path: Path) -> None:
    save(model, tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    other = MSPN(MSPNConfig(1, (2, 3), 1, 2))
    save(other, str(tmp_path))
    loaded = load(str(tmp_path))
    assert isinstance(loaded, MSPN)
    assert loaded.config == other.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_only_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"can save a MSPN.*, got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def weight_norm(layer: torch.nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer)


def pruned(layer: torch.nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def of_another_size(layer: torch.nn.Conv2d) -> None:
    layer.weight = torch.nn.Parameter(layer.weight[..., :1])


@pytest.mark.parametrize(
    ("change", "message", "undo"),
    [
        (
            weight_norm,
            r"holds 'levels\.0\.head\.parametrizations\.weight\.original0', which its .*remove_parametrizations",
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        ),
        (
            pruned,
            r"holds 'levels\.0\.head\.weight_mask', which its configuration does not know; .*prune\.remove",
            lambda layer: prune.remove(layer, "weight"),
        ),
        (
            torch.nn.Module.double,
            r"'levels\.0\.head\.weight' is of torch\.float64, .*\.to\(dtype\)",
            torch.nn.Module.float,
        ),
        (of_another_size, r"'levels\.0\.head\.weight' has shape \(1, 2, 5, 1\), but its configuration calls for", None),
    ],
)
def test_what_load_would_refuse_is_not_saved(
    model: MSPN,
    tmp_path: Path,
    change: Callable[[torch.nn.Module], object],
    message: str,
    undo: Callable[[torch.nn.Module], object] | None,
) -> None:
    head = model.levels[0].head
    change(head)
    for write in (save, MSPN.save_pretrained):
        with pytest.raises(ValueError, match=f"this MSPN:? {message}"):
            write(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    if undo is not None:
        undo(head)
        save(model, tmp_path / "x")
        loaded = load(tmp_path / "x")
        assert isinstance(loaded, MSPN)
        assert torch.equal(loaded.predict(FRAMES, 2), model.predict(FRAMES, 2))


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codebooks_of_float32_in_half_precision(tmp_path: Path, update: str, dtype: torch.dtype) -> None:
    model = HRVQVAE(replace(SHRVQVAEConfig.preset("kth-3x8"), codebook_update=update)).to(dtype).eval()
    save(model, tmp_path)
    loaded = load(tmp_path).state_dict()
    wide = torch.promote_types(dtype, torch.float32)
    assert loaded["quantizer.codewords"].dtype == wide
    for key, value in model.state_dict().items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)


def test_saving_draws_no_random_number(model: MSPN, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    save(model, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_failed_save_leaves_the_old_model(model: MSPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model, tmp_path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(MSPN(MSPNConfig(1, (2, 3), 1, 2)), tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load(tmp_path)
    assert isinstance(loaded, MSPN)
    assert loaded.config == CONFIG


def test_missing(model: MSPN, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; a saved model is a folder with config\.json"):
        load(tmp_path / "nowhere")
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("\udcff", "config.json is not JSON"),
        ("[]", "does not describe a vpfast model"),
        ('{"config": {}}', '"model" is None; this version knows mspn'),
        ('{"model": "gpt", "config": {}}', "\"model\" is 'gpt'; this version knows mspn"),
        ('{"model": [], "config": {}}', '"model" is \\[\\]; this version knows mspn'),
        ('{"model": "mspn", "config": {"depth": 3}}', "another configuration"),
    ],
)
def test_foreign_descriptions(model: MSPN, tmp_path: Path, text: str, message: str) -> None:
    save(model, tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "config.json: this version .* cannot build it: .*'depth'"),
        ({"levels": 7}, "config.json: .*MSPNConfig.levels must be at most 2.*got 7"),
        ({"hidden_channels": 3}, r"stem\.weight' has shape \(2, 6, 5, 5\), but config.json.*\(2, 7, 5, 5\)"),
        ({"levels": 1}, "holds 'levels.0.cell.share.weight', which config.json beside it does not know"),
        ({"enc_info": False}, "holds 'levels.0.cell.share.weight'"),
    ],
)
def test_descriptions_that_do_not_fit(model: MSPN, tmp_path: Path, change: dict[str, int], message: str) -> None:
    """Weights from elsewhere, without vpfast's own note inside them."""
    save(model, tmp_path)
    from safetensors.torch import load_file, save_file

    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_weight(model: MSPN, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["levels.0.head.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors lacks 'levels\.0\.head\.bias'"):
        load(tmp_path)


def test_files_of_two_saves_are_told_apart(model: MSPN, tmp_path: Path) -> None:
    """Both fit by shape: only the note inside the weights tells that the gates lie in another order."""
    save(model, tmp_path / "a")
    save(MSPN(replace(CONFIG, gate_order="ifog")), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="another configuration"):
        load(tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_damaged_weights(model: MSPN, tmp_path: Path, kept: int) -> None:
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        load(tmp_path)
