"""One browser for all tests, and the pages that they look at, each made once."""

import pytest
from browser import looking, pages


@pytest.fixture(scope="session")
def browser():
    with looking.opened() as browser:
        yield browser


@pytest.fixture(scope="session")
def page_of(tmp_path_factory):
    """Name of `pages.PAGES` -> the page's address."""
    made = {}

    def page(name):
        if name not in made:
            made[name] = pages.PAGES[name](tmp_path_factory.mktemp(name)).as_uri()
        return made[name]

    return page
