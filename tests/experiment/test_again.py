"""The same command again, another command on the same folder, and what goes wrong on the way."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import ARMS, FAST, copy_experiment, edit_json, predicted, snapshot
from kdlora.configfile import load_config, save_config
from kdlora.errors import ArtifactError, KdLoraError, ModelError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment import deployment, jobs, preview
from kdlora.experiment import run as experiment_run
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.experiment.scoring import evaluate_experiment
from kdlora.experiment.settle import with_recorded, with_values
from kdlora.experiment.stages import train_run
from kdlora.report.shipped import BenchmarkResult
from kdlora.section import DataConfig
from kdlora.system.ownership import MANIFEST
from kdlora.system.storage import hold_lock

ALL = {"run": {"arms": ARMS, "seeds": [0, 1]}}


@pytest.fixture
def copied(experiment, tmp_path):
    """The layout of a copy of the finished experiment, free to be changed."""
    return ExperimentLayout(copy_experiment(experiment.folder, tmp_path / "copy"))


def test_the_same_command_again_repeats_nothing(experiment, copied, workshop, tmp_path, monkeypatch):
    """A second call that trains again, as where a check of damage cries wolf, costs hours, and may ship another."""
    (copied.root / MANIFEST).unlink()  # which version 0.1 did not write
    (copied.student / "LICENSE").write_text("put there by hand")  # it was exported anew, and its thresholds were gone
    before = snapshot(copied.root)
    # No stage, and no server of children that would import torch once more.
    for module in (experiment_run, jobs, preview):
        monkeypatch.setattr(module, "run_in_child", lambda *_, **__: pytest.fail("a process was started"))
    again = run_experiment(workshop.config(ALL), copied.root)
    assert again.records == experiment.records
    assert again.shipped == experiment.shipped
    assert (copied.root / MANIFEST).is_file()
    after = snapshot(copied.root)
    assert after.keys() >= before.keys()
    kept = {name for name in before if name.split("/")[0] in ("runs", "teacher", "student", "adapter")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}

    # A note of open keys that lacks one of a later version made another config of the same call.
    asked = workshop.config(ALL)
    edit_json(copied.root / MANIFEST, open={"lora.rank": False})
    experiment_run.check_folder(with_recorded(asked, copied.config), copied, asked)

    # Folders that were begun when four copies were the default go on with four.
    (copied.root / MANIFEST).write_text(json.dumps({"made_by": "kdlora", "kind": "experiment"}))
    opened = with_values(asked, {"data.augment": None})
    settled = with_recorded(opened, copied.config)
    assert settled.data.augment == asked.data.augment is not None
    experiment_run.check_folder(settled, copied, opened)

    # The remedy of a want of memory, or of cores, was "another config"; so were data that had moved with the folder.
    less = {"train": FAST | {"micro_batch_tokens": 64, "gradient_checkpointing": True}}
    data = {"train": shutil.copy(workshop.train, tmp_path), "validation": str(workshop.validation)}
    changes = {"data": data, "teacher": less, "student": less, "run": ALL["run"] | {"threads": 2}}
    assert run_experiment(workshop.config(ALL | changes), copied.root).records == experiment.records


def test_a_config_made_by_hand_is_run_once_and_its_student_is_measured(workshop, tmp_path, monkeypatch):
    """The folder's config named a file below the folder, so that the same call again was another experiment.

    The settings of a teacher that nobody trains stay open, and the run said that its export had failed; it said
    so, too, where the measurement was killed.
    """
    monkeypatch.chdir(workshop.train.parent)
    data = DataConfig(train=workshop.train.name, validation=str(workshop.validation))
    config = workshop.config({"teacher": {"train": FAST | {"learning_rate": None}}})
    config = config.model_copy(update={"data": data})
    result = run_experiment(config, tmp_path / "out")
    assert load_config(result.layout.config).data.train == str(workshop.train)
    monkeypatch.setattr(jobs, "run_in_child", lambda *_, **__: pytest.fail("a run was repeated"))
    run_experiment(config, tmp_path / "out")
    measured = []
    monkeypatch.setattr(deployment, "benchmark", lambda models, *_, **__: measured.extend(models) or BenchmarkResult())
    notes = deployment.deploy_student(with_values(config, {"export.benchmark": True}), result.layout, print)
    assert measured == ["student"]
    assert not [note for note in notes if "was not" in note]

    def die(*_, **__):
        result.layout.exported.touch()
        raise RuntimeError("killed")

    monkeypatch.setattr(experiment_run, "run_in_child", die)
    lost = run_experiment(config, tmp_path / "out")
    assert "The student was not measured: killed" in lost.notes
    assert lost.is_export_lost  # the command ended with 0
    assert not result.is_export_lost


def test_a_report_is_made_whatever_hinders_the_shipping(copied, workshop, monkeypatch):
    """Trainings of a night were done and had no report, since the pretrained model's folder had been moved."""
    for file in (copied.shipped, copied.report_html):
        file.unlink()

    def fail(*_, **__):
        raise ModelError("there is no model")

    monkeypatch.setattr(experiment_run, "run_in_child", fail)
    with pytest.raises(ModelError, match="there is no model"):
        run_experiment(workshop.config(ALL), copied.root)
    assert copied.report_html.exists()


def test_damaged_results_are_written_anew_from_the_runs(copied, workshop):
    """The message told to delete the folders of runs: trainings of hours, for a file of seconds."""
    before = copied.results.read_bytes()
    copied.results.write_bytes(before[:-20])
    with pytest.raises(ArtifactError, match="`kdlora run` again writes it anew"):
        evaluate_experiment(copied.root, str(workshop.validation))
    run_experiment(workshop.config(ALL), copied.root)
    assert copied.results.read_bytes() == before


def test_a_calibration_says_what_no_temperature_takes_back(copied):
    """Rare classes stayed three times too probable, and the documentation said that a temperature takes that back."""
    config = with_values(load_config(copied.config), {"export.calibrate": True})
    for weights, told in (("balanced", 1), (None, 0)):
        wanted = with_values(config, {"student.train.class_weights": weights})
        notes = deployment.deploy_student(wanted, copied, print)
        assert notes[0].startswith("Calibrated with temperature")
        assert sum("which no temperature takes back" in note for note in notes) == told


def test_arms_may_be_added_whose_models_nobody_looked_at(workshop, tmp_path):
    """The rates of a teacher that was not there yet were open; settled later, they were "another config"."""
    values = {"teacher": {"train": FAST | {"learning_rate": None}}}
    first = run_experiment(workshop.config(values), tmp_path / "out")
    both = run_experiment(workshop.config(values | {"run": {"arms": ["fft", "student-lora"]}}), tmp_path / "out")
    assert [one.arm for one in both.records] == ["fft", "student-lora"]
    assert both.records[1] == first.records[0]
    settled = load_config(both.layout.config)
    assert settled.teacher.train.learning_rate > 0
    for again in (settled, workshop.config(values | {"run": {"arms": ["fft", "student-lora"]}})):
        assert run_experiment(again, tmp_path / "out").records == both.records


def test_what_cannot_be_had_of_the_student_is_refused_and_takes_nothing(copied, workshop, monkeypatch):
    """The export went before the missing package was noticed; a misspelt label was a note after all trainings."""
    before = snapshot(copied.root)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "nncf" else find(name, *more))
    for changes, told in (
        ({"export": {"formats": ["onnx", "openvino"]}}, r"export\.formats: openvino.*openvino-export"),
        ({"export": {"thresholds": {"negativ": "f1"}}}, r"no label 'negativ'.*Did you mean 'negative'"),
        ({"export": {"min_recall": {"PER": 0.9}}}, r"export\.min_recall: only a task of tokens"),
        ({"defer": {"error": 0.1}}, "defer: there is no test split"),
    ):
        with pytest.raises(KdLoraError, match=told):
            run_experiment(workshop.config(ALL | changes), copied.root)
    assert snapshot(copied.root) == before


def test_a_given_teacher_that_is_not_there_costs_the_student_no_score(copied, workshop, caplog):
    """On the machine to which the folder was moved, nothing was told at all."""
    shutil.rmtree(copied.teacher)
    config = yaml.safe_load(copied.config.read_text())
    config["teacher"]["fine_tuned"] = "/gone/teacher"
    copied.config.write_text(yaml.safe_dump(config))
    assert [row["model"] for row in evaluate_experiment(copied.root, str(workshop.validation))] == ["student"]
    assert "the teacher is not scored" in caplog.text


def test_a_run_without_weights_keeps_its_record_until_it_ships(copied, workshop):
    """Weights deleted to save space: the scores still hold. With the arms narrowed, another arm ships and has none."""
    shutil.rmtree(copied.run("student-fft", 0).model)
    records, before = sorted(copied.runs.glob("*/run.json")), predicted(copied, "student-fft", 0).logits

    def interrupt(stage, event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(workshop.config(ALL), copied.root, listen=interrupt)
    assert sorted(copied.runs.glob("*/run.json")) == records
    narrowed = workshop.config({"run": {"arms": ["student-fft"]}})
    copied.report_md.unlink()
    for by_hand in (copied.student / "service.py", copied.adapter / "service.py"):
        by_hand.parent.mkdir(exist_ok=True)
        by_hand.write_text("put there by hand")
        with pytest.raises(ArtifactError, match=r"service\.py is no file of a model, and would be lost"):
            run_experiment(narrowed, copied.root)
        assert by_hand.exists()
        assert copied.report_md.exists(), "the trainings are done, and their report is due"
        by_hand.unlink()
    (copied.page / "notes").mkdir(parents=True)
    assert "page's folder; name another, or empty it" in run_experiment(narrowed, copied.root).notes[-1]
    (copied.page / "notes").rmdir()  # which it did not take for its own, and remove
    result = run_experiment(narrowed, copied.root)
    assert (result.shipped.arm, result.shipped.seed) == ("student-fft", 0)
    assert not copied.adapter.exists()  # the old one belongs to another student
    card = (copied.student / "README.md").read_text()
    assert "`student-fft`" in card
    told = "it is the only student with a score, among the arms and seeds that the last call named."
    for text in (copied.shipped.read_text(), card, copied.report_md.read_text()):  # which shows the other arms, too
        assert told in text
    np.testing.assert_array_equal(predicted(copied, "student-fft", 0).logits, before)  # the same seed, the same numbers


def test_a_training_replaces_no_folder_with_a_file_of_the_user(copied, workshop):
    """Notes beside the teacher's weights, or beside an adapter, were gone when these were trained anew."""
    for arm, folder in (("fft", copied.teacher), ("kd-lora", copied.run("kd-lora", 0).adapter)):
        notes = folder / "notes.txt"
        notes.write_text("put there by hand")
        with pytest.raises(ArtifactError, match=rf"{folder.name}/notes\.txt is no file of a model, and would be lost"):
            train_run(workshop.config(ALL), copied, arm, 0, lambda event: None)
        assert notes.exists()
        notes.unlink()


def test_a_control_differs_from_the_distilled_arm_by_its_teacher_alone(copied, workshop):
    """With the teacher's weight at 0, the distilled arm must be its control: same head, adapters, rows and order."""
    (copied.teacher / "model.safetensors").unlink()
    for arm, control in (("kd-lora", "student-lora"), ("kd-fft", "student-fft")):
        distilled = predicted(copied, arm, 1).logits
        assert not np.array_equal(distilled, predicted(copied, control, 1).logits)  # the teacher does matter
        train_run(workshop.config(ALL | {"distil": {"alpha": 1.0}}), copied, arm, 1, lambda event: None)
        np.testing.assert_array_equal(predicted(copied, arm, 1).logits, predicted(copied, control, 1).logits)


def test_a_given_teacher_has_no_seed(workshop, tmp_path):
    """Seeds in another order were another config: the first is the teacher's seed, where one is trained."""
    layout, teacher = ExperimentLayout(tmp_path / "out"), {"teacher": {"fine_tuned": str(tmp_path)}}
    first, second = (workshop.config(teacher | {"run": {"arms": ARMS, "seeds": seeds}}) for seeds in ([0, 1], [1, 0]))
    layout.root.mkdir()
    layout.config.write_text(save_config(first), encoding="utf-8")
    experiment_run.check_folder(second, layout)


def test_another_config_is_refused_and_named(copied, workshop):
    """Runs of two configs in one folder make a table that compares nothing."""
    before = snapshot(copied.root)
    config = workshop.config(ALL | {"lora": {"rank": 4}, "distil": {"temperature": 3.0}})
    with pytest.raises(ArtifactError) as caught:
        run_experiment(config, copied.root)
    for told in (
        f"{copied.root} belongs to another config",
        "distil.temperature: 2.0 there, 3.0 here",
        "lora.rank: 8 there, 4 here",
        "--out",
        f"--set teacher.fine_tuned={copied.root.resolve() / 'teacher'}",
    ):
        assert told in str(caught.value)
    with pytest.raises(ArtifactError, match=r"teacher\.seed: 0 there, 5 here"):  # which the first seed decides
        run_experiment(workshop.config({"run": {"arms": ARMS, "seeds": [5, 0, 1]}}), copied.root)
    # A quick look trained for an epoch; the plain command that came after it took its figures for those of the whole.
    with pytest.raises(ArtifactError, match=r"student\.train\.epochs: 2\.0 there, None here"):
        run_experiment(workshop.config(ALL | {"student": {"train": FAST | {"epochs": None}}}), copied.root)
    with pytest.raises(ArtifactError, match="or delete it"):  # another teacher
        run_experiment(workshop.config(ALL | {"teacher": {"train": FAST | {"epochs": 5}}}), copied.root)
    assert snapshot(copied.root) == before


def test_what_another_call_did_between_plan_and_lock_counts(experiment, workshop, tmp_path):
    """While "Begin?" waits, another call can finish: its runs were repeated, or another config's put beside them."""

    def begin(name, changes):
        out = tmp_path / name
        config = workshop.config(ALL | changes)
        return run_experiment(config, out, before=lambda plan: copy_experiment(experiment.folder, out))

    assert begin("same", {}).records == experiment.records
    with pytest.raises(ArtifactError, match=r"lora\.rank: 8 there, 4 here"):
        begin("other", {"lora": {"rank": 4}})


def test_other_rows_do_not_get_the_steps_that_were_chosen_for_the_first(workshop, tmp_path, monkeypatch):
    """Ctrl-C before a run had ended, a shorter file, and its few rows got the one epoch that was chosen for many."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    train, out = Path(shutil.copy(workshop.train, tmp_path)), tmp_path / "out"
    data = {"train": str(train), "validation": str(workshop.validation)}
    config = workshop.config({"data": data, "student": {"train": FAST | {"epochs": None}}})
    monkeypatch.setattr(experiment_run, "carry_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, out)
    whole = train.read_bytes()
    train.write_bytes(b"".join(whole.splitlines(keepends=True)[:-8]))
    with pytest.raises(ArtifactError, match=rf"{out} was begun with other rows .* or delete it"):
        run_experiment(config, out)
    train.write_bytes(whole)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, out)
    train.write_bytes(b"".join(whole.splitlines(keepends=True)[:-8]))
    (out / "config.yaml").unlink()  # as by `rm -r OUT/*`
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, out)


def test_labels_of_other_names_are_other_rows(workshop, tmp_path):
    """A class was renamed in the data, and the same command shipped the old names as if they were the new ones."""
    train, validation = (Path(shutil.copy(path, tmp_path)) for path in (workshop.train, workshop.validation))
    data, out = {"train": str(train), "validation": str(validation)}, tmp_path / "out"
    config = workshop.config({"data": data, "run": {"arms": ["student-lora"]}})
    run_experiment(config, out)
    for path in (train, validation):
        path.write_text(path.read_text(encoding="utf-8").replace("positive", "praise"), encoding="utf-8")
    for again in (config, workshop.config({"data": data, "run": {"arms": ["student-lora", "fft"]}})):
        with pytest.raises(ArtifactError, match=rf"{out} was begun with other rows or labels"):
            run_experiment(again, out)


def test_a_teacher_that_is_trained_again_is_in_the_plan(copied, workshop):
    """Half of the hours were missing where the teacher's folder had been removed to save space."""
    shutil.rmtree(copied.teacher)
    assert not plan_experiment(workshop.config(ALL), copied.root).trainings
    shutil.rmtree(copied.run("kd-fft", 1).model)
    plan = plan_experiment(workshop.config(ALL), copied.root)
    assert [(one.arm, one.runs) for one in plan.trainings] == [("fft", 1), ("kd-fft", 1)]


def test_a_folder_of_something_else_or_of_another_process_is_refused(workshop, tmp_path):
    """`--out ~` must not fill a home folder; `tests/security/test_files.py` has one that is full."""
    (tmp_path / "a.txt").write_text("dear")
    layout = ExperimentLayout(tmp_path / "new")
    layout.root.mkdir()
    layout.lock.touch()  # left by a first call that was killed
    for place in ("a.txt", "a.txt/out"):
        with pytest.raises(ArtifactError, match=r"a\.txt is no folder; name one"):
            run_experiment(workshop.config(), tmp_path / place)

    # Two processes in one folder overwrite each other's checkpoints.
    told = f"another process runs the experiment in {layout.root}"
    with hold_lock(layout.lock, "is another"), pytest.raises(ArtifactError, match=told):
        run_experiment(workshop.config(), layout.root)
