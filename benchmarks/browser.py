"""What a page of `kdlora export --web` costs in Chromium: load, time of one text, difference to Python's answers.

    python benchmarks/browser.py --model EXPORT [--file TEXTS] [--count 200]

Needs chromium and chromedriver. Each text is asked three times; the median of its times counts. Python answers text by
text, as the page does: int8 rounds the activations of a whole batch with one scale.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import command_line, markdown, tell_machine
from serve import read_texts

from kdlora import Classifier
from kdlora.deploy.hub import locate_export
from kdlora.deploy.network import spread
from kdlora.deploy.webpage import write_web_page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chromium import open_browser, serve_folder, show

_LOAD = "import('./classify.js').then(({load}) => load()).then(model => { window.model = model; arguments[0]() })"
_ASK = """
const [texts, done] = arguments;
(async () => {
  const found = [];
  for (const text of texts) {
    const rounds = [];
    for (let round = 0; round < 3; round++) rounds.push(await window.model.answer([text]));
    const [, middle] = rounds.map((answer) => answer.milliseconds).sort((a, b) => a - b);
    found.push({ values: rounds[0].values, time: middle });
  }
  return found;
})().then(done, error => done(String(error)))
"""


def main() -> None:
    """Write a page, ask it, and print one table."""
    parser = command_line(__doc__, "model")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    texts = spread(read_texts(options.file), options.count)
    model = Classifier.load(locate_export(options.model), threads=1)
    with tempfile.TemporaryDirectory() as place:
        page = write_web_page(options.model, Path(place) / "page")
        with serve_folder(page.folder) as server, open_browser(Path(place) / "profile") as browser:
            browser.set_script_timeout(600)
            show(browser, f"{server.address}/look.css", 1280)  # a page that loads no model by itself
            start = time.perf_counter()
            browser.execute_async_script(_LOAD)
            loaded = time.perf_counter() - start
            found = browser.execute_async_script(_ASK, texts)
    differences, seconds = [], []
    for text, answer in zip(texts, found, strict=True):
        start = time.perf_counter()
        one = model.predict([text])[0]
        seconds.append(time.perf_counter() - start)
        values = list(one.probabilities.values()) or [one.label]
        differences.append(np.abs(np.subtract(answer["values"], values)).max())
    times = [answer["time"] for answer in found]
    tell_machine()
    header = ("file", "to load", "load", "one text, p50", "p99", "Python, p50", "largest difference", "above 0.001")
    row = (page.model, f"{page.size_bytes / 1e6:.1f} MB", f"{loaded:.2f} s", *_milliseconds(times, 50, 99))
    row += (*_milliseconds([1e3 * one for one in seconds], 50), f"{max(differences):.2g}")
    print(markdown(header, [(*row, f"{sum(one > 1e-3 for one in differences)} of {len(texts)}")]))


def _milliseconds(times: list[float], *percents: int) -> list[str]:
    return [f"{np.percentile(times, percent):.1f} ms" for percent in percents]


if __name__ == "__main__":
    main()
