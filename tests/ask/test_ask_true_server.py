"""A true server, where the environment names one: `LLM_URL=http://127.0.0.1:8000/v1 LLM_MODEL=name pytest ...`."""

from __future__ import annotations

import os

import pandas as pd
import pytest

from kdlora.asking.ask import ask
from kdlora.errors import ConfigError

pytest_plugins = ["experiment_fixtures"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLM_URL" not in os.environ, reason="LLM_URL names no server of a language model"),
]


def test_a_true_server_is_asked_and_gone_on_with(asking):
    """The stand-in says what we think that servers say."""
    given = {"base_url": os.environ["LLM_URL"], "model": os.environ.get("LLM_MODEL", "default"), "timeout": 120.0}
    given |= {"rows": 5, "concurrency": 1}
    try:
        done = ask(str(asking.data), to := asking.folder / "logprobs", asking.settings(**given))
    except ConfigError as fault:
        if "gives no log-probabilities" not in str(fault):
            raise
        given["votes"] = 1
        done = ask(str(asking.data), to := asking.folder / "votes", asking.settings(**given))
    assert done.rows + done.unanswered == 5
    assert done.tokens_read > 5 * 20
    assert pd.read_parquet(done.table)[["negative", "positive"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-4)
    again = ask(str(asking.data), to, asking.settings(**given))
    assert (again.resumed, again.requests) == (5, done.requests)
