"""The pictures of the playground in README and docs, taken from the running application.

    python -m benchmarks.screenshots [URL]

Without a URL it starts the application with the starter models.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from benchmarks.server import imagen, running
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from playwright.sync_api import Browser, Page

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_DONE = "#result:not([hidden])"
_LIMIT_MS = 120_000


def main() -> None:
    if len(sys.argv) > 1:
        take_all(sys.argv[1])
        return
    with running(imagen("Imagen")) as server:
        take_all(server.url)


def take_all(url: str) -> None:
    """Every picture, into docs/."""
    with sync_playwright() as tools:
        program = shutil.which("chromium")
        browser = tools.chromium.launch(executable_path=program, args=list(FLAGS))
        for name, (act, scheme, width_px, height_px) in PICTURES.items():
            with opened(browser, url, scheme, width_px, height_px) as page:
                act(page)
                page.wait_for_timeout(800)  # pictures have been drawn, and what slides has stopped
                path = ROOT / f"docs/playground-{name}.jpg"
                page.screenshot(path=path, type="jpeg", quality=85)
        browser.close()


@contextmanager
def opened(
    browser: Browser, url: str, scheme: str, width_px: int, height_px: int
) -> Generator[Page]:
    size = {"width": width_px, "height": height_px}
    context = browser.new_context(viewport=size, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    page = context.new_page()
    page.set_default_timeout(_LIMIT_MS)
    page.goto(url)
    page.wait_for_selector("#tasks li")
    yield page
    context.close()


def nothing_yet(page: Page) -> None:
    page.wait_for_selector(".status.ready")


def choose(page: Page, sample: str, task: str) -> None:
    page.locator("#samples button", has_text=sample).click()
    page.locator(".task-name").filter(has_text=task).click()


def result(page: Page) -> None:
    choose(page, "astronaut", "Comic")
    page.click("#run")
    page.wait_for_selector(_DONE)


def seeds(page: Page) -> None:
    choose(page, "astronaut", "Aged")
    page.fill("#count", "3")
    page.click("#run")
    page.wait_for_selector("#grid .completed")


def cut_out(page: Page) -> None:
    choose(page, "astronaut", "Background")
    page.click("#run")
    page.wait_for_selector(_DONE)


PICTURES: dict[str, tuple[Callable[[Page], None], str, int, int]] = {
    "empty": (nothing_yet, "light", 1280, 800),
    "result": (result, "light", 1320, 1350),
    "seeds": (seeds, "dark", 1440, 760),
    "phone": (cut_out, "light", 390, 844),
}

if __name__ == "__main__":
    main()
