"""save_pretrained, from_pretrained, push_to_hub: the files that save() writes, a card beside them, and no network."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vpfast
from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig, load, pretrained, save

SMALL_MSPN = MSPNConfig(in_channels=1, channels=(2, 3, 4), levels=2, hidden_channels=2)
SMALL_CODES = SHRVQVAEConfig(
    **{"in_channels": 1, "channels": (4, 4), "residual_channels": 4, "latent_channels": 2, "codebook_size": 2},
    **{"layers": 2, "prior_channels": 4, "prior_blocks": 2, "prior_heads": 1, "prior_head_dim": 4, "prior_ffn": 4},
    **{"prior_head": 4},
)
CLASSES = {MSPN: SMALL_MSPN, HRVQVAE: SMALL_CODES, SHRVQVAE: SMALL_CODES}


@pytest.fixture(params=CLASSES, ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param(CLASSES[request.param]).eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever connects to another machine fails at once."""

    def refuse(*args):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def same(model, other):
    assert type(other) is type(model)
    assert other.config == model.config
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = type(model).from_pretrained(tmp_path / "a" / "b")
    same(model, loaded)
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]


def test_the_files_are_those_of_save(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    save(model, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    same(model, load(tmp_path / "a"))
    same(model, type(model).from_pretrained(str(tmp_path / "b")))


def test_another_class_is_refused_by_name(tmp_path):
    SHRVQVAE(SMALL_CODES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} holds a SHRVQVAE, not a MSPN; SHRVQVAE.from_pretrained loads"):
        MSPN.from_pretrained(tmp_path)


# -- how it was trained ------------------------------------------------------------------------------------------------

TOLD = {"seed": 7, "out": "/home/me/runs/one", "data": {"root": "/data/kth/", "train": {"include": ["/a/b", "c/*"]}}}
KEPT = {"seed": 7, "out": "one", "data": {"root": "kth", "train": {"include": ["b", "c/*"]}}}


@pytest.fixture
def trained(model, tmp_path):
    """The folder of weights that tell how they were trained."""
    save(model, tmp_path / "trained")
    (tmp_path / "trained" / "training.json").write_text(json.dumps(TOLD))
    return tmp_path / "trained"


def test_how_it_was_trained_goes_with_it(model, trained, tmp_path):
    """But for where things lay; also by way of a folder that it was shared in."""
    loaded = type(model).from_pretrained(trained)
    loaded.save_pretrained(tmp_path / "shared")
    assert json.loads((tmp_path / "shared" / "training.json").read_text()) == KEPT
    assert "## Training\n\nThe configuration of the run" in (tmp_path / "shared" / "README.md").read_text()
    load(tmp_path / "shared").save_pretrained(tmp_path / "again", model_card_kwargs={"training": "A week."})
    assert json.loads((tmp_path / "again" / "training.json").read_text()) == KEPT
    assert "## Training\n\nA week.\n" in (tmp_path / "again" / "README.md").read_text()


def test_a_model_that_was_trained_on_does_not_tell_of_the_run_before(trained, tmp_path):
    changed = load(trained)
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1
    changed.save_pretrained(tmp_path / "changed")
    load(trained).double().save_pretrained(tmp_path / "of another type")
    overwritten = load(trained)
    save(changed, trained)
    overwritten.save_pretrained(tmp_path / "overwritten")
    for name in ("changed", "of another type", "overwritten"):
        assert (tmp_path / name / "config.json").exists()
        assert not (tmp_path / name / "training.json").exists()


def test_the_folder_describes_the_model_that_was_saved_last(trained, tmp_path):
    """Whatever was saved there before, and whether that is known to come from a run."""
    models = [load(trained), load(trained), MSPN(SMALL_MSPN), SHRVQVAE(SMALL_CODES)]
    with torch.no_grad():
        next(models[1].parameters()).zero_()
    folder = tmp_path / "shared"
    for before, last in permutations(models, 2):
        for one in (before, last):
            one.save_pretrained(folder, model_card_kwargs={"name": "x"})
        last.save_pretrained(tmp_path / "fresh", model_card_kwargs={"name": "x"})
        contents = [{path.name: path.read_bytes() for path in each.iterdir()} for each in (folder, tmp_path / "fresh")]
        assert contents[0] == contents[1]
        assert ("training.json" in contents[0]) == (b"in `training.json`" in contents[0]["README.md"])
        assert ("training.json" in contents[0]) == (last is models[0])
        shutil.rmtree(tmp_path / "fresh")
        shutil.rmtree(folder)


@pytest.mark.parametrize("last", ["config.json", "model.safetensors", "README.md"])
def test_a_failed_save_loses_nothing(trained, tmp_path, monkeypatch, last):
    load(trained).save_pretrained(tmp_path / "shared")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    write_bytes = Path.write_bytes

    def full_disk(path, data):
        if path.name.startswith(f".{last}"):
            raise OSError("no space left")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        MSPN(SMALL_MSPN).save_pretrained(tmp_path / "shared")
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == before


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "{"])
def test_a_damaged_tale_is_left_where_it_is(trained, tmp_path, text):
    (trained / "training.json").write_text(text)
    load(trained).save_pretrained(tmp_path / "shared")
    assert not (tmp_path / "shared" / "training.json").exists()


def test_how_it_was_trained_is_pushed(hub, model, trained, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **given):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path, **given):
            pushed.update(json.loads((Path(folder_path) / "training.json").read_text()))
            return "https://example.org/commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    type(model).from_pretrained(trained).push_to_hub("me/name")
    assert pushed == KEPT


# -- the card ----------------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> tuple[dict, str]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML to read the head of a card")
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_tells_what_the_model_is(model, tmp_path):
    model.save_pretrained(tmp_path / "some-model")
    head, body = card_of(tmp_path / "some-model")
    kind = type(model).__name__
    assert head == {"library_name": "vpfast", "tags": ["video-prediction", kind.lower()]}
    assert body.lstrip().startswith("# some-model\n")
    assert f"{sum(weight.numel() for weight in model.parameters()):,}, float32" in body
    assert "grey, height and width multiples of 4, values in [0, 1]" in body
    assert f"`{kind}` of vpfast {vpfast.__version__}" in body
    written = json.loads((tmp_path / "some-model" / "config.json").read_text())["config"]
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == written
    assert "## Training" not in body
    assert "## Quality" not in body


def test_the_code_in_the_card_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("here/it-is")
    _, body = card_of(tmp_path / "here" / "it-is")
    names: dict = {}
    exec(body.split("```python\n")[1].split("```")[0], names)
    same(model, names["model"])
    made = names["again"] if isinstance(model, HRVQVAE) else names["future"]
    assert made.shape == (1, 10, 1, 32, 32)


def test_texts_of_the_card(model, tmp_path):
    texts = {"name": "me/moving", "license": "mit", "about": "Of cats.", "training": "A week.", "quality": "| good |"}
    model.save_pretrained(tmp_path, model_card_kwargs=texts)
    head, body = card_of(tmp_path)
    assert head["license"] == "mit"
    assert "# moving\n\nOf cats.\n" in body
    assert '.from_pretrained("me/moving")' in body
    assert "## Training\n\nA week.\n\n## Quality\n\n| good |\n\n## Configuration" in body


def test_a_card_with_a_dollar(tmp_path):
    MSPN(SMALL_MSPN).save_pretrained(tmp_path, model_card_kwargs={"training": "for $name and 5 $"})
    assert "for $name and 5 $" in (tmp_path / "README.md").read_text()


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    MSPN(SMALL_MSPN).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "notes.txt").read_text() == "mine too"
    MSPN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "edit", [lambda card: card + "more\n", lambda card: card.replace("## Use", "## Its use"), str.lower]
)
def test_a_card_that_was_edited_stays(tmp_path, edit):
    MSPN(SMALL_MSPN).save_pretrained(tmp_path)
    edited = edit((tmp_path / "README.md").read_text())
    (tmp_path / "README.md").write_text(edited)
    MSPN(SMALL_MSPN).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited


def test_an_unknown_text_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError, match="'licence' given, must be of name, license, about, training, quality"):
        MSPN(SMALL_MSPN).save_pretrained(tmp_path / "x", model_card_kwargs={"licence": "mit"})
    assert not (tmp_path / "x").exists()


def test_the_hub_reads_the_head_of_the_card(model, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, whose reader of cards it is")
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "bsd-3-clause"})
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.license) == ("vpfast", "bsd-3-clause")
    assert data.tags == ["video-prediction", type(model).__name__.lower()]


# -- what is not here --------------------------------------------------------------------------------------------------


def test_a_path_is_never_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; a saved model is a folder with config\.json"):
        MSPN.from_pretrained(tmp_path / "nowhere")


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = MSPN(SMALL_MSPN)
    model.save_pretrained(tmp_path)
    same(model, MSPN.from_pretrained(str(tmp_path)))
    known = ", ".join(pretrained())
    message = rf"^me/model is no folder here, and none of {known}; to look .* pip install 'vpfast\[hub\]'$"
    with pytest.raises(ImportError, match=message):
        MSPN.from_pretrained("me/model")
    with pytest.raises(ImportError, match=r"to push to me/model takes huggingface_hub: pip install 'vpfast\[hub\]'"):
        model.push_to_hub("me/model")


def test_models_are_imported_without_huggingface_hub():
    code = "import sys; import vpfast.models; assert 'huggingface_hub' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- the Hub, whose downloads and uploads stand still ------------------------------------------------------------------


@pytest.fixture
def hub():
    return pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")


def test_arguments_are_those_of_the_mixin(hub):
    """Whoever knows huggingface_hub's PyTorchModelHubMixin calls these methods right."""
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        theirs = inspect.signature(getattr(hub.PyTorchModelHubMixin, name)).parameters
        for own in inspect.signature(getattr(MSPN, name)).parameters.values():
            assert own.kind == theirs[own.name].kind, f"{name}: {own.name}"
            if own.name != "commit_message":
                assert own.default == theirs[own.name].default, f"{name}: {own.name}"


@pytest.fixture
def repository(model, tmp_path):
    """The cache of huggingface_hub after a download of ``me/model``: files of one commit, linked from a snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache" / "models--me--model"
    model.save_pretrained(place / "snapshots" / commit, model_card_kwargs={"name": "me/model"})
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return tmp_path / "cache"


def test_from_the_cache_of_the_hub(hub, model, repository):
    loaded = type(model).from_pretrained("me/model", cache_dir=repository, local_files_only=True)
    same(model, loaded)


def test_a_revision_that_is_not_there(hub, repository):
    with pytest.raises(FileNotFoundError, match=r"me/model is no folder here, .*; and the Hugging Face Hub: "):
        MSPN.from_pretrained("me/model", revision="other", cache_dir=repository, local_files_only=True)


def test_only_what_a_model_is_made_of_is_downloaded(hub, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(repo_id, **given):
        asked.update(given, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    same(model, type(model).from_pretrained("me/model", revision="v1", token="t"))
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("me/model", "v1", "t")
    assert set(asked["allow_patterns"]) == {"config.json", "model.safetensors", "README.md", "training.json"}


@pytest.mark.parametrize("name", ["run/weights/best", "a b", "me/model"])
def test_what_is_nowhere_is_one_line(hub, name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="is no folder here") as found:
        MSPN.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(found.value)


def test_a_repository_of_something_else(hub, repository, monkeypatch):
    for path in repository.rglob("config.json"):
        path.write_text('{"architectures": ["Bert"]}')
    with pytest.raises(ValueError, match=r"config\.json does not describe a vpfast model"):
        MSPN.from_pretrained("me/model", cache_dir=repository, local_files_only=True)


def test_pushing(hub, model, monkeypatch):
    pushed: dict = {}

    class Api:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, **given):
            pushed.update(created=repo_id, **given)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path, **given):
            folder = Path(folder_path)
            pushed.update(
                given, files={path.name for path in folder.iterdir()}, card=(folder / "README.md").read_text()
            )
            pushed["model"] = load(folder)
            return "https://example.org/commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    address = model.push_to_hub("name", token="t", private=True, branch="b", model_card_kwargs={"license": "mit"})
    assert address == "https://example.org/commit"
    same(model, pushed["model"])
    assert pushed["files"] == {"README.md", "config.json", "model.safetensors"}
    assert pushed["delete_patterns"] == ["training.json"]
    assert (pushed["created"], pushed["repo_id"], pushed["revision"]) == ("name", "me/name", "b")
    assert (pushed["token"], pushed["private"], pushed["exist_ok"]) == ("t", True, True)
    assert '.from_pretrained("me/name")' in pushed["card"]
    assert "license: mit" in pushed["card"]


def test_subclasses_load_as_what_they_are_not(tmp_path):
    """A class derived from a model is another model: what is saved says so, and is not taken for it."""

    class Mine(MSPN):
        pass

    MSPN(replace(SMALL_MSPN, levels=1)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="holds a MSPN, not a Mine"):
        Mine.from_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match="can save a MSPN"):
        Mine(SMALL_MSPN).save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
