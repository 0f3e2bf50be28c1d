"""A page in headless Chromium: no complaint, nothing asked for, clips that play and stop, on a phone, in the dark."""

import numpy as np
import pytest
import torch
from chromium import chromium

from vpfast.visual import Clip, Curves, Page, Table, write_page

STEPS, CONTEXT = 6, 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def clips():
    """Two clips of noise, and what two models made of the end of them."""
    drawn = torch.Generator().manual_seed(0)
    found = []
    for number in (1, 2):
        truth = torch.rand(STEPS, 3, 10, 14, generator=drawn)
        made = {name: torch.rand(STEPS - CONTEXT, 3, 10, 14, generator=drawn) for name in ("MSPN", "codes")}
        found.append(Clip(f"Clip {number}", truth, made, {"MSPN": "PSNR 20.0 dB"}))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory, clips):
    path = tmp_path_factory.mktemp("page") / "page.html"
    rows = {"MSPN": ["0.1"] * 9, "codes": ["0.2"] * 9}
    curves = {name: {"MSPN": [0.1, 0.2, 0.3, 0.4], "codes": [0.2, 0.3, 0.3, 0.5]} for name in ("MSE ↓", "SSIM ↑")}
    table = Table("Means", [f"column {number}" for number in range(9)], rows)
    facts = {"weights": "run/" * 40}
    write_page(path, Page("A page", "2 clips.", [table], Curves(curves, 3), clips, CONTEXT, 20, facts))
    return path


def step_of(browser):
    return int(browser.run("return document.querySelector('.controls input').value"))


def go_to(browser, step):
    browser.run(
        "const slider = document.querySelector('.controls input'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        step,
    )


def pixels_of(browser, number):
    """The canvas of that number: uint8 (H, W, 4)."""
    shape, values = browser.run(
        "const canvas = document.querySelectorAll('canvas')[arguments[0]];"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return [[canvas.height, canvas.width, 4], Array.from(data)]",
        number,
    )
    return np.array(values, np.uint8).reshape(shape)


def as_pixels(frame):
    return (frame * 255).round().byte().permute(1, 2, 0).numpy()


def test_it_opens_without_a_complaint_and_asks_for_nothing(browser, page):
    browser.open(page)
    browser.until("return document.querySelector('.controls input').value > 2")
    assert browser.complaints() == []
    assert browser.asked_for() == [page.as_uri()]
    assert browser.run("return document.title") == "A page"
    assert browser.run("return document.compatMode") == "CSS1Compat"


def test_what_a_browser_reports_is_seen(browser, page, tmp_path):
    """The test above can fail."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text().replace("<main>", "<main><img src='http://127.0.0.1:9/a.png'><script>x</script>")
    )
    browser.open(broken)
    assert any("Content Security Policy" in each for each in browser.complaints())
    open_to_all = page.read_text().replace("default-src", "x-src").replace("img-src", "y-src")
    broken.write_text(open_to_all.replace("<main>", "<main><img src='http://127.0.0.1:9/a.png'>"))
    browser.open(broken)
    assert "http://127.0.0.1:9/a.png" in browser.asked_for()


def test_clips_play_pause_and_go_on(browser, page):
    browser.open(page)
    seen = {step_of(browser)}
    pictures = {pixels_of(browser, 0).tobytes()}
    while len(seen) < STEPS:  # round and round
        browser.until(f"return document.querySelector('.controls input').value != {step_of(browser)}")
        seen.add(step_of(browser))
        pictures.add(pixels_of(browser, 0).tobytes())
    assert len(pictures) > 2
    browser.press(".controls button")
    assert browser.run("return document.querySelector('.controls button').textContent") == "Play"
    held = step_of(browser)
    browser.run("return new Promise((done) => setTimeout(done, 300))")
    assert step_of(browser) == held
    browser.press(".controls button")
    browser.until(f"return document.querySelector('.controls input').value != {held}")
    assert browser.run("return document.querySelector('.controls button').textContent") == "Pause"


def test_each_screen_shows_its_frame_of_each_step(browser, page, clips):
    browser.open(page, still=True)
    columns = 5  # truth, and two models with their errors
    assert browser.run("return document.querySelectorAll('canvas').length") == columns * len(clips)
    for step in range(STEPS):
        go_to(browser, step)
        for number, clip in enumerate(clips):
            for place, name in ((1, "MSPN"), (3, "codes")):
                given = step < CONTEXT
                wanted = clip.truth[step] if given else clip.made[name][step - CONTEXT]
                assert (pixels_of(browser, number * columns + place)[..., :3] == as_pixels(wanted)).all()
                assert pixels_of(browser, number * columns + place + 1)[..., 3].any() != given
            assert (pixels_of(browser, number * columns)[..., :3] == as_pixels(clip.truth[step])).all()
        said = browser.run("return document.querySelector('.controls output').value")
        assert said == f"frame {step + 1} of {STEPS}, {'given' if given else 'predicted'}"
        told = browser.run("return document.querySelector('.controls input').getAttribute('aria-valuetext')")
        assert told == said


def test_the_curves_mark_the_step_that_is_shown(browser, page):
    browser.open(page, still=True)
    script = (
        "const line = document.querySelector('.chart .cursor');"
        "const mark = document.querySelectorAll('.chart .c0 .mark > g')[arguments[0]];"
        "return [getComputedStyle(line).visibility, line.getBoundingClientRect(), mark.getBoundingClientRect()]"
    )
    for step in range(STEPS):
        go_to(browser, step)
        shown, line, mark = browser.run(script, max(0, step - CONTEXT))
        assert shown == ("visible" if step >= CONTEXT else "hidden")
        if step >= CONTEXT:
            assert line["x"] + line["width"] / 2 == pytest.approx(mark["x"] + mark["width"] / 2, abs=1.5)


def test_who_wants_no_motion_gets_none(browser, page):
    browser.open(page, still=True)
    browser.run("return new Promise((done) => setTimeout(done, 300))")
    assert step_of(browser) == CONTEXT
    assert browser.run("return document.querySelector('.controls button').textContent") == "Play"


def test_it_is_used_by_keyboard(browser, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(page, still=True)
    slider = browser.driver.find_element(By.CSS_SELECTOR, ".controls input")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert step_of(browser) == CONTEXT + 1
    slider.send_keys(Keys.HOME)
    assert step_of(browser) == 0
    button = browser.driver.find_element(By.CSS_SELECTOR, ".controls button")
    button.send_keys(Keys.SPACE)
    browser.until("return document.querySelector('.controls input').value > 0")


@pytest.mark.parametrize("width", [320, 375, 768, 1600])
def test_it_fits_every_width(browser, page, width):
    browser.open(page, size=(width, 700), still=True)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    outside = browser.run(
        "return [...document.querySelectorAll('canvas, button, output, .chart, h1, figcaption')]"
        ".filter((each) => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.wide')).length"
    )
    assert outside == 0
    button = browser.run("return document.querySelector('button').getBoundingClientRect()")
    assert min(button["width"], button["height"]) >= 36  # a thumb


def luminance(colour):
    channels = np.array([int(each) for each in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("dark", [False, True])
def test_words_and_lines_stand_out_from_the_page(browser, page, dark):
    browser.open(page, dark=dark, still=True)
    colour = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    paper = luminance(browser.run(colour, "body", "backgroundColor"))
    assert (paper < 0.05) == dark

    def contrast(selector, kind, ground=paper):
        lighter, darker = sorted((luminance(browser.run(colour, selector, kind)), ground), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    for words in ("body", "header p", ".screens small", "summary", ".red", ".blue", "thead th"):
        assert contrast(words, "color") >= 4.5, words
    assert contrast(".chart text", "fill") >= 4.5
    for number in range(8):
        style = f"document.querySelector('.legend li').className = 'c{number}'"
        browser.run(style)
        assert contrast(".legend li", "color") >= 3, number
    assert contrast("button", "color", luminance(browser.run(colour, "button", "backgroundColor"))) >= 4.5


def test_without_scripts_all_frames_are_there_at_once(browser, page):
    browser.open(page, scripts=False)
    try:
        drawn = browser.run(
            "return [...document.querySelectorAll('.screen img')].map((each) => each.getBoundingClientRect().width)"
        )
        controls = browser.run("return getComputedStyle(document.querySelector('.controls')).display")
    finally:
        browser.open(page)  # scripts are for all tabs
    assert min(drawn) > 50
    assert controls == "none"
