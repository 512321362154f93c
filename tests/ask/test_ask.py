"""What is asked of a language model, what is made of its answers, and the table that teaches."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

import llm_standin
from experiments import write_lines
from kdlora.asking.ask import plan_asking
from kdlora.asking.questions import Questions, count_votes, join_groups, likely_groups, read_logprobs, read_vote
from kdlora.errors import ConfigError
from kdlora.report.wording import duration
from tiny import sentiment_rows, write_csv

pytest_plugins = ["experiment_fixtures"]

LABELS = {"negative": "it was bad", "positive": "it was good"}


def questions(count: int, *, most: int = 20, votes: bool = False, examples=()) -> Questions:
    return Questions(None, {f"topic {number}": "" for number in range(count)}, examples, most=most, votes=votes)


def tokens(**given: float) -> list[tuple[str, float]]:
    return [(token, math.log(p)) for token, p in given.items()]


def test_the_table_has_the_probabilities_of_every_row_by_id(asking):
    """Answers that come out of order and are joined by position teach the wrong rows."""
    asking.model.delay = 0.01
    done = asking()
    assert (done.rows, done.unanswered, done.left, done.requests) == (60, 0, 0, 60)
    table = pd.read_parquet(done.table).set_index("id")
    assert list(table) == ["negative", "positive"]
    rows = pd.read_csv(asking.data).set_index("id")
    said = table.loc[rows.index].idxmax(axis=1)
    assert (said == rows["label"]).all()
    assert table.to_numpy().max() == pytest.approx(0.9)
    assert pd.read_parquet(asking.to / "train.parquet").equals(rows.reset_index())


def test_the_completions_protocol_and_descriptions_and_examples(asking):
    """A prompt without the descriptions that the user wrote, or with the row itself as a solved example."""
    done = asking(protocol="completions", labels=LABELS, shots=4)
    assert done.rows == 60
    prompts = [one["prompt"] for one in asking.model.seen]
    assert all("A: negative (it was bad)" in prompt and "B: positive (it was good)" in prompt for prompt in prompts)
    shown = {prompt.rsplit("Text: ", 1)[0] for prompt in prompts}
    assert 1 < len(shown) <= 5  # the four examples, without the one whose text is asked about
    for prompt in prompts:
        *examples, asked = [part.split("\n")[0] for part in prompt.split("Text: ")[1:]]
        assert len(examples) >= 3 - sum(asked == other for other in examples)
        assert asked not in examples
    assert {one["model"] for one in asking.model.seen} == {"m"}
    assert {one["temperature"] for one in asking.model.seen} == {0.0}


def test_votes_where_there_are_no_log_probabilities(asking):
    """Counted at a temperature with a seed each: equal answers would be one answer, counted five times."""
    asking.model.logprobs = False
    done = asking(votes=5)
    assert (done.rows, done.requests) == (60, 300)
    assert {one["temperature"] for one in asking.model.seen} == {1.0}
    assert {one["seed"] for one in asking.model.seen} == {0, 1, 2, 3, 4}
    table = pd.read_parquet(done.table)
    rows = pd.read_csv(asking.data).set_index("id").loc[table["id"]]
    assert (table[["negative", "positive"]].idxmax(axis=1).to_numpy() == rows["label"].to_numpy()).mean() > 0.9
    assert table[["negative", "positive"]].min().min() > 0


def test_many_labels_are_asked_for_in_two_steps(asking):
    """Seventy labels do not fit the likely tokens that a server shows: those beyond would have no probability."""
    names = [f"topic {number}" for number in range(70)]
    rows = [{"id": f"r{n}", "text": f"it is about topic {n % 70} again", "label": names[n % 70]} for n in range(140)]
    data = write_lines(asking.folder / "topics.jsonl", rows)
    done = asking(data, top_logprobs=10)
    table = pd.read_parquet(done.table).set_index("id")
    assert (table.idxmax(axis=1) == pd.DataFrame(rows).set_index("id")["label"].loc[table.index]).all()
    assert np.allclose(table.sum(axis=1), 1, atol=1e-5)
    assert 2 * 140 <= done.requests <= 3 * 140
    with pytest.raises(ConfigError, match="70 labels are too many for 5 likely tokens, even in two steps"):
        asking(data, top_logprobs=5)


def test_examples_of_many_labels_are_not_those_of_the_first(asking):
    """Eight examples of the first eight labels of seventy would have the model say no other."""
    rows = [
        {"id": f"r{n}", "text": f"it is about topic {n % 70:02} again", "label": f"topic {n % 70:02}"}
        for n in range(140)
    ]
    plan = plan_asking(str(write_lines(asking.folder / "topics.jsonl", rows)), asking.settings(shots=8))
    shown = re.findall(r"about topic (\d+)", plan.prompts[0])[:-1]
    assert len(set(shown)) == 8
    assert max(map(int, shown)) > 20


def test_pairs_unlabelled_texts_and_their_split(asking):
    """Without a column that names the split, rows of two files with equal ids teach each other's texts."""
    more = asking.folder / "texts.txt"
    more.write_text("a superb plot\n\nan awful ending\n", encoding="utf-8")
    table = pd.read_parquet(asking(unlabelled=str(more)).table)
    assert table["split"].value_counts().to_dict() == {"train": 60, "unlabelled": 2}
    assert table[table["split"] == "unlabelled"]["id"].tolist() == ["0", "2"]
    assert pd.read_parquet(asking.to / "unlabelled.parquet")["text"].tolist() == ["a superb plot", "an awful ending"]
    pairs = write_lines(
        asking.folder / "pairs.jsonl",
        [{"premise": "a", "hypothesis": f"superb {n}", "label": "ab"[n % 2]} for n in range(8)],
    )
    asking.model.seen.clear()
    from kdlora.asking.ask import ask

    assert ask(str(pairs), asking.folder / "pairs", asking.settings()).rows == 8
    assert "Text: a\nSecond text: superb" in asking.model.seen[0]["messages"][0]["content"]


def test_rows_without_labels_get_the_likeliest(asking):
    """Texts that nobody labelled need the names of the labels, and train.parquet says what the model chose."""
    data = asking.folder / "texts.txt"
    data.write_text("a superb plot\nan awful ending\n", encoding="utf-8")
    asking(data, labels=LABELS)
    assert pd.read_parquet(asking.to / "train.parquet")["label"].tolist() == ["positive", "negative"]


def test_a_dry_run_asks_nothing(asking, cli):
    """Whoever looks at cost and prompts first must not pay for it; neither key nor server is needed."""
    rows = ("--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--price-in", 1e6, "--price-out", 0, "--dry-run")
    done = cli("ask", asking.data, "--to", asking.to, *rows)
    assert done.code == 0, done.err
    assert done.out.count("Choose the label") == 3
    assert "60 rows, 60 requests" in done.out
    assert not asking.to.exists()
    plan = plan_asking(str(asking.data), asking.settings(votes=3, price_in=1e6, price_out=0.0))
    assert (plan.rows, plan.requests) == (60, 180)
    assert plan.cost == pytest.approx(plan.tokens)
    assert not asking.model.seen


@pytest.mark.parametrize("select", ["random", "diverse"])
def test_some_rows_and_later_more_of_them(asking, select):
    """A larger selection that does not begin with the smaller one pays for the same rows twice."""
    assert asking(rows=20, select=select).rows == 20
    first = set(pd.read_parquet(asking.to / "train.parquet")["id"])
    assert len(first) == 20
    if select == "random":
        assert (done := asking(rows=30)).requests == 30
        assert first < set(pd.read_parquet(done.table)["id"])


def test_a_model_chooses_the_rows_that_it_doubts(asking, tiny_model_folder, tmp_path):
    """The order of the margins, not of the confidence in one label."""
    from kdlora.deploy.predict import Classifier
    from kdlora.models.encoders import load_encoder, save_encoder
    from tiny import task

    encoder = load_encoder(str(tiny_model_folder("bert")), task(), seed=3)
    encoder.model.config.kdlora_task = task().to_dict()
    save_encoder(encoder, tmp_path / "student")
    asking(rows=10, select="uncertain", select_by=str(tmp_path / "student"))
    rows = pd.read_csv(asking.data)
    found = Classifier.load(tmp_path / "student").predict(rows["text"].tolist())
    margin = pd.Series([abs(2 * one.probabilities["positive"] - 1) for one in found], index=rows["id"])
    chosen = pd.read_parquet(asking.to / "train.parquet")["id"]
    assert margin[chosen].max() <= margin.drop(chosen).min() + 1e-6


def test_the_command_prints_what_was_done(asking, cli):
    """For people on standard error, for programs as JSON."""
    given = ("ask", asking.data, "--to", asking.to, "--model", "m", "--base-url", asking.model.url)
    done = cli(*given, "--audit", 40, "--price-in", 1, "--price-out", 2)
    assert done.code == 0, done.err
    assert "Audit on 40 rows" in done.out
    assert re.search(r"reported half:\s+\d+\.0% are\s+'(neg|posi)tive'", done.out)  # what a constant answer would reach
    assert "60 rows in" in done.err
    assert json.loads(cli(*given, "--audit", 40, "--json").out)["resumed"] == 60


def test_a_student_learns_from_the_answers(asking, cli, tiny_model_folder):
    """The way on: rows that were refused are in neither file, and the report knows what the answers cost."""
    asking.model.fault = lambda number: "refusal" if number in (7, 60) else None
    validation = write_csv(asking.folder / "validation.csv", sentiment_rows(40, 1))
    more = asking.folder / "more.csv"
    write_csv(more, [{"id": row["id"], "text": row["text"] + " again"} for row in sentiment_rows(30, 2)])
    done = asking(audit=str(validation), unlabelled=str(more), price_in=1.0, price_out=2.0)
    assert (done.rows, done.unanswered) == (128, 2)
    config = {
        "task": {"text": "text", "label": "label"},
        "data": {name: str(asking.to / f"{name}.parquet") for name in ("train", "unlabelled")}
        | {"validation": str(validation)},
        "teacher": {"probabilities": str(done.table)},
        "student": {"model": str(tiny_model_folder("bert")), "train": {"epochs": 1, "learning_rate": 5e-3}},
        "run": {"arms": ["fft", "kd-lora"], "seeds": [0], "precision": "fp32", "threads": 1},
        "export": {"formats": [], "benchmark": False},
    }
    path = asking.folder / "config.yaml"
    path.write_text(json.dumps(config))
    ended = cli("run", path, "--out", asking.folder / "run")
    assert ended.code == 0, ended.err
    records = [json.loads(next((asking.folder / "run").rglob(f"{arm}*/run.json")).read_text()) for arm in ("kd", "fft")]
    assert [record["status"] for record in records] == ["finished"] * 2
    assert records[1]["model"] == records[0]["teacher_model"] == "m"
    assert any(note.startswith("1 of 40 validation rows have no answer") for note in records[1]["notes"])
    assert records[0]["asked"] == json.loads((asking.to / "asked.json").read_text())
    report = (asking.folder / "run" / "report.md").read_text().replace("\u00a0", " ")
    asked, student = re.search(r"\*\*A million texts\*\*\n\n.*\n.*\n(.*)\n(.*)\n", report).groups()
    time, price = duration(1e6 / done.asked.per_second).replace("\u00a0", " "), f"{1e6 * done.cost / 130:,.2f}"
    assert re.fullmatch(rf"\| m, asked \| 97\.5 \| [\d.,]+ \| {time} \| {price} \|", asked)
    assert re.fullmatch(r"\| the student, KD-LoRA \| [\d.]+ \| [\d,]+ \| [\d.]+ (s|min|h) \| – \|", student)


def test_the_rate_is_that_of_the_longest_call(asking, cli):
    """A call that only found everything done reports no time at all, and one row more the time of a first answer."""
    asking.model.delay = 0.02
    first = asking(rows=40)
    assert first.asked.timed == first.asked.questions == 40
    assert 0 < first.asked.per_second < 16 / 0.02
    later = asking(rows=41, concurrency=1).asked
    assert (later.questions, later.timed, later.concurrency) == (41, 40, 16)
    assert later.per_second == first.asked.per_second
    assert later.cost_per_million is None
    (asking.to / "asked.json").write_text('{"model": "m"}')
    done = cli("ask", asking.data, "--to", asking.to, "--model", "m", "--base-url", asking.model.url, "--rows", 41)
    assert done.code == 2
    assert "asked.json is damaged" in done.err


def test_a_code_that_is_not_shown_gets_a_part_of_what_is_not_shown():
    """Zero would say that the model excludes the label; more than the least that is shown cannot be."""
    options = questions(4).choices
    found = read_logprobs(tokens(A=0.7, B=0.2), options)
    assert found == pytest.approx([0.7, 0.2, 0.05, 0.05])
    found = read_logprobs(tokens(A=0.5, B=0.02), options)
    assert found == pytest.approx(np.array([0.5, 0.02, 0.02, 0.02]) / 0.56)


def test_tokens_around_a_code_count_and_words_that_begin_with_it_do_not():
    """`Absolutely` is no A, and `I cannot` no I."""
    options = questions(9).choices
    assert "I" not in {option.code for option in options}
    found = read_logprobs(
        [(" A", math.log(0.3)), ("A", math.log(0.1)), ("(B", math.log(0.4)), ("Ab", math.log(0.2))], options
    )
    assert found[:2] == pytest.approx([0.5, 0.5], abs=1e-4)
    assert read_logprobs(tokens(I=0.9, Absolutely=0.09), options) is None


def test_votes_are_read_by_code_or_name():
    """An answer in a sentence, or of another label, is no vote."""
    options = questions(30, votes=True).choices
    assert [option.code for option in options[:2]] == ["1", "2"]
    said = ["2", " 2.", "topic 1", "12 is it", "31", "the topic 1", ""]
    assert [read_vote(one, options) for one in said] == [1, 1, 1, 11, None, None, None]
    assert count_votes([0, 0, None], 2) == pytest.approx([2.25 / 2.5, 0.25 / 2.5], abs=1e-3)
    assert count_votes([0, None, None], 2) is None


def test_an_article_is_no_vote_and_a_name_with_signs_is_one():
    """`A film that I liked` would be a vote for the first label, and `C++` for none."""
    options = Questions(None, {"good": "", "C++": "", "(größer)": ""}, (), most=20, votes=True).choices
    said = ["A film that I liked", "A", "A.", "a good", "A good", "B: C++", "C++", "GRÖSSER", "A\nB", "**C**"]
    assert [read_vote(one, options) for one in said] == [None, 0, 0, None, 0, 1, 1, 2, 0, 2]


@pytest.mark.parametrize("votes", [[1, 0], [2, 1, 0, 0, 1], [1, 0, 0, 1], [1, None, 0]])
def test_of_equally_many_votes_the_first_decides(votes):
    """The first label would get every tie, and teach what the model did not say."""
    found = count_votes(votes, 3)
    assert found.argmax() == 1
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_groups_multiply():
    """A group that was not asked keeps its mass, evenly."""
    choices = questions(4, most=2).choices
    assert likely_groups(np.array([0.02, 0.98])) == [1]
    assert likely_groups(np.array([0.4, 0.6])) == [0, 1]
    found = join_groups(np.array([0.2, 0.8]), choices, {1: np.array([0.25, 0.75])})
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.6])


def test_the_stand_in_is_one(asking):
    """The other tests rest on it."""
    prompt = "Labels:\nA: negative\nB: positive (good)\n\nText: what a superb film\nAnswer:"
    assert llm_standin.likely(prompt, 0.9) == pytest.approx({"A": 0.1, "B": 0.9})
