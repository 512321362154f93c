"""The report as a browser shows it: no overflow, no network, labelled axes, for every reader, in print."""

from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

import fabricate
from chromium import NEEDS_CHROMIUM, Server, axe_faults, look, open_browser, serve_folder, show, weak_texts
from fabricate import ARMS, PAIRS, SIMILARITY, TAGS, make_experiment, ship
from kdlora.data.tasks import Task
from kdlora.report.compare import compare
from kdlora.report.report import make_report

pytestmark = [pytest.mark.slow, pytest.mark.drawn, NEEDS_CHROMIUM]

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src="/stolen" onerror="document.title=1">',
    "a label that is very long indeed, much longer than any column of a table has room for on a telephone",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichenverordnungsparagraph",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
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
        make_report(root / name, draws=200)
    compare([root / "mrpc", root / "stsb", root / "hostile"], out=root / "compared", draws=200)
    (root / "compared" / "compare.html").rename(root / "compared" / "report.html")
    with serve_folder(root) as serving:
        yield serving


NAMES = ("hostile", "mrpc", "stsb", "tags", "spans", "compared")


def _show(browser: webdriver.Chrome, server: Server, name: str, width: int, scheme: str = "light") -> None:
    show(browser, f"{server.address}/{name}/report.html", width, scheme)


AXES = {"parameters in all (millions)", "median time of one text (ms)", "epoch", "difference in score (points)"}
BEYOND_THE_EDGE = (
    "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.table, svg, pre, .unseen, .skip')"
    " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
)
OVERLAPS = """
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


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fetches_nothing_fits_any_screen_and_serves_every_reader(browser, server, name):
    """A label that is a script, a plot that is loaded from elsewhere, or has no words for who cannot see it."""
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
    assert axe_faults(browser) == []
    if name == "hostile":  # escaping must not eat the text either
        assert browser.find_element(By.TAG_NAME, "h1").text == HOSTILE[0]
        assert HOSTILE[1] in browser.find_element(By.TAG_NAME, "body").text
    labels = "return [...document.querySelectorAll('figure > svg[role] text')].map(e => e.textContent.trim())"
    assert name in ("spans", "compared") or set(browser.execute_script(labels)) >= AXES
    for width in (1280, 390):
        look(browser, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(BEYOND_THE_EDGE) == []
        assert name in ("tags", "spans") or browser.execute_script(OVERLAPS) == []


def test_columns_sort_by_what_their_figures_mean(browser, server):
    """739 k stood above 109 M, and 85.4 s above 2.1 min."""
    _show(browser, server, "mrpc", 1280)
    sort = """
        const [table, title] = [...document.querySelectorAll('table')].map(one => [one,
          [...one.querySelectorAll('thead button')].find(button => button.textContent === 'trainable')])
          .find(([, button]) => button);
        title.click();
        const column = title.closest('th').cellIndex;
        return [...table.tBodies[0].rows].map(row => row.cells[column].firstChild.textContent.trim());
    """
    found = browser.execute_script(sort)
    numbers = [float(one.split()[0]) * {"k": 1e3, "M": 1e6}[one.split()[1]] for one in found]
    assert {one.split()[1] for one in found} == {"k", "M"}
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True))


def test_text_can_be_read_in_light_and_dark(browser, server):
    """Grey on grey: WCAG asks for a contrast of 4.5. And a checker that was not loaded finds nothing wrong."""
    for scheme in ("light", "dark"):
        _show(browser, server, "mrpc", 1280, scheme)
        assert weak_texts(browser) == []
        assert axe_faults(browser) == []
        back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (int(back.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")
    browser.execute_script("document.documentElement.lang = ''; document.querySelector('main a').textContent = ''")
    assert axe_faults(browser)
