"""Reports in a real browser, on a phone and a desktop, light and dark."""

import pytest
from browser.looking import SCHEMES, WIDTHS, faults_of, shown
from browser.pages import PAGES

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(browser, page_of, name, scheme):
    """No error, no request, nothing wider than the window, no text cut off, nothing serious of axe-core's."""
    faults = faults_of(browser, page_of(name), scheme, name=name)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["run", "prompts", "comparison", "budgets", "failure"])
def test_a_phone_shows_every_column_of_a_table(browser, page_of, name):
    """Rows of wide tables become lists there; a table that scrolls would hide its last columns."""
    with shown(browser, page_of(name), width=WIDTHS[0]) as (page, _):
        wide = "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.ariaLabel)"
        assert page.locator(".scroll:has(> table)").evaluate_all(wide) == []


def test_small_pictures_are_sharp_and_large_ones_smooth(browser, page_of):
    for name, rendering in (("run", {"pixelated"}), ("comparison", {"pixelated"}), ("videos", {"auto"})):
        with shown(browser, page_of(name)) as (page, _):
            found = page.locator(".grid img").evaluate_all("all => all.map(e => getComputedStyle(e).imageRendering)")
            assert set(found) == rendering
