"""Chromium, headless, driven by playwright: the system's own, since tests download no browser."""

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
    """What a page said and asked for while it was open.

    Attributes:
        console: console messages, errors that nothing caught, and dialogs, all of which a sound page has none of.
        requests: addresses other than the page's own, and those of what it made itself.
    """

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def on_dialog(self, dialog: Any) -> None:
        self.console.append(f"dialog: {dialog.message}")
        # With a listener it would stay open, and the page would wait for it.
        dialog.dismiss()


@contextmanager
def launched() -> Iterator[Any]:
    """A playwright `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container tests run as root, for whom Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, page: Path, heard: Heard | None = None, **settings: Any) -> Iterator[Any]:
    """A page that has drawn everything, with no past: a playwright `Page`.

    Args:
        heard: filled while the page is open.
        settings: what playwright's `new_context` takes: `viewport`, `color_scheme`.
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
