"""What can be done with a report without a mouse, as tree.js says."""

import pytest
from browser.looking import shown

pytestmark = pytest.mark.browser

FOCUSED = "() => document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"


def tab_to(page, label, most=40):
    """Presses Tab until what has this label, or begins with it, has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).startswith(label):
            return
    raise AssertionError(f"no Tab reaches {label!r}")


def test_a_tree_is_walked_by_arrow_keys(browser, page_of):
    with shown(browser, page_of("tree"), width=390) as (page, faults):
        panel, trail = page.locator(".tree .node b"), page.locator(".tree .trail")
        tab_to(page, "Search tree of")
        assert panel.inner_text() == "best leaf"
        steps = page.locator(".tree .node dd").first
        assert steps.inner_text() == "8 of 8"
        page.keyboard.press("ArrowUp")
        assert panel.inner_text() == "node"
        assert steps.inner_text() == "6 of 8"
        assert trail.get_attribute("d").count("M") == 4  # from the root to the node
        page.keyboard.press("Escape")
        assert trail.get_attribute("d") == ""
        for _ in range(9):
            page.keyboard.press("ArrowUp")
        assert panel.inner_text() == "root"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        at = page.locator(".tree circle.at")
        assert at.count() == 1
        for _ in range(8):  # to the right end, which a phone shows only when scrolled to
            page.keyboard.press("ArrowRight")
        box, window = at.bounding_box(), page.locator(".tree .scroll").bounding_box()
        assert window["x"] <= box["x"] <= window["x"] + window["width"]
        whole = page.locator(".tree svg").get_attribute("viewBox")
        page.keyboard.press("+")
        assert page.locator(".tree svg").get_attribute("viewBox") != whole
        tab_to(page, "all", most=3)
        page.keyboard.press("Enter")
        assert [float(v) for v in page.locator(".tree svg").get_attribute("viewBox").split()] == [
            float(v) for v in whole.split()
        ]
        assert faults == []


@pytest.mark.parametrize(("name", "label"), [("run", "the best sample, step by step"), ("prompts", "prompts")])
def test_what_scrolls_is_reached_by_tab(browser, page_of, name, label):
    with shown(browser, page_of(name), width=390) as (page, faults):
        tab_to(page, label)
        if name == "run":
            page.keyboard.press("ArrowRight")
            page.wait_for_function("document.activeElement.scrollLeft > 0", timeout=5000)
        assert faults == []
