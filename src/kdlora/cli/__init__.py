"""The command line: a verb parses, makes one library call, and prints."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from kdlora.cli import experiments, language_model, models, scale
from kdlora.cli.app import app
from kdlora.errors import KdLoraError, harmless, log_to_stderr
from kdlora.extras import extras_named

__all__ = ["app", "experiments", "language_model", "main", "models", "scale"]


_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):
    _SIGNALS[signal.SIGHUP] = "SIGHUP (the terminal was closed)"
_FEWER = "; give fewer or shorter texts at a time (in a training: lower micro_batch_tokens), or more memory"
_NEW_OBJECTS = 50_000
"""So many come between two looks for garbage; with Python's 700 the imports look far too often, and find none."""


def _goes_on(arguments: Sequence[str]) -> bool:
    """Say whether the same command continues: predictions do from a file into a file."""
    verb = " ".join(arguments[:1])
    into_file = any(one.startswith("--to") for one in arguments) and not {"-", "--to=-"} & {*arguments}
    return verb in ("run", "demo", "suite", "search", "label", "ask", "push") or (verb == "predict" and into_file)


def main() -> NoReturn:
    """Run the command line and turn errors into exit codes: 2 the user's, 1 the machine's, 128 + the signal's."""
    asked = _take_signals()
    gc.set_threshold(_NEW_OBJECTS)
    level = os.environ.get("KDLORA_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        _fail(f"KDLORA_LOG is {level!r}; expected DEBUG, INFO, WARNING or ERROR", 2)
    log_to_stderr(level)
    if isinstance(sys.stdout, io.TextIOWrapper):  # Windows has another encoding for pipes; a terminal's may lack a sign
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    if not sys.stderr.isatty():  # a log full of bars cannot be read; libraries draw theirs into files, too
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        with extras_named("this command"):
            code = app(standalone_mode=False, prog_name="kdlora")
        if code == 130:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
    except KdLoraError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        number = asked[0] if asked else signal.SIGINT
        then = "continues where it stopped" if _goes_on(sys.argv[1:]) else "begins again"
        _fail(f"interrupted by {_SIGNALS[number]}; the same command {then}", 128 + number)
    except MemoryError as error:
        what = f" ({error})" if str(error) else ""
        _fail(f"out of memory{what}{_FEWER}", 1)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{error}; check the path", 2)
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error}{remedy}", 1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            _fail(f"{error}{_FEWER}", 1)
        if type(error).__name__ == "ChildDiedError":  # no import: most commands have no child
            remedy = "free some memory and run" if "SIGKILL" in str(error) else "run"
            _fail(f"{error}; {remedy} the same command again", 1)
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        if message := error.format_message():
            _fail(message, 2)
        sys.exit(2)  # no verb: the help has been shown
    sys.exit(code or 0)


def _take_signals() -> list[signal.Signals]:
    """Turn requests to end into KeyboardInterrupt, so that children save and locks go; list those that come."""
    asked: list[signal.Signals] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        raise KeyboardInterrupt

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    return asked


def _fail(message: str, code: int) -> NoReturn:
    print(f"kdlora: {harmless(message)}", file=sys.stderr)
    sys.exit(code)
