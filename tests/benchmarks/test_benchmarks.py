"""Studies that can be carried out, Table 2 at real size, and language models as teachers."""

import re
from dataclasses import replace

import choice
import defer
import llm_server
import numpy as np
import pytest
import study
import table2
import torch
from table2_measure import TIMED, Timing
from table2_models import SIZES, TRAIN_COUNTS, VALIDATION_COUNTS, batches_to_run, count, lengths_of, padded_tokens

import fabricate
import tiny
from experiments import read_rows
from kdlora import load_splits, load_suite
from kdlora.config import DataConfig
from kdlora.evidence.predictions import Predictions
from kdlora.experiment.plan import make_plan, whole_config
from kdlora.experiment.suitefile import build_suite


def test_the_studies_are_suites_that_plan_every_declared_side():
    """A misspelt setting shows after hours; a side that no suite has is a contrast that is silently never printed."""
    suites = {path.stem: load_suite(path) for path in study.STUDIES.glob("*.yaml") if path.stem != "contrasts"}
    assert [name for name, suite in suites.items() if not make_plan(suite).runs()] == []
    planned = {name: {(one, arm) for one in suite.families for arm in suite.arms} for name, suite in suites.items()}
    planned["unlabelled"] |= planned["labelled"]
    for name in planned.keys() - {"labelled"}:
        sides = [side for pair in study.declared_contrasts(name) for side in pair]
        assert set(sides) <= planned[name], name


def test_texts_are_the_rows_that_do_not_train(workshop, tmp_path):
    """A study whose texts nobody can make cannot be repeated; a text that also trains would count twice."""
    values, texts = workshop.values(), tmp_path / "texts" / "rest.csv"
    data = {"train": str(workshop.train), "unlabelled": str(texts), "max_train_examples": 10}
    task = {"task": {"text": "text", "label": "label"}, "data": data}
    config = {key: values[key] for key in ("recipe", "teacher", "student")}
    suite = build_suite(
        {"name": "s", "tasks": {"mood": task}, "families": {"one": {}}, "arms": ["kd-lora"], "config": config}
    )
    study.write_texts(suite)
    splits = load_splits(whole_config(suite, "mood", "one").task, DataConfig(train=str(workshop.train)))
    drawn = load_splits(whole_config(suite, "mood", "one").task, whole_config(suite, "mood", "one").data)
    assert list(drawn.train["text"]) == list(splits.train["text"])[:10]
    assert [row["text"] for row in read_rows(texts)] == list(splits.train["text"])[10:]


PUBLISHED = {
    "BERT-base": 109_483_778,
    "DistilBERT": 66_955_010,
    "RoBERTa-base": 124_647_170,
    "DistilRoBERTa": 82_119_938,
    "DeBERTaV3-base": 184_423_682,
    "DeBERTaV3-small": 141_896_450,
}


@pytest.mark.parametrize("size", [size for pair in SIZES.values() for size in pair], ids=lambda size: size.title)
def test_models_and_adapters_have_the_published_sizes(size):
    """A config that drifts, or adapters on other layers, would put a model that nobody uses into the table."""
    assert count(size).total == PUBLISHED[size.title]
    counts = count(size, 8)
    assert counts.adapter == 8 * (768 + 768) * 2 * (12 if size.title.endswith("base") else 6)
    assert counts.head == (1538 if size.title == "BERT-base" else 592_130)
    assert (counts.trainable, counts.total) == (counts.adapter + counts.head, PUBLISHED[size.title])


def test_all_batches_together_are_the_whole_set():
    """A lost last batch, or a wrong share, would scale the time of a sample wrongly."""
    lengths = lengths_of(VALIDATION_COUNTS)
    assert (len(lengths_of(TRAIN_COUNTS)), len(lengths)) == (8551, 1043), "the paper's sentences of CoLA"
    whole, share = batches_to_run(lengths, 1)
    assert (sorted(length for batch in whole for length in batch), share) == (lengths, 1.0)
    some, part = batches_to_run(lengths, 8)
    assert part == pytest.approx(sum(map(padded_tokens, some)) / sum(map(padded_tokens, whole)))


def test_paper_and_ours_stand_in_one_row():
    """Swapped families or methods would set our figures beside those of another model; a shared CPU must be told."""
    results = {family: table2.count_family(family) for family in SIZES}
    for figures in results.values():
        figures.memory["fp32"] = {"FFT": 3_000_000_000, "LoRA": 1_000_000_000, "KD-LoRA": None}
        times = {name: [8.0, 10.0] for name in TIMED[:3]} | {TIMED[3]: [4.0, 5.0]}
        figures.timing["fp32"] = Timing(times, 1, 0.97)
    text = table2.render(results, table2.parse([]))
    assert "| BERT-base | LoRA | 0.295 / 0.590 / 1.180 / 2.359 | 0.002 | 2.9 / 5.9 / 11.8 / 23.6 |" in text
    assert "| DistilBERT | KD-LoRA | 0.147 / 0.295 / 0.590 / 1.180 | 0.592 | 1.2 / 2.4 / 4.7 / 9.4 |" in text
    assert "| RoBERTa-base → DistilRoBERTa | 124.65 → 82.12 | 34.1% | 125 → 82 |" in text
    assert "| DeBERTaV3-base | FFT | 3000 | 2213 | 2234.5 |" in text
    assert "| DistilRoBERTa | KD-LoRA, merged | 4.500 ± 0.707 | 50.0% | 4.44 | 38.4% |" in text
    assert "| DistilBERT | KD-LoRA | – | 274 | 296.8 |" in text, "what could not be measured is a dash"
    assert "Others used the CPU" not in text
    results["bert"].timing["fp32"] = replace(results["bert"].timing["fp32"], occupied=0.06)
    assert "as little as 6% of their threads" in table2.render(results, table2.parse([]))


def test_what_is_kept_of_a_beginning_changes_no_answer(tmp_path):
    """A cache that is cut at the wrong token gives the answer to another prompt."""
    model = llm_server.Model(str(tiny.build_model_folder("llama", tmp_path / "llama")), "float32")
    model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    begin = "Labels:\nA: a superb film\nB: a dull film"
    texts = ["a superb film", "a dull film to the end", "a superb film", "a dull film, said nobody"]
    for prompt in (f"{start}\n\nText: {text}\nAnswer:" for text in texts for start in (begin, begin + " again")):
        likely, read = model.answer(prompt)
        tokens = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            alone = model.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert read == len(tokens)
        torch.testing.assert_close(likely, alone, atol=1e-4, rtol=0)


def test_knowing_where_one_is_wrong_counts_as_less_error():
    """A gain with the other sign, or with pairs of different seeds, would be told as a finding."""
    labels, sure = np.arange(200) % 2, np.linspace(0.1, 3, 200)
    said = np.where(np.arange(200) < 40, -1, 1) * (2 * labels - 1)  # 40 wrong answers
    judged = []
    for arm, seeds, sureness in (("kd-lora", 2, sure), ("student-lora", 3, sure[::-1])):
        logits = np.stack([np.zeros(200), said * sureness], axis=1)
        rows = Predictions(tuple(map(str, range(200))), ("test",) * 200, logits, ("no", "yes"), labels)
        judged += [defer.Judged("one", arm, seed, rows, rows) for seed in range(seeds)]
    told = defer.gain([judged], draws=20)
    assert float(re.match(r"([+-]\S+) points", told)[1]) < -20
    told = defer.gain([judged], lambda sure, wrong: defer.answered_share(sure, wrong, 0.1), draws=20)
    assert float(re.match(r"([+-]\S+) points", told)[1]) > 70
    assert "2 seeds" in told
    assert defer.gain([judged[:2]]) == "no experiment has both kd-lora and student-lora"


def test_what_a_rule_loses_is_counted_on_rows_that_did_not_choose(tmp_path, monkeypatch):
    """Judged on the rows that chose, the highest score would never lose anything."""
    for arm, noise in (("kd-lora", 1.0), ("kd-fft", 0.9), ("student-lora", 1.6)):
        monkeypatch.setitem(fabricate._NOISE, arm, noise)
    arms = ("fft", "kd-lora", "kd-fft", "student-lora")
    layout = fabricate.make_experiment(tmp_path / "e", arms=arms, seeds=(0,), rows=600, test_split=True)
    found = choice.regrets(layout.root, rows=30, splits=20)
    assert set(found) == {"product", "highest", *arms[1:]}
    assert found["highest"] > 0
    assert found["student-lora"] > found["product"]  # it is the worst of the three
