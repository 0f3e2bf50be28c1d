"""Pictures of codes, layer by layer: what is drawn, read back from the PNG, and what is refused."""

import sys

import numpy as np
import pytest
import torch

from vpfast.visual import write_code_maps, write_depths, write_heat_maps, write_repairs
from vpfast.visual._grid import colour_map
from vpfast.visual.layers import _psnr, _ranks, _spread


def image(path):
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))


def clip(frames=3, channels=1, height=16, width=24):
    return torch.rand(frames, channels, height, width, generator=torch.Generator().manual_seed(0))


def drawings(monkeypatch):
    """What the functions hand to the grid, in place of a file."""
    seen = []
    monkeypatch.setattr("vpfast.visual.layers.write_grid", lambda *args: seen.append(args))
    return seen


def test_depths_stand_beside_their_frames(tmp_path, monkeypatch):
    frames = clip(frames=6)
    made = {"1 layer": torch.full_like(frames, 0.5), "2 layers": (frames + 0.1).clamp(0, 1)}
    seen = drawings(monkeypatch)
    write_depths(tmp_path / "a.png", frames, made, {"1 layer": "a note"}, max_rows=3)
    _, columns, rows, bar, _ = seen[0]
    assert rows == ["1", "3", "6"]
    assert bar is None
    assert [(column.title, column.note) for column in columns] == [
        ("frame", ""),
        ("1 layer", "a note"),
        ("2 layers", ""),
    ]
    for column, source in zip(columns, (frames, *made.values()), strict=True):
        for cell, step in zip(column.cells, (0, 2, 5), strict=True):
            assert np.array_equal(cell.image[..., 0], (source[step, 0] * 255).round().byte().numpy())
    errors = (made["2 layers"] - frames)[[0, 2, 5]].square().flatten(1).mean(1)
    assert [cell.caption for cell in columns[2].cells] == [f"{-10 * error.log10():.1f} dB" for error in errors]
    assert [cell.caption for cell in columns[0].cells] == [""] * 3


def test_runs_lie_below_each_other(tmp_path, monkeypatch):
    frames = clip(frames=5)
    worse, better = (frames * 0.5), (frames * 0.9)
    runs = {"noise 5 dB": {"given": worse, "1 layer": better}, "noise 2 dB": {"given": worse * 0.5, "1 layer": worse}}
    seen = drawings(monkeypatch)
    write_repairs(tmp_path / "a.png", frames, runs, max_rows=2)
    _, columns, rows, _, _ = seen[0]
    assert rows == ["noise 5 dB: 1", "noise 5 dB: 5", "noise 2 dB: 1", "noise 2 dB: 5"]
    assert [column.title for column in columns] == ["frame", "given", "1 layer"]
    for column, clips in zip(columns, ([frames] * 2, [worse, worse * 0.5], [better, worse]), strict=True):
        shown = [clip[step] for clip in clips for step in (0, 4)]
        for cell, frame, real in zip(column.cells, shown, [frames[0], frames[4]] * 2, strict=True):
            assert np.array_equal(cell.image[..., 0], (frame[0] * 255).round().byte().numpy())
            error = (frame - real).square().mean()
            assert cell.caption == ("" if column.title == "frame" else f"{-10 * error.log10():.1f} dB")


def test_psnr_is_that_of_clipped_frames():
    frames = clip()
    assert _psnr(frames, frames) == [100.0] * 3
    assert _psnr(torch.full((1, 1, 4, 4), 7.0), torch.full((1, 1, 4, 4), 0.9)) == pytest.approx([20.0])
    assert _psnr(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), torch.ones(1, 1, 4, 4)) == [100.0]


@pytest.mark.parametrize("strict_tree", [True, False])
def test_codewords_are_ranked_by_the_brightness_under_them(tmp_path, monkeypatch, strict_tree):
    """2x2 positions of 4x4 pixels; layer 1 tells left from right, layer 2 in each half the upper from the lower."""
    light = torch.tensor([[0.1, 0.7], [0.3, 0.9]])
    frames = light.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 1, 8, 8)
    left_right = torch.tensor([[1, 0], [1, 0]])
    lower_upper = torch.tensor([[1, 0], [0, 1]])  # the names of the codewords differ between the two codebooks
    indices = torch.stack([left_right, lower_upper], dim=-1).expand(2, 2, 2, 2)
    seen = drawings(monkeypatch)
    write_code_maps(tmp_path / "a.png", frames, indices, 2, strict_tree)
    columns = seen[0][1]
    dark, bright = colour_map("viridis")[[0, 255]]
    assert columns[1].note == "2 of 2 codewords"
    expected = np.array([[dark, bright], [dark, bright]])
    assert np.array_equal(columns[1].cells[0].image, expected.repeat(4, 0).repeat(4, 1))
    if strict_tree:
        assert columns[2].note == "4 of 4 codewords"
        expected = np.array([[dark, dark], [bright, bright]])
    else:  # one codebook: 0 stands for 0.7 and 0.3, 1 for 0.1 and 0.9, both 0.5 in the mean
        assert columns[2].note == "2 of 2 codewords"
        assert len(np.unique(columns[2].cells[0].image.reshape(-1, 3), axis=0)) == 2
        return
    assert np.array_equal(columns[2].cells[1].image, expected.repeat(4, 0).repeat(4, 1))


def test_ranks_are_among_siblings():
    rows = torch.tensor([7, 3, 3, 9, 4])
    groups = torch.tensor([2, 0, 0, 2, 1])
    ranks, count = _ranks(rows, groups, torch.tensor([5.0, 1.0, 2.0, 4.0, 9.0]))
    assert count == 4
    assert ranks.tolist() == [1.0, 0.5, 0.5, 0.0, 0.5]


def test_heat_lies_over_the_frame(tmp_path, monkeypatch):
    frames = torch.zeros(2, 1, 8, 8)
    frames[1, :, 4:] = 1
    strengths = torch.zeros(2, 2, 2, 3)
    strengths[..., 0] = 4.0
    strengths[0, 0, 0, 1] = 0.5
    seen = drawings(monkeypatch)
    write_heat_maps(tmp_path / "a.png", frames, strengths)
    columns = seen[0][1]
    assert [column.note for column in columns[1:]] == ["up to 4", "up to 0.5", "up to 0"]
    nothing, most = colour_map("inferno")[[0, 255]].astype(np.float32)
    evenly, halved = columns[1].cells
    assert (evenly.image == most).all()
    assert np.array_equal(halved.image[0, 0], (most - 255 / 8).round())
    assert np.array_equal(halved.image[7, 7], (most + 255 / 8).round().clip(0, 255))
    spot = columns[2].cells[0].image
    assert np.array_equal(spot[0, 0], most)
    assert np.array_equal(spot[7, 7], nothing)
    assert (np.diff(spot.sum(axis=2, dtype=int).diagonal()) <= 0).all()
    assert (columns[3].cells[0].image == nothing).all()


def test_a_few_strong_positions_do_not_leave_the_rest_dark(tmp_path, monkeypatch):
    strengths = torch.ones(2, 20, 20, 1)
    strengths[0, 0, :3] = 50.0  # of 800 positions
    seen = drawings(monkeypatch)
    write_heat_maps(tmp_path / "a.png", torch.zeros(2, 1, 20, 20), strengths)
    (column,) = seen[0][1][1:]
    assert column.note == "up to 1"
    assert (column.cells[0].image == colour_map("inferno")[255]).all()


@pytest.mark.parametrize("layers", [1, 3, 9])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 16, 48)])
def test_files_hold_the_pictures(tmp_path, layers, channels, height, width):
    frames = clip(5, channels, height, width)
    indices = torch.randint(0, 4, (5, height // 4, width // 4, layers), generator=torch.Generator().manual_seed(1))
    made = {f"{depth} layers": frames * 0.5 for depth in range(1, layers + 1)}
    write_depths(tmp_path / "d.png", frames, made, max_rows=2)
    write_code_maps(tmp_path / "c.png", frames, indices, 4, max_rows=2)
    write_heat_maps(tmp_path / "h.png", frames, indices.float(), max_rows=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "d.png", "h.png"]
    for name, colour in (("c", colour_map("viridis")[0]), ("d", [255, 255, 255])):
        drawn = image(tmp_path / f"{name}.png")
        assert drawn.shape[1] > (layers + 1) * 150
        assert (drawn == np.asarray(colour)).all(axis=2).mean() > 0.01


def test_text_stays_inside(tmp_path):
    """Nothing is drawn on the rim, even where there are few and narrow columns."""
    frames = clip(2, 1, 32, 8)
    indices = torch.zeros(2, 8, 2, 1, dtype=torch.int64)
    write_code_maps(tmp_path / "c.png", frames, indices, 512)
    write_heat_maps(tmp_path / "h.png", frames, torch.rand(2, 8, 2, 1))
    write_depths(tmp_path / "d.png", frames, {"1 layer": frames}, {"1 layer": "21.33 times smaller"})
    for name in "chd":
        drawn = image(tmp_path / f"{name}.png")
        for rim in (drawn[:3], drawn[-3:], drawn[:, :3], drawn[:, -3:]):
            assert (rim == 255).all(), name


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(1, 4, [0]), (3, 4, [0, 1, 2]), (10, 3, [0, 4, 9]), (5, 1, [0])]
)
def test_rows_are_spread_over_the_clip(count, most, expected):
    assert _spread(count, most) == expected


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: write_depths(path, clip(), {"1 layer": clip(2)}), "1 layer has the shape"),
        (lambda path: write_depths(path, clip(), {"1 layer": clip(3, 1, 8, 8)}), "one size"),
        (lambda path: write_repairs(path, clip(), {}), "runs must be at least one"),
        (lambda path: write_repairs(path, clip(), {"a": {"x": clip()}, "b": {"y": clip()}}), "all of the same columns"),
        (lambda path: write_repairs(path, clip(), {"a": {"x": clip(2)}}), "x of a has the shape"),
        (lambda path: write_depths(path, clip(), {}, max_rows=0), "max_rows must be at least 1, got 0"),
        (lambda path: write_code_maps(path, clip(), torch.zeros(2, 4, 6, 3, dtype=torch.int64), 4), "indices must be"),
        (lambda path: write_code_maps(path, clip(), torch.full((3, 4, 6, 3), 4), 4), "from 0 to 3, got torch.int64"),
        (lambda path: write_code_maps(path, clip(), torch.zeros(3, 4, 6, 3), 4), "integers from 0 to 3"),
        (lambda path: write_heat_maps(path, clip(), torch.full((3, 4, 6, 3), -1.0)), "at least 0"),
        (lambda path: write_heat_maps(path, clip(), torch.full((3, 4, 6, 3), float("nan"))), "finite"),
        (lambda path: write_heat_maps(path, clip(), torch.zeros(3, 4, 6)), "strengths must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'vpfast\[cli\]'"):
        write_depths(tmp_path / "a.png", clip(), {"1 layer": clip()})
