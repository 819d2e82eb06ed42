"""The documentation site in a real browser: the one that STEER_SITE names, or else one built here."""

import os
import subprocess
from pathlib import Path

import pytest
from browser.looking import SCHEMES, faults_of, served

ROOT = Path(__file__).parents[2]
PAGES = ("", "tutorial/", "gallery/", "reference/models/")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site():
    folder = os.environ.get("STEER_SITE")
    if folder is None:
        pytest.importorskip("zensical", reason="needs the site: STEER_SITE=build/site, or the extra docs to build it")
        subprocess.run(["bash", ".ci/site"], cwd=ROOT, check=True)
        folder = ROOT / "build/site"
    with served(Path(folder)) as address:
        yield address


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_site_can_be_read(browser, site, page, scheme):
    name = "site-" + (page.strip("/").replace("/", "-") or "start")
    faults = faults_of(browser, site + page, scheme, name=name, home=site)
    assert not faults, "\n".join(faults)
