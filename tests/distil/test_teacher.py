"""Teacher logits: attached by id, computed once, refused when stale, mended when damaged."""

import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from kdlora.data.batches import tokenise
from kdlora.data.spool import hash_columns
from kdlora.distil import inference as teacher_module
from kdlora.distil.inference import hash_model, hash_tokenizer, predict_logits, read_stored_logits, teacher_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.losses import TargetScale, fold_into_head
from kdlora.errors import ArtifactError, ConfigError, DataError, ModelError
from kdlora.models.encoders import load_encoder


@pytest.fixture
def rows(make_examples) -> Dataset:
    return make_examples("single-label", 23)


@pytest.fixture
def make_encoder(tiny_model_folder, tasks):
    return lambda family="bert": load_encoder(str(tiny_model_folder(family)), tasks["single-label"], seed=1)


@pytest.fixture
def label(make_encoder, rows, tasks, tmp_path):
    """`label(**changes)` stores the logits in one folder, as a run does."""

    def run(**changes):
        values = {"columns": [0, 1], "dataset": rows, "task": tasks["single-label"], "folder": tmp_path / "logits"}
        options = {"max_length": 48, "rows_per_shard": 10, "device": "cpu"}
        encoder = changes.pop("encoder", None) or make_encoder()
        return teacher_logits(encoder=encoder, **(values | options | changes))

    return run


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Rows of every forward over a shard."""
    seen: list[int] = []

    def watch(model, tokenizer, data, **options):
        seen.append(len(data.dataset))
        return predict_logits(model, tokenizer, data, **options)

    monkeypatch.setattr(teacher_module, "predict_logits", watch)
    return seen


def test_a_teacher_reads_on_packed_weights_in_fp32(make_encoder, label, monkeypatch):
    """Labels took twice as long as final scores, which make the same passes."""
    encoder, seen = make_encoder(), set()

    def watch(model, *given, **options):
        seen.update(type(module).__name__ for module in model.modules())
        return predict_logits(model, *given, **options)

    monkeypatch.setattr(teacher_module, "predict_logits", watch)
    label(encoder=encoder, precision="fp32")
    assert "_FrozenLayer" in seen
    assert "_FrozenLayer" not in {type(module).__name__ for module in encoder.model.modules()}


@pytest.mark.parametrize("scale", [TargetScale(2003.0, 12.0), TargetScale(310_000.0, 9_000.0)])
def test_a_regression_says_its_values_in_their_own_scale(tiny_model_folder, tasks, make_examples, tmp_path, scale):
    """In bf16 years were multiples of 8; in fp16, by the same way, prices were infinite."""
    task = tasks["regression"]
    encoder = load_encoder(str(tiny_model_folder("bert")), task, seed=1)
    with torch.no_grad():
        fold_into_head(encoder.model, scale)
    said = {}
    for precision in ("fp32", "bf16"):
        options = {"max_length": 48, "device": "cpu", "precision": precision}
        found = teacher_logits(encoder, [0], make_examples("regression", 23), task, tmp_path / precision, **options)
        said[precision] = (found.logits - scale.mean) / scale.std
    np.testing.assert_allclose(said["bf16"], said["fp32"], atol=0.02)
    assert "forward" not in vars(encoder.model.classifier)


def made_up(ids, width: int = 2) -> TeacherLogits:
    logits = np.arange(len(ids) * width, dtype=np.float32).reshape(-1, width)
    return TeacherLogits(pa.array(ids), logits, tuple("abcdef"[:width]), "made up")


def test_attached_by_id_and_never_missing():
    """A teacher table in another order taught every row some other row's answer."""
    attached = made_up(["c", "a", "d", "b"]).attach(Dataset.from_dict({"id": ["a", "b", "c"], "text": ["x", "y", "z"]}))
    assert attached["teacher_logits"][:] == [[2.0, 3.0], [6.0, 7.0], [0.0, 1.0]]
    assert attached["text"][:] == ["x", "y", "z"]
    again = made_up(["a", "b", "c"], width=3).attach(attached)
    assert again["teacher_logits"][0] == [0.0, 1.0, 2.0], "an older column stays in force"

    # Rows without a teacher, filled with zeros or dropped, make a student that nobody asked for.
    with pytest.raises(DataError, match=r"8 of 10 examples have no teacher logits, first ids '0', '1', '2', '3', '6'"):
        made_up(["4", "5"]).attach(Dataset.from_dict({"id": [str(row) for row in range(10)]}))
    for shape in ((1, 2), (2, 3)):  # other faults: `test_teacher_table.py`
        with pytest.raises(DataError, match=rf"expected logits of shape \(2, 2\), got \({shape[0]}, {shape[1]}\)"):
            TeacherLogits(pa.array(["a", "b"]), np.zeros(shape, np.float32), ("x", "y"), "")


@pytest.mark.parametrize("order", ["all", "drawn", "few", "shuffled", "last first"])
def test_rows_in_any_order_get_their_own_logits(order):
    """What is found without a table of all ids must be what such a table finds, over the borders of slices too."""
    ids = [f"example-{row}" for row in range(60_000)]
    teacher = TeacherLogits(ids, np.arange(60_000, dtype=np.float32)[:, None], ("a",), "")
    draw = np.random.default_rng(0)
    wanted = {
        "all": np.arange(60_000),
        "drawn": np.flatnonzero(draw.random(60_000) < 0.9),
        "few": np.flatnonzero(draw.random(60_000) < 0.01),
        "shuffled": draw.permutation(60_000),
        "last first": np.r_[59_999, np.arange(59_999)],
    }[order]
    chosen = Dataset(pa.table({"id": ids}), fingerprint="made up").select(wanted)
    attached = teacher.attach(chosen)
    assert attached["id"][:] == [ids[row] for row in wanted]
    np.testing.assert_array_equal(np.asarray(attached["teacher_logits"][:])[:, 0], wanted)
    assert teacher.count_extra(chosen) == 60_000 - len(wanted)


def test_pairs_are_read_whole_and_outputs_must_be_there(label, tmp_path, make_examples):
    """The second text left out, or cuts that are not counted, only show as a worse teacher."""
    with pytest.raises(ModelError, match="has 2 outputs; expected 3 at least"):
        label(columns=[0, 2], folder=tmp_path / "third")
    with pytest.raises(ConfigError, match=r"got 'bf61'\. Did you mean 'bf16'"):
        label(precision="bf61")
    assert not (tmp_path / "logits").exists(), "the right number format would be refused as stale"
    assert len(label(precision="auto", folder=tmp_path / "auto").logits) == 23
    rows = make_examples("single-label", 6)
    pairs = rows.add_column("text_pair", ["a wonderful film"] * 6)
    alone = label(dataset=rows, folder=tmp_path / "alone")
    assert not np.allclose(alone.logits, label(dataset=pairs, folder=tmp_path / "pairs").logits)
    assert alone.truncated == 0
    assert label(dataset=pairs, folder=tmp_path / "short", max_length=8).truncated == 6


def test_ids_and_texts_are_looked_at_before_the_teacher_reads(label, rows, forwards, tmp_path):
    """Hours of a teacher that end at its last row, whose folder is stale once the ids are unique."""
    twice = concatenate_datasets([rows, rows.select([0])])
    gap = rows.remove_columns("text").add_column("text", [*rows["text"][:22], None])
    named = "row '0-22' has no text"
    faults = ((twice, "1 ids occur more"), (rows.remove_columns("id"), "no column 'id'"), (gap, named))
    for given, told in (*faults, (gap.select([22, 3]), named)):
        with pytest.raises(DataError, match=told):
            label(dataset=given)
    assert forwards == []
    assert not (tmp_path / "logits").exists()


def test_a_second_call_runs_no_forward_and_progress_counts_rows_once(label, forwards):
    """Arms and seeds that each label anew cost more than all their training; counted again, rows run past the end."""
    told = [], []
    first, second = (label(progress=lambda *counts, own=own: own.append(counts)) for own in told)
    assert forwards == [10, 10, 3]
    np.testing.assert_array_equal(first.logits, second.logits)
    assert first.fingerprint == second.fingerprint
    assert told[0] == sorted(told[0])
    assert len(told[0]) > 3
    assert told[0][-1:] == told[1] == [(23, 23)]


def test_an_interrupted_labelling_goes_on(label, forwards):
    """A teacher that starts anew after every crash never gets through a large data set."""

    def stop(done, total):
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(progress=stop)
    assert len(label().ids) == 23
    assert forwards == [10, 10, 10, 3]


def test_stale_logits_are_refused(label, make_encoder, rows, tasks):
    """A cache keyed by its folder alone teaches this student with last week's teacher."""
    label()
    moved, reads_otherwise = make_encoder(), make_encoder()
    with torch.no_grad():
        moved.model.classifier.bias.add_(1e-3)
    reads_otherwise.tokenizer.add_tokens(["extraordinary"])
    texts, ids = (Dataset.from_dict(rows.to_dict() | {name: ["other", *rows[name][1:]]}) for name in ("text", "id"))
    for change, named in (
        ({"encoder": moved}, "weights"),
        ({"encoder": reads_otherwise}, "tokenizer"),
        ({"dataset": texts}, "examples"),
        ({"dataset": ids}, "examples"),
        ({"max_length": 47}, "max_length"),
        ({"precision": "bf16"}, "precision"),
        ({"columns": [1, 0]}, "columns"),
        ({"task": replace(tasks["single-label"], label_names=("positive", "negative"))}, "labels"),
    ):
        with pytest.raises(ArtifactError, match=f"are stale: {named}.* changed. Delete the folder"):
            label(**change)


def test_fingerprints_are_of_content(make_encoder, rows):
    """A fast tokenizer remembers its last truncation: a hash over all of it makes every cache stale."""
    encoder = make_encoder()
    before = hash_model(encoder.model), hash_tokenizer(encoder.tokenizer)
    encoder.tokenizer(["some text"], truncation=True, max_length=5, padding=True)
    predict_logits(encoder.model, encoder.tokenizer, tokenise(rows, encoder.tokenizer, 48))
    assert (hash_model(encoder.model), hash_tokenizer(encoder.tokenizer)) == before

    # Another pooling or activation of the same weights is another model, which has no weight to show for it.
    modern = make_encoder("modernbert").model
    seen = {hash_model(modern)}
    for name, other in (("classifier_pooling", "mean"), ("hidden_activation", "relu"), ("norm_eps", 0.1)):
        assert getattr(modern.config, name) != other
        setattr(modern.config, name, other)
        seen.add(hash_model(modern))
    assert len(seen) == 4

    # A hash over how rows are stored refuses a cache after a reload; one that joins texts misses a moved boundary.
    turned = rows.select(range(len(rows) - 1, -1, -1))
    straight = turned.select(range(len(rows) - 1, -1, -1))
    names = ["id", "text", "text_pair"]
    assert hash_columns(rows, names) == hash_columns(Dataset.from_dict(rows[:]), names) == hash_columns(straight, names)
    assert hash_columns(rows, names) != hash_columns(turned, names)
    for one, other in ((["ab", "c"], ["a", "bc"]), ([[1, 2], [3]], [[1], [2, 3]]), ([None], [""])):
        assert hash_columns(Dataset.from_dict({"x": one}), ["x"]) != hash_columns(
            Dataset.from_dict({"x": other}), ["x"]
        )


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "exchanged"])
def test_damaged_shards_are_computed_anew(label, forwards, tmp_path, caplog, damage):
    """A flipped bit is a wrong lesson in every epoch; shards that changed places would even fit, attached by id."""
    first = label()
    other, shard = (tmp_path / "logits" / f"logits-0000{number}.parquet" for number in (0, 1))
    whole = shard.read_bytes(), other.read_bytes()
    shard.unlink()
    if damage == "exchanged":
        shard.write_bytes(whole[1])
        other.write_bytes(whole[0])
    elif damage != "missing":
        middle = len(whole[0]) // 2
        flipped = whole[0][:middle] + bytes([whole[0][middle] ^ 1]) + whole[0][middle + 1 :]
        shard.write_bytes(flipped if damage == "flipped" else whole[0][:50])
    with caplog.at_level(logging.WARNING):
        mended = label()
    assert "logits-00001.parquet is " + ("gone" if damage == "missing" else "damaged") in caplog.text
    assert forwards == [10, 10, 3, 10] + [10] * (damage == "exchanged")
    assert (shard.read_bytes(), other.read_bytes()) == whole
    np.testing.assert_array_equal(first.logits, mended.logits)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_broken_manifest(label, tmp_path, content):
    """A traceback from a JSON parser does not tell a user which folder to delete."""
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json: .*Delete the folder"):
        label()


def test_a_teacher_that_is_not_finite(label, make_encoder):
    """A teacher that diverged would be stored, and blamed on the student."""
    encoder = make_encoder()
    with torch.no_grad():
        encoder.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"answers example '0-\d+' with .*nan.*expected finite logits"):
        label(encoder=encoder)


def test_stored_logits_are_read_without_the_teacher_and_are_its_own(label, make_encoder, rows, tasks, tmp_path):
    """The teacher must be out of memory while the student trains; logits in the order of batches look plausible."""
    first, encoder = label(), make_encoder()
    again = read_stored_logits(tmp_path / "logits", tasks["single-label"])
    np.testing.assert_array_equal(first.logits, again.logits)
    expected = predict_logits(encoder.model, encoder.tokenizer, tokenise(rows, encoder.tokenizer, 48))
    np.testing.assert_allclose(again.logits, expected, rtol=1e-4, atol=1e-6)
    assert again.ids.to_pylist() == rows["id"][:]
    assert (again.fingerprint, again.truncated, again.label_names) == (first.fingerprint, 0, first.label_names)
    with pytest.raises(DataError, match=r"has 2 labels \(negative, positive\); the task has 3 \(a, b, c\)"):
        read_stored_logits(tmp_path / "logits", tasks["multi-label"])
    with pytest.raises(ArtifactError, match=r"elsewhere/manifest\.json: not a manifest of logits"):
        read_stored_logits(tmp_path / "elsewhere", tasks["single-label"])
    (tmp_path / "logits" / "logits-00002.parquet").unlink()
    with pytest.raises(
        ArtifactError, match=r"logits-00002\.parquet is gone since it was written.*Run the command that made"
    ):
        read_stored_logits(tmp_path / "logits", tasks["single-label"])


def test_odd_labels_and_ids_can_be_stored(label, tasks, tmp_path, rows):
    """A label that is named as a column of the store would overwrite the ids."""
    task = replace(tasks["single-label"], label_names=("id", "split"))
    found = label(task=task, folder=tmp_path / "named")
    again = read_stored_logits(tmp_path / "named", task)
    assert again.ids.to_pylist()[0].startswith("0-")
    np.testing.assert_array_equal(found.logits, again.logits)

    # A plain script's data set counts its rows in whole numbers; the storage of text ids failed on them.
    numbered = rows.remove_columns("id").add_column("id", list(range(len(rows))))
    stored = label(dataset=numbered)
    assert stored.ids.to_pylist()[:3] == ["0", "1", "2"]
    assert "teacher_logits" in stored.attach(numbered).column_names
