"""Pages are read back: what they hold, that they refer to nothing, and, in a browser, that they play."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from vpfast.visual import Clip, Curves, Page, Table, write_page
from vpfast.visual._sheet import sheet, signed
from vpfast.visual._svg import chart, styles

NAMES = ("MSPN & <friends>", "other")


def moving(steps=6, channels=1, size=(16, 24)):
    clip = torch.zeros(steps, channels, *size)
    for step, frame in enumerate(clip):
        frame[:, 4:12, 2 * step : 2 * step + 4] = 1
    return clip


def made(**changes):
    truth = moving()
    clips = [
        Clip(
            f"Clip {number}",
            truth,
            {name: truth[2:] * factor for name, factor in zip(NAMES, (0.5, 0.9), strict=True)},
            {},
        )
        for number in (1, 2)
    ]
    curves = {"MSE ↓": {NAMES[0]: [0.1, 0.2, 0.3, 0.4], NAMES[1]: [0.1, 0.1, float("nan"), 0.2], "repeat": [0.5] * 4}}
    given = {
        "title": "A <b>title</b>",
        "lead": "2 clips.",
        "tables": [
            Table("Means", ["MSE ↓", "all"], {NAMES[0]: [0.25, 17459.6], NAMES[1]: [0.123456, "<x>"]}, {(1, 0)})
        ],
        "curves": Curves(curves, first=3, quiet={"repeat"}),
        "clips": clips,
        "context": 2,
        "fps": 20,
        "facts": {"weights": "runs/<x>"},
    }
    return Page(**{**given, **changes})


class Outline(HTMLParser):
    """Every element with its attributes, whether the elements are nested rightly, and the words."""

    EMPTY = frozenset({"meta", "link", "img", "input", "path", "circle"})

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.found if name == tag and wanted.items() <= attrs.items()]


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        write_page(tmp_path / "page.html", made(**changes))
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        return (tmp_path / "page.html").read_text()

    return write


def test_a_page_is_whole_and_says_what_it_was_given(written):
    outline = Outline(written())
    assert outline.open == []
    words = " ".join(" ".join(outline.words).split())
    for text in ("A <b>title</b>", *NAMES, "runs/<x>", "6 frames, in a loop: 2 are given, 4 predicted."):
        assert text in words
    assert "0.25 17,460" in words
    assert "0.1235 <x>" in words
    assert outline.all("html", lang="en")
    assert outline.all("meta", name="viewport")
    assert len(outline.all("h1")) == 1
    assert len(outline.all("strong")) == 1
    assert len(outline.all("article")) == 2


def test_a_page_refers_to_nothing_outside_of_it(written):
    text = written()
    outline = Outline(text)
    for _, attrs in outline.found:
        for key in ("src", "href", "srcset", "poster", "action", "data"):
            assert attrs.get(key, "data:").startswith("data:")
    policy = outline.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "@import" not in text
    assert "url(" not in text
    assert re.findall(r"\w+://[^\s\"<]*", text) == []


def test_every_picture_is_told_in_words(written):
    outline = Outline(written())
    pictures = outline.all("img")
    assert [picture["alt"] for picture in pictures[:3]] == [
        "Clip 1, what really happened: 6 frames",
        f"Clip 1, {NAMES[0]}: 4 frames",
        f"Clip 1, error of {NAMES[0]}: 4 frames",
    ]
    assert len({picture["alt"] for picture in pictures}) == len(pictures) == 10
    (drawn,) = outline.all("svg", role="img")
    assert f"{NAMES[0]}: 0.1 at frame 3, 0.4 at frame 6" in drawn["aria-label"]
    assert all("aria-hidden" in each for each in outline.all("svg") if "role" not in each)
    assert all(each.get("aria-label") for each in outline.all("div", role="region"))
    assert outline.all("input", type="range")[0]["aria-label"] == "Frame"
    assert outline.all("output")[0]["aria-live"] == "off"  # it changes several times a second


def decoded(address):
    from PIL import Image

    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", address).groups()
    return kind, np.array(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (7, 16, 24, 3), (12, 9, 9, 3), (10, 4, 4, 4)])
def test_a_sheet_holds_the_frames_in_order(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images[..., 3:] |= 1  # what cannot be seen at all need not keep its colour
    found = sheet(images)
    _, whole = decoded(found.address)
    _, height, width, channels = shape
    assert whole.shape == (found.rows * height, found.columns * width, channels)
    for at, image in enumerate(images):
        row, column = divmod(at, found.columns)
        assert (whole[row * height :, column * width :][:height, :width] == image).all()


def test_large_sheets_are_small_files():
    y, x = np.mgrid[:128, :128]
    noise = np.random.default_rng(0).integers(0, 12, (20, 128, 128, 3))
    images = ((x + y)[None, :, :, None] * 0.9 + noise).astype(np.uint8)
    found = sheet(images)
    kind, whole = decoded(found.address)
    assert kind == "webp"
    assert len(found.address) < images.size / 5
    assert abs(whole[:128, :128].astype(int) - images[0]).mean() < 6


def test_without_webp_a_sheet_is_png(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    kind, whole = decoded(sheet(images).address)
    assert kind == "png"
    assert (whole[:8, 8:16] == images[1]).all()


def test_errors_are_red_above_and_blue_below_and_nothing_where_right():
    colours = signed(np.array([[[0.5, -0.25, 0.0, 2.0]]], np.float32), limit=0.5)[0, 0]
    assert colours[:, 3].tolist() == [255, 128, 0, 255]
    assert colours[0, 0] > colours[0, 2]
    assert colours[1, 0] < colours[1, 2]


def test_frames_beyond_256_pixels_are_averaged_down(written):
    clip = torch.zeros(3, 1, 128, 512)
    clip[..., ::2] = 1
    outline = Outline(written(clips=[Clip("Clip 1", clip, {"m": clip[1:]}, {})], context=1))
    _, whole = decoded(outline.all("img")[0]["src"])
    (box,) = outline.all("div", **{"class": "screen truth"})
    assert whole.shape[:2] == (int(box["data-rows"]) * 64, int(box["data-columns"]) * 256)
    assert abs(whole[:64, :256].astype(int) - 127).max() <= 1


def test_long_clips_are_shown_smaller(written):
    clip = torch.zeros(500, 1, 128, 160)
    outline = Outline(written(clips=[Clip("Clip 1", clip, {}, {})], context=1))
    _, whole = decoded(outline.all("img")[0]["src"])
    assert 6_000_000 < whole.shape[0] * whole.shape[1] < 8_500_000
    assert max(whole.shape) < 4096


def test_a_chart_puts_values_where_they_are():
    lines = {"a": [0.0, 1.0, 0.5], "b": [1.0, float("nan"), 0.0]}
    text = chart("SSIM", lines, styles(list(lines), {"b"}), first=11)
    a, b = re.findall(r'<path class="line" d="M([^"]+)"', text)
    places = [tuple(map(float, pair.split())) for pair in a.split("L")]
    assert [x for x, _ in places] == [46.0, 198.0, 350.0]
    (_, low), (_, high), (_, middle) = places
    assert low > middle > high
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert b == f"46.0 {high}L350.0 {low}"
    assert text.count("<g transform") == 3  # the quiet line has no marks
    assert [int(each) for each in re.findall(r'class="x"[^>]*>(\d+)<', text)] == [11, 12, 13]


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [3.0, 3.0, 3.0]])
def test_a_chart_of_one_value_has_a_scale(values):
    text = chart("MSE", {"a": values}, {"a": 0}, first=1)
    assert "nan" not in text
    assert len(set(re.findall(r'class="y"[^>]*>([^<]+)<', text))) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": [Clip("A", moving(), {}, {}), Clip("B", moving(5), {}, {})]}, "equally long and of one size"),
        ({"clips": [Clip("A", moving(4), {"m": moving(5)}, {})]}, "A: the truth has 4 frames, fewer than the 5"),
        ({"clips": [Clip("A", moving(), {"truth": moving()}, {})]}, "A: what a model made cannot be called 'truth'"),
        ({"clips": [Clip("A", moving(), {"m": moving(size=(8, 8))}, {})]}, "one size .*'m': '8x8'"),
        ({"context": 7}, "between 0 and the 6 frames"),
        ({"curves": Curves({"MSE": {"a": [float("nan")]}})}, "at least one finite value"),
    ],
)
def test_what_cannot_be_a_page_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / "page.html", made(**changes))
    assert not any(tmp_path.iterdir())


def test_a_page_without_clips_has_no_player(written):
    outline = Outline(written(clips=[]))
    assert outline.all("article") == outline.all("input") == []


def test_the_same_page_twice_is_the_same_file(written):
    assert written() == written()
