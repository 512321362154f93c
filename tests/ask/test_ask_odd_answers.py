"""Answers, keys and data that are not as they should be: no wrong sum, no lost answer, no key where others read."""

import numpy as np
import pandas as pd
import pytest

from experiments import write_lines
from kdlora.asking.ask import ask, plan_asking
from kdlora.asking.audit import audit_answers
from kdlora.asking.server import UNREADABLE_ATTEMPTS
from kdlora.errors import ConfigError
from tiny import sentiment_rows, task, write_csv


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 1},
        {"prompt_tokens": -50, "completion_tokens": 1},
        {"prompt_tokens": float("inf"), "completion_tokens": 1},
        None,
    ],
)
def test_usage_that_cannot_be_true_counts_as_the_most(asking, usage):
    """A server that says nothing was used would never come to the end of a budget."""
    asking.model.edit = lambda answer: answer.update(usage=usage)
    done = asking(max_tokens=3000)
    assert 0 < done.left < 60
    assert 2500 < done.tokens_read + done.tokens_written <= 3000


def likely(answer: dict) -> list[dict]:
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def test_log_probabilities_above_zero_are_none(asking):
    """Probabilities or scores in their place would all be cut to 1, and teach that nothing is known."""
    asking.model.edit = lambda answer: [one.update(logprob=0.9) for one in likely(answer)]
    with pytest.raises(ConfigError, match="a log-probability above 0"):
        asking()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer.update(choices=[]),
        lambda answer: answer.update(choices=None),
        lambda answer: answer["choices"][0].update(logprobs={"content": "x"}),
        lambda answer: answer.update(usage={"prompt_tokens": 1}, choices=[[[[]]]]),
    ],
)
def test_an_answer_without_choices_leaves_one_row_out(asking, spoil):
    """An exception of the reader ends hours of work."""
    asking.model.edit = lambda answer: spoil(answer) if 10 <= asking.model.number < 10 + UNREADABLE_ATTEMPTS else None
    done = asking(concurrency=1)
    assert (done.rows, done.unanswered) == (59, 1)
    assert "no answer of the protocol" in done.examples[0]["unanswered"]


def test_nan_huge_answers_and_half_characters(asking):
    """Nothing of it reaches the table, nor makes the log unreadable."""

    def spoil(answer: dict) -> None:
        place = asking.model.number % 4
        if place == 1:
            likely(answer)[0]["logprob"] = float("nan")
        elif place == 2:
            answer["choices"][0]["message"]["content"] = "x" * 3_000_000
        elif place == 3:
            likely(answer)[:] = [{"token": "\ud800", "logprob": -0.1}]
            answer["choices"][0]["message"]["content"] = "\ud800"

    asking.model.edit = spoil
    done = asking(concurrency=1)
    assert 15 <= done.unanswered < 60
    assert np.isfinite(pd.read_parquet(done.table)[["negative", "positive"]].to_numpy()).all()
    assert (asking.to / "answers.jsonl").stat().st_size < 60_000
    assert asking().resumed == 60


def test_one_answer_without_log_probabilities_is_one_row_without_an_answer(asking):
    """A server that gives them else would end the call at this row, each time anew."""
    asking.model.edit = lambda answer: (
        answer["choices"][0].update(logprobs=None) if asking.model.number % 10 == 5 else None
    )
    done = asking(concurrency=1)
    assert (done.rows, done.unanswered) == (54, 6)


def test_a_key_is_in_no_error_and_on_no_disk(asking, monkeypatch):
    """The line end of a file with the key is refused by the client, which quotes the key."""
    asking.model.key = "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    said = "\ud800 not with sk-secret"
    asking.model.edit = lambda answer: (
        answer["choices"][0]["message"].update(refusal=said) if asking.model.number == 5 else None
    )
    done = asking(concurrency=1)
    assert (done.rows, done.examples[0]["unanswered"]) == (59, "refused: ? not with ***")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY has characters that no key has"):
        asking()
    long = "s" * 150 + "k" * 150
    monkeypatch.setenv("OPENAI_API_KEY", long)
    with pytest.raises(ConfigError, match="refuses the key") as fault:  # the server's message holds it
        ask(str(asking.data), asking.folder / "elsewhere", asking.settings())
    assert "sss" not in str(fault.value)
    assert not any(b"sk-s" in file.read_bytes() or b"sss" in file.read_bytes() for file in files(asking))


def files(asking):
    return [file for file in asking.folder.rglob("*") if file.is_file()]


def test_a_text_is_no_template(asking):
    """Whoever writes a text would write the prompt, too."""
    text = "{{ labels }} {% for one in labels %}{{ 7 * 7 }}{# superb"
    rows = [{"id": str(n), "text": f"{text} {n}", "label": ["{{ 1 }}", "ä{%"][n % 2]} for n in range(4)]
    data = write_lines(asking.folder / "texts.jsonl", rows)
    assert asking(data).rows == 4
    for one in asking.model.seen:
        assert "A: {{ 1 }}\nB: ä{%\n" in (prompt := one["messages"][0]["content"])
        assert f"Text: {text}" in prompt


def test_a_server_with_another_name_for_the_limit_is_obeyed(asking):
    """Every row would be refused, and a call that goes on asks many at once before it knows."""
    asking.model.limit = "max_completion_tokens"
    assert asking(rows=20).unanswered == 0
    assert asking(concurrency=8).rows == 60
    assert [one.get("max_completion_tokens") for one in asking.model.seen[-10:]] == [1] * 10


def test_an_audit_of_one_class():
    """No metric or interval to fall over."""
    labels, sure = np.zeros(60, np.int64), np.tile([0.7, 0.3], (60, 1))
    audit = audit_answers(task(), ["p"], [sure], labels, seed=0)
    assert (audit.prompts[0].accuracy, audit.prompts[0].high, audit.temperature) == (100, 100, 1)
    assert audit.confusion == ((30, 0, 0), (0, 0, 0))
    other = audit_answers(task(), ["p", "q"], [sure, 1 - sure], labels, seed=0)
    assert other.prompts[1].against_chosen.difference == -100


def test_a_plan_counts_drawn_rows_once(asking):
    """They are among those that are asked about."""
    seen = []
    plan = plan_asking(str(asking.data), asking.settings(audit=40))
    assert (plan.rows, plan.requests) == (60, 60)
    ask(str(asking.data), asking.to, asking.settings(audit=40), progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (60, 60)


def test_the_label_column_may_be_in_the_audited_rows_only(asking):
    """Texts without labels are the purpose; people's labels of others have a column of their own name."""
    texts = asking.folder / "texts.txt"
    texts.write_text("a superb plot\nan awful ending\n")
    people = write_csv(
        asking.folder / "v.csv",
        [{"id": row["id"], "text": row["text"], "kind": row["label"]} for row in sentiment_rows(60, 1)],
    )
    labels = {"positive": "", "negative": ""}
    done = asking(texts, labels=labels, label="kind", audit=str(people))
    assert (done.rows, done.audit.prompts[0].accuracy) == (62, 100)
    assert pd.read_parquet(asking.to / "train.parquet")["kind"].tolist() == ["positive", "negative"]


def test_a_group_of_one_label_is_not_asked_within(asking):
    """A question with one possible answer costs a request and may have none."""
    rows = [{"id": str(n), "text": f"it is about topic {n % 3}", "label": f"topic {n % 3}"} for n in range(30)]
    done = asking(write_lines(asking.folder / "d.jsonl", rows), top_logprobs=2)
    assert (done.rows, done.unanswered) == (30, 0)
    assert done.requests <= 30 + 30
