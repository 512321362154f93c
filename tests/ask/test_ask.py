"""What is asked of a language model, what is made of its answers, and how good they are."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments import write_lines
from kdlora.asking.ask import ask, plan_asking
from kdlora.asking.asksettings import AskSettings
from kdlora.asking.audit import audit_answers
from kdlora.asking.questions import Questions, count_votes, join_groups, likely_groups, read_logprobs, read_vote
from kdlora.configfile import build_config
from kdlora.data.load import load_splits
from kdlora.deploy.predict import Classifier
from kdlora.errors import ConfigError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.labelling import LabelSettings
from kdlora.experiment.recording import new_record
from kdlora.experiment.scoring import score_given_teacher
from kdlora.report.wording import duration
from tiny import save_classifier, sentiment_rows, task, write_csv

LABELS = {"negative": "it was bad", "positive": "it was good"}


def test_one_value_may_stand_for_a_list_of_one() -> None:
    """`text="review"` was six columns, and the labels "no" and "ok" were "n" and "o"."""
    given = AskSettings("m", text="review", prompts="p.j2", labels=["no", "ok"])  # type: ignore[arg-type]
    assert given == AskSettings("m", text=("review",), prompts=("p.j2",), labels={"no": "", "ok": ""})
    assert LabelSettings(text="review").text == ("review",)  # type: ignore[arg-type]


def test_it_is_said_which_label_a_number_stands_for(asking, tmp_path, caplog) -> None:
    """Labels 0 and 1 are positions in the file of labels; read in silence, they may be the other way round."""
    rows = [row | {"label": int(row["label"] == "positive")} for row in sentiment_rows(8)]
    plan_asking(str(write_csv(tmp_path / "coded.csv", rows)), asking.settings(labels={"positive": "", "negative": ""}))
    assert "labels were read as positions: 0 = positive, 1 = negative" in caplog.text


def questions(count: int, *, most: int = 20, votes: bool = False, examples=()) -> Questions:
    settings = AskSettings("m", top_logprobs=most, votes=5 * votes)
    return Questions(None, {f"topic {number}": "" for number in range(count)}, examples, settings)


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


def test_thoughts_before_the_answer_are_no_part_of_it(asking):
    """Eight tokens ended in the middle of a thought: such a model could not be asked at all."""

    def think(answer: dict) -> None:
        message = answer["choices"][0]["message"]
        message["content"] = f"<think>\n{'B: hm. ' * 50}</think>\n\n{message['content']}"

    asking.model.logprobs, asking.model.edit = False, think
    done = asking(votes=3, answer_tokens=600, rows=10)
    assert (done.rows, done.unanswered) == (10, 0)
    assert {one["max_tokens"] for one in asking.model.seen} == {600}
    table = pd.read_parquet(done.table).set_index("id")
    rows = pd.read_csv(asking.data).set_index("id").loc[table.index]
    assert (table.idxmax(axis=1) == rows["label"]).all()


def test_what_was_cut_is_asked_again_with_more_tokens(asking):
    """The rows about which a model thinks longest had no answer for ever, and no word of the limit."""

    def cut(answer: dict) -> None:
        if asking.model.seen[-1]["max_tokens"] < 600 and asking.model.number % 9 in (1, 2, 3):
            answer["choices"][0].update(finish_reason="length", message={"content": "<think>hm"})

    said = "400 Could not finish the message because max_tokens or model output limit was reached."
    asking.model.logprobs, asking.model.edit = False, cut
    asking.model.fault = lambda number: said if number in (3, 4, 5) else None
    given = {"votes": 3, "rows": 9, "concurrency": 1}
    for _ in range(2):
        done = asking(**given, answer_tokens=100)
        assert (done.rows, done.unanswered, done.requests) == (5, 4, 27)
    first, second = (one["unanswered"] for one in done.examples[:2])
    assert first == "cut at answer_tokens 100: no label: '<think>hm'"
    assert second.startswith("cut at answer_tokens 100: the server refuses it: ")
    for tokens in (600, 100):
        done = asking(**given, answer_tokens=tokens)
        assert (done.rows, done.unanswered, done.requests) == (9, 0, 39)


def test_many_labels_are_asked_for_in_two_steps_with_examples_of_all(asking):
    """Seventy labels do not fit the likely tokens that a server shows: those beyond would have no probability."""
    names = [f"topic {number:02}" for number in range(70)]
    rows = [{"id": f"r{n}", "text": f"it is about {names[n % 70]} again", "label": names[n % 70]} for n in range(140)]
    data = write_lines(asking.folder / "topics.jsonl", rows)
    done = asking(data, top_logprobs=10)
    table = pd.read_parquet(done.table).set_index("id")
    assert (table.idxmax(axis=1) == pd.DataFrame(rows).set_index("id")["label"].loc[table.index]).all()
    assert np.allclose(table.sum(axis=1), 1, atol=1e-5)
    assert 2 * 140 <= done.requests <= 3 * 140
    with pytest.raises(ConfigError, match="70 labels are too many for 5 likely tokens, even in two steps"):
        asking(data, top_logprobs=5)

    # Eight examples of the first eight labels of seventy would have the model say no other.
    plan = plan_asking(str(data), asking.settings(shots=8))
    shown = re.findall(r"about topic (\d+)", plan.prompts[0])[:-1]
    assert len(set(shown)) == 8
    assert max(map(int, shown)) > 20


def test_a_pair_is_an_example_of_another_with_the_same_question():
    """By the first text alone, a question with ten candidate answers would be asked about without an example."""
    pairs = [{"text": "who?", "text_pair": name, "label": 0} for name in ("Ann", "Ben")]
    made = questions(2, examples=pairs)
    assert made.fill(pairs[0], made.choices).count("who?") == 2


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
    assert ask(str(pairs), asking.folder / "pairs", asking.settings()).rows == 8
    assert "Text: a\nSecond text: superb" in asking.model.seen[0]["messages"][0]["content"]


def test_a_dry_run_asks_nothing(asking, cli):
    """Whoever looks at cost and prompts first must not pay for it; neither key nor server is needed."""
    rows = ("--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--price-in", 1e6, "--price-out", 0, "--dry-run")
    done = cli("ask", asking.data, "--to", asking.to, *rows)
    assert done.out.count("Choose the label") == 3
    assert "60 rows, 60 requests" in done.out
    assert not asking.to.exists()
    plan = plan_asking(str(asking.data), asking.settings(votes=3, price_in=1e6, price_out=0.0))
    assert (plan.rows, plan.requests) == (60, 180)
    assert plan.cost == pytest.approx(plan.tokens)
    assert not asking.model.seen


def test_some_rows_and_later_more_of_them(asking, tiny_model_folder):
    """A larger selection that does not begin with the smaller one pays for the same rows twice."""
    assert asking(rows=20).rows == 20
    first = set(pd.read_parquet(asking.to / "train.parquet")["id"])
    assert (done := asking(rows=30)).requests == 30
    assert first < set(pd.read_parquet(done.table)["id"])
    asking.to = asking.folder / "diverse"
    assert asking(rows=20, select="diverse").rows == 20
    assert pd.read_parquet(asking.to / "train.parquet")["id"].nunique() == 20

    # A model chooses those that it doubts: the order of the margins, not of the confidence in one label.
    student, asking.to = (
        save_classifier(tiny_model_folder("bert"), asking.folder / "student"),
        asking.folder / "doubted",
    )
    asking(rows=10, select="uncertain", select_by=str(student))
    rows = pd.read_csv(asking.data)
    found = Classifier.load(student).predict(rows["text"].tolist())
    margin = pd.Series([abs(2 * one.probabilities["positive"] - 1) for one in found], index=rows["id"])
    chosen = pd.read_parquet(asking.to / "train.parquet")["id"]
    assert margin[chosen].max() <= margin.drop(chosen).min() + 1e-6
    (student / "README.md").write_text("The card, which `kdlora defer` writes anew, chooses no row.")
    assert asking(rows=12, select="uncertain", select_by=str(student)).resumed == 10
    # Of an experiment it is the student that chooses, and not its report.
    experiment, asking.to = student.rename(asking.folder / "moved").parent / "runs", asking.folder / "by-run"
    (experiment / "student").parent.mkdir()
    (asking.folder / "moved").rename(experiment / "student")
    (experiment / "config.yaml").write_text("{}")
    asking(rows=10, select="uncertain", select_by=str(experiment))
    (experiment / "report.md").write_text("as written anew")
    assert asking(rows=12, select="uncertain", select_by=str(experiment)).resumed == 10


def test_the_command_prints_what_was_done_and_audited_rows_are_no_examples(asking, cli):
    """A model that has seen the answer of an audited row audits itself."""
    options = ("--audit", 40, "--shots", 6)
    done = cli(*asking.command, *options, "--price-in", 1, "--price-out", 2)
    assert "Audit on 40 rows" in done.out
    assert re.search(r"reported half:\s+\d+\.0% are\s+'(neg|posi)tive'", done.out)  # what a constant answer would reach
    assert "60 rows in" in done.err
    assert json.loads(cli(*asking.command, *options, "--json").out)["resumed"] == 60
    lines = map(json.loads, (asking.to / "answers.jsonl").read_text().splitlines())
    ids = [line["id"] for line in lines if "id" in line]
    examples = json.loads((asking.to / "ask.json").read_text())["ingredients"]["examples"]
    assert (len(ids), len(examples)) == (60, 6)
    assert not {one["id"] for one in examples} & set(ids[:40])  # those are asked first


def test_a_student_learns_from_the_answers(asking, cli, tiny_model_folder):
    """The way on: rows that were refused are in neither file, and the report knows what the answers cost."""
    asking.model.fault = lambda number: "refusal" if number in (7, 60) else None
    rows = [{"key": f"k{row.pop('id')}", **row} for row in sentiment_rows(40, 1)]
    validation = write_csv(asking.folder / "validation.csv", rows)
    write_csv(asking.data, [{"key": row.pop("id"), **row} for row in sentiment_rows(60, 0)])
    more = asking.folder / "more.csv"
    write_csv(more, [{"key": row["id"], "text": row["text"] + " again"} for row in sentiment_rows(30, 2)])
    done = asking(id_column="key", audit=validation, unlabelled=more, price_in=1.0, price_out=2.0)
    assert (done.rows, done.unanswered) == (128, 2)
    config = {
        "task": {"text": "text", "label": "label"},
        "data": {name: str(asking.to / f"{name}.parquet") for name in ("train", "unlabelled")}
        | {"validation": str(asking.to / "validation.parquet")},
        "teacher": {"probabilities": str(done.table)},
        "student": {"model": str(tiny_model_folder("bert")), "train": {"epochs": 1, "learning_rate": 5e-3}},
        "run": {"arms": ["fft", "kd-lora"], "seeds": [0], "precision": "fp32", "threads": 1},
        "export": {"formats": [], "benchmark": False},
    }
    path = asking.folder / "config.yaml"
    path.write_text(json.dumps(config))
    cli("run", path, "--out", asking.folder / "run")
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

    # Of five thousand validation rows two hundred were audited: the others are no mistakes of the language model.
    rows = [{"id": row["key"], "text": row["text"], "label": row["label"]} for row in rows]
    wider = write_csv(asking.folder / "wider.csv", [*rows, {"id": "new", "text": "a new one", "label": "positive"}])
    given = build_config(config | {"data": config["data"] | {"validation": str(wider)}})
    layout, splits = ExperimentLayout(asking.folder / "wider"), load_splits(given.task, given.data)
    record = score_given_teacher(given, layout, splits, new_record(given, layout, splits, "fft", 0))
    assert record.score is None
    assert "score on the validation split is not available: " in record.notes[-1]

    # The labels of another training file are no language model's, whatever those beside its table are.
    told = json.loads((asking.to / "asked.json").read_text())
    (asking.to / "asked.json").write_text(json.dumps({**told, "own_labels": True}))
    people = build_config(config | {"data": config["data"] | {"train": str(asking.data)}})
    for one, own in ((given, True), (people, False)):
        assert new_record(one, layout, splits, "kd-lora", 0).asked.own_labels is own


def test_log_probabilities_of_codes_become_probabilities():
    """Zero would say that the model excludes the label; more than the least that is shown cannot be."""
    options = questions(4).choices
    found = read_logprobs(tokens(A=0.7, B=0.2), options)
    assert found == pytest.approx([0.7, 0.2, 0.05, 0.05])
    found = read_logprobs(tokens(A=0.5, B=0.02), options)
    assert found == pytest.approx(np.array([0.5, 0.02, 0.02, 0.02]) / 0.56)

    # Labels that are letters, as grades: the code E of the label F, or J of I, is that of no other label.
    for labels, said, meant in (("ABCDF", "E", 4), ("ABCDEFGHIJ", "J", 8)):
        made = Questions(None, dict.fromkeys(labels, ""), (), AskSettings("m"))
        assert read_logprobs(tokens(**{said: 0.9}), made.choices).argmax() == meant
        assert "Reply with the code of the label before the colon" in made.fill({"text": "hm"}, made.choices)

    # `Absolutely` is no A, and `I cannot` no I.
    options = questions(9).choices
    assert "I" not in {option.code for option in options}
    found = read_logprobs(
        [(" A", math.log(0.3)), ("A", math.log(0.1)), ("(B", math.log(0.4)), ("Ab", math.log(0.2))], options
    )
    assert found[:2] == pytest.approx([0.5, 0.5], abs=1e-4)
    assert read_logprobs(tokens(I=0.9, Absolutely=0.09), options) is None

    # A group that was not asked keeps its mass, evenly.
    choices = questions(4, most=2).choices
    assert likely_groups(np.array([0.02, 0.98])) == [1]
    assert likely_groups(np.array([0.4, 0.6])) == [0, 1]
    found = join_groups(np.array([0.2, 0.8]), choices, {1: np.array([0.25, 0.75])})
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.6])


def test_names_in_place_of_letters_are_told_by_their_first_token():
    """A model of few parameters answers letters by their place in the list; `A` would be the beginning of `angry`."""
    settings = AskSettings("m", codes="names")
    made = Questions(None, {"angry": "", "no": "", "not sure": "of it"}, (), settings)
    options = made.choices
    filled = made.fill({"text": "hm"}, options)
    assert "\nangry\nno\nnot sure (of it)\n" in filled
    assert "Reply with the label, and nothing else." in filled
    given = [(" Ang", 0.4), ("a", 0.2), ("No", 0.1), ("not", 0.1), ("Well", 0.05)]
    found = read_logprobs([(token, math.log(p)) for token, p in given], options)
    assert found == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert [read_vote(one, options) for one in ("Angry.", "not sure", "NO", "maybe")] == [0, 2, 1, None]
    assert [read_vote(one, options) for one in ("Angry: he shouts", "No\n\nIt is", "Nothing")] == [0, 1, None]
    # Of -1 and of the first of two characters the token was thrown away, and another label got all of its mass.
    for said, names in {"-": ("1", "0", "-1"), "不": ("好", "很好", "不好"), "a": ("no", "so", "a lot")}.items():
        options = Questions(None, dict.fromkeys(names, ""), (), settings).choices
        found = read_logprobs([(said, math.log(0.8)), (names[0], math.log(0.1))], options)
        assert found == pytest.approx([1 / 10, 1 / 10, 8 / 10])
    options = Questions(None, {"amused": "", "no": ""}, (), settings).choices
    assert read_logprobs([("a", math.log(0.9))], options) is None
    options = Questions(None, dict.fromkeys(("1", "0", "-1"), ""), (), replace(settings, votes=3)).choices
    assert [read_vote(one, options) for one in ("-1 because", "-1 (bad)", "- 1", "1: good")] == [2, 2, 0, 0]
    long = {"eidgenössisches Verwaltungsverfahrensrecht": "", "no": ""}  # a vote that is cut in its middle is none
    asked = [
        Questions(None, names, (), AskSettings("m", codes="names", votes=3)) for names in (long, {"a": "", "b": ""})
    ]
    assert [one.tokens_of_answer for one in asked] == [len(next(iter(long)).encode()), 8]
    with pytest.raises(ConfigError, match="cannot tell '10' from '1', which may be its first token"):
        Questions(None, {str(number): "" for number in range(1, 11)}, (), settings)
    with pytest.raises(ConfigError, match="'card lost' and 'card stolen'"):
        Questions(None, {"card lost": "", "card stolen": ""}, (), settings)
    with pytest.raises(ConfigError, match=r"as the server shows \(20\), not 21"):
        Questions(None, {f"{number} is it": "" for number in range(21)}, (), settings)


def test_votes_are_read_by_code_or_name():
    """An answer in a sentence, or of another label, is no vote."""
    options = questions(30, votes=True).choices
    assert [option.code for option in options[:2]] == ["1", "2"]
    said = ["2", " 2.", "topic 1", "12 is it", "31", "the topic 1", ""]
    assert [read_vote(one, options) for one in said] == [1, 1, 1, 11, None, None, None]
    assert count_votes([0, 0, None], 2) == pytest.approx([2.25 / 2.5, 0.25 / 2.5], abs=1e-3)
    assert count_votes([0, None, None], 2) is None

    # `A film that I liked` would be a vote for the first label, and `C++` for none.
    options = Questions(None, {"good": "", "C++": "", "(größer)": ""}, (), AskSettings("m", votes=5)).choices
    said = ["A film that I liked", "A", "A.", "a good", "A good", "B: C++", "C++", "GRÖSSER", "A\nB", "**C**"]
    assert [read_vote(one, options) for one in said] == [None, 0, 0, None, 0, 1, 1, 2, 0, 2]

    # With the codes A to D, the answer B was a vote for the label b.
    options = Questions(None, dict.fromkeys("bemt", ""), (), AskSettings("m", votes=5)).choices
    assert [read_vote(one, options) for one in ("A", "B", "b", "e", "E", "T")] == [0, 1, 0, 1, 1, 3]

    # Of equally many the first decides: the first label would get every tie.
    for votes in ([1, 0], [2, 1, 0, 0, 1], [1, 0, 0, 1], [1, None, 0]):
        found = count_votes(votes, 3)
        assert found.argmax() == 1
        assert found[1] == pytest.approx(found[0], abs=1e-3)


TASK = task()


def answers(right: np.ndarray, labels: np.ndarray, sure: float) -> np.ndarray:
    table = np.full((len(labels), 2), 1 - sure)
    table[np.arange(len(labels)), np.where(right, labels, 1 - labels)] = sure
    return table


def test_figures_are_those_of_the_half_that_chose_nothing():
    """A prompt chosen and reported on the same rows looks better than it is."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    tables = [answers(draw.random(400) < 0.7, labels, 0.99) for _ in range(6)]
    audit = audit_answers(TASK, [f"p{n}" for n in range(6)], tables, labels, seed=1)
    chosen = audit.prompts[audit.chosen]
    assert chosen.chosen_on == max(one.chosen_on for one in audit.prompts)
    right = (tables[audit.chosen].argmax(axis=1) == labels).sum()
    assert round(chosen.chosen_on * 2 + chosen.accuracy * 2) == right
    assert chosen.low < chosen.accuracy < chosen.high
    assert sum(map(sum, audit.confusion)) == 200
    others = [one.against_chosen for one in audit.prompts if one is not chosen]
    assert all(one.n_examples == 200 and one.low < one.difference < one.high for one in others)
    assert audit.temperature > 2
    assert audit.ece_after < 0.1 < audit.ece_before


def test_a_model_that_prefers_a_label_is_corrected():
    """It orders the texts well and still gives all of them one label, which a temperature cannot mend."""
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 2
    odds = np.where(labels == 1, 1.0, -1.0) + draw.normal(0, 0.5, 400) - 3.0
    table = 1 / (1 + np.exp(np.stack((odds, -odds), axis=1)))
    audit = audit_answers(TASK, ["p"], [table], labels, seed=0)
    assert audit.prompts[0].accuracy < 55
    assert audit.accuracy_after > 90
    assert audit.bias[1] - audit.bias[0] > 2
    assert audit.ece_after < 0.1 < audit.ece_before
    few = audit_answers(TASK, ["p"], [table[:60]], (np.arange(60) % 10 == 0).astype(int), seed=0)
    assert few.bias == ()
    assert few.accuracy_after == few.prompts[0].accuracy


def test_flawless_and_unanswered_rows():
    """However sure, right answers have them surer: the fit ran to its bound, and a table of 0.9 became one of 1.0."""
    labels = np.arange(200) % 2
    flawless, flawed = np.ones(200, bool), np.arange(200) % 10 > 0
    audit = audit_answers(TASK, ["p"], [answers(flawless, labels, 0.9)], labels, seed=0)
    assert audit.temperature == 1
    assert audit.ece_after == audit.ece_before
    assert audit.untempered == "all 100 answered rows of the half that chooses are right"
    audit = audit_answers(TASK, ["p"], [answers(flawed, labels, 0.99)], labels, seed=0)
    assert audit.temperature > 1
    assert not audit.untempered

    # A prompt that refuses what is difficult would win.
    careful, plain = answers(flawless, labels, 0.9), answers(flawed, labels, 0.9)
    careful[np.arange(200) % 3 > 0] = np.nan
    audit = audit_answers(TASK, ["careful", "plain"], [careful, plain], labels, seed=0)
    assert audit.chosen == 1
    assert audit.prompts[0].accuracy < 50
    assert audit.prompts[0].macro_f1 == 100
    assert audit.prompts[0].unanswered == 133
    assert audit.prompts[0].against_chosen.high < 0

    # Of one class: no metric or interval to fall over.
    labels, sure = np.zeros(60, np.int64), np.tile([0.7, 0.3], (60, 1))
    audit = audit_answers(TASK, ["p"], [sure], labels, seed=0)
    assert (audit.prompts[0].accuracy, audit.prompts[0].high, audit.temperature) == (100, 100, 1)
    assert audit.confusion == ((30, 0, 0), (0, 0, 0))
    other = audit_answers(TASK, ["p", "q"], [sure, 1 - sure], labels, seed=0)
    assert other.prompts[1].against_chosen.difference == -100


def test_prompts_are_compared_and_the_best_one_asks_the_rest(asking):
    """The table of a prompt that lost, or of two prompts mixed."""
    bad, good = asking.folder / "bad.j2", asking.folder / "good.j2"
    body = "Labels:\n{% for one in labels %}\n{{ one.code }}: {{ one.name }}\n{% endfor %}\n\nText: "
    bad.write_text(body + "{{ text[:3] }}")
    good.write_text(body + "{{ text }}")
    validation = write_csv(asking.folder / "validation.csv", sentiment_rows(80, 1))
    done = asking(prompts=(str(bad), str(good)), audit=str(validation))
    assert done.audit.chosen == 1
    assert done.requests == 2 * 80 + 60
    assert (done.rows, done.audit.prompts[1].accuracy) == (140, 100)
    table = pd.read_parquet(done.table)
    assert table["split"].value_counts().to_dict() == {"validation": 80, "train": 60}
    assert done.audit.temperature == 1
    assert table[["negative", "positive"]].max(axis=1).to_numpy() == pytest.approx(0.9, abs=1e-6)
    assert json.loads((asking.to / "audit.json").read_text())["chosen"] == 1
