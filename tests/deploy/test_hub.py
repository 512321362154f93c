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
encoder, columns = load_fine_tuned("someone/student", splits.task, revision=sys.argv[2])
print(json.dumps([len(splits.train), list(splits.task.label_names), encoder.model.config.num_labels]))
"""


@pytest.fixture
def hub():
    with hub_standin.running() as server:
        yield server
        assert server.unknown == []  # what the libraries asked for is served, or the stand-in is no stand-in


@pytest.fixture
def finished(tmp_path, classifier_folder, exported):
    """A folder as an experiment leaves it: student with card, ONNX export, config, report."""
    layout = ExperimentLayout(tmp_path / "runs" / "reviews")
    shutil.copytree(classifier_folder(), layout.student)
    shutil.copytree(exported(), layout.onnx)
    (layout.student / "README.md").write_text(student_card(make_record(), "apache-2.0"))
    layout.config.write_text("{}")
    layout.report_md.write_text("It quotes examples.")
    layout.report_html.write_text("<p>It quotes examples.")
    return layout


def call(hub, tmp_path, *arguments, token=True, text=None):
    """Run Python in a process that knows no other Hub than the stand-in."""
    environment = {**os.environ, **hub_standin.environment(hub, str(tmp_path / "cache"), token=token)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, input=text
    )


def test_a_push_is_private_is_resumed_and_its_model_loads_by_id(hub, finished, tmp_path):
    """A push that starts again from nothing after a lost connection, or shows a private model to everyone."""
    command = ("-m", "kdlora", "push", finished.root, "someone/student")
    hub.refused_uploads = 1
    broken = call(hub, tmp_path, *command)
    assert broken.returncode == 1, broken.stderr
    assert "the same command again sends only what is missing" in broken.stderr
    sent = list(hub.uploads)
    done = call(hub, tmp_path, *command, "--json")
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)
    assert pushed["private"] is True
    assert hub.repositories["models/someone/student"].private
    assert len(hub.uploads) == len(set(hub.uploads)) == 3, "weights, ONNX and int8, each once"
    assert set(sent) < set(hub.uploads)

    files = hub.repositories["models/someone/student"].commits[pushed["revision"]]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "onnx/model.onnx"} <= set(files)
    assert not {"config.yaml", "results.json", "report.html"} & set(files)
    assert 'model="someone/student"' in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(content for name, content in files.items() if name.endswith("json"))

    again = call(hub, tmp_path, *command, "--json")
    assert json.loads(again.stdout)["revision"] == pushed["revision"], "nothing changed, so nothing is committed"
    assert len(hub.uploads) == 3

    name = f"someone/student/onnx@{pushed['revision']}"
    predicted = call(hub, tmp_path, "-m", "kdlora", "predict", name, "-", text="what a superb film\n")
    assert predicted.returncode == 0, predicted.stderr
    assert set(json.loads(predicted.stdout)["probabilities"]) == {"negative", "neutral", "positive"}
    stranger = call(hub, tmp_path / "other", "-m", "kdlora", "predict", "someone/student", "-", token=False, text="x\n")
    assert stranger.returncode == 2
    assert "no Hub model of this name that you may see" in stranger.stderr


def test_a_public_repository_is_not_pushed_to_by_accident(hub, finished, tmp_path):
    """The default is private; an existing public repository would publish the model all the same."""
    hub.add("someone/student", {"README.md": b"here"})
    refused = call(hub, tmp_path, "-m", "kdlora", "push", finished.root, "someone/student")
    assert refused.returncode == 2
    assert "is public; say --public" in refused.stderr
    assert hub.uploads == []
    wanted = ("--public", "--report", "--revision", "second")
    done = call(hub, tmp_path, "-m", "kdlora", "push", finished.root, "someone/student", *wanted, "--json")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["models/someone/student"]
    assert {"report.html", "report.md"} <= set(repository.commits[repository.branches["second"]])
    assert set(repository.commits[repository.branches["main"]]) == {"README.md"}


def test_without_a_token_the_push_says_how_to_log_in(hub, finished, tmp_path):
    """A traceback of an HTTP library is how this usually ends."""
    done = call(hub, tmp_path, "-m", "kdlora", "push", finished.root, "someone/student", token=False)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_sets_and_fine_tuned_teachers_load_by_id_and_revision(hub, classifier_folder, tmp_path):
    """`data.path: USER/NAME` that works only against the real Hub is tested by users alone."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    first = hub.add("someone/moods", {"train.jsonl": lines}, kind="datasets")
    hub.add("someone/moods", {"train.jsonl": lines * 2}, kind="datasets")
    folder = classifier_folder("bert", "single-label")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    revision = hub.add("someone/student", files)
    hub.add("someone/student", {"config.json": b"{}"})
    done = call(hub, tmp_path, "-c", LOAD_BY_ID, first, revision)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [54, ["negative", "neutral", "positive"], 3]


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


def test_what_cannot_be_pushed_or_found_is_refused_before_the_hub_is_asked(tmp_path, finished):
    """Typing errors must not become repositories."""
    with pytest.raises(ConfigError, match="'student' is no name of a repository; expected USER/NAME"):
        push_experiment(finished.root, "student")
    shutil.rmtree(finished.student)
    with pytest.raises(ModelError, match="has no student to push"):
        push_experiment(finished.root, "someone/student")
    with pytest.raises(KdLoraError, match="no such folder, no Hub model of this name in the cache"):
        locate_model("someone/nothing")
    assert locate_model(tmp_path) == tmp_path
    assert str(locate_model("../someone/nothing")) == "../someone/nothing"
