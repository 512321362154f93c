"""Fixtures for tests of whole experiments, one that is finished among them."""

import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from experiments import ARMS, Workshop

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(scope="session")
def workshop(made_once) -> Workshop:
    """Models and data for small experiments."""
    return made_once("workshop", _furnish)


def _furnish(folder: Path) -> Workshop:
    import tiny

    return Workshop(
        teacher=tiny.build_model_folder("bert", folder / "bert"),
        student=tiny.build_model_folder("distilbert", folder / "distilbert", layers=1),
        train=tiny.write_csv(folder / "train.csv", tiny.sentiment_rows(64)),
        validation=tiny.write_csv(folder / "validation.csv", tiny.sentiment_rows(40, seed=1)),
    )


@pytest.fixture(scope="session")
def experiment(workshop: Workshop, made_once):
    """The result of all six arms with two seeds; read only, see `copy_experiment`."""
    from kdlora.experiment.run import run_experiment

    config = workshop.config({"run": {"arms": ARMS, "seeds": [0, 1]}})
    return made_once("all-arms", lambda folder: run_experiment(config, folder / "all-arms"))


@cache
def _command(app: object) -> object:
    """Build the verbs once, not for each call."""
    return get_command(app)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`cli("run", path, ..., code=0)` calls the command line in this process, and takes what it prints.

    It must end with that exit code, and without a traceback.
    """
    from kdlora.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.main.get_command", _command)

    def call(*arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["kdlora", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        assert (int(ended.value.code or 0), "Traceback" in printed.err) == (code, False), printed.err[-3000:]
        return printed

    return call
