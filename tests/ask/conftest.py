"""Rows, a language model on loopback, and a call with both."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llm_standin
from kdlora.asking import server
from kdlora.asking.ask import AskSummary, ask
from kdlora.asking.asksettings import AskSettings
from tiny import sentiment_rows, write_csv


@dataclass
class Asker:
    """Sixty rows with labels, and how they are asked about."""

    folder: Path
    model: llm_standin.StandIn

    def __post_init__(self) -> None:
        """Name the rows, and where answers go."""
        self.data, self.to = self.folder / "train.csv", self.folder / "asked"

    @property
    def command(self) -> tuple[object, ...]:
        """The command line that asks."""
        return ("ask", self.data, "--to", self.to, "--model", "m", "--base-url", self.model.url)

    def settings(self, **given: Any) -> AskSettings:
        """Settings that reach the stand-in."""
        return AskSettings(**{"model": "m", "base_url": self.model.url, "timeout": 5.0, **given})

    def __call__(self, data: Path | None = None, **given: Any) -> AskSummary:
        """Ask."""
        return ask(data or self.data, self.to, self.settings(**given))


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Asker]:
    """What most tests need: rows, and a server that answers at once; waits between attempts are short."""
    monkeypatch.setattr(server, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(server, "LONGEST_DELAY", 0.05)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with llm_standin.running() as model:
        asker = Asker(tmp_path, model)
        write_csv(asker.data, sentiment_rows(60, 0))
        yield asker
