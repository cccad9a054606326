"""A real browser: Debian's chromium, headless, driven over WebDriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
SECONDS = 60


def missing() -> str:
    """What is missing for a browser test, or nothing."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install selenium)"
    needed = ("chromium", "chromedriver")
    absent = [name for name in needed if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found (apt-get install chromium chromium-driver)" if absent else ""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A fresh browser with a profile of its own; it ends with the context."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


class Shown:
    """A page that is open.  ``timeline`` counts from the end: -1 is the schedule that is judged."""

    def __init__(self, driver: Any, page: str, file: Path, **media: str) -> None:
        self.driver = driver
        self.media(**media)
        file.write_text(page, encoding="utf-8")
        driver.get(file.as_uri())
        self.run("scrollTo(0, 0)")

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script after the next frame is drawn.

        In it, ``t`` is the timeline judged last and ``s`` its section, ``op`` finds an op and ``pixel`` a colour.
        """
        body = (
            "const done = arguments[arguments.length - 1], args = arguments;"
            "requestAnimationFrame(() => setTimeout(() => {"
            "const s = window.schedulePage?.sections.at(-1), t = s?.timelines.at(-1);"
            "const pixel = (x, y) => {"
            "  const scale = t.canvas.width / t.scene.width, copy = document.createElement('canvas');"
            "  const context = copy.getContext('2d', { willReadFrequently: true });"
            "  context.drawImage(t.canvas, -Math.round(x * scale), -Math.round(y * scale));"
            "  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); };"
            "const op = (text) => t.scene.schedule.ops.find((one) => one.text === text);"
            f"done((() => {{ {script} }})());}}, 0));"
        )
        return self.driver.execute_async_script(body, *arguments)

    def problems(self) -> list[str]:
        """What the console says since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def media(self, **features: str) -> None:
        """Pretend to a media feature, such as ``prefers_color_scheme="dark"``."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})

    def point_at(self, op: str, press: bool = False) -> None:
        """Move the mouse onto an op of the judged timeline, and perhaps click."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        self.run("t.canvas.scrollIntoView({ block: 'center', behavior: 'instant' }); s.view.fit();")
        x, y = self.run(
            "const frame = t.canvas.getBoundingClientRect(), box = t.boxOf(op(args[0]));"
            "return [frame.left + box.middle, frame.top + box.centre];",
            op,
        )
        actions = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(round(x), round(y))
        if press:
            actions.pointer_action.click()
        actions.perform()

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, on whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def tooltip(self) -> str:
        """The tooltip's text, or nothing where it is hidden."""
        return str(self.run("const tip = document.getElementById('tooltip'); return tip.hidden ? '' : tip.innerText;"))

    def pixel(self, op: str) -> list[int]:
        """The colour in the lower left of an op's cell, below its name."""
        return self.run("const box = t.boxOf(op(args[0])); return pixel(box.left + 4, box.bottom - 4);", op)

    def colour(self, name: str) -> list[int]:
        """A colour of the page's style."""
        text = self.run(
            "return getComputedStyle(document.documentElement).getPropertyValue(args[0]).trim()", f"--{name}"
        )
        return [int(text[place : place + 2], 16) for place in (1, 3, 5)]
