"""``vpfast report``: the numbers of ``vpfast evaluate`` and the clips behind them, in one page that plays."""

import re

import pytest
import torch
from chromium import chromium

import vpfast.models
from vpfast.cli import report
from vpfast.data import MovingDigits
from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint

PRIOR = {"prior_channels": 8, "prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 2, "prior_head_dim": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of weights that say they were trained on small moving digits: of MSPN, S-HR-VQVAE and HR-VQVAE."""
    torch.manual_seed(0)
    data = DataConfig(size=16, digit_size=8, digits=1)
    small = {"channels": (4, 8), "residual_channels": 4}
    models = {
        "mspn": (MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4)), 2),
        "shrvqvae": (SHRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", **small, **PRIOR)), 2),
        "hrvqvae": (HRVQVAE(SHRVQVAEConfig(in_channels=1, codebook_size=3, layers=2, **small)), 0),
    }
    folders = {}
    for name, (model, horizon) in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        how = TrainConfig(model={"name": name}, data=data, context=3, horizon=horizon, seed=5)
        checkpoint.write_weights(folders[name], model, how)
    return folders


@pytest.fixture
def given(monkeypatch):
    """The page that was written, before it became HTML."""
    kept = []
    real = report.write_page
    monkeypatch.setattr(report, "write_page", lambda path, page: kept.append(page) or real(path, page))
    return kept


def clips_of(count, length):
    found = MovingDigits(split="test", length=length, count=count, seed=5, size=16, digit_size=8, digits=1)
    return torch.stack([found[index] for index in range(count)])


def test_a_page_holds_the_numbers_of_evaluate_and_its_clips(command, trained, tmp_path, read_json, given):
    out = tmp_path / "page.html"
    args = ("--weights", trained["mspn"], "--clips", 5, "--name", "MSPN", "--beside.codes", trained["shrvqvae"])
    code, said, err = command("report", *args, "--out", out, "--show", 3)
    assert (code, err) == (0, "")
    assert said == (
        "5 clips of moving digits, test split: 2 frames predicted from 3. Protocol default.\n"
        f"{out.stat().st_size / 1e6:.2f} MB: {out}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert command("evaluate", *args, "--out", tmp_path / "n.json")[0] == 0
    numbers, (page,) = read_json(tmp_path / "n.json"), given
    table, foretold = page.tables
    names = ("mse", "mae", "mse_sum", "mae_sum", "psnr", "ssim")
    assert list(table.rows) == ["MSPN", "codes", "repeat last frame"]
    for name, cells in table.rows.items():
        assert cells[:6] == [numbers[name]["mean"][each] for each in names]
        assert page.curves.panels["PSNR (dB) ↑"][name] == numbers[name]["per_frame"]["psnr"]
    size = sum(each.numel() for each in vpfast.models.load(trained["mspn"]).parameters())
    assert [table.rows[name][6] for name in ("MSPN", "repeat last frame")] == [f"{size:,}", ""]
    for column, (name, best) in enumerate(zip(names, (min, min, min, min, max, max), strict=True)):
        means = [numbers[each]["mean"][name] for each in table.rows]
        assert {row for row, at in table.best if at == column} == {means.index(best(means))}
    assert list(foretold.rows) == ["codes, cross entropy", "codes, accuracy"]
    assert (page.context, page.curves.first) == (3, 4)
    truth = clips_of(5, 5)
    predicted = vpfast.models.load(trained["mspn"]).predict(truth[:, :3], 2).clamp(0, 1)
    assert [clip.name for clip in page.clips] == ["Clip 1 of 5", "Clip 3 of 5", "Clip 5 of 5"]
    for clip, index in zip(page.clips, (0, 2, 4), strict=True):
        assert torch.equal(clip.truth, truth[index])
        torch.testing.assert_close(clip.made["MSPN"], predicted[index])
        psnr = -10 * (predicted[index] - truth[index, 3:]).square().flatten(1).mean(1).log10().mean().item()
        assert clip.notes["MSPN"] == f"PSNR {psnr:.1f} dB"


def test_frames_made_again_are_reported_by_depth(command, trained, tmp_path, given):
    code, said, _ = command("report", "--weights", trained["hrvqvae"], "--clips", 2, "--out", tmp_path / "page.html")
    assert (code, "2 clips of moving digits, test split: 3 frames each, coded and made again." in said) == (0, True)
    (page,) = given
    (table,) = page.tables
    assert list(table.rows) == ["1 layer", "2 layers"]
    assert table.columns[6:] == ["codewords used", "perplexity", "parameters"]
    assert re.fullmatch(r"\d+ of 9", table.rows["2 layers"][6])
    assert [row[8] == "" for row in table.rows.values()] == [True, False]
    assert (page.context, page.curves.first) == (0, 1)
    assert [list(clip.made) for clip in page.clips] == [["2 layers"]] * 2


def test_other_protocols_are_reported(command, trained, tmp_path, given):
    args = ("report", "--weights", trained["mspn"], "--clips", 1, "--protocol", "openstl", "--out", tmp_path / "p.html")
    code, said, _ = command(*args)
    assert (code, "Protocol openstl." in said) == (0, True)
    assert list(given[0].curves.panels) == [
        "MSE (pixel sum) ↓",
        "MAE (pixel sum) ↓",
        "PSNR (dB) ↑",
        "SSIM ↑",
    ]


def test_videos_are_reported(command, weights, video, tmp_path, given):
    data = ["--data.root", video.parent, "--data.test.include", "*.avi", "--data.cache", tmp_path / "cache"]
    code, said, _ = command("report", "--weights", weights, *data, "--out", tmp_path / "page.html", "--show", 9)
    assert (code, f"2 clips of {video.parent.name}, test split" in said) == (0, True)
    assert len(given[0].clips) == 2
    assert given[0].facts["data.root"] == str(video.parent)


def test_a_report_plays_in_a_browser(command, trained, tmp_path):
    out = tmp_path / "page.html"
    args = (
        "report",
        "--weights",
        trained["mspn"],
        "--clips",
        3,
        "--name",
        "MSPN",
        "--beside.codes",
        trained["shrvqvae"],
    )
    with chromium(tmp_path / "chromium") as browser:
        assert command(*args, "--fps", 20, "--out", out)[0] == 0
        browser.open(out)
        browser.until("return document.querySelector('.controls input').value == 4")
        assert browser.complaints() == []
        assert browser.asked_for() == [out.as_uri()]
        assert browser.run("return document.querySelectorAll('canvas').length") == 3 * 5
        assert browser.run("return document.querySelectorAll('.chart').length") == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "page.pdf"], "out: page.pdf given, must be a file that ends in .html"),
        (["--out", "/nowhere/page.html"], "--out /nowhere/page.html cannot be written"),
        (["--show", "-1"], "show: -1 given, must be at least 0"),
        (["--fps", "0"], "fps: 0.0 given, must be above 0 and at most 50"),
        (["--name", "truth"], "name: 'truth' given, must be another name"),
        (["--beside.truth", "x"], "beside.truth: 'x' given, must be --beside.NAME FOLDER with another name"),
        (["--protocol", "mine"], "protocol: 'mine' given, must be one of default, openstl"),
        (["--data.size", "17"], "data.size: 17 given, must be a multiple of 2"),
        (["--clip", "1"], "unknown key '--clip'; did you mean '--clips'?"),
    ],
)
def test_what_cannot_be_reported_is_refused(refused, trained, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("report", "--weights", trained["mspn"], "--clips", 2, "--out", "page.html", *args)
    assert not any(tmp_path.iterdir())


def test_a_page_is_kept_unless_forced(command, refused, trained, tmp_path):
    args = ("report", "--weights", trained["mspn"], "--clips", 1, "--show", 0, "--out", tmp_path / "page.html")
    (tmp_path / "page.html").write_text("precious")
    assert "exists already; --force replaces it" in refused(*args)
    assert (tmp_path / "page.html").read_text() == "precious"
    assert command(*args, "--force")[0] == 0
    assert "<article>" not in (tmp_path / "page.html").read_text()


def test_weights_are_needed(refused, tmp_path):
    assert "--weights is missing" in refused("report", "--out", tmp_path / "page.html")
