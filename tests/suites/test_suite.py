"""Suites carried out with real models: what is shared, resumed, recorded, refused."""

import json
import shutil

import pytest
import yaml
from filelock import FileLock

from experiments import snapshot, write_collection
from fabricate import BINARY, NAMES, edit_record, make_record
from kdlora.data.logit_table import open_store
from kdlora.data.tasks import Task
from kdlora.distil.inference import LOGITS_MANIFEST
from kdlora.errors import ArtifactError, ConfigError, DataError, StaleError
from kdlora.evidence.records import ExperimentLayout, read_record, write_record
from kdlora.experiment import engines
from kdlora.experiment.jobs import train_afresh, undamaged_record
from kdlora.experiment.recording import add_origin
from kdlora.experiment.suite import run_suite
from kdlora.experiment.suitefile import build_suite
from kdlora.models.encoders import load_encoder
from kdlora.system.integrity import hash_file
from kdlora.system.storage import mark_folder


def test_every_run_has_its_record_and_one_teacher_taught_them_all(finished_suite):
    """A student taught by another teacher than its neighbour's would make the grid's figures incomparable."""
    runs = finished_suite.plan.runs()
    assert len(runs) == 8
    assert {record.status for record in finished_suite.records.values()} == {"finished"}
    for run in runs:
        record = read_record(finished_suite.folder / run.key / "run.json")
        assert (record.arm, record.seed) == (run.arm, run.seed)
    teachers = {finished_suite.records[run.key].fingerprints["taught_by"] for run in runs if run.arm == "kd-lora"}
    scores = {run.key: finished_suite.records[run.key].score for run in runs if run.arm == "fft"}
    assert len(teachers) == 1
    assert teachers.pop().split(" of ")[0] == max(scores, key=scores.get)

    # Thousands of teachers would fill the disk; logits made again for every configuration would waste the time.
    assert len(list(finished_suite.folder.glob("runs/*/fft-*/teacher/model.safetensors"))) == 1
    assert len(list(finished_suite.folder.rglob("logits"))) == 1
    assert not list(finished_suite.folder.glob("runs/*/*/runs/*/model"))


def test_students_of_two_pretrained_models_are_not_compared(suite_folder, suite_values, tmp_path):
    """A model that was exchanged at its place between two calls of a suite had its students in one table."""
    for path in suite_folder.glob("runs/reviews/kd-lora-*/runs/*/run.json"):
        edit_record(path, fingerprints=read_record(path).fingerprints | {"base": "of another model"})
    result = run_suite(build_suite(suite_values(arms=["fft", "kd-lora", "student-fft"])), suite_folder)
    failed = [record for record in result.records.values() if record.status == "failed"]
    assert {record.arm for record in failed} == {"student-fft"}
    assert "the pretrained model, its weights or its tokenizer, changed since kd-lora" in failed[0].error


def test_models_of_other_kinds_or_revisions_are_no_exchanged_ones(tmp_path, tiny_model_folder):
    """All students of a suite's second task failed where one task is of words, whose models have no pooler."""
    source = str(tiny_model_folder("bert"))

    def train(number: int, task: Task, revision: str, **base: str) -> None:
        layout = ExperimentLayout(tmp_path / "runs" / str(number), shared_folder=tmp_path)
        config = {"student": {"model": source, "revision": revision}}
        record = make_record("student-lora", task=task).model_copy(update={"model": source, "config": config})
        record = add_origin(record, layout, load_encoder(source, task, seed=0), [])
        write_record(layout.run("student-lora", 0).record, record)
        edit_record(layout.run("student-lora", 0).record, fingerprints=record.fingerprints | base)

    train(0, BINARY, "first", base="of another model")
    train(1, NAMES, "first")
    train(2, BINARY, "second")
    with pytest.raises(ArtifactError, match=f"changed since student-lora .*, or delete {tmp_path}$"):
        train(3, BINARY, "first")


def test_only_what_is_missing_or_damaged_is_done_again(suite_folder, suite_values):
    """Resume must find the gaps, and a bit that flipped, and keep the rest, down to the bits of the files.

    A call without students deleted the teacher of those before, and the next one repeated them all.
    """
    grids = suite_values()["grids"]
    longer = grids | {"adapters": grids["adapters"] | {"lora.rank": [8]}}
    assert run_suite(build_suite(suite_values(arms=["fft", "lora"], grids=longer)), suite_folder).reused == 2
    gone = next(suite_folder.glob("runs/reviews/kd-lora-*/runs/*"))
    score = read_record(gone / "run.json").score
    shutil.rmtree(gone)
    before = snapshot(suite_folder / "runs")
    weights = next(suite_folder.glob("runs/reviews/student-lora-*/runs/*/adapter/adapter_model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # neither its size nor its time tells
    result = run_suite(build_suite(suite_values()), suite_folder)
    after = snapshot(suite_folder / "runs")
    assert result.reused == 6
    assert read_record(gone / "run.json").score == score
    assert weights.read_bytes() == whole
    again = weights.parents[1].relative_to(suite_folder / "runs").as_posix()
    kept = [name for name in before if "config.yaml" not in name and not name.startswith(again)]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_new_teacher_teaches_its_students_again(suite_folder, suite_values):
    """Students of an earlier teacher beside those of a better one would be averaged as if they were alike."""
    best = next(path.parents[1] for path in suite_folder.glob("runs/reviews/fft-*/teacher/model.safetensors"))
    record = read_record(best / "runs" / "fft-seed0" / "run.json")
    shutil.rmtree(best)
    result = run_suite(build_suite(suite_values()), suite_folder)
    assert result.reused == 5, "the teacher and two students are trained again"
    taught = [one for one in result.records.values() if one.arm == "kd-lora"]
    again = read_record(best / "runs" / "fft-seed0" / "run.json")
    assert again.score == record.score
    assert {one.fingerprints["taught_by"].split(" of ")[1] for one in taught} == {again.finished}

    # A grid of teachers without students, which are there to be compared, filled the disk.
    shutil.rmtree(best)
    assert run_suite(build_suite(suite_values(arms=["fft"])), suite_folder).reused == 1
    assert not list(suite_folder.glob("runs/*/fft-*/teacher"))


def test_a_failed_run_is_recorded_and_the_others_go_on(suite_values, tmp_path):
    """One bad configuration of a thousand must not cost the night; nor may students wait for a teacher that failed."""
    grids = {"fft": {"teacher.train.learning_rate": [1e30]}, "adapters": {"lora.targets": [["q_lin"], ["nothing"]]}}
    suite = build_suite(suite_values(arms=["kd-lora", "student-lora"], grids=grids))
    result = run_suite(suite, tmp_path / "suite")
    found = [(record.arm, record.status) for record in result.records.values()]
    assert sorted(found) == [
        ("fft", "failed"),
        *[("kd-lora", "failed")] * 2,
        ("student-lora", "failed"),
        ("student-lora", "finished"),
    ]
    errors = {record.arm: str(record.error) for record in result.failed}
    assert "there is no teacher" in errors["kd-lora"]
    assert "nothing" in errors["student-lora"]
    written = [read_record(path) for path in (tmp_path / "suite").rglob("run.json")]
    assert sorted((record.arm, record.status) for record in written) == sorted(found)
    again = run_suite(suite, tmp_path / "suite")
    assert (again.reused, len(again.failed)) == (1, 4)


def test_checkpoints_go_only_where_they_are_of_another_training(tmp_path):
    """A refusal that said to put a file back deleted the hours that putting it back would have saved."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mark_folder(folder, "training")
    for fault, stays in ((ArtifactError("put back what was there"), True), (StaleError("the rows changed"), False)):
        answers = iter([fault, "trained"])

        def train(answers=answers):
            if isinstance(answer := next(answers), Exception):
                raise answer
            return answer

        if stays:
            with pytest.raises(ArtifactError, match="put back"):
                train_afresh(train, folder)
        else:
            assert train_afresh(train, folder) == "trained"
        assert folder.exists() == stays


def test_students_of_other_texts_share_their_teacher(suite_values, tmp_path):
    """The rows of the first family stood for all: copies were data that changed, others had a teacher of their own."""
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"film {number} was long\n" for number in range(40)), encoding="utf-8")
    both = suite_values()["families"]["tiny"]
    families = {
        "few": both | {"data": {"augment": 0, "unlabelled": str(file), "max_unlabelled_examples": 8}},
        "less": both | {"data": {"augment": 0, "max_train_examples": 40}},
        "copied": both | {"data": {"augment": 1}},
    }
    suite = build_suite(suite_values(families=families, grids={}, arms=["kd-lora"]))
    result = run_suite(suite, tmp_path / "suite")
    assert [record.error for record in result.failed] == []
    students = [record for record in result.records.values() if record.arm == "kd-lora"]
    taught = {record.rows.get("unlabelled") or "copies" in record.rows: record for record in students}
    assert taught.keys() == {8, True, False}
    assert taught[True].rows["copies"] > 40
    assert len({record.fingerprints["taught_by"] for rows, record in taught.items() if rows}) == 1
    assert sorted(one.rows["train"] for one in result.records.values() if one.arm == "fft") == [40, 64]
    assert run_suite(suite, tmp_path / "suite").reused == 5

    # Other texts in the same file were refused for ever, since the teacher stays and its logits are of the old ones.
    file.write_text(file.read_text(encoding="utf-8").replace("long", "short"), encoding="utf-8")
    again = run_suite(suite, tmp_path / "suite")
    assert ([record.error for record in again.failed], again.reused) == ([], 4)


def test_a_teacher_labels_as_it_was_trained_to_read(suite_values, tmp_path):
    """Students of another pool had logits that the teacher never gave, and a longer grid found them stale."""
    common = {"run": {"precision": "fp32", "threads": 1}, "data": {"long_texts": "windows"}}
    for pools in (["max"], ["max", "mean"]):
        grids = {"adapters": {"data.window_pool": pools}}
        suite = build_suite(suite_values(config=common, grids=grids, arms=["kd-lora"]))
        result = run_suite(suite, tmp_path / "suite")
        assert [record.error for record in result.failed] == []
    (manifest,) = result.folder.glob(f"**/logits/{LOGITS_MANIFEST}")
    assert open_store(manifest).ingredients["windows"]["pool"] == "mean"


def test_seeds_of_a_teacher_have_one_folder_and_a_head_the_rate_of_its_control(suite_values, tmp_path):
    """The seeds that do not teach took the weights of the one that does, before it had labelled, at every call.

    The head of `kd-fft` had the teacher's rate, whatever the grid said. Where another seed came first, the weights of
    the one before taught under its name, or every student was refused for a student that the suite named no more.
    """
    data = suite_values()["tasks"]["reviews"]["data"] | {"max_train_examples": 32}
    grid = {"full_students": {"teacher.train.head_learning_rate": [1e-4, 1e-2]}}
    values = suite_values(tasks={"reviews": {"task": {}, "data": data}}, grids=grid, arms=["fft", "kd-fft"])
    suite = build_suite(values | {"seeds": [0, 1]})
    result = run_suite(suite, tmp_path / "suite")
    assert [record.error for record in result.failed] == []
    assert len(list(result.folder.glob("runs/*/*/teacher/model.safetensors"))) == 1
    students = [record for record in result.records.values() if record.arm == "kd-fft"]
    rates = [record.config["teacher"]["train"]["head_learning_rate"] for record in students]
    assert sorted(rates) == [1e-4, 1e-4, 1e-2, 1e-2]
    told = (result.folder / "runs.csv").read_text()
    assert all(f"head learning rate {rate}" in told for rate in (0.0001, 0.01))

    (weights,) = result.folder.glob("runs/*/*/teacher/model.safetensors")
    grid["full_students"]["teacher.train.head_learning_rate"].pop()
    for seeds, reused in ([1], 0), ([0, 1], 1):
        result = run_suite(build_suite(values | {"seeds": seeds}), tmp_path / "suite")
        assert [record.error for record in result.failed] == []
        assert result.reused == reused
        assert all(undamaged_record(run, result.folder) for run in result.plan.runs())
        teacher = next(record for record in result.records.values() if (record.arm, record.seed) == ("fft", seeds[0]))
        assert teacher.files["teacher/model.safetensors"] == hash_file(weights)
        marks = {one.fingerprints["taught_by"] for one in result.records.values() if one.arm == "kd-fft"}
        assert [mark.split("/")[-1] for mark in marks] == [f"fft-seed{seeds[0]} of {teacher.finished}"]


def test_runs_of_another_metric_are_not_mixed_and_of_other_rows_made_again(suite_folder, suite_values, monkeypatch):
    """Cells of an earlier version, scored by another metric or on other rows, would stand beside new ones."""
    place = next(suite_folder.glob("runs/reviews/student-lora-*/runs/*/run.json"))
    record = read_record(place)
    edit_record(place, task=record.task | {"metrics": ["macro_f1"]})
    with pytest.raises(ArtifactError, match=r"was scored by macro_f1.*now ask for accuracy\. Set task\.metric"):
        run_suite(build_suite(suite_values()), suite_folder)
    edit_record(place, fingerprints=record.fingerprints | {"data": "other"})
    (other,) = {*suite_folder.glob("runs/reviews/student-lora-*/runs/*/run.json")} - {place}
    edit_record(other, task=record.task | {"label_names": ["negative", "praise"]})  # whose codes are the same
    monkeypatch.setattr(engines, "visible_gpus", lambda: ["GPU-first", "GPU-second"])
    result = run_suite(build_suite(suite_values(arms=["student-lora"])), suite_folder)
    assert result.reused == 0
    assert any("2 runs at a time" in note for note in read_record(place).notes)


def test_a_suite_that_finds_none_of_its_runs_says_so(suite_folder, suite_values, tmp_path, monkeypatch, caplog):
    """Where data had moved, a week of runs was done again without a word."""
    values = suite_values()
    data = values["tasks"]["reviews"]["data"]
    moved = {"reviews": {"task": {}, "data": data | {"train": shutil.copy(data["train"], tmp_path)}}}
    monkeypatch.setattr("kdlora.experiment.suite._carry_out", lambda *_: None)
    run_suite(build_suite(values), suite_folder)
    assert not caplog.text
    run_suite(build_suite(values | {"tasks": moved}), suite_folder)
    assert f"none of the 8 runs in {suite_folder} is of this suite" in caplog.text


def test_missing_data_are_told_before_any_training(suite_values, tmp_path):
    """A path that is wrong on the last task must not show after a week."""
    tasks = {
        "first": {"task": {}, "data": {"train": str(tmp_path / "none.csv")}},
        "second": {"task": {}, "data": {"train": str(tmp_path / "neither.csv")}},
    }
    with pytest.raises(ConfigError, match="2 faults") as fault:
        run_suite(build_suite(suite_values(tasks=tasks)), tmp_path / "suite")
    assert "none.csv" in str(fault.value)
    assert "neither.csv" in str(fault.value)
    collection = write_collection(tmp_path / "labelled")
    with pytest.raises(ConfigError, match="that M labelled, and one teacher teaches all rows"):
        run_suite(build_suite(suite_values(config={"data": {"unlabelled": str(collection)}})), tmp_path / "suite")
    with pytest.raises(DataError, match=r"none\.csv"):
        run_suite(build_suite(suite_values(tasks={"first": tasks["first"]})), tmp_path / "suite")

    # A URL taken for a folder would be written to `s3:` beside the suite file.
    with pytest.raises(ConfigError, match=r"expected a folder to write to, not an address \(s3:"):
        run_suite(build_suite(suite_values()), "s3://bucket/suite")


def test_the_command_line_tells_by_its_exit_status(cli, suite_values, suite_folder, tmp_path):
    """A scheduler only sees the status: 0 all finished, 1 a run failed, 2 the suite is wrong."""
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(suite_values(arms=["student-lora"])), encoding="utf-8")
    planned = cli("suite", file, "--out", suite_folder, "--dry-run")
    assert "2 runs, 2 of them finished" in planned.out
    facts = json.loads(cli("suite", file, "--out", tmp_path / "new", "--dry-run", "--json").out)
    assert (facts["runs"], facts["finished"], facts["labellings"], facts["obstacle"]) == (2, 0, 0, "")
    assert facts["seconds"] > 0
    done = cli("suite", file, "--out", suite_folder)
    assert "2 runs finished, 2 of them before; 0 failed" in done.out
    bad = cli("suite", file, "--out", tmp_path / "bad", "--set", "grids.adapters={lora.targets: [[nothing]]}", code=1)
    assert "failed:" in bad.out
    wrong = cli("suite", file, "--out", tmp_path / "bad", "--set", "arms=[kd-lroa]", code=2)
    assert "Did you mean 'kd-lora'?" in wrong.err
    lost = ("suite", file, "--out", suite_folder, "--set", "tasks.reviews.data.train=none.csv")
    before = (suite_folder / "suite.yaml").read_text(encoding="utf-8")
    for more in ((), ("--dry-run",)):  # which ended with 0, "0 of them finished"
        cli(*lost, *more, code=2)
    assert (suite_folder / "suite.yaml").read_text(encoding="utf-8") == before, "that of the runs which are there"
    with FileLock(suite_folder / ".lock"):  # two schedulers would train every run twice
        assert "another process" in cli("suite", file, "--out", suite_folder, code=2).err
