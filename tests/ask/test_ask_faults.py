"""Servers that fail or answer oddly, a budget: every row once, no label made up, nothing spent beyond."""

import gc
import json
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import write_lines
from kdlora.asking import server
from kdlora.asking.answers import Answers
from kdlora.asking.ask import ask, plan_asking
from kdlora.asking.server import UNREADABLE_ATTEMPTS
from kdlora.errors import ArtifactError, ConfigError, DataError
from tiny import sentiment_rows, write_csv


def answered(folder: Path) -> Counter[str]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return Counter(f"{line['prompt']} {line['split']} {line['id']}" for line in lines if "id" in line)


def test_rows_are_not_replaced_by_those_that_were_answered(asking):
    """500 rows became the 20 that the budget was for, and the answers to them stale."""
    asking(rows=10)
    rows = asking.to / "unlabelled.parquet"
    pd.DataFrame({"id": ["a", "b"], "text": ["fine", "dull"], "source": ["x", "y"]}).to_parquet(rows)
    kept = rows.read_bytes()
    for told, given in (("unlabelled", {"unlabelled": str(rows)}), ("train", {"data": asking.to / "train.parquet"})):
        with pytest.raises(ConfigError, match=rf"{told}\.parquet would be replaced by what is written there"):
            asking(**given)
    assert rows.read_bytes() == kept


def test_a_folder_is_not_ours_by_the_name_of_one_file(asking):
    """A file `ask.json` of the user's own made all else in its folder kdlora's, to be replaced."""
    asking.to.mkdir()
    own = {"ask.json": '{"my": "settings"}', "train.parquet": "precious", "answers.jsonl": '{"role": "user"}\n'}
    for name, content in own.items():
        (asking.to / name).write_text(content)
    with pytest.raises(ArtifactError, match=r"ask\.json is no record of answers of a language model"):
        asking(rows=10)
    assert {name: (asking.to / name).read_text() for name in own} == own


def test_texts_without_words_are_not_spread(asking):
    """Fifty texts of emoji ended in a traceback."""
    write_csv(asking.data, [{"id": str(row), "text": "😀" * (row + 1)} for row in range(20)])
    with pytest.raises(DataError, match="diverse finds no words of two letters"):
        asking(rows=5, select="diverse", labels={"good": "", "bad": ""})


def test_what_passes_is_repeated(asking):
    """One bad answer among many ends hours of work, or leaves rows without an answer."""
    asking.model.fault = {3: "429", 10: "500", 24: "cut", 31: "garbage", 45: "slow"}.get
    done = asking(timeout=1.5, concurrency=8)
    assert (done.rows, done.unanswered) == (60, 0)
    assert done.requests == asking.model.number >= 65
    assert max(answered(asking.to).values()) == 1
    assert done.seconds >= 0.2 + 1.5  # as long as the server says, and until the limit


def test_what_is_no_label_never_becomes_one(asking, cli):
    """A refusal that counts as the first label, or as equal probabilities, teaches what nobody said."""
    asking.model.fault = lambda number: {3: "refusal", 9: "nonsense", 15: "empty"}.get(number % 18)
    done = cli(*asking.command, "--concurrency", 1)
    for said in ("10 without an answer", "I would rather not", "no label: 'Sorry'", "an empty answer"):
        assert said in done.err
    table = pd.read_parquet(asking.to / "probabilities.parquet")
    assert len(table) == len(pd.read_parquet(asking.to / "train.parquet")) == 50
    assert table[["negative", "positive"]].max(axis=1).min() == pytest.approx(0.9)
    assert "60 rows" not in cli(*asking.command).err  # they are not asked again, and stay out


def test_what_the_server_refused_is_asked_again(asking):
    """An expired key, or a server with wrong settings, left rows without an answer for ever."""
    asking.model.fault = lambda number: "400" if number >= 20 else {3: "refusal", 9: "nonsense"}.get(number)
    done = asking(concurrency=4)
    assert (done.rows, done.unanswered, done.left) == (18, 42, 0)
    assert asking(concurrency=4).unanswered == 42
    asking.model.fault = lambda number: None
    done = asking(concurrency=4)
    assert (done.rows, done.unanswered, done.requests) == (58, 2, 140)
    assert (asking().resumed, asking.model.number) == (60, 140)

    asking.to = asking.folder / "nonsense"  # a folder without any answer begins anew, whatever was wrong
    asking.model.fault = lambda number: "nonsense" if number < 160 else None
    with pytest.raises(DataError, match="none of the first 20 rows has an answer"):
        asking()
    done = asking()
    assert (done.rows, done.unanswered, done.requests) == (60, 0, 80)


def test_a_text_that_moderation_flags_is_left_out(asking, cli):
    """The same command ended at that row for ever, since every 403 was a wrong key."""
    asking.model.fault = {20: "403 Your input was flagged", 60: "403 Your input was flagged"}.get
    for number in (60, 61):
        assert "1 without an answer" in cli(*asking.command, "--concurrency", 1).err
        assert (asking.model.number, len(pd.read_parquet(asking.to / "probabilities.parquet"))) == (number, 59)
    asking.model.fault = lambda number: "403 not in your country"
    assert "refuses the key" in refused(asking, cli)


def test_a_server_that_is_lost_ends_the_call_and_the_next_one_goes_on(asking, cli):
    """Exit code 1: the machine's fault; what was answered stays."""
    asking.model.fault = lambda number: "500" if number >= 20 else None
    done = cli(*asking.command, code=1)
    assert "the same command goes on" in done.err
    asking.model.fault = lambda number: None
    cli(*asking.command)
    assert answered(asking.to) == Counter({f"0 train r{number}": 1 for number in range(60)})


def test_ctrl_c_breaks_into_no_task(asking, cli, monkeypatch, caplog, request):
    """A hundred lines of tasks whose exception was never retrieved, above the sentence that says how to go on."""
    keep = Answers.keep

    def interrupt(answers: Answers, *given: object) -> None:
        keep(answers, *given)
        if answers.done == 30:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Answers, "keep", interrupt)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    asking.model.fault = lambda number: "slow" if number >= 35 else None
    done = cli(*asking.command, code=130)
    gc.collect()
    assert done.err == "kdlora: interrupted by Ctrl-C; the same command continues where it stopped\n"
    assert not caplog.records
    asking.model.fault = lambda number: None
    assert asking().rows == 60
    assert max(answered(asking.to).values()) == 1


@pytest.mark.parametrize("limit", [{"max_requests": 25}, {"max_tokens": 1500}, {"max_cost": 0.0015}])
def test_a_budget_is_never_passed_and_can_be_raised(asking, limit):
    """Sixteen requests under way pass a limit together that each of them keeps."""
    prices = {"price_in": 1.0, "price_out": 1.0}
    asking.model.fault = lambda number: "500" if number % 5 == 3 else None
    done = asking(**limit, **prices)
    used = sum(len(one["messages"][0]["content"].split()) + 1 for one in asking.model.seen)
    assert 0 < done.left < 60
    assert done.rows == 60 - done.left
    assert asking.model.number == done.requests <= limit.get("max_requests", 1000)
    assert done.tokens_read + done.tokens_written <= used
    assert "max_requests" in limit or done.tokens_read + done.tokens_written <= 1500
    assert asking(**prices).rows == 60
    assert max(answered(asking.to).values()) == 1


def test_a_budget_is_spent_on_whole_rows(asking):
    """Sixteen rows of five votes were begun at once: fifty requests were paid for one answer, and eighty for four."""
    asking.model.delay = 0.01
    for limit in (50, 60, 80):
        done = asking(votes=5, max_requests=limit)
        assert (done.requests, done.rows) == (limit, limit // 5)
    assert asking(votes=5).rows == 60


def test_what_answers_cost_beyond_the_expected_is_learnt(asking):
    """Sixteen requests under way passed the limit by all that the server counts for a text and thoughts of its own."""
    asking.model.edit = lambda answer: answer.update(usage={"prompt_tokens": 3000, "completion_tokens": 5000})
    asking.model.delay = 0.01
    assert asking(max_tokens=20_000).requests == 2
    done = asking(max_tokens=60_000)  # the next call knows nothing of it
    assert (done.requests, done.tokens_read, done.tokens_written) == (7, 21_000, 35_000)

    # xAI, and gateways to Gemini, count thoughts in the total alone.
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 521}
    asking.model.edit, asking.to = lambda answer: answer.update(usage=usage), asking.folder / "thoughts"
    done = asking(max_tokens=10_000)
    assert done.left > 40
    assert (done.tokens_read, done.tokens_written) == (20 * done.requests, 501 * done.requests)


def test_a_budget_that_ends_before_the_audit_leaves_no_table(asking):
    """A table by a prompt that nobody chose, without the temperature."""
    done = asking(audit=50, max_requests=30)
    assert (done.rows, done.audit, done.left) == (0, None, 30)
    assert not done.table.exists()
    assert asking(audit=50).rows == 60


def test_a_line_that_was_cut_is_asked_again_and_a_damaged_one_is_named(asking):
    """Half a line of a machine that lost its power, glued to the next one, is no answer."""
    asking()
    log = asking.to / "answers.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert asking().requests == 61
    log.write_bytes(whole.replace(b'{"prompt"', b'{prompt"', 1))
    with pytest.raises(ArtifactError, match=r"damaged line .* delete that line"):
        asking()


def test_answers_to_something_else_are_refused(asking, monkeypatch):
    """Answers of two models or prompts in one table."""
    monkeypatch.chdir(asking.folder)
    Path("p.j2").write_text("{{ text }}{% for one in labels %}{{ one.code }}{% endfor %}")
    asking(max_requests=5)
    for named, change in {
        "the model changed": {"model": "other"},
        "the examples that the prompts show changed": {"shots": 2},
        "the labels, their order or descriptions changed": {"labels": {"negative": "", "positive": "good"}},
        "how answers are read": {"votes": 3},
        "how rows are chosen": {"seed": 4},
        "the data, or what is read of it changed": {"audit": 40},
        "a prompt changed": {"prompts": ("p.j2",)},
    }.items():
        with pytest.raises(ArtifactError, match=named):
            asking(**change)
    write_csv(asking.data, sentiment_rows(61, 0))
    with pytest.raises(ArtifactError, match="the data, or what is read of it changed"):
        asking()


def test_a_file_may_be_added_later(asking):
    """Every answer was paid for again, though no question had changed."""
    rows = [{"id": row["id"], "text": row["text"]} for row in sentiment_rows(60, 0)]
    write_csv(asking.data, rows)
    labels = {"negative": "", "positive": ""}
    assert asking(labels=labels).asked.own_labels
    rows = [{"kind": row.pop("label"), **row} for row in sentiment_rows(40, 1)]
    audit = {"labels": labels, "label": "kind", "audit": write_csv(asking.folder / "people.csv", rows)}
    asking.model.key = "another"
    wrong = write_csv(asking.folder / "wrong.csv", [*rows, {**rows[0], "id": "new"}])
    with pytest.raises(ConfigError, match="refuses the key"):  # no row of it was asked about: it binds nothing
        asking(**audit | {"audit": wrong})
    assert asking(labels=labels).resumed == 60
    with pytest.raises(ConfigError, match="refuses the key"):
        asking(**audit | {"audit": wrong})
    asking.model.key = None
    done = asking(**audit)
    assert (done.rows, done.resumed, done.requests, done.audit.rows) == (100, 60, 102, 40)
    more = asking.folder / "more.txt"
    more.write_text("a superb plot\nan awful ending\n")
    assert asking(**audit, unlabelled=more).requests == 104
    assert answered(asking.to).most_common(1)[0][1] == 1
    more.write_text("another text\n")
    for change in ({}, {"unlabelled": more}):  # left out or edited, it is another table
        with pytest.raises(ArtifactError, match="the data, or what is read of it changed"):
            asking(**audit, **change)


def test_what_a_message_advises_can_be_done(asking):
    """A first mistake that settles what a folder without any answer is of: each remedy was refused as stale."""
    prompt = asking.folder / "p.j2"
    prompt.write_text(
        "Labels:\n{% for one in labels %}\n{{ one.code }}: {{ one.name }}\n{% endfor %}\n\nText: {{ text }}"
    )
    asking.model.models = ("good",)
    with pytest.raises(ConfigError, match="has no model 'm'"):
        asking()
    asking.model.fault = lambda number: "nonsense"
    with pytest.raises(
        DataError, match=r"none of the first 20 rows has an answer .* change the prompt.*--answer-tokens"
    ):
        asking(model="good")
    asking.model.fault, asking.model.logprobs = lambda number: None, False
    with pytest.raises(ConfigError, match="--votes 5"):
        asking(model="good", prompts=(str(prompt),))
    assert not (asking.to / "asked.json").exists()
    done = asking(model="good", prompts=(str(prompt),), votes=3, max_requests=22 + 30, concurrency=1)
    assert (done.rows, done.left, done.resumed, done.requests) == (10, 50, 0, 52)  # what the mistakes cost counts
    assert answered(asking.to).total() == 10


def test_a_second_process_is_refused(asking):
    """Two processes that write one log pay for each row twice."""
    asking.model.delay = 0.2
    thread = threading.Thread(target=asking, kwargs={"rows": 4, "concurrency": 1})
    thread.start()
    while not (asking.to / "answers.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(ArtifactError, match="another process asks into"):
        asking()
    thread.join()


def likely(answer: dict) -> list[dict]:
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def refused(asking, cli, *options: object, data: Path | None = None) -> str:
    """What the command says as it ends with exit code 2, in one line and without a traceback."""
    url = () if "--base-url" in options else ("--base-url", asking.model.url)
    done = cli("ask", data or asking.data, "--to", asking.to, "--model", "m", *url, *options, code=2)
    assert done.err.startswith("kdlora: ")
    assert len(done.err.strip().splitlines()) == 1
    return done.err


def test_bad_servers(asking, cli, monkeypatch):
    """No key, another key, another model, another address, no log-probabilities."""
    monkeypatch.setattr(server, "FIRST_ATTEMPTS", 2)
    asking.model.fault = lambda number: "slow"
    said = refused(asking, cli, "--timeout", 0.2)
    assert "none within 0.2 s (raise timeout, or lower concurrency)" in said
    assert "CancelledError" not in said
    for fault in (
        "400 'top_logprobs' must be at most 5",
        "403 You are not allowed to request logprobs from this model",  # no word of the key, which is right
        "400 Unsupported value: 'temperature' does not support 0 with this model",
    ):
        asking.model.fault = lambda number, fault=fault: fault
        assert "with votes in their place: --votes 5 (a model that thinks" in refused(asking, cli)
    asking.model.fault = lambda number: None
    assert "no key: set the environment variable OPENAI_API_KEY" in refused(
        asking, cli, "--base-url", "https://api.openai.com/v1"
    )
    assert "no answer from http://127.0.0.1:9/v1" in refused(asking, cli, "--base-url", "http://127.0.0.1:9/v1")
    assert "without user and parameters" in refused(asking, cli, "--base-url", "http://me:secret@127.0.0.1/v1")
    asking.model.models = ("other",)
    assert "has no model 'm'" in refused(asking, cli)
    asking.model.models, asking.model.logprobs = (), False
    assert "gives no log-probabilities; ask with votes in their place: --votes 5" in refused(asking, cli)
    asking.model.logprobs = True  # probabilities in their place would all be cut to 1
    asking.model.edit = lambda answer: [one.update(logprob=0.9) for one in likely(answer)]
    assert "a log-probability above 0" in refused(asking, cli)
    asking.model.edit, asking.model.key = (lambda answer: None), "right"
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert "refuses the key in OPENAI_API_KEY" in refused(asking, cli)
    monkeypatch.setenv("MY_KEY", "right")
    cli(*asking.command, "--key-variable", "MY_KEY")


def test_bad_prompts_and_labels(asking, cli):
    """Before anything is asked, and so before anything is paid for."""
    template, labels = asking.folder / "p.j2", asking.folder / "labels.yaml"
    codes = "{% for one in labels %}{{ one.code }}{% endfor %}"
    for text, message in {
        "{{ text }}{{ title | default('') }}" + codes: "unknown field 'title'; there are examples, labels, text,",
        "{{ text }}{% for one in labels %}{{ one.cod }}{% endfor %}": "has no attribute 'cod'",
        "{{ text_pair }}{{ text }}" + codes: "'text_pair' is undefined",
        "{{ text": "line 1: not a Jinja template",
        "{{ text }}{{ labels }}{% for one in labels %}{{ one.name }}{% endfor %}{{ 1 / 0 }}": "cannot be filled",
        "{{ text }}{% for one in labels %}{{ one.name }}{% endfor %}": "shows no code of the label 'negative'",
        "what is it?" + codes: "never shows {{ text }}",
        "{{ text }}{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + codes: "cannot be filled",
        "{{ text }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + codes: "nested too deep",
        "{{ text }}{{ labels.__class__.__mro__ }}": "cannot be filled",
    }.items():
        template.write_text(text)
        assert message in refused(asking, cli, "--prompt", template)
    for text, message in {
        "[a, a]": "different label names",
        "3": "expected a list",
        "{negative: , Negative: }": "differ by more than case",
        "[bad, good]": "(of kdlora ask in --labels, or leave out a column that is no label)",
        "{": "no file of labels",
        "[[a], b]": "expected a list of different label names",
    }.items():
        labels.write_text(text)
        assert message in refused(asking, cli, "--labels", labels)
    assert not asking.model.seen
    assert not asking.to.exists()


def test_spans_are_not_asked_for(asking):
    """Questions about the whole text would be paid for, and the table refused by the run that it is for."""
    rows = [{"text": "Ada met Alan", "spans": [{"start": 0, "end": 3, "label": "PER"}]}]
    settings = asking.settings(labels={"PER": "", "LOC": ""})
    file = write_lines(asking.folder / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r"'spans' holds spans or tags, and ask asks .* their column: --text text"):
        plan_asking(file, settings)
    assert plan_asking(file, replace(settings, text=("text",))).rows == 1
    rows = [{"text": "Ada met Alan", "tags": ["a", "b"], "ner": 1}, {"text": "Ada", "tags": ["a"], "ner": "b"}]
    assert plan_asking(write_lines(asking.folder / "b.jsonl", rows), settings).rows == 2


def test_bad_numbers_and_data(asking, cli):
    """A budget of nothing, too few rows, a file that is not there."""
    plain = asking.folder / "plain.txt"
    plain.write_text("a text\n")
    assert "less than one question may need" in refused(asking, cli, "--max-tokens", 10)
    assert "needs price_in and price_out" in refused(asking, cli, "--max-cost", 1)
    assert "top_logprobs is at least 2 and at most 20, got 30" in refused(asking, cli, "--top-logprobs", 30)
    assert "max_requests is at least 1, got 0" in refused(asking, cli, "--max-requests", 0)
    assert "one answer, counted several times" in refused(asking, cli, "--votes", 3, "--temperature", 0)
    assert "price_in is at least 0, got nan" in refused(asking, cli, "--price-in", "nan")
    assert "cannot be drawn from 60" in refused(asking, cli, "--audit", 61)
    assert "several prompts are compared" in refused(asking, cli, "--prompt", "a", "--prompt", "b")
    assert "does not exist" in refused(asking, cli, data=asking.folder / "gone.csv")
    assert "no label column; name the labels" in refused(asking, cli, data=plain)
    assert "select: uncertain needs" in refused(asking, cli, "--select", "uncertain", "--rows", 3)
    assert "examples (shots) are drawn" in refused(asking, cli, "--shots", 100)
    assert "(audit): unknown kind of file '.txt'" in refused(asking, cli, "--audit", plain)
    keyed = write_csv(asking.folder / "keyed.csv", [{"key": row.pop("id"), **row} for row in sentiment_rows(4, 0)])
    more = ("--id-column", "key", "--unlabelled", asking.data)
    assert "train.csv has no column 'key'" in refused(asking, cli, *more, data=keyed)
    taken = write_csv(asking.folder / "taken.csv", [{"id": name, "label": name, "n": name} for name in "ab"])
    assert "rename the column 'id'" in refused(asking, cli, "--text", "id", "--id-column", "n", data=taken)
    rows = [{"a": name, "b": name, "c": name, "label": name} for name in "xy"]
    wide = write_csv(asking.folder / "wide.csv", rows)  # a column was left out, and the prompt held the right label
    assert "two of a pair, got 3: a, b, c" in refused(
        asking, cli, "--text", "a", "--text", "b", "--text", "c", data=wide
    )
    assert "names the column 'label' twice" in refused(asking, cli, "--text", "label", "--label", "label", data=wide)
    with pytest.raises(ConfigError, match="labels are names, got 0"):
        asking.settings(labels=[0, 1])
    asking.to = asking.folder / "loop"
    asking.to.symlink_to(asking.to)
    assert "is no folder; name one" in refused(asking, cli)
    assert not asking.model.seen


@pytest.mark.parametrize("read", [0, -50, float("inf"), None])
def test_usage_that_cannot_be_true_counts_as_the_most(asking, read):
    """A server that says nothing was used would never come to the end of a budget."""
    usage = {"prompt_tokens": read, "completion_tokens": 1}
    asking.model.edit = lambda answer: answer.update(usage=None if read is None else usage)
    done = asking(max_tokens=3000)
    assert 0 < done.left < 60
    assert 2500 < done.tokens_read + done.tokens_written <= 3000


def test_answers_without_choices_leave_their_rows_out(asking):
    """An exception of the reader ends hours of work."""
    spoilt = (
        lambda answer: answer.update(choices=[]),
        lambda answer: answer.update(choices=None),
        lambda answer: answer["choices"][0].update(logprobs={"content": "x"}),
        lambda answer: answer.update(usage={"prompt_tokens": 1}, choices=[[[[]]]]),
    )

    def spoil(answer: dict) -> None:
        kind, attempt = divmod(asking.model.number, 10)
        if 1 <= kind <= len(spoilt) and attempt < UNREADABLE_ATTEMPTS:
            spoilt[kind - 1](answer)

    asking.model.edit = spoil
    done = asking(concurrency=1)
    assert (done.rows, done.unanswered, done.requests) == (56, 4, 56 + 4 * UNREADABLE_ATTEMPTS)
    assert all("no answer of the protocol" in one["unanswered"] for one in done.examples)
    # Asked about first, before the server has answered anything in the next call: "check the address".
    asking.model.edit = lambda answer: answer.update(choices=None)
    assert asking(concurrency=1).unanswered == 4


def test_an_outage_that_is_told_in_an_answer_loses_no_row(asking):
    """OpenRouter's errors have status 200: rows were kept as empty answers, and never asked about again."""
    error = {"code": 502, "message": "Provider returned error"}

    def spoil(answer: dict) -> None:
        if asking.model.number > 20:
            answer["choices"][0].update(error=error, logprobs=None, message={"content": ""})
            answer.update({"error": error, "choices": None} if asking.model.number % 2 else {})

    asking.model.edit = spoil
    done = asking(rows=30, concurrency=1)
    assert (done.rows, done.unanswered) == (20, 10)
    lines = map(json.loads, (asking.to / "answers.jsonl").read_text().splitlines())
    assert all("Provider returned error" in line["unanswered"] for line in lines if "unanswered" in line)
    asking.model.edit = lambda answer: None
    done = asking(rows=30)
    assert (done.rows, done.unanswered) == (30, 0)


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
        ask(str(asking.data), asking.folder / "none", asking.settings())
    assert not (asking.folder / "none").exists()
    long = "s" * 150 + "k" * 150
    monkeypatch.setenv("OPENAI_API_KEY", long)
    with pytest.raises(ConfigError, match="refuses the key") as fault:  # the server's message holds it
        ask(str(asking.data), asking.folder / "elsewhere", asking.settings())
    assert "sss" not in str(fault.value)
    written = b"".join(file.read_bytes() for file in asking.folder.rglob("*") if file.is_file())
    assert b"sk-s" not in written
    assert b"sss" not in written


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


def test_a_server_that_takes_no_seed_is_asked_without(asking):
    """Mistral's answered every vote by an error, and no option leaves the seed out; o3-mini takes no temperature."""
    asking.model.fault = lambda number: "422 extra_forbidden: body, seed" if "seed" in asking.model.seen[-1] else None
    done = asking(votes=3, rows=20)
    assert (done.rows, done.unanswered, done.requests) == (20, 0, 61)
    asking.model.fault = {61: "400 doubao-seed-1-6: the text is flagged"}.get  # says nothing of the parameter
    asking(votes=3, rows=22)
    assert all("seed" in one for one in asking.model.seen[61:])

    unsupported = "400 Unsupported parameter: 'temperature' is not supported with this model"
    asking.model.fault = lambda number: unsupported if "temperature" in asking.model.seen[-1] else None
    assert asking(votes=3, rows=24).unanswered == 0
    assert all(("seed" in one, "temperature" in one) == (True, False) for one in asking.model.seen[-6:])
    asking.to = asking.folder / "another"  # votes at a temperature of one's own are not those at the model's
    with pytest.raises(DataError, match=unsupported[4:]):
        asking(votes=3, temperature=0.5)
