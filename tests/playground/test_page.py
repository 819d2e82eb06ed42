"""The page in a real browser: a run with its pictures and verdict, Stop, an error; nothing asked of another machine."""

import importlib.util
import shutil
import socket
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]


@pytest.fixture(scope="module")
def address():
    from steer.playground.page import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch("digits", port=port, browser=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def fill(page, **fields):
    for name, value in fields.items():
        box = page.locator(f"#{name} input, #{name} textarea").first
        box.fill(str(value))
        box.press("Tab")


def test_a_visit(address, browser, tmp_path):
    """Runs, looks at what came, stops a longer run, and makes a mistake."""
    problems, hosts = [], set()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    page.locator("#run:enabled").wait_for(timeout=20_000)

    fill(page, budget=800, temperature="1.0")
    page.click("#run")
    page.locator("#status .steer-verdict").wait_for(timeout=30_000)
    assert "Steered" in page.inner_text("#status .steer-verdict")
    assert page.locator("#samples img").count() == 16
    assert "reward" in page.locator("#samples img").first.get_attribute("alt")
    assert page.locator("#lineage svg path").count() > 0
    assert "generator.one(0)" in page.inner_text("#python")
    assert "--budget 800" in page.inner_text("#command").replace("\n", " ")
    with page.expect_download() as download:
        page.click("#archive")
    assert download.value.path().read_bytes()[:2] == b"PK"
    page.screenshot(path=tmp_path / "wide.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 844})
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})

    fill(page, budget=40_000)
    page.click("#run")
    page.locator("#status progress").wait_for(timeout=30_000)
    page.locator("#stop:enabled").wait_for()
    page.click("#stop")
    page.locator("#status .steer-verdict").wait_for(timeout=30_000)
    assert page.inner_text("#status .steer-verdict").startswith("Stopped; this is what there was.")
    assert page.locator("#samples img").count() == 16

    fill(page, label="three")
    page.click("#run")
    page.locator("#status .steer-error").wait_for(timeout=30_000)
    message = page.inner_text("#status")
    assert "label must be a whole number of at least 0, got 'three'" in message
    assert "Traceback" not in message
    assert hosts - {None} == {"127.0.0.1"}  # data: has no host
    assert problems == []
