"""The site as a browser shows it, for every reader."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from pages import ROOT

from chromium import NEEDS_CHROMIUM, axe_faults, look, open_browser, serve_folder

pytestmark = [NEEDS_CHROMIUM, pytest.mark.docs]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, str]]:
    """A browser, and the address of the site."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    with serve_folder(folder) as server, open_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.set_script_timeout(300)
        yield browser, server.address


PAGES = {"": "light", "api/": "dark", "cli/": "light", "comparison/": "dark", "howto/tokens/": "light"}


@pytest.mark.parametrize(("page", "scheme"), [*PAGES.items(), ("howto/tokens/", "dark")])
def test_a_page_serves_every_reader(site, page: str, scheme: str):
    """The theme's own colours of code are too pale, and its copy buttons are landmarks without a name."""
    browser, address = site
    look(browser, 1280, scheme)
    for _ in range(2):  # the theme remembers the colours of the page before
        browser.get(f"{address}/{page}")
        browser.execute_script("localStorage.clear()")
    shown = browser.execute_script("return document.body.dataset.mdColorScheme")
    assert shown == ("slate" if scheme == "dark" else "default")
    assert axe_faults(browser) == []
