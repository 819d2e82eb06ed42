"""Pages in a headless browser: what it complains of, what a script measures, and what axe-core finds."""

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCHEMES = ("light", "dark")
WIDTHS = (390, 1280)
"""Of a phone and of a desktop, in pixels."""

_MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")
_SCREENSHOTS = os.environ.get("STEER_SCREENSHOTS")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def absent(reason: str) -> Any:
    """Skips, or fails where the browser has to be there: STEER_BROWSER=required, as CI sets it."""
    if os.environ.get("STEER_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """A headless Chromium: the system's, else playwright's own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("needs playwright: pip install 'steer-diffusion[browser]'")
    with sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, _NAMES)), driver.chromium.executable_path)
        if not Path(program).exists():
            absent("needs a Chromium: apt install chromium, or python -m playwright install chromium")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def shown(
    browser: Any, address: str, scheme: str = "light", width: int = 1280, home: str | None = None
) -> Iterator[tuple[Any, list[str]]]:
    """The page at an address and the list of what went wrong there: errors, and requests that leave `home`.

    Args:
        browser: From `opened`.
        address: file:// or http://.
        scheme: "light" or "dark", the reader's setting.
        width: Of the window, in pixels.
        home: What addresses of requests have to begin with; the page itself by default.
    """
    window = {"width": width, "height": 844}
    context = browser.new_context(color_scheme=scheme, viewport=window, reduced_motion="reduce")
    page, faults = context.new_page(), []

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            faults.append(f"console: {message.text}")

    def requested(request: Any) -> None:
        if not request.url.startswith((home or address, "data:", "blob:")):
            faults.append(f"the page asks for {request.url}")

    page.on("console", said)
    page.on("request", requested)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    try:
        page.goto(address, wait_until="networkidle" if address.startswith("http") else "load")
        yield page, faults
    finally:
        context.close()


def faults_of(browser: Any, address: str, scheme: str, *, name: str, home: str | None = None) -> list[str]:
    """Everything that is wrong with a page at each width, as sentences. Keeps screenshots where they are asked for.

    axe-core looks once, on the phone: colours are those of the scheme, and what scrolls is measured at every width.

    Args:
        browser, address, scheme, home: As `shown`.
        name: Of the screenshots, in the folder that STEER_SCREENSHOTS names.
    """
    with shown(browser, address, scheme, WIDTHS[0], home) as (page, faults):
        faults += serious(page)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 844})
            faults += [f"{width} px: {fault}" for fault in page.evaluate(_MEASURE)]
            if _SCREENSHOTS:
                page.screenshot(path=Path(_SCREENSHOTS) / f"{name}-{scheme}-{width}.png", full_page=True)
        return faults


def serious(page: Any) -> list[str]:
    """What axe-core calls serious or critical."""
    found = _axe()(page)
    return [
        f"axe: {rule['id']} ({rule['help']}): {'; '.join(node['html'][:120] for node in rule['nodes'][:3])}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


@functools.cache
def _axe() -> Callable[[Any], list[dict[str, Any]]]:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        absent("needs axe-playwright-python: pip install 'steer-diffusion[browser]'")
    axe, options = Axe(), {"resultTypes": ["violations"]}
    return lambda page: axe.run(page, options=options).response["violations"]
