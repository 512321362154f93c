"""The report as a browser shows it: no overflow, no network, labelled axes, for every reader, in print."""

from __future__ import annotations

import base64
import re
import shutil
import socketserver
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import fabricate
from fabricate import ARMS, PAIRS, SIMILARITY, TAGS, make_experiment, ship
from kdlora.data.tasks import Task
from kdlora.report.compare import compare
from kdlora.report.report import make_report

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
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
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
    make_experiment(root / "spans", task=fabricate.NAMES, texts=HOSTILE, seeds=(0,), rows=40)
    for name in ("hostile", "mrpc", "stsb", "tags", "spans"):
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


NAMES = ("hostile", "mrpc", "stsb", "tags", "spans", "both", "compared")


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
def test_nothing_runs_and_nothing_is_fetched(browser, server, name):
    """A label that is a script, or a plot that is loaded from elsewhere."""
    server.asked.clear()
    _show(browser, server, name, 1280)
    assert server.asked == [f"/{name}/report.html"]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in fetched if not address.startswith("data:")] == []
    assert "owned" not in browser.execute_script("return document.title.replace(/<.*?>/g, '')").split("·")[1]
    assert browser.execute_script("return document.scripts.length") == 1, "the page's own"
    assert browser.execute_script("return document.images.length") == 0
    allowed = browser.find_element(By.CSS_SELECTOR, "meta[http-equiv]").get_attribute("content")
    assert "script-src 'sha256-" in allowed
    assert "unsafe-inline'; script-src" in allowed, "styles only"


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
    drawings = browser.find_elements(By.CSS_SELECTOR, "figure > svg[role]")
    assert len(drawings) >= 6
    flat = [label.text for one in drawings for label in one.find_elements(By.TAG_NAME, "text")]
    assert {"parameters in all (millions)", "median time of one text (ms)", "epoch"} <= set(flat)
    assert "difference in score (points)" in flat


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
          .filter(e => e.textContent.trim() && !e.closest('.skip'))
          .filter(e => !e.getAttribute('style')?.includes('fill: var(--card)'))
          .map(e => { const own = getComputedStyle(e);
            const front = light(parts(e.tagName === 'text' ? own.fill : own.color)), back = light(parts(behind(e)));
            return [(Math.max(front, back) + .05) / (Math.min(front, back) + .05), e.outerHTML.slice(0, 80)]; })
          .filter(([ratio]) => ratio < 4.5);
        """
    )
    assert weak == []
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")


def _serious_faults(browser: webdriver.Chrome) -> list[str]:
    """Run axe-core's rules; say what is serious or critical."""
    import axe_core_python

    script = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": script})
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(done, error => done({error: String(error)}))"
    )
    assert "error" not in found, found
    assert len(found["passes"]) > 15, "axe looked at the page"
    return [
        f"{fault['id']}: {node['html'][:160]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"][:3]
    ]


@pytest.mark.parametrize(("name", "scheme"), [*((name, "light") for name in NAMES), ("mrpc", "dark")])
def test_axe_finds_no_serious_fault(browser, server, name, scheme):
    """A plot without words, a table without headers, text too pale: some readers get nothing."""
    _show(browser, server, name, 1280, scheme)
    assert _serious_faults(browser) == []


def test_axe_is_able_to_find_faults(browser, server):
    """A checker that was not loaded finds nothing wrong."""
    _show(browser, server, "mrpc", 1280)
    browser.execute_script("document.documentElement.lang = ''; document.querySelector('main a').textContent = ''")
    assert _serious_faults(browser)


def _column(browser: webdriver.Chrome, table: int, column: int) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('main table')[arguments[0]].tBodies[0].rows]"
        ".map(row => row.cells[arguments[1]].textContent.trim())",
        table,
        column,
    )


def test_tables_sort_by_keyboard_and_back(browser, server):
    """Scores sorted as text put 9.5 above 85.0; a sort that cannot be undone loses the order of the report."""
    _show(browser, server, "compared", 1280)
    place = browser.execute_script(
        "const tables = [...document.querySelectorAll('main table')];"
        "for (const [number, table] of tables.entries()) for (const header of table.tHead.rows[0].cells)"
        " if (/score/.test(header.textContent) && table.tBodies[0].rows.length > 2) return [number, header.cellIndex]"
    )
    before = _column(browser, *place)
    button = browser.execute_script(
        "return document.querySelectorAll('main table')[arguments[0]].tHead.rows[0].cells[arguments[1]]"
        ".querySelector('button')",
        *place,
    )
    button.send_keys(Keys.ENTER)
    figures = [float(re.search(r"[\d.]+", text)[0]) for text in _column(browser, *place) if re.search(r"\d", text)]
    assert figures == sorted(figures, reverse=True)
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    figures = [float(re.search(r"[\d.]+", text)[0]) for text in _column(browser, *place) if re.search(r"\d", text)]
    assert figures == sorted(figures)
    button.send_keys(Keys.ENTER)
    assert _column(browser, *place) == before


@pytest.mark.parametrize("name", ["mrpc", "hostile"])
def test_the_page_prints(browser, server, name):
    """A printed table that is cut at the paper's edge, a number broken over two lines, or a dark page of ink."""
    _show(browser, server, name, 1280, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 700, "height": 990, "deviceScaleFactor": 1, "mobile": False}
    )
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = browser.execute_script(
        "return [...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right).filter(r => r > 701)"
    )
    assert cut == []
    broken = browser.execute_script(
        "return [...document.querySelectorAll('td.number')].filter(cell => {"
        " const range = document.createRange(); range.selectNodeContents(cell);"
        " const lines = [...range.getClientRects()].filter(r => r.width).map(r => r.bottom);"
        " return Math.max(...lines) - Math.min(...lines) > 8 }).map(cell => cell.textContent)"
    )
    assert broken == []
    pdf = base64.b64decode(
        browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    )
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") in range(2, 25)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
