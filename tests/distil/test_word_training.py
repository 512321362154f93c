"""Tasks of tokens, and texts in windows: a loss a word or a text, whatever the windows and micro-batches."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import List as Listed
from interruptions import weights
from sklearn.metrics import f1_score
from transformers import TrainingArguments

from kdlora.config import DistilConfig
from kdlora.data.batches import Collator, WordCollator, tokenise
from kdlora.data.spool import label_array
from kdlora.data.tags import split_words
from kdlora.data.windows import WindowSettings
from kdlora.data.word_tokens import cut_words, split_row, word_offsets, words_joined, words_seen
from kdlora.distil.distillation_trainer import DistillationTrainer
from kdlora.distil.inference import predict_logits, read_stored_logits, teacher_logits
from kdlora.distil.logits import TeacherLogits, labelled_values
from kdlora.distil.losses import distillation_loss, start_at_shares
from kdlora.distil.teacher_table import read_teacher_table
from kdlora.errors import DataError
from kdlora.models.encoders import load_encoder
from sentences import fuzzed_texts

COLUMNS = {"id": Value("string"), "text": Value("string"), "label": Listed(Value("int64"))}
COLUMNS |= {name: Listed(Value("int32")) for name in ("starts", "ends")}


def test_the_loss_is_the_mean_over_the_words_of_a_step(make_setup, tmp_path):
    """Silent failure: a mean of windows' or micro-batches' means, which weighs a word by its neighbours."""
    runs = {}
    for tokens in (None, 60):
        setup = make_setup("tokens", dropout=0.0, unlabelled=12, micro_batch_tokens=tokens, epochs=1)
        assert max(map(len, setup.train.dataset["windows"])) > 1
        runs[tokens] = setup, setup.run(tmp_path / str(tokens)).history[-1]
    for name in ("loss", "hard_loss", "soft_loss"):
        assert runs[None][1][name] == pytest.approx(runs[60][1][name], rel=1e-5)
    torch.testing.assert_close(*(weights(setup.model) for setup, _ in runs.values()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("taught", [True, False])
def test_words_without_label_or_without_a_teacher_are_left_out(make_setup, tmp_path, taught):
    """Silent failure: words that count as a row but add no loss make the rate of learning depend on them."""
    still = {"dropout": 0.0, "learning_rate": 1e-12, "epochs": 1, "batch_size": 44}
    setup = make_setup("tokens", **still)
    plain = make_setup("tokens", **still)
    start_at_shares(plain.model, plain.task, labelled_values(plain.train.dataset))
    logits = torch.tensor(predict_logits(plain.model, plain.encoder.tokenizer, plain.train))
    labels = torch.tensor(label_array(plain.train.dataset))
    teacher = torch.tensor([value for row in plain.train.dataset["teacher_logits"] for value in row])
    teacher = teacher.reshape(logits.shape)
    kept = teacher.isfinite().all(1) if taught else labels >= 0
    assert 0 < kept.sum() < len(labels)
    terms = distillation_loss(
        logits[kept], labels[kept], teacher[kept] if taught else None, kind="tokens", labelled=(labels >= 0)[kept]
    )
    found = setup.run(tmp_path, distil=DistilConfig() if taught else None).history[-1]
    assert found["loss"] == pytest.approx(float(terms.total.mean()), rel=1e-4)
    assert found["hard_loss"] == pytest.approx(float(terms.hard.sum() / (labels >= 0)[kept].sum()), rel=1e-4)
    assert ("soft_loss" in found) == taught


def test_a_teacher_of_another_tokenizer_is_read_word_by_word(tiny_model_folder, make_examples, tasks, tmp_path):
    """Silent failure: logits that are attached by token, so that a student learns of word 5 what was said of word 4."""
    rows, task = make_examples("tokens", 20), tasks["tokens"]
    text = rows[0]["text"] + " \u200b\x00"  # characters that a tokenizer drops
    first = {"text": text, "starts": [*rows[0]["starts"], len(text) - 1], "ends": [*rows[0]["ends"], len(text)]}
    first["label"] = [*rows[0]["label"], 0]
    rows = rows.map(lambda row: row | first if row["id"] == rows[0]["id"] else row, new_fingerprint="dropped")
    encoder = load_encoder(str(tiny_model_folder("roberta")), task, seed=0)
    made = teacher_logits(encoder, [*range(7)], rows, task, tmp_path, max_length=24, rows_per_shard=7)
    stored = read_stored_logits(tmp_path, task)
    np.testing.assert_array_equal(stored.logits, made.logits)
    np.testing.assert_array_equal(stored.offsets, word_offsets(rows))
    assert stored.unseen == 1
    assert np.isnan(stored.logits[stored.offsets[1] - 1]).all()
    student = load_encoder(str(tiny_model_folder("bert")), task, seed=0).tokenizer
    shuffled = stored.attach(rows.select(np.random.default_rng(0).permutation(20)))
    for row in tokenise(shuffled, student, 16).dataset:
        number = stored.ids.to_pylist().index(row["id"])
        wanted = stored.logits[stored.offsets[number] : stored.offsets[number + 1]]
        np.testing.assert_array_equal(np.reshape(row["teacher_logits"], (-1, 7)), wanted)
        assert len(row["places"]) == len(wanted)


def test_a_table_may_answer_for_the_words_before_they_were_cut(tasks):
    """Silent failure: `Oslo` of `#Oslo`, of which a table says nothing, was learnt from neither teacher nor label."""
    task = tasks["tokens"]
    columns = {"id": ["x", "y", "z"], "text": ["go #Oslo", "a-b c", "d"], "label": [[0, 1], [3, 0], [0]]}
    columns |= {"starts": [[0, 3], [0, 4], [0]], "ends": [[2, 8], [3, 5], [1]]}
    cut = cut_words(Dataset.from_dict(columns, Features(COLUMNS)))
    assert cut["label"][:] == [[0, 1, 2], [3, 4, 4, 0], [0]]
    values = np.arange(5, dtype=np.float32)[:, None] + np.array([0, 0.5, 0, 0, 0, 0, 0], np.float32)
    table = TeacherLogits(["z", "x", "y"], values, task.label_names, "made up", offsets=np.array([0, 1, 3, 5]))
    found = [np.array(row).reshape(-1, 7)[:, :3].tolist() for row in table.attach(cut)["teacher_logits"]]
    begin, goes_on = ([[n, n + first, n + 0.5 - first] for n in range(5)] for first in (0.5, 0))  # B- is I- within
    assert found == [[begin[1], begin[2], goes_on[2]], [begin[3], goes_on[3], goes_on[3], begin[4]], [begin[0]]]
    with pytest.raises(DataError, match="expected logits for each word, got some for each example"):
        TeacherLogits(["x", "y", "z"], values[:3], task.label_names, "made up").attach(cut)
    parts = np.arange(8, dtype=np.float32)[:, None] + np.zeros(7, np.float32)
    each = TeacherLogits(["x", "y", "z"], parts, task.label_names, "made up", offsets=np.array([0, 3, 7, 8]))
    assert [np.array(row).reshape(-1, 7)[:, 0].tolist() for row in each.attach(cut)["teacher_logits"]] == [
        [0, 1, 2],
        [3, 4, 5, 6],
        [7],
    ]


def test_a_script_of_ones_own_trains_on_words(make_examples, make_setup, tmp_path):
    """Silent failure: a public collator whose words are others than those that an experiment trains on.

    `compute_metrics` was given the sub-tokens of all windows for the labels of the words.
    """
    setup, rows = make_setup("tokens", dropout=0.0), make_examples("tokens", 44)
    offsets, tokenizer = word_offsets(rows), setup.encoder.tokenizer
    values = np.random.default_rng(0).normal(size=(offsets[-1], 7)).astype(np.float32)
    values[0] = np.nan
    rows = TeacherLogits(rows["id"][:], values, setup.task.label_names, "made up", offsets=offsets).attach(rows)
    collate = WordCollator(tokenizer, max_length=48)
    inside = Collator.of(tokenizer, "tokens", 48)
    tokens = tokenise(rows, tokenizer, 48).dataset
    wanted = inside([part for row in tokens for part in split_row(row)])
    found = collate(list(rows))
    assert len(found["input_ids"]) > 44, "some texts have several windows"
    assert found.keys() == wanted.keys() >= {"words", "labels", "teacher_logits", "labelled"}
    for name, values in found.items():
        assert torch.equal(values, wanted[name]), name
    sizes = []
    trainer = DistillationTrainer(
        setup.model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False),
        kind="tokens",
        data_collator=collate,
        eval_dataset=rows,
        compute_metrics=lambda given: sizes.append((given.predictions.shape, given.label_ids.shape)) or {},
        processing_class=tokenizer,
    )
    loss = trainer.evaluate()["eval_loss"]
    trainer.args.per_device_eval_batch_size = 44
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5), "each word counts alike, not each batch"
    ((predicted, _), (labelled,)) = sizes[0]
    assert predicted == labelled == sum(len(collate([row])["labels"]) for row in rows)
    unlabelled = trainer.predict(rows.remove_columns(["label", "teacher_logits"])).predictions
    expected = predict_logits(setup.model, tokenizer, tokenise(rows, tokenizer, 48))
    np.testing.assert_allclose(unlabelled, expected[words_seen(tokens)], atol=1e-5)


def fuzzed_columns() -> dict[str, list]:
    texts = [text for text in fuzzed_texts() if split_words(text)[0]]
    starts, ends = map(list, zip(*map(split_words, texts), strict=True))
    return {"id": list(map(str, range(len(texts)))), "text": texts, "starts": starts, "ends": ends}


def test_any_text_is_read_where_its_words_are(tiny_model_folder, tasks):
    """Silent failure: in texts that normalisation makes longer or shorter a word gets the answer of another place."""
    rows = Dataset.from_dict(fuzzed_columns())
    texts, words = rows["text"][:], list(zip(rows["starts"], rows["ends"], strict=True))
    assert len(texts) > 950
    encoder = load_encoder(str(tiny_model_folder("bert")), tasks["tokens"], seed=1)
    tokenised = tokenise(rows, encoder.tokenizer, 32)
    tokens, seen = tokenised.dataset, 0
    for row, text, (starts, ends) in zip(tokens, texts, words, strict=True):
        offsets = encoder.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        ids = encoder.tokenizer(text, verbose=False)["input_ids"]
        for place, start, end in zip(row["places"], starts, ends, strict=True):
            if place >= 0:
                first = next(one for (a, b), one in zip(offsets, ids, strict=True) if a < min(b, end) and start < b)
                assert row["input_ids"][place] == first, (text, start)
                seen += 1
    assert seen > 10_000
    some = [row | {"label": [0] * len(row["starts"])} for row in rows.select(range(100))]
    batch = WordCollator(encoder.tokenizer, max_length=32)(some)
    encoder.model.config.id2label = dict(reversed(encoder.model.config.id2label.items()))  # whatever the file's order
    joined = predict_logits(encoder.model, encoder.tokenizer, tokenised)[words_joined(tokens)]
    assert len(joined) > 1000
    assert (joined[:, 2::2] >= joined[:, 1::2]).all()
    places = tokens.select(range(100))["places"]
    assert len(batch["labels"]) == sum(len(set(row) - {-1}) for row in places) < sum(map(len, places))
    assert torch.isfinite(encoder.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits).all()


def test_any_text_trains_the_words_that_it_names(make_setup, tiny_model_folder, tasks, tmp_path):
    """Silent failure: labels or a teacher's logits of odd texts that reach another word, which no finite loss shows."""
    columns, task = fuzzed_columns(), tasks["tokens"]
    columns["label"] = [
        [int(text.startswith("film", at)) for at in row]
        for text, row in zip(columns["text"], columns["starts"], strict=True)
    ]
    rows = Dataset.from_dict(columns, Features(COLUMNS))
    encoder = load_encoder(str(tiny_model_folder("roberta")), task, seed=1)
    labelled = teacher_logits(encoder, [*range(7)], rows, task, tmp_path / "logits", max_length=32)
    told = np.full_like(labelled.logits, -5)
    told[np.arange(len(told)), label_array(rows)] = 5
    told[np.isnan(labelled.logits)] = np.nan
    taught = dataclasses.replace(labelled, logits=told).attach(rows)
    for distil in (None, DistilConfig(alpha=0.0)):
        setup = make_setup("tokens", lora=False, dropout=0.0, epochs=2, batch_size=32, learning_rate=3e-3)
        setup.train = tokenise(taught, setup.encoder.tokenizer, 32)
        setup.run(tmp_path / str(distil), distil=distil)
        found = predict_logits(setup.model, setup.encoder.tokenizer, setup.train).argmax(1) == 1
        assert f1_score(label_array(rows) == 1, found) > 0.9, distil


@pytest.mark.parametrize("values", ["logits", "probabilities", "names"])
def test_a_table_answers_for_each_word(make_examples, tasks, tmp_path, values):
    """Silent failure: a user's table whose words are shifted, or whose unseen words teach as sure ones."""
    rows, task, draw = make_examples("tokens", 4), tasks["tokens"], np.random.default_rng(0)
    names = task.label_names
    table, expected = {"id": rows["id"][:]} | {name: [] for name in names}, []
    for starts in rows["starts"]:
        numbers = draw.dirichlet(np.ones(7), len(starts))
        numbers[0] = np.nan
        expected.append(np.log(numbers) if values == "probabilities" else numbers)
        for name, column in zip(names, numbers.T, strict=True):
            table[name].append([None if np.isnan(value) else float(value) for value in column])
    if values == "names":
        tags = [np.maximum(0, row) for row in rows["label"]]
        table = {"id": table["id"], "label": [[names[tag] for tag in row] for row in tags]}
        expected = [np.log(np.eye(7)[row] * 0.9 + 0.1 / 7) for row in tags]
        for words, row in zip(table["label"], expected, strict=True):
            words[0], row[0] = None, np.nan
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    kind = "logits" if values == "logits" else "probabilities"
    found = read_teacher_table(tmp_path / "table.parquet", task, values=kind)
    np.testing.assert_allclose(found.logits, np.concatenate(expected), rtol=1e-5)
    assert found.unseen == 4
    assert len(found.attach(rows.select([2, 0]))) == 2
    short = {
        name: [part[:-1] for part in column] if name in ("O", "label") else column for name, column in table.items()
    }
    pq.write_table(pa.table(short), tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"the example '0-0' has \d+ (words, but logits of|values in column 'O', but)"):
        read_teacher_table(tmp_path / "short.parquet", task, values=kind).count_extra(rows)


def logits_by_hand(setup, data, pool):
    """Run every window alone, and pool."""
    model, rows = setup.model.eval(), []
    for row in data.dataset:
        parts = np.split(np.asarray(row["input_ids"]), np.cumsum(row["windows"])[:-1])
        with torch.no_grad():
            found = [model(input_ids=torch.as_tensor(part)[None]).logits[0] for part in parts]
        rows.append(torch.stack(found).mean(0) if pool == "mean" else torch.stack(found).amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("single-label", "mean"), ("single-label", "max"), ("multi-label", "max"), ("regression", "mean")],
)
def test_the_loss_is_of_pooled_logits_whatever_the_micro_batches(make_setup, make_examples, tmp_path, kind, pool):
    """A loss a window, or windows of a text in two micro-batches, would teach that every part says the label."""
    rows = {"train": make_examples(kind, 24), "validation": make_examples(kind, 12, seed=9)}
    outcomes, setups = [], []
    for tokens in (None, 64):
        setup = make_setup(kind, dropout=0.0, lora=False, epochs=1, batch_size=24, micro_batch_tokens=tokens)
        for name, part in rows.items():
            setattr(setup, name, tokenise(part, setup.encoder.tokenizer, 16, windows=WindowSettings(4, pool)))
        counts = [len(sizes) for sizes in setup.train.dataset["windows"]]
        assert min(counts) == 1 or max(counts) > 3
        if kind == "multi-label":  # as the training itself begins
            start_at_shares(setup.model, setup.task, label_array(rows["train"]))
        by_hand = logits_by_hand(setup, setup.train, pool)
        found = predict_logits(setup.model, setup.encoder.tokenizer, setup.train, batch_tokens=48)
        np.testing.assert_allclose(found, by_hand, atol=1e-5)
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
        collate = Collator.of(setup.encoder.tokenizer, kind, 16)
        script = DistillationTrainer(setup.model, args, kind=kind, pool=pool, data_collator=collate)
        of_texts = script.predict(setup.train.dataset.remove_columns("label")).predictions
        np.testing.assert_allclose(of_texts, by_hand, atol=1e-5)
        outcomes.append(setup.run(tmp_path / str(tokens), distil=None))
        setups.append(setup)
    if kind != "regression":  # whose targets are standardised
        labels = torch.as_tensor(rows["train"]["label"][:])
        expected = distillation_loss(by_hand, labels, None, kind=kind).total.mean()
        assert outcomes[0].history[0]["hard_loss"] == pytest.approx(float(expected), abs=1e-5)
    losses = [outcome.history[0]["loss"] for outcome in outcomes]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for first, second in zip(*(weights(setup.model).values() for setup in setups), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-3)
