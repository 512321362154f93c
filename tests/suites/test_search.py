"""Searches: what they may see, how they resume and share, what they leave."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from datasets import Dataset
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial
from transformers import AutoConfig, AutoModel

from experiments import copy_experiment, edit_json, read_rows
from kdlora.configfile import build_search, load_config, load_search
from kdlora.data.load import load_splits
from kdlora.data.tasks import Task
from kdlora.distil.resume import OtherTrainingError
from kdlora.distil.trainer import ProgressEvent
from kdlora.errors import ArtifactError, ConfigError, DataError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.plan import identity, reset_unused
from kdlora.experiment.search import _lines, begin_search, carry_out_trial, run_search
from kdlora.experiment.settle import rows_per_epoch, settings_for, with_values
from kdlora.experiment.study import (
    Reporter,
    ask,
    check_space,
    counted_trials,
    grid_of,
    hold_out,
    inspect_rows,
    load_held_out,
    make_teacher,
    open_study,
    planned_trials,
    settings_of,
    train_trial,
    with_settings,
)
from kdlora.models.encoders import load_encoder, save_encoder
from kdlora.searchconfig import SearchConfig
from kdlora.system.children import ChildDiedError, run_in_child
from tiny import task, write_csv

SPACE = {"student.train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "lora.rank": [2, 4]}


@pytest.fixture
def search_of(workshop):
    """`search_of(space, config changes, key=value)` gives a config and a search."""

    def give(space=SPACE, changes=None, **settings):
        values = workshop.values(changes)
        values["student"] = {**values["student"], "train": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3}}
        return build_search(values | {"search": {"space": space, **settings}})

    return give


@pytest.fixture(scope="module")
def finished_search(workshop, tmp_path_factory):
    """A search of two trials over a continuous space; read only."""
    values = workshop.values({"student": {"train": {"epochs": 2, "batch_size": 8}}})
    config, settings = build_search(values | {"search": {"space": SPACE, "trials": 2}})
    return run_search(config, settings, tmp_path_factory.mktemp("searches") / "one")


def test_nothing_of_a_held_out_text_is_learnt_and_nothing_reported_is_seen(workshop, tmp_path):
    """A config chosen on the rows that are reported afterwards scores too high, and nobody can tell by how much.

    Copies made before the rows are held out carry halves and words of the texts that judge the trial.
    """
    words = [f"w{row}" for row in range(40)]
    rows = [
        {"id": str(row), "text": f"{word} and {word} or {word}", "label": ("negative", "positive")[row % 2]}
        for row, word in enumerate(words * 2)  # every text twice
    ]
    file = write_csv(tmp_path / "train.csv", rows)
    config = workshop.config({"data": {"train": str(file), "test": str(workshop.validation), "augment": 5}})
    splits, held = load_splits(config.task, config.data), load_held_out(config, SearchConfig(validation_fraction=0.25))
    assert held.test is None
    assert sorted([*held.train["id"], *held.validation["id"]]) == sorted(splits.train["id"])
    assert rows_per_epoch(held) == rows_per_epoch(splits) == 80
    assert len(held.validation) == 20
    unseen = {text.split()[0] for text in held.validation["text"]}
    seen = {word for part in (held.train, held.unlabelled) for text in part["text"] for word in text.split()}
    assert not seen & unseen
    assert len(unseen) == 10
    pairs = Dataset.from_dict({"id": ["0", "1", "2", "3"], "text": list("aabb"), "text_pair": list("xyxx")})
    whole = dataclasses.replace(held, train=pairs.add_column("label", [0, 1, 0, 1]))
    parts = hold_out(whole, SearchConfig(validation_fraction=0.5))
    assert {len(parts.train), len(parts.validation)} <= {1, 2, 3}
    assert ("2" in parts.train["id"]) == ("3" in parts.train["id"])


def test_held_out_rows_without_an_entity_are_refused(search_of):
    """Every trial would score 0, and the first one be the best."""
    config, _ = search_of()
    splits, words = load_splits(config.task, config.data), {"starts": [[0]] * 20, "ends": [[1]] * 20}
    rows = {"id": [str(row) for row in range(20)], "text": list("abcdefghijklmnopqrst"), "label": [[1]] + [[0]] * 19}
    task = Task("tokens", ("words",), ("tags",), ("O", "B-X", "I-X"), ("entity_f1",))
    rare = dataclasses.replace(splits, task=task, train=Dataset.from_dict(rows | words))
    with pytest.raises(DataError, match=r"no held-out row has a label or an entity.*raise search\.validation_fraction"):
        hold_out(rare, SearchConfig(validation_fraction=0.1))


def test_a_label_of_one_text_stays_in_training(search_of):
    """Silent failure: trials that are judged on a label that none of them was shown."""
    config, _ = search_of()
    splits = load_splits(config.task, config.data)
    texts = [f"text {row % 30}" for row in range(60)]  # every text twice
    labels = [[*(float(row % 30 == rare) for rare in range(8)), float(row % 30 > 7)] for row in range(60)]
    train = Dataset.from_dict({"id": [str(row) for row in range(60)], "text": texts, "label": labels})
    task = Task("multi-label", ("text",), tuple("abcdefghi"), tuple("abcdefghi"), ("micro_f1",))
    held = hold_out(dataclasses.replace(splits, task=task, train=train), SearchConfig(validation_fraction=0.5))
    assert np.array(held.train["label"]).max(axis=0).tolist() == [1.0] * 9
    assert 20 <= len(held.validation) < 30
    assert not set(held.train["text"]) & set(held.validation["text"])
    two = train.select([0, 8, 30, 38])  # two texts, each twice, and each label in one of them
    with pytest.raises(DataError, match="every label has a single training row"):
        hold_out(dataclasses.replace(splits, task=task, train=two), SearchConfig())


def test_a_search_leaves_a_config_a_report_and_all_trials(finished_search, workshop):
    """The best settings in a log line are copied by hand, and wrongly."""
    assert (finished_search.finished, finished_search.pruned, finished_search.failed) == (2, 0, 0)
    best = load_config(finished_search.folder / "best.yaml")
    assert best.lora.rank == finished_search.best["lora.rank"]
    assert best.student.train.learning_rate == finished_search.best["student.train.learning_rate"]
    assert best.run.arms == workshop.config().run.arms
    page = (finished_search.folder / "search.html").read_text(encoding="utf-8")
    assert "seed" not in page[page.index("<figure") : page.rindex("</figure>")]
    assert page.count("<figure") == 1
    lines = read_rows(finished_search.folder / "trials.csv")
    assert [line["state"] for line in lines] == ["complete"] * 2
    assert max(float(line["score"]) for line in lines) == finished_search.score
    assert [line["epochs"] for line in lines] == ["2"] * 2


def test_a_second_call_goes_on_where_the_first_ended(cli, finished_search, workshop, tmp_path):
    """A search that forgets its trials repeats hours; exit status and best settings are what a script reads."""
    folder, file = copy_experiment(finished_search.folder, tmp_path / "search"), tmp_path / "config.yaml"
    values = workshop.values({"student": {"train": {"epochs": 2, "batch_size": 8}}})
    file.write_text(yaml.safe_dump(values | {"search": {"space": SPACE, "trials": 3}}), encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/trial.json")}
    found = cli("search", file, "--out", folder)
    assert "3 trials finished, 0 pruned, 0 failed" in found.out
    assert f"lora.rank: {load_config(folder / 'best.yaml').lora.rank}" in found.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("trials/*/trial.json"))) == 3
    cli("search", file, "--out", tmp_path / "s", "--set", "search.space=[]", code=2)


def test_processes_share_the_trials_of_an_arm(search_of, tmp_path):
    """Two processes that both count to N train twice as much; of another arm, trials were told as those of this one."""
    config, settings = search_of({"lora.rank": [2, 4]}, trials=30)
    search = begin_search(config, settings, tmp_path / "s")
    studies = [search.study() for _ in range(2)]
    taken = [ask(one, settings, tmp_path / "locks") for one in studies]
    assert {trial.params["lora.rank"] for trial, _ in taken} == {2, 4}
    assert ask(studies[0], settings, tmp_path / "locks") is None
    other, _ = search_of({"lora.rank": [2, 4]}, {"run": {"arms": ["kd-lora"]}})
    another = begin_search(other, settings, tmp_path / "s").study()
    assert another.study_name != studies[0].study_name
    assert ask(another, settings, tmp_path / "locks")[0].number == 0  # beside a trial 0 that is running


def test_a_trial_of_a_dead_process_is_tried_again(search_of, tmp_path):
    """A killed trial that counts as running leaves the search a trial short, for ever; that it failed is not true."""
    config, settings = search_of(trials=1)
    search = begin_search(config, settings, tmp_path / "s")
    study = search.study()
    dead, lock = ask(study, settings, search.folder / "trials")
    assert ask(study, settings, search.folder / "trials") is None  # alive as long as it holds its lock
    lock.release()
    heard = []
    result = run_search(config, settings, search.folder, listen=heard.append)
    assert (result.finished, result.failed, heard[-1].done) == (1, 0, 1)
    assert [line["trial"] for line in read_rows(search.folder / "trials.csv")] == ["1"]
    trials = search.study().trials
    assert [one.state.name for one in trials] == ["FAIL", "COMPLETE"]
    assert trials[1].params == dead.params
    assert len(counted_trials(study)) == 1


def test_a_trial_whose_child_was_killed_is_tried_once_more(search_of, tmp_path, monkeypatch):
    """The system kills what takes too much memory, perhaps for another's need: the point was lost for good.

    The same command with less memory began a new study, in which all finished trials were trained again.
    """
    config, settings = search_of(trials=1)
    search = begin_search(config, settings, tmp_path / "s")

    def die(*_, **__):
        raise ChildDiedError("killed at https://jane:hunter2hunter2@h/api")

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", die)
    assert [carry_out_trial(search)[0] for _ in range(2)] == [0, 1]
    assert carry_out_trial(search) is None
    first, second = search.study().trials
    assert (second.params, second.user_attrs["continues"]) == (first.params, 0)
    assert first.user_attrs["error"] == "ChildDiedError: killed at https://***@h/api"
    assert [one.number for one in counted_trials(search.study())] == [1]

    def train(job, *others, **options):
        done = 50.0, [{"epoch": 1.0, "score": 50.0}]
        return done if job is train_trial else run_in_child(job, *others, **options)

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", train)
    smaller = with_settings(config, {"student.train.micro_batch_tokens": 4096})
    result = run_search(smaller, settings, search.folder)
    assert (result.finished, result.failed, len(list(search.folder.glob("trials/*/.lock")))) == (1, 0, 1)
    over_memory = SearchConfig(space={"student.train.micro_batch_tokens": [4096, 16384]})
    searches = [dataclasses.replace(search, config=one, settings=over_memory) for one in (config, smaller)]
    assert len({one.study().study_name for one in searches}) == 2


def test_each_trial_is_a_new_point(tmp_path):
    """Of thirty trials over lists ten repeated another, and taught nothing; two processes had drawn the same."""
    space = {"lora.rank": [2, 4, 8], "lora.alpha": {"low": 1, "high": 5}}
    settings = SearchConfig(space=space, trials=14, startup_trials=2)
    studies = [open_study(tmp_path, "s", settings) for _ in range(2)]
    for _ in range(7):
        taken = [ask(study, settings, tmp_path / "trials") for study in studies]
        for study, (trial, lock) in zip(studies, taken, strict=True):
            study.tell(trial, trial.params["lora.rank"] - trial.params["lora.alpha"])
            lock.release()
    assert ask(studies[0], settings, tmp_path / "trials") is None
    assert len({tuple(sorted(one.params.items())) for one in studies[0].trials}) == 14


@pytest.mark.parametrize(
    ("space", "pruned"),
    [
        ({"student.train.batch_size": [8, 32]}, True),  # all have the epochs of the config's own
        ({"student.train.epochs": [3, 20]}, False),
        ({"student.model": ["a", "b"], "student.train.batch_size": [8, 32]}, False),
    ],
)
def test_trainings_of_other_lengths_are_not_pruned(tmp_path, space, pruned):
    """In its first epochs a long training is behind a short one, so the long ones would all be thrown out."""
    study = open_study(tmp_path, "s", SearchConfig(space=space, pruning_startup_trials=1))
    for score in (80.0, 60.0):
        trial = study.ask()
        for epoch in (1, 2):
            trial.report(score, epoch)
        assert trial.should_prune() == (pruned and score < 80)
        study.tell(trial, score)


def test_the_table_of_trials_has_the_epochs_that_were_trained():
    """A training of twelve epochs that was validated every third time stood there with four."""
    space = SearchConfig(space={"student.train.learning_rate": {"low": 1e-4, "high": 1e-2}})
    scores = {3: 70.0, 6: 71.0, 9: 72.0, 12: 73.0}
    rates = {"student.train.learning_rate": FloatDistribution(1e-4, 1e-2)}
    params = {"student.train.learning_rate": 1e-3}
    trial = create_trial(params=params, distributions=rates, intermediate_values=scores, value=73.0)
    assert _lines([trial], space)[1][3] == 12


def test_one_teacher_serves_all_trials_which_take_the_steps_of_the_real_training(search_of, tmp_path, monkeypatch):
    """Half of the rows in half of the steps favours high rates; a teacher that has no answer for copies fails them.

    A learning rate that diverges is a finding, not the end of the night's search; nor are checkpoints of a teacher that
    was begun on another device.
    """
    refused = []

    def carry_out(job, *others, **options):
        if job is make_teacher and not refused:
            refused.append((others[2].runs / "fft-seed0" / "checkpoints").mkdir(parents=True))
            raise OtherTrainingError("of another device")
        return run_in_child(job, *others, **options)

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", carry_out)
    teacher = {"train": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3}}
    changes = {"run": {"arms": ["kd-lora"]}, "teacher": teacher, "data": {"augment": 1}}
    space = {"student.train.learning_rate": [5e-3, 1e30]}
    config, settings = search_of(space, changes, trials=5, validation_fraction=0.5)
    heard = []
    result = run_search(config, settings, tmp_path / "s", listen=heard.append)
    assert (result.finished, result.failed) == (1, 1)
    assert result.best == {"student.train.learning_rate": 5e-3}
    assert "failed" in (result.folder / "search.md").read_text(encoding="utf-8")
    assert len(list(result.folder.glob("teachers/*/teacher/model.safetensors"))) == 1
    assert not list(result.folder.glob("teachers/*/runs")), "a teacher's checkpoint is three times its weights"
    assert {one.detail.steps for one in heard if isinstance(one.detail, ProgressEvent)} == {64 // 8}
    trial = json.loads(next(result.folder.glob("trials/*/trial.json")).read_text(encoding="utf-8"))
    assert trial["history"][-1]["step"] == 64 // 8


def test_another_teacher_at_the_same_place_begins_another_search(search_of, workshop, tmp_path, monkeypatch):
    """A rewritten table had the best settings of the old one at once, and old and new scores were ranked together."""
    table, model, trained = tmp_path / "table.csv", tmp_path / "model", []

    def train(job, *others, **options):
        if job is not train_trial:
            return run_in_child(job, *others, **options)
        trained.append(others[2].root)
        return 50.0, [{"epoch": 1.0, "score": 50.0}]

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", train)
    arms = {"run": {"arms": ["kd-lora"]}}
    for sure in (1, 2):
        rows = [{"id": row["id"], "negative": sure, "positive": -sure} for row in read_rows(workshop.train)]
        config, settings = search_of(
            SPACE, arms | {"teacher": {"model": None, "logits": str(write_csv(table, rows))}}, trials=1
        )
        assert run_search(config, settings, tmp_path / "s").finished == 1
    assert len(trained) == len(set(trained)) == 2
    search, seen = search_of(SPACE, arms | {"teacher": {"fine_tuned": str(model)}}), []
    for seed in (1, 2, 2):
        save_encoder(load_encoder(str(workshop.teacher), task(), seed=seed), model)
        seen.append(inspect_rows(*search)[0])
    assert seen[0] != seen[1] == seen[2]


def test_another_pretrained_model_at_the_same_place_begins_another_search(search_of, workshop, tmp_path):
    """Trials of old and new weights were ranked together, and the new student learnt from the old teacher."""
    seen = []
    for role in ("teacher", "teacher", "student"):
        for changed in (False, True):
            folder = shutil.copytree(getattr(workshop, role), tmp_path / role, dirs_exist_ok=True)
            if changed:
                encoder = load_encoder(str(folder), task(), seed=0)
                encoder.model.get_input_embeddings().weight.data += 0.01
                save_encoder(encoder, folder)
            model = {"teacher": {"model": str(folder)}} if role == "teacher" else {"student": {"model": str(folder)}}
            seen.append(inspect_rows(*search_of(SPACE, {"run": {"arms": ["kd-lora"]}} | model))[0])
    assert seen[:2] == seen[2:4]
    assert len(set(seen)) == 3


def test_a_small_space_has_no_more_trials_than_points(search_of):
    """The bar of three ranks ended at 3 of 30, as if the search had been stopped."""
    assert planned_trials(search_of({"lora.rank": [4, 8, 16]}, trials=30)[1]) == 3
    assert planned_trials(search_of({"lora.rank": [4, 8, 16]}, trials=2)[1]) == 2


def test_an_interrupted_search_leaves_its_best_and_another_space_begins_anew(search_of, tmp_path, monkeypatch, caplog):
    """Ctrl-C in the third trial left neither report nor best.yaml; a changed range replaced both without a word."""
    scores = [50.0, 60.0]

    def train(job, *others, **options):
        if job is not train_trial:
            return run_in_child(job, *others, **options)
        if not scores:
            raise KeyboardInterrupt
        return (score := scores.pop()), [{"epoch": 1.0, "score": score}]

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", train)
    config, settings = search_of(trials=3)
    with pytest.raises(KeyboardInterrupt):
        run_search(config, settings, tmp_path / "s")
    assert [line["score"] for line in read_rows(tmp_path / "s" / "trials.csv")][:2] == ["60.0", "50.0"]
    assert (tmp_path / "s" / "best.yaml").exists()
    begin_search(config, settings, tmp_path / "s")
    assert "begins anew" not in caplog.text
    begin_search(*search_of({"lora.rank": [2, 4, 8]}, trials=3), tmp_path / "s")
    assert "begins anew" in caplog.text


def test_a_trial_that_is_not_as_it_was_written_is_trained_again(finished_search, workshop, tmp_path):
    """A score of 99 in a file that was found again became the best; half a file was a traceback without a name."""
    folder = copy_experiment(finished_search.folder, tmp_path / "search")
    (folder / "journal.log").unlink()
    first, second = folder.glob("trials/*/trial.json")
    edit_json(first, score=99.0)
    second.write_text(second.read_text(encoding="utf-8")[:40], encoding="utf-8")
    values = workshop.values({"student": {"train": {"epochs": 2, "batch_size": 8}}})
    again = run_search(*build_search(values | {"search": {"space": SPACE, "trials": 2}}), folder)
    assert (again.score, again.best, again.failed) == (finished_search.score, finished_search.best, 0)


def test_the_rate_that_is_searched_is_that_of_the_arm(search_of, tmp_path):
    """Thirty trials of `lora` were one training, at a rate that no trial named."""
    config, settings = search_of(SPACE, {"run": {"arms": ["lora"]}}, arm="lora")
    search = begin_search(with_values(config, {"student.train.learning_rate": None}), settings, tmp_path / "s")
    trial = with_settings(search.config, {"student.train.learning_rate": 2e-3})
    assert settings_for(trial, "lora").learning_rate == 2e-3


def test_the_arm_that_is_searched_is_told_where_another_ships(search_of, tmp_path, monkeypatch, caplog):
    """After hours of trials of kd-lora, kd-fft shipped, of which none of the found settings is."""

    def end(*_):
        raise ChildDiedError("that is enough")

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", end)
    both = ["kd-lora", "kd-fft"]
    for arms, arm, told in ((both, None, 1), (both, "kd-lora", 0), (["kd-lora"], None, 0)):
        caplog.clear()
        with pytest.raises(ChildDiedError):
            begin_search(*search_of(SPACE, {"run": {"arms": arms}}, arm=arm), tmp_path / "s")
        assert sum("--set search.arm=kd-fft searches that arm" in one for one in caplog.messages) == told


def test_each_model_of_a_search_is_trained_at_its_own_rate(workshop, tmp_path, monkeypatch):
    """All at the rate of the config's own model, the search would compare rates and not models."""
    wide = shutil.copytree(workshop.teacher, tmp_path / "wide")
    AutoModel.from_config(AutoConfig.from_pretrained(wide, hidden_size=64)).save_pretrained(wide)
    train = {"epochs": 1, "batch_size": 8, "learning_rate": None}
    space = {"student.model": [str(workshop.student), str(wide)]}
    values = workshop.values({"student": {"model": str(workshop.student), "train": train}})
    config, settings = build_search(values | {"search": {"space": space, "trials": 2}})
    rates = {}

    def watch(job, config, *others, **options):
        if job is train_trial:
            rates[config.student.model] = config.student.train.learning_rate
        return run_in_child(job, config, *others, **options)

    monkeypatch.setattr("kdlora.experiment.search.run_in_child", watch)
    result = run_search(config, settings, tmp_path / "s")
    assert rates == {str(workshop.student): 0.012, str(wide): 0.006}
    best = load_config(result.folder / "best.yaml").student
    assert (best.model, best.train.learning_rate) == (result.best["student.model"], None)  # settled by `kdlora run`


def test_the_pruner_gets_each_epochs_own_score_and_the_training_stops(search_of, tmp_path):
    """An event at the end of an epoch carries the score of the epoch before; a pruned trial would train to its end."""
    reports, stop = [], tmp_path / "stop"
    trial = SimpleNamespace(
        report=lambda score, epoch: reports.append((epoch, score)), should_prune=lambda: reports[-1][0] == 2
    )
    reporter = Reporter(trial, stop, lambda event: None)
    events = [(0.5, None, 0), (1.0, None, 0), (1.0, 70.0, 1), (1.4, 70.0, 1), (2.0, 70.0, 1), (2.0, 60.0, 2)]
    for epoch, score, scored in events:
        reporter.hear(ProgressEvent(epoch, 3, 0, 0, 0.0, score, scored=scored))
    assert (reports, stop.exists()) == ([(1, 70.0)], False)
    for epoch in (2.3, 2.6, 3.4):  # of many epochs few are scored
        reporter.hear(ProgressEvent(epoch, 3, 0, 0, 0.0, 60.0, scored=2.0))
    assert (reports, stop.exists()) == ([(1, 70.0), (2, 60.0)], True)
    config, settings = search_of(validation_fraction=0.2)
    layout = ExperimentLayout(tmp_path / "trial")
    assert train_trial(config, settings, layout, "student-lora", stop, lambda event: None)[0] is None


def test_a_journal_is_locked_without_a_link_and_told_where_damaged(search_of, tmp_path, monkeypatch):
    """Optuna's traceback of a hundred lines hides the four words that matter; a full disk cost all trials."""
    config, settings = search_of(seed=2**32 - 1)
    monkeypatch.setattr("os.symlink", lambda *_, **__: pytest.fail("locked by a link, for good after a kill"))
    run = begin_search(config, settings, tmp_path / "s")
    run.study()
    with (run.folder / "journal.log").open("ab") as file:
        file.write(b'{"op_code":4,"wor')  # what a full disk left of a line, which the next one must not be glued to
    assert ask(run.study(), settings, run.folder / "trials")
    assert len(run.study().trials) == 1
    (run.folder / "journal.log").write_text("mine\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"journal\.log is damaged .*; delete it"):
        run_search(config, settings, run.folder)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({}, "there is nothing to search"),
        ({"lora.rnak": [1]}, "lora.rnak: unknown key. Did you mean 'rank'"),
        ({"lora.rank": [0]}, "lora.rank: input should be greater than or equal to 1"),
        ({"run.seeds": [[0]]}, "run.seeds: a search is over keys of teacher"),
        ({"lora.rank": [8, 8]}, "lora.rank: 8 stands twice"),
        ({"lora.dropout": {"low": 0.0, "high": 0.1, "log": True}}, "a logarithmic range starts above 0"),
        ({"lora.rank": 8}, "expected a list of values"),
        ({"lora.dropout": {"low": 0.2, "high": 0.1}}, "lora.dropout: low 0.2 is above high 0.1"),
        ({"lora.dropout": {"low": "x", "high": 0.1}}, "lora.dropout: low: Input should be a valid number"),
        ({"lora.rank": {"low": 4, "high": 16, "lgo": 1}}, "lora.rank: unknown lgo; a range has low, high, log"),
        ({"lora.rank": {"low": 4.0, "high": 16.0}}, "lora.rank: .* fractional part"),  # its ends alone are whole
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(search_of, space, expected):
    """A fault in the space that shows at trial 17 costs sixteen trials."""
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        check_space(*search_of(space), "student-lora")


@pytest.mark.parametrize(
    ("arm", "key", "values", "is_searched"),
    [
        ("student-fft", "student.train.learning_rate", [1e-3, 1e-2], False),
        ("student-fft", "student.full_learning_rate", [1e-5, 1e-4], True),
        ("student-lora", "distil.alpha", [0.1, 0.9], False),
        ("kd-lora", "distil.alpha", [0.1, 0.9], True),
        ("kd-lora", "teacher.train.learning_rate", [1e-3, 1e-2], True),
        ("fft", "lora.rank", [2, 4], False),
    ],
)
def test_a_key_that_changes_nothing_is_not_searched(search_of, arm, key, values, is_searched):
    """Thirty trainings of one config, of which the first was told as the best learning rate."""
    config, settings = search_of({key: values}, {"run": {"arms": ["fft", "kd-lora", "student-lora", "student-fft"]}})
    with nullcontext() if is_searched else pytest.raises(ConfigError, match=f"{key} changes nothing of the arm {arm}"):
        check_space(config, settings, arm)


def test_nothing_of_a_given_teacher_is_searched(search_of, tmp_path):
    """Its trials were one training under many rates, of which the first was told as the best."""
    config, settings = search_of({"teacher.train.learning_rate": [1e-5, 1e-4]}, {"run": {"arms": ["fft", "kd-lora"]}})
    given = with_values(config, {"teacher.fine_tuned": str(tmp_path)})
    with pytest.raises(ConfigError, match="changes nothing of the arm kd-lora"):
        check_space(given, settings, "kd-lora")
    with pytest.raises(ConfigError, match="a teacher that is given is not trained"):
        begin_search(with_values(given, {"run.arms": ("fft",)}), settings, tmp_path / "s")


def test_the_adapters_of_a_teacher_are_part_of_what_it_teaches(search_of):
    """Three trials over the rank of a teacher's adapters were one training, told three times."""
    values = {"teacher": {"tuning": "lora"}, "run": {"arms": ["lora", "kd-fft"]}}
    config, _ = search_of({"lora.rank": [1, 4]}, values)
    one, other = (identity(reset_unused(with_values(config, {"lora.rank": rank}), "kd-fft")) for rank in (1, 4))
    assert one != other


def test_a_grid_stays_within_its_range():
    """0.1 + 2 x 0.1 is above 0.3, and such a trial was refused when the search went on."""
    space = {"lora.dropout": {"low": 0.1, "high": 0.3, "step": 0.1}}
    assert grid_of(SearchConfig(space=space, trials=5))["lora.dropout"] == pytest.approx([0.1, 0.2, 0.3])
    assert max(grid_of(SearchConfig(space=space, trials=5))["lora.dropout"]) == 0.3


def test_spaces_are_read_as_they_are_written(workshop, tmp_path):
    """A rank of 8.0, or a list that Optuna cannot keep, would fail far from the file that says it."""
    search = SearchConfig(
        space={
            "lora": {"rank": {"low": 2, "high": 8, "step": 2}, "targets": [["query"], "all-linear"]},
            "distil.alpha": {"low": 0.0, "high": 1.0, "step": 0.5},
        },
        trials=24,
    )
    grid = grid_of(search)
    assert grid["lora.rank"] == [2, 4, 6, 8]
    assert grid["distil.alpha"] == [0.0, 0.5, 1.0]
    point = settings_of(search, {key: values[0] for key, values in grid.items()})
    assert point == {"lora.rank": 2, "lora.targets": ["query"], "distil.alpha": 0.0}
    assert grid_of(search.model_copy(update={"trials": 23})) is None

    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(workshop.values() | {"search": {"space": {"student.model": ["./a", "b/c"]}}}))
    space = load_search(file)[1].space["student.model"]  # paths are the config's, ids stay
    assert space.values == (str(tmp_path.resolve() / "a"), "b/c")

    # `kdlora run` must take the same file, and the search must not become part of the experiment.
    values = workshop.values() | {"search": {"space": {"lora.rank": [2, 4]}, "trials": 7}}
    file, space = tmp_path / "config.yaml", tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    space.write_text("lora.rank: [16]\n", encoding="utf-8")
    assert load_config(file) == workshop.config()
    assert load_search(file)[1].trials == 7
    found = load_search(file, ["search.trials=9"], space=space)[1]
    assert (found.trials, found.space["lora.rank"].values) == (9, (16,))
    found = load_search(file, ["search.space={lora.alpha: [1, 2]}"])[1]  # the file's was searched beside it
    assert list(found.space) == ["lora.alpha"]
    with pytest.raises(ConfigError, match=r"search: 1 fault\n  - trails: unknown key. Did you mean 'trials'"):
        load_search(file, ["search.trails=9"])
    with pytest.raises(ConfigError, match="seed: input should be less than 4294967296"):
        load_search(file, [f"search.seed={2**32}"])
