"""Chromium for the tests of pages: a browser, a server that remembers what it was asked for, and what readers need."""

import contextlib
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

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDS_CHROMIUM = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class _Handler(SimpleHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        return


class Server(socketserver.ThreadingTCPServer):
    """Serves a folder on this machine and remembers what was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[Server]:
    with Server(folder) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield serving
        serving.shutdown()


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def show(browser: webdriver.Chrome, address: str, width: int, scheme: str = "light") -> None:
    """Open a page at a width, in light or dark."""
    look(browser, width, scheme)
    browser.get(address)


def look(browser: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    """Give the page that is open, or the next one, a width, and make it light or dark."""
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def weak_texts(browser: webdriver.Chrome) -> list[object]:
    """List texts whose contrast is below the 4.5 that WCAG asks for."""
    found: list[object] = browser.execute_script(
        """
        const parts = text => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
          .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const behind = e => { for (; e; e = e.parentElement) {
          const back = getComputedStyle(e).backgroundColor; if (parts(back)[3] !== 0) return back; } };
        const shown = 'p, td, th, dt, dd, figcaption, summary, li, a, h1, h2, h3, h4, text, label, caption';
        return [...document.querySelectorAll(shown)]
          .filter(e => e.textContent.trim() && !e.closest('.skip'))
          .filter(e => !e.getAttribute('style')?.includes('fill: var(--card)'))
          .map(e => { const own = getComputedStyle(e);
            const front = light(parts(e.tagName === 'text' ? own.fill : own.color)), back = light(parts(behind(e)));
            return [(Math.max(front, back) + .05) / (Math.min(front, back) + .05), e.outerHTML.slice(0, 80)]; })
          .filter(([ratio]) => ratio < 4.5);
        """
    )
    return found


def axe_faults(browser: webdriver.Chrome) -> list[str]:
    """Run axe-core's rules; say what breaks them."""
    import axe_core_python

    script = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": script})
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(done, error => done({error: String(error)}))"
    )
    assert "error" not in found, found
    assert len(found["passes"]) > 15, "axe looked at the page"
    return [f"{fault['id']}: {node['html'][:160]}" for fault in found["violations"] for node in fault["nodes"][:3]]
