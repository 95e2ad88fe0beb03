"""A real browser, and pages as it shows them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=30_000)  # a busy machine is no failure


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium without a screen. `scripts/test` installs it where it can."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        why = "no chromium: apt-get install chromium"
        # CI must not pass by leaving these tests out.
        pytest.fail(why) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(why)
    with sync_playwright() as driver:
        made = driver.chromium.launch(
            executable_path=program, args=["--disable-gpu", "--disable-background-networking"]
        )
        yield made
        made.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens the page in a file; at the end it must have complained of nothing and asked for nothing."""
    contexts, wrong = [], []

    def open_(path: Path, width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or wrong.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong
