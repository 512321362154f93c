"""The report as a browser shows it: no overflow, no scripts, no network, labelled axes, readable in light and dark."""

from __future__ import annotations

import shutil
import socketserver
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from fabricate import ARMS, PAIRS, SIMILARITY, TAGS, make_experiment, ship
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from kdlora.data.tasks import Task
from kdlora.evidence.compare import compare
from kdlora.evidence.report import make_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs chromium and chromedriver (Debian: chromium-driver)"),
]

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src="/stolen" onerror="document.title=1">',
    "a label that is very long indeed, much longer than any column of a table has room for on a telephone",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichenverordnungsparagraph",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of several kinds, one of them full of hostile names, below one folder."""
    root = tmp_path_factory.mktemp("reports")
    hostile = Task("single-label", ("text",), ("label",), HOSTILE, ("accuracy",))
    layout = make_experiment(root / "hostile", task=hostile, texts=HOSTILE, experiment=HOSTILE[0], failed=[("lora", 1)])
    ship(layout, names=HOSTILE, recipe=HOSTILE[2] + HOSTILE[1])
    ship(make_experiment(root / "mrpc", task=PAIRS, arms=(*ARMS, "student-fft", "kd-fft")), calibrated=True)
    ship(make_experiment(root / "stsb", task=SIMILARITY), int8=False)
    make_experiment(root / "tags", task=TAGS, seeds=(0,))
    for name in ("hostile", "mrpc", "stsb", "tags"):
        make_report([root / name], draws=200)
    make_report([root / "mrpc", root / "stsb"], out=root / "both", draws=200)
    compare([root / "mrpc", root / "stsb", root / "hostile"], out=root / "compared", draws=200)
    (root / "compared" / "compare.html").rename(root / "compared" / "report.html")
    return root


@pytest.fixture(scope="module")
def server(pages: Path) -> Iterator[socketserver.ThreadingTCPServer]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(_Handler, directory=str(pages))) as serving:
        serving.daemon_threads = True
        serving.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


NAMES = ("hostile", "mrpc", "stsb", "tags", "both", "compared")


def _show(
    browser: webdriver.Chrome, server: socketserver.TCPServer, name: str, width: int, scheme: str = "light"
) -> None:
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"http://127.0.0.1:{server.server_address[1]}/{name}/report.html")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", NAMES)
def test_the_page_does_not_scroll_sideways(browser, server, name, width):
    """A table that widens the page makes every paragraph unreadable on a telephone."""
    _show(browser, server, name, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.table, svg, pre, .unseen, .skip')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
    )
    assert wide == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_and_nothing_is_fetched(browser, server, pages, name):
    """A label that is a script, or a plot that is loaded from elsewhere."""
    server.asked.clear()
    _show(browser, server, name, 1280)
    assert server.asked == [f"/{name}/report.html"]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in fetched if not address.startswith("data:")] == []
    assert "owned" not in browser.execute_script("return document.title.replace(/<.*?>/g, '')").split("·")[1]
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert (pages / name / "report.html").stat().st_size < 3_000_000


def test_hostile_names_are_shown_as_they_are(browser, server):
    """Escaping must not eat the text either."""
    _show(browser, server, "hostile", 1280)
    assert browser.find_element(By.TAG_NAME, "h1").text == HOSTILE[0]
    body = browser.find_element(By.TAG_NAME, "body").text
    assert HOSTILE[1] in body


@pytest.mark.parametrize("name", ["mrpc", "stsb", "tags", "hostile"])
def test_axes_are_labelled_with_their_units(browser, server, name):
    """A plot without labels can only be guessed at."""
    _show(browser, server, name, 1280)
    drawings = browser.find_elements(By.CSS_SELECTOR, "figure > svg[role=img]")
    assert len(drawings) >= 6
    labels = [[label.text for label in one.find_elements(By.CSS_SELECTOR, ".axis-label")] for one in drawings]
    assert all(labels)
    flat = [text for found in labels for text in found]
    for wanted in (
        "parameters in all (millions)",
        "median time of one text (ms)",
        "epoch",
        "difference in score (points)",
    ):
        assert wanted in flat


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["mrpc", "stsb", "hostile", "compared"])
def test_texts_in_plots_do_not_overlap(browser, server, name, width):
    """Two labels on one spot are none."""
    _show(browser, server, name, width)
    overlaps = browser.execute_script(
        """
        const found = [];
        for (const svg of document.querySelectorAll('figure > svg')) {
          const texts = [...svg.querySelectorAll('text')]
            .map(e => [e.firstChild.textContent, e.getBoundingClientRect()]);
          texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
            const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (wide > 1 && high > 3) found.push(one + ' / ' + other);
          }));
        }
        return found;
        """
    )
    assert overlaps == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, server, scheme):
    """Grey on grey: WCAG asks for a contrast of 4.5."""
    _show(browser, server, "mrpc", 1280, scheme)
    weak = browser.execute_script(
        """
        const parts = text => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
          .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const behind = e => { for (; e; e = e.parentElement) {
          const back = getComputedStyle(e).backgroundColor; if (parts(back)[3] !== 0) return back; } };
        return [...document.querySelectorAll('p, td, th, dt, dd, figcaption, summary, li, a, h1, h2, h3, h4, text')]
          .filter(e => e.textContent.trim() && !e.closest('.skip') && !e.classList.contains('heat-text'))
          .map(e => { const own = getComputedStyle(e);
            const front = light(parts(e.tagName === 'text' ? own.fill : own.color)), back = light(parts(behind(e)));
            return [(Math.max(front, back) + .05) / (Math.min(front, back) + .05), e.outerHTML.slice(0, 80)]; })
          .filter(([ratio]) => ratio < 4.5);
        """
    )
    assert weak == []
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")


def test_links_lead_to_records_that_are_there(browser, server):
    """A broken link from a figure to its run."""
    _show(browser, server, "mrpc", 1280)
    server.asked.clear()
    browser.get(browser.find_element(By.CSS_SELECTOR, ".seeds a").get_attribute("href"))
    assert server.asked[0].endswith("/mrpc/runs/fft-seed0/run.json")
    assert '"arm": "fft"' in browser.page_source
