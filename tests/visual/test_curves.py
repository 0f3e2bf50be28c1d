"""Curves of a run: what is drawn, on which scale, and what is refused."""

import sys

import numpy as np
import pytest

from vpfast.visual import Series, write_curves, write_frame_curves
from vpfast.visual.curves import _means, _panel, _place


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def line(values):
    return np.arange(1.0, len(values) + 1), np.asarray(values, float)


def image(path):
    from PIL import Image

    return np.array(Image.open(path).convert("RGB")).astype(int)


def test_a_picture_grows_with_its_panels_and_holds_every_line(tmp_path):
    steps = np.arange(1, 301)
    falling = Series(steps, 100 * np.exp(-steps / 50))
    write_curves(tmp_path / "one.png", {"loss": {"loss": falling}}, title="a run")
    two = {"a": Series([1, 300], [0.1, 0.2]), "b": Series([1, 300], [0.3, 0.2])}
    write_curves(tmp_path / "more.png", {"loss": {"loss": falling}, "val_psnr": two, "lr": {"lr": falling}})
    small, large = image(tmp_path / "one.png"), image(tmp_path / "more.png")
    assert small.shape[1] == large.shape[1] == 1210
    assert large.shape[0] > small.shape[0] + 200
    blue, orange = np.array([0x25, 0x63, 0xEB]), np.array([0xEA, 0x58, 0x0C])
    assert (abs(small - blue).sum(axis=2) < 30).sum() > 500
    assert (abs(small - orange).sum(axis=2) < 30).sum() == 0
    assert (abs(large - orange).sum(axis=2) < 30).sum() > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.png", "one.png"]


def test_panels_do_not_overlap():
    boxes = [_place(number) for number in range(8)]
    for first, (x, y, w, h) in enumerate(boxes):
        for u, v, p, q in boxes[first + 1 :]:
            assert x + w < u or u + p < x or y + h < v or v + q < y


@pytest.mark.parametrize(
    ("values", "may", "scale"),
    [
        ([100, 10, 1], True, "log"),
        ([100, 10, 1], False, "linear"),
        ([3, 2, 1], True, "linear"),
        ([100, 10, 0], True, "linear"),
        ([100, 10, -1], True, "linear"),
    ],
)
def test_a_scale_is_logarithmic_where_that_shows_more(axes, values, may, scale):
    _panel(axes, "loss", {"loss": line(values)}, may)
    assert axes.get_yscale() == scale


def test_many_values_are_drawn_through_their_means(axes):
    values = np.tile([0.0, 2.0], 300)
    _panel(axes, "loss", {"loss": line(values)}, True)
    pale, strong = axes.get_lines()
    assert len(pale.get_ydata()) == 600
    assert np.allclose(strong.get_ydata(), 1, atol=0.25)
    steps, means = _means(*line(np.arange(600.0)))
    assert len(means) == 120
    assert means.mean() == pytest.approx(299.5)
    assert np.allclose(steps, means + 1)


def test_what_is_not_finite_is_left_out(axes, tmp_path):
    steps, values = [1, 2, 3], [1.0, float("nan"), float("inf")]
    write_curves(tmp_path / "a.png", {"loss": {"loss": Series(steps, values)}, "empty": {"x": Series([1], [np.nan])}})
    with pytest.raises(ValueError, match="at least one finite value to draw, got none"):
        write_curves(tmp_path / "b.png", {"loss": {"loss": Series([1], [float("nan")])}})
    with pytest.raises(ValueError, match=r"loss, x: as many values as steps expected, got \(2,\) and \(1,\)"):
        write_curves(tmp_path / "b.png", {"loss": {"x": Series([1], [1, 2])}})
    assert not (tmp_path / "b.png").exists()


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    from matplotlib.figure import Figure

    made = []

    class Kept(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    return made


def test_errors_by_frame_have_a_panel_a_metric_and_a_line_a_model(tmp_path, figures):
    quiet = "repeat"
    panels = {
        "PSNR": {"a": [30, 20, 10], "b": [25, float("nan"), 15], quiet: [9, 8, 7]},
        "SSIM": {"a": [0.9, 0.8, 0.7]},
        "MSE": {"a": [float("nan")] * 3},
    }
    write_frame_curves(tmp_path / "a.png", panels, first=11, title="errors", quiet={quiet})
    (figure,) = figures
    psnr, ssim = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["PSNR", "SSIM"]
    lines = {line.get_label(): line for line in psnr.get_lines()}
    assert lines["a"].get_xdata().tolist() == [11, 12, 13]
    assert lines["b"].get_xydata().tolist() == [[11, 25], [13, 15]]
    looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(looks) == 3
    assert lines[quiet].get_linestyle() == "--"
    assert ssim.get_lines()[0].get_color() == lines["a"].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", quiet]
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 < boxes[1].x0
    assert image(tmp_path / "a.png").shape[1] == 1170


@pytest.mark.parametrize("metrics", [1, 2, 3, 5])
def test_panels_of_errors_and_their_words_do_not_overlap(tmp_path, figures, metrics):
    names = [f"a model with a long name {number}" for number in range(8)]
    panels = {f"metric {number}": {name: [1000.5, 2000.25] for name in names} for number in range(metrics)}
    write_frame_curves(tmp_path / "a.png", panels, title="errors")
    (figure,) = figures
    inside = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_tightbbox()]
    for number, box in enumerate(boxes):
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert inside.y0 <= box.y0
        assert box.y1 <= inside.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_errors_without_a_finite_value_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one finite value to draw, got none"):
        write_frame_curves(tmp_path / "a.png", {"MSE": {"a": [float("nan")]}})
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'vpfast\[cli\]'"):
        write_curves(tmp_path / "a.png", {"loss": {"loss": Series([1], [1])}})
