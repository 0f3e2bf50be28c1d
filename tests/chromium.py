"""Chromium without a window: opens a page, and tells what it asked for and what it complained about."""

import json
import shutil
from contextlib import contextmanager

import pytest

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


class Browser:
    """A tab of its own settings. ``size`` is (width, height) in pixels of a page."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, size=(1100, 800), dark=False, still=False, scripts=True):
        """Opens a file and waits until its player is there; returns the browser."""
        width, height = size
        features = {
            "color-scheme": "dark" if dark else "light",
            "reduced-motion": "reduce" if still else "no-preference",
        }
        self._tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._tell(
            "Emulation.setEmulatedMedia",
            features=[{"name": f"prefers-{name}", "value": value} for name, value in features.items()],
        )
        self._tell("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.driver.get("about:blank")
        for log in ("performance", "browser"):
            self.driver.get_log(log)
        self.driver.get(path.absolute().as_uri())
        if scripts:
            self.until("return !document.querySelector('.controls').hidden")
        return self

    def run(self, script, *arguments):
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script, seconds=60):
        """Waits until a script returns something true; returns that."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda driver: self.run(script))

    def press(self, selector):
        """A click, as by a mouse."""
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def complaints(self):
        """Everything in the console since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked_for(self):
        """Every address that was asked for since the page was opened, but those that hold what they name."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        found = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        addresses = [each["request"]["url"] for each in found]
        return [address for address in addresses if not address.startswith("data:")]

    def _tell(self, command, **values):
        self.driver.execute_cdp_cmd(command, values)


@contextmanager
def chromium(folder):
    """A :class:`Browser` whose profile lies in ``folder``; skips the test where something is missing."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="needs selenium to drive a browser: pip install selenium"
    )
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, place in places.items():
        if place is None:
            pytest.skip(f"needs {name}, which is not installed: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = places["chromium"]
    for argument in (*ARGUMENTS, f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(places["chromedriver"]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
