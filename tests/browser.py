"A real browser for the tests that need one: headless Chromium, found on this machine and never downloaded."

import shutil
import tempfile
from contextlib import contextmanager

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
_quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@contextmanager
def browser_page(url: str, **more):
    "Open a page; yields it and the list of errors that its console and its scripts report."
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(home, executable_path=CHROMIUM, headless=True, args=_quiet.split(), viewport={"width": 1000, "height": 760}, **more)
        try:
            page, errors = context.pages[0], []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            yield page, errors
        finally:  # or a test that fails never ends
            context.close()
