"""Push and load by id, models and data sets, against a stand-in of the Hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

import hub_standin
from fabricate import make_record
from kdlora.deploy.hub import locate_model, plan_push, push_experiment
from kdlora.errors import ArtifactError, ConfigError, KdLoraError, ModelError
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


def call(hub, folder, *arguments, token=True):
    """Call Python in a process that knows no other Hub than the stand-in."""
    environment = {**os.environ, **hub_standin.environment(hub, str(folder / "cache"), token=token)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_push_is_private_is_resumed_and_its_model_loads_by_id(hub, finished, tmp_path):
    """A push that starts again from nothing after a lost connection, or shows a private model to everyone."""
    texts = tmp_path / "texts.txt"
    texts.write_text("what a superb film\n")
    push = ("-m", "kdlora", "push", finished.root, "someone/student")
    hub.refused_uploads = 1
    broken, done, again = (call(hub, tmp_path, *push, *more) for more in ((), ("--json",), ("--json",)))
    sent = "the same command again sends only what is missing"
    assert (broken.returncode, sent in broken.stderr, done.returncode) == (1, True, 0), (broken, done)
    pushed = json.loads(done.stdout)
    assert pushed["private"] is hub.repositories["models/someone/student"].private is True
    assert len(hub.uploads) == len(set(hub.uploads)) == 3, "weights, ONNX and int8, each once"
    files = hub.repositories["models/someone/student"].commits[pushed["revision"]]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "onnx/model.onnx"} <= set(files)
    assert not {"config.yaml", "results.json", "report.html"} & set(files)
    assert 'model="someone/student"' in files["README.md"].decode()
    assert str(finished.root) not in b"".join(files[name] for name in files if name.endswith("json")).decode()
    assert json.loads(again.stdout)["revision"] == pushed["revision"], "nothing changed, so nothing is committed"
    predicted = call(hub, tmp_path, "-m", "kdlora", "predict", "someone/student/onnx", texts)
    assert predicted.returncode == 0, predicted
    assert set(json.loads(predicted.stdout)["probabilities"]) == {"negative", "neutral", "positive"}
    predict = ("-m", "kdlora", "predict", "someone/student", texts)
    for command, told in ((predict, "no Hub model of this name that you may see"), (push, "hf auth login")):
        stranger = call(hub, tmp_path / "other", *command, token=False)
        assert (stranger.returncode, told in stranger.stderr) == (2, True), stranger
        assert "Traceback" not in stranger.stderr
    gone = call(SimpleNamespace(url="http://127.0.0.1:9"), tmp_path, *push)  # nobody listens there
    assert (gone.returncode, sent in gone.stderr, "Traceback" in gone.stderr) == (1, True, False), gone


@pytest.mark.parametrize(
    ("status", "told"), [(500, "the Hub answered 500 for a/b"), (403, "accept the model's terms"), (None, "no answer")]
)
def test_a_failure_of_the_hub_is_not_the_users_mistake(monkeypatch, status, told):
    """An error 500 was "no Hub model of this name", and a connection that broke a traceback."""

    def snapshot_download(*_, **__):
        if status is None:
            raise HfHubHTTPError.__mro__[1]("no answer")
        answer = SimpleNamespace(status_code=status, headers={}, request=None)
        raise LocalEntryNotFoundError("not in the cache") from HfHubHTTPError("failed", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError if status is None else OSError, match=told):
        locate_model("a/b")


def test_a_public_repository_is_not_pushed_to_by_accident(hub, finished, tmp_path):
    """An existing public repository would publish the model; an earlier model's int8 file would answer for it."""
    stale = {"kdlora_decisions.json", "model-00001-of-00002.safetensors", "onnx/openvino_model_quantized.xml"}
    kept = {"NOTICE", "notes.txt", "samples/config.json"}
    there = {"README.md", *kept, *stale}
    hub.add("someone/open", dict.fromkeys(there, b"here"))
    push = ("-m", "kdlora", "push", finished.root, "someone/open")
    refused = call(hub, tmp_path, *push)
    assert (refused.returncode, "is public; say --public" in refused.stderr) == (2, True), refused
    done = call(hub, tmp_path, *push, "--public", "--report", "--revision", "second", "--json")
    assert done.returncode == 0, done
    repository = hub.repositories["models/someone/open"]
    pushed, files = json.loads(done.stdout), set(repository.commits[repository.branches["second"]])
    assert {"report.html", "report.md", "onnx/model_quantized.onnx"} <= set(pushed["files"])
    assert (set(pushed["removed"]), files) == (stale, kept | set(pushed["files"]))
    assert set(repository.commits[repository.branches["main"]]) == there
    hub.add("someone/closed", {"README.md": b"here"}, private=True)
    refused = call(hub, tmp_path, *push[:-1], "someone/closed", "--public")  # the Hub ignores the wish
    assert (refused.returncode, "is private; make it public there" in refused.stderr) == (2, True), refused


def test_data_sets_and_fine_tuned_teachers_load_by_id_and_revision(hub, classifier_folder, tmp_path):
    """`data.path: USER/NAME` that works only against the real Hub is tested by users alone."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    first = hub.add("someone/moods", {"train.jsonl": lines}, kind="datasets")
    hub.add("someone/moods", {"train.jsonl": lines * 2}, kind="datasets")
    folder = classifier_folder("bert", "single-label")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    revision = hub.add("someone/teacher", files)
    hub.add("someone/teacher", {"config.json": b"{}"})
    loaded = call(hub, tmp_path, "-c", LOAD_BY_ID, first, revision)
    assert json.loads(loaded.stdout) == [54, ["negative", "neutral", "positive"], 3], loaded.stderr


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
    monkeypatch.chdir(tmp_path)  # where `make demo` ran there is a runs/demo
    with pytest.raises(ConfigError, match="'student' is no name of a repository; expected USER/NAME"):
        push_experiment(finished.root, "student")
    with pytest.raises(ConfigError, match="'someone/my--model' is no name of a repository"):
        plan_push(finished.root, "someone/my--model")
    for name in ("runs/demo--2", "runs/demo.git"):
        with pytest.raises(ModelError, match=f"{name}: no such folder, and no name of a Hub model"):
            locate_model(name)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="has no student to push"):
        push_experiment(tmp_path, "someone/student")
    with pytest.raises(KdLoraError, match="no such folder, no Hub model of this name in the cache"):
        locate_model("someone/nothing")
    changed = shutil.copytree(finished.root, tmp_path / "changed")
    (changed / "student" / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(ArtifactError, match=r"README.md: not UTF-8; save it as UTF-8"):
        plan_push(changed, "someone/student")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(ModelError, match="runs/demo/student: there is no such folder in runs/demo"):
        locate_model("runs/demo/student")
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="runs/dome: there is no such folder beside the experiments in runs"):
        locate_model("runs/dome")
    assert locate_model(tmp_path) == tmp_path
    assert str(locate_model("../someone/nothing")) == "../someone/nothing"
