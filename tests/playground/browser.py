"""A browser without a window, and the playground in it as a user finds it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.programs import require

TIMEOUT_S = 120

RUN_KEYS = Keys.CONTROL + Keys.ENTER
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
# What a shell, a page and JSON each take for something else.
NASTY = (
    "<img src=x onerror=alert(1)> & </pre> 'it''s' \"$HOME\" `id` \\n \\\n!! %s\n\t日本語 🦊 \u202e"
)
READ_TOKENS = """
return [...arguments[0].querySelectorAll('.text [data-position]')].map((span) => ({
  text: span.textContent,
  temperature: span.dataset.temperature === undefined ? null : Number(span.dataset.temperature),
  colour: getComputedStyle(span).backgroundImage,
  kind: span.className.replace('heat', '').replace('active', '').trim(),
}))
"""
# WCAG's contrast of a text with each of its backgrounds, as the browser paints them.
MEASURE_CONTRASTS = """
const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const luminance = (colour) => {
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((value) =>
    value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return arguments[0].map((element) => {
  const style = getComputedStyle(element);
  const lights = [style.color, style.backgroundColor].map(luminance).sort((a, b) => b - a);
  return (lights[0] + 0.05) / (lights[1] + 0.05);
});
"""


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Chromium with a profile of its own; the test is skipped where there is none."""
    options = webdriver.ChromeOptions()
    options.binary_location = require("chromium", "chromium")
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(require("chromedriver", "chromium-driver")))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The playground of a server, opened anew."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        self.url = url
        self.read_console()
        self.read_requests()

    def open(self, fragment: str = "") -> None:
        self.browser.get("about:blank")  # A new fragment alone would not load the page anew.
        self.browser.get(f"{self.url}/playground{fragment}")

    def open_ready(self, fragment: str = "") -> None:
        """Open it, and wait for the lists that the server fills."""
        self.open(fragment)
        self.wait(lambda: self.find_all("[name=model] option"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, TIMEOUT_S, 0.05).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def read(self, selector: str) -> str:
        """An element's text, also where nobody sees it."""
        return self.find(selector).get_property("textContent")

    def fill(self, **fields: object) -> None:
        """Set fields of the form by name, with `__` for a dot; None switches a box off."""
        for name, value in fields.items():
            field = self.find(f"[name='{name.replace('__', '.')}']")
            if field.get_attribute("type") == "checkbox":
                if field.is_selected() != bool(value):
                    field.click()
                continue
            if field.tag_name == "select":
                field.find_element(By.CSS_SELECTOR, f"option[value='{value}']").click()
                continue
            # Typing would leave out what is not on a keyboard, and run on Enter.
            script = "arguments[0].value = arguments[1];"
            script += "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
            self.browser.execute_script(script, field, str(value))

    def press(self, *keys: str) -> None:
        """Keys for what has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def run(self) -> None:
        """Run, and wait until both answers have ended."""
        self.find("#run").click()
        self.wait_until_done()

    def wait_until_done(self) -> None:
        self.wait(lambda: not self.find("#stop").is_enabled() and self.find_all(".pane header"))

    @property
    def panes(self) -> tuple[WebElement, WebElement]:
        adaptive, fixed = self.find_all(".pane")
        return adaptive, fixed

    def read_tokens(self, pane: WebElement) -> list[dict[str, Any]]:
        return self.browser.execute_script(READ_TOKENS, pane)

    def read_part(self, pane: WebElement, name: str) -> str:
        """The text of a pane's element of this class."""
        return pane.find_element(By.CLASS_NAME, name).get_property("textContent")

    def read_table(self, selector: str) -> list[list[str]]:
        """The words of each row of the tables that are found."""
        return [row.text.split() for row in self.find_all(f"{selector} tr")]

    def measure_contrasts(self, elements: list[WebElement]) -> list[float]:
        return self.browser.execute_script(MEASURE_CONTRASTS, elements)

    def use_theme(self, theme: str) -> None:
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def read_console(self) -> list[str]:
        """Errors and broken policies since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def read_requests(self) -> list[str]:
        """Addresses that pages have asked for since the last call."""
        entries = self.browser.get_log("performance")
        events = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        # The browser's own first tab is made of such.
        return [url for url in urls if not url.startswith(("chrome:", "about:", "data:"))]
