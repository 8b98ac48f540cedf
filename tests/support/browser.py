"""The Chromium of the system, headless, driven by playwright. Tests download no browser."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), "chromium"
)


@dataclass
class Heard:
    """The messages and requests of a page while it was open.

    Attributes:
        console: console messages, uncaught errors and dialogs. A correct page has none.
        requests: requested addresses other than the page itself.
    """

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def on_dialog(self, dialog: Any) -> None:
        self.console.append(f"dialog: {dialog.message}")
        # A dialog with a listener stays open, and the page would wait for it.
        dialog.dismiss()


@contextmanager
def launched() -> Iterator[Any]:
    """Launch Chromium: yield a playwright `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container tests run as root, and Chromium has no sandbox for root.
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, page: Path, heard: Heard | None = None, **settings: Any) -> Iterator[Any]:
    """Open a page in a new context: yield a playwright `Page` that has drawn everything.

    Args:
        heard: filled while the page is open.
        settings: the arguments of playwright's `new_context`: `viewport`, `color_scheme`.
    """
    heard = heard or Heard()
    address = page.resolve().as_uri()
    context = browser.new_context(**settings)
    try:
        tab = context.new_page()
        tab.on("console", lambda message: heard.console.append(message.text))
        tab.on("pageerror", lambda error: heard.console.append(f"uncaught: {error}"))
        tab.on("dialog", heard.on_dialog)
        tab.on("request", lambda asked: heard.requests.append(asked.url) if asked.url != address else None)
        tab.goto(address)
        tab.wait_for_selector("html[data-ready=all]", timeout=30_000)
        yield tab
    finally:
        context.close()
