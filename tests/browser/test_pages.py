"""Reports in a real browser, on a phone and a desktop, light and dark."""

import pytest
from browser.looking import SCHEMES, faults_of
from browser.pages import PAGES

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(browser, page_of, name, scheme):
    """No error, no request, nothing wider than the window, no text cut off, nothing serious of axe-core's."""
    faults = faults_of(browser, page_of(name), scheme, name=name)
    assert not faults, "\n".join(faults)
