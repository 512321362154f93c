"""Push and load by id, models and data sets, against a stand-in of the Hub on loopback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

import hub_standin
from fabricate import make_record
from kdlora.deploy.hub import locate_model, push_experiment
from kdlora.errors import ConfigError, KdLoraError, ModelError
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.card import FOLDER_IN_CARD, card_metadata, student_card

ROWS = [
    {"sentence": f"the film was {word}", "mood": mood}
    for word, mood in [("superb", "positive"), ("awful", "negative"), ("long", "neutral")] * 20
]
LOAD_BY_ID = """
import json, sys
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import load_splits
from kdlora.models.encoders import load_fine_tuned

splits = load_splits(TaskConfig(text="sentence", label="mood"), DataConfig(path="someone/moods", revision=sys.argv[1]))
encoder, columns = load_fine_tuned("someone/teacher", splits.task, revision=sys.argv[2])
print(json.dumps([len(splits.train), list(splits.task.label_names), encoder.model.config.num_labels]))
"""


@pytest.fixture(scope="module")
def hub():
    with hub_standin.running() as server:
        yield server
        assert server.unknown == []  # what the libraries asked for is served, or the stand-in is no stand-in


@pytest.fixture(scope="module")
def finished(tmp_path_factory, classifier_folder, exported):
    """A folder as an experiment leaves it: student with card, ONNX export, config, report."""
    layout = ExperimentLayout(tmp_path_factory.mktemp("finished") / "reviews")
    shutil.copytree(classifier_folder(), layout.student)
    shutil.copytree(exported(), layout.onnx)
    (layout.student / "README.md").write_text(student_card(make_record(), "apache-2.0"))
    layout.config.write_text("{}")
    layout.report_md.write_text("It quotes examples.")
    layout.report_html.write_text("<p>It quotes examples.")
    return layout


COMMANDS = """
import contextlib, io, json, sys
from kdlora.cli import main
told = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err, code = ["kdlora", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def python(hub, folder, *arguments, token=True):
    """Run Python in a process that knows no other Hub than the stand-in; give what it printed last."""
    environment = {**os.environ, **hub_standin.environment(hub, str(folder / "cache"), token=token)}
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def call(hub, folder, *commands, token=True):
    """Call `kdlora` several times in one process: code, output and errors of each."""
    return python(hub, folder, COMMANDS, json.dumps([list(map(str, command)) for command in commands]), token=token)


def test_a_push_is_private_is_resumed_and_its_model_loads_by_id(hub, finished, tmp_path):
    """A push that starts again from nothing after a lost connection, or shows a private model to everyone."""
    (tmp_path / "texts.txt").write_text("what a superb film\n")
    push, to = ("push", finished.root, "someone/student"), tmp_path / "said.jsonl"
    hub.refused_uploads = 1
    broken, done, again, predicted = call(
        hub,
        tmp_path,
        push,
        (*push, "--json"),
        (*push, "--json"),
        ("predict", "someone/student/onnx", tmp_path / "texts.txt", "--to", to),
    )
    assert (broken[0], "the same command again sends only what is missing" in broken[2]) == (1, True), broken
    assert done[0] == 0, done
    pushed = json.loads(done[1])
    assert pushed["private"] is hub.repositories["models/someone/student"].private is True
    assert len(hub.uploads) == len(set(hub.uploads)) == 3, "weights, ONNX and int8, each once"
    files = hub.repositories["models/someone/student"].commits[pushed["revision"]]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "onnx/model.onnx"} <= set(files)
    assert not {"config.yaml", "results.json", "report.html"} & set(files)
    assert 'model="someone/student"' in files["README.md"].decode()
    assert str(finished.root) not in b"".join(files[name] for name in files if name.endswith("json")).decode()
    assert json.loads(again[1])["revision"] == pushed["revision"], "nothing changed, so nothing is committed"
    assert predicted[0] == 0, predicted
    assert set(json.loads(to.read_text())["probabilities"]) == {"negative", "neutral", "positive"}
    asked = ("predict", "someone/student", tmp_path / "texts.txt")
    stranger, unknown = call(hub, tmp_path / "other", asked, push, token=False)
    assert (stranger[0], "no Hub model of this name that you may see" in stranger[2]) == (2, True), stranger
    assert (unknown[0], "hf auth login" in unknown[2], "Traceback" in unknown[2]) == (2, True, False), unknown


def test_a_public_repository_is_not_pushed_to_by_accident(hub, finished, tmp_path):
    """The default is private; an existing public repository would publish the model all the same."""
    hub.add("someone/open", {"README.md": b"here"})
    push, wanted = ("push", finished.root, "someone/open"), ("--public", "--report", "--revision", "second")
    refused, done = call(hub, tmp_path, push, (*push, *wanted, "--json"))
    assert (refused[0], "is public; say --public" in refused[2]) == (2, True), refused
    assert done[0] == 0, done
    repository = hub.repositories["models/someone/open"]
    assert {"report.html", "report.md"} <= set(repository.commits[repository.branches["second"]])
    assert set(repository.commits[repository.branches["main"]]) == {"README.md"}


def test_data_sets_and_fine_tuned_teachers_load_by_id_and_revision(hub, classifier_folder, tmp_path):
    """`data.path: USER/NAME` that works only against the real Hub is tested by users alone."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    first = hub.add("someone/moods", {"train.jsonl": lines}, kind="datasets")
    hub.add("someone/moods", {"train.jsonl": lines * 2}, kind="datasets")
    folder = classifier_folder("bert", "single-label")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    revision = hub.add("someone/teacher", files)
    hub.add("someone/teacher", {"config.json": b"{}"})
    assert python(hub, tmp_path, LOAD_BY_ID, first, revision) == [54, ["negative", "neutral", "positive"], 3]


def test_the_card_carries_what_the_hub_reads():
    """Metadata that the Hub refuses fail the push at its end; a path of this machine would be published."""
    from huggingface_hub import ModelCard

    record = make_record().model_copy(
        update={
            "config": {
                "student": {"model": "distilbert-base-uncased"},
                "data": {"path": "nyu-mll/glue", "subset": "mrpc"},
            }
        }
    )
    data = ModelCard(student_card(record, "apache-2.0")).data
    assert (data.base_model, data.license, data.datasets) == ("distilbert-base-uncased", "apache-2.0", ["nyu-mll/glue"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    result = data.eval_results[0]
    assert (result.metric_type, result.dataset_config) == ("accuracy", "mrpc")
    assert result.metric_value == pytest.approx(record.metrics["accuracy"], abs=1e-4)

    local = record.model_copy(update={"config": {"student": {"model": "/home/me/model"}, "data": {"path": None}}})
    assert {"base_model", "datasets", "license"}.isdisjoint(card_metadata(local))
    assert "/home/me" not in student_card(local)
    assert FOLDER_IN_CARD in student_card(local)
    yaml.safe_load(student_card(local).split("---")[1])


def test_what_cannot_be_pushed_or_found_is_refused_before_the_hub_is_asked(tmp_path, finished, monkeypatch):
    """Typing errors must not become repositories."""
    with pytest.raises(ConfigError, match="'student' is no name of a repository; expected USER/NAME"):
        push_experiment(finished.root, "student")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="has no student to push"):
        push_experiment(tmp_path, "someone/student")
    with pytest.raises(KdLoraError, match="no such folder, no Hub model of this name in the cache"):
        locate_model("someone/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(ModelError, match="runs/demo/student: there is no such folder in runs/demo"):
        locate_model("runs/demo/student")
    assert locate_model(tmp_path) == tmp_path
    assert str(locate_model("../someone/nothing")) == "../someone/nothing"
