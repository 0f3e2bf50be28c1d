"""``vpfast evaluate --protocol`` and ``--table``: the rules of other projects, and the papers' tables filled in."""

import json
import sys

import pytest
import torch

import vpfast.models
from vpfast.data import MovingDigits
from vpfast.metrics import PROTOCOLS, VideoMetrics
from vpfast.models import HRVQVAE, MSPN, MSPNConfig, SHRVQVAEConfig
from vpfast.training import AdversarialConfig, DataConfig, LossConfig, TrainConfig, checkpoint

DIGITS = DataConfig(size=16, digit_size=8, digits=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of weights of a tiny network in a run's folder called ``tiny``."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "weights"
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    how = TrainConfig(data=DIGITS, context=3, horizon=2, seed=5, loss=LossConfig(feedback="none"))
    checkpoint.write_weights(folder, model, how)
    return folder


@pytest.fixture
def codes(tmp_path):
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(4, 4), residual_channels=4, codebook_size=4, layers=3))
    checkpoint.write_weights(tmp_path / "codes", model, TrainConfig(data=DIGITS, context=4, horizon=0))
    return tmp_path / "codes"


def by_hand(run, protocol, context, horizon, clips=3):
    digits = MovingDigits(split="test", length=context + horizon, count=clips, seed=5, size=16, digit_size=8, digits=1)
    frames = torch.stack([digits[index] for index in range(clips)])
    metrics = VideoMetrics(protocol)
    metrics.update(vpfast.models.load(run).eval().predict(frames[:, :context], horizon), frames[:, context:])
    return metrics.compute()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_can_be_asked_for(command, run, tmp_path, read_json, protocol):
    out = tmp_path / "n.json"
    code, said, err = command("evaluate", "--weights", run, "--clips", 3, "--protocol", protocol, "--out", out)
    assert code == 0, err
    assert f"protocol {protocol}\n" in said
    assert f"Protocol `{protocol}`, 3 clips." in said
    expected = by_hand(run, protocol, 3, 2)
    assert read_json(out)["prediction"]["mean"] == pytest.approx(expected.mean, rel=1e-4)


def test_what_is_printed_can_be_written(command, run, tmp_path):
    out = tmp_path / "n.md"
    code, said, _ = command("evaluate", "--weights", run, "--clips", 1, "--out", out)
    assert (code, out.read_text()) == (0, said)


def test_lpips_without_its_package_is_refused(refused, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    said = refused("evaluate", "--weights", run, "--clips", 1, "--lpips", "true")
    assert "LPIPS needs the packages lpips and torchvision" in said
    assert "pip install 'vpfast[lpips]'" in said


def test_a_table_is_filled_in(command, run, tmp_path, read_json):
    out = tmp_path / "t.json"
    code, said, err = command("evaluate", "--weights", run, "--table", "mspn-3", "--clips", 3, "--out", out)
    assert (code, err) == (0, "")
    expected = by_hand(run, "mspn", 10, 10).mean  # as far as the table, not as the model was trained
    row = f"| **vpfast: tiny** | **{expected['ssim']:.3f}** | **{expected['mse_sum']:.1f}** | mspn |"
    lines = said.splitlines()
    assert row in lines
    assert lines.index("| MSPN (Ours) | 0.963 | 12.9 | mspn |") == lines.index(row) - 1
    assert any(line.startswith("| **repeat last frame** |") for line in lines)
    assert "3 clips of the test split of moving digits of scikit-learn; frames 16x16, grey" in said
    values = read_json(out)
    assert (values["table"], values["protocol"]) == ("mspn-3", "mspn")
    ours = next(each for each in values["rows"] if each["from"] == "vpfast")
    assert ours["cells"]["10 → 10 SSIM ↑"] == pytest.approx(expected["ssim"], rel=1e-4)


def test_a_table_under_another_protocol(command, run):
    code, said, _ = command("evaluate", "--weights", run, "--table", "mspn-3", "--clips", 1, "--protocol", "default")
    assert code == 0
    assert "| MSPN (Ours) † | 0.963 | 12.9 | mspn |" in said
    assert "under the protocol `default`." in said


def test_parts_are_measured_one_after_another(command, run, tmp_path, read_json):
    first, both = tmp_path / "first.json", tmp_path / "both.json"
    args = ("evaluate", "--weights", run, "--table", "shrvqvae-3", "--clips", 2)
    assert command(*args, "--part", "kth", "--out", first)[0] == 0
    assert command(*args, "--part", "mnist", "--add", first, "--out", both)[0] == 0
    (ours, last) = [each["cells"] for each in read_json(both)["rows"] if each["from"] == "vpfast"]
    assert (ours["Method"], last["Method"]) == ("vpfast: tiny", "repeat last frame")
    missing = [key for key, value in ours.items() if value is None]
    assert missing == ["KTH 10 → 20 LPIPS ↓"]
    assert ours["KTH 10 → 20 SSIM ↑"] == pytest.approx(by_hand(run, "predrnn", 10, 20, 2).mean["ssim"], rel=1e-4)


def test_other_models_and_how_they_were_trained_stand_in_the_table(command, run, tmp_path):
    for name, how in (("adv", {"adversarial": AdversarialConfig(enabled=True, channels=(4, 8))}), ("long", {})):
        checkpoint.write_weights(tmp_path / name, vpfast.models.load(run), TrainConfig(data=DIGITS, **how))
    (tmp_path / "bare").mkdir()
    vpfast.models.save(vpfast.models.load(run), tmp_path / "bare")
    beside = [each for name in ("adv", "long", "bare") for each in (f"--beside.{name}", tmp_path / name)]
    code, said, err = command(
        "evaluate", "--weights", run, *beside, "--table", "mspn-7", "--part", "kitti", "--clips", 1
    )
    assert code == 0, err
    rows = [line.split(" | ")[:4] for line in said.splitlines() if line.startswith(("| **vpfast", "| **repeat"))]
    assert rows == [
        ["| **vpfast: tiny**", "KITTI", "no", "no"],
        ["| **vpfast: adv**", "KITTI", "yes", "yes"],
        ["| **vpfast: long**", "KITTI", "no", "yes"],
        ["| **vpfast: bare**", "KITTI", "not known", "not known"],
        ["| **repeat last frame**", "KITTI", "", ""],
    ]


def test_table_1_is_of_files(command, codes, tmp_path, read_json):
    out = tmp_path / "t.json"
    code, said, err = command("evaluate", "--weights", codes, "--table", "shrvqvae-1", "--clips", 5, "--out", out)
    assert (code, err) == (0, "")
    found = read_json(out)["measured"]["vpfast: codes"]
    assert (found["frames"], found["frame_bytes"]) == (20, 20 * 16 * 16)
    assert found["code_bytes"] == found["header_bytes"] + 3 * 20 * 4 * 4 * 2 // 8
    assert f"**{found['ratio']:.2f}** |" in said
    assert "**16x16x1**" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--protocol", "ssim"], "protocol: 'ssim' given, must be one of default, openstl, predrnn, simvp, mspn, vptr"),
        (["--table", "mspn-6"], "table: 'mspn-6' given, must be one of mspn-2, mspn-3"),
        (["--table", "mspn-5"], "--table mspn-5 is of several data sets: caltech (Caltech Pedestrian), kitti (KITTI)"),
        (["--table", "mspn-5", "--part", "kth"], "part: 'kth' given, must be one of caltech, kitti"),
        (["--table", "mspn-3", "--horizon", "5"], "horizon: 5 given, must be left out: --table mspn-3 is of 10 → 10"),
        (["--table", "mspn-3", "--context=5"], "context: 5 given, must be left out"),
        (["--table", "mspn-3", "--strip", "s.png"], "strip: s.png given, must be left out beside --table"),
        (
            ["--table", "mspn-3", "--add", "/no.json"],
            "add: /no.json given, must be a file that an earlier --table wrote",
        ),
        (["--table", "shrvqvae-1"], "--table shrvqvae-1 is of codes, and a MSPN has none"),
        (
            ["--table", "shrvqvae-1", "--part", "kth"],
            "part: kth given, must be left out: --table shrvqvae-1 has one part",
        ),
        (["--part", "kth"], "part: kth given, must be left out without --table"),
    ],
)
def test_bad_options_are_refused(refused, run, tmp_path, args, message):
    assert message in refused("evaluate", "--weights", run, "--clips", 1, "--out", tmp_path / "n.json", *args)
    assert not (tmp_path / "n.json").exists()


def test_codes_do_not_fill_a_table_of_predictions(refused, run, codes):
    said = refused("evaluate", "--weights", codes, "--table", "mspn-3")
    assert "is of predictions, and a HRVQVAE predicts nothing; --table shrvqvae-1 is of its codes" in said
    assert "beside.x" in refused("evaluate", "--weights", run, "--beside.x", codes, "--table", "mspn-3")
    assert "--weights is missing" in refused("evaluate", "--table", "mspn-3")


def test_a_file_of_another_table_is_refused(refused, run, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"table": "mspn-2", "measured": []}))
    said = refused("evaluate", "--weights", run, "--table", "mspn-3", "--add", tmp_path / "t.json")
    assert "is of the table mspn-2, must be of mspn-3" in said


def test_two_rows_are_not_called_the_same(command, refused, run):
    args = ("evaluate", "--weights", run, "--beside.tiny", run, "--table", "mspn-3", "--clips", 1)
    assert "beside.tiny: the row of --weights is called tiny too" in refused(*args)
    code, said, _ = command(*args, "--name", "other")
    assert code == 0
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| **vpfast")] == [
        "| **vpfast: other**",
        "| **vpfast: tiny**",
    ]
