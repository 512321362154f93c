"""Doors at loading and predicting: a folder, a file or a stream that somebody else wrote, who means no good."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import hub_standin
import tiny
from deploy_folders import TEXTS, build_classifier
from experiments import edit_json
from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.collection import open_collection
from kdlora.data.logit_table import open_store
from kdlora.data.opening import open_saved
from kdlora.data.read import open_file
from kdlora.deploy.calibrate import save_temperature
from kdlora.deploy.predict import Classifier
from kdlora.deploy.stream import predict_file
from kdlora.errors import ArtifactError, DataError, KdLoraError, ModelError
from kdlora.evidence.records import read_record, read_results
from kdlora.models.encoders import load_encoder, load_fine_tuned, read_task
from kdlora.models.settings import read_licence
from kdlora.system.integrity import hash_files, seal

SOURCE = Path(__file__).parents[2] / "src" / "kdlora"
CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def folder(made_once, tmp_path: Path) -> Path:
    """A whole classifier of one's own, to be spoilt."""
    whole = made_once("classifier-bert-single-label", lambda place: build_classifier("bert", place / "model"))
    return Path(shutil.copytree(whole, tmp_path / "model"))


def ways_in(folder: Path) -> dict[str, Callable[[], object]]:
    """Every way in which kdlora reads a transformers folder."""
    task = tiny.task()
    return {
        "predict": lambda: Classifier.load(folder),
        "student": lambda: load_encoder(str(folder), task, seed=0),
        "teacher": lambda: load_fine_tuned(str(folder), task, label_names=list(task.label_names)),
    }


def refusals(folder: Path) -> str:
    """Take every way in; each must be refused as a user's mistake. Gives what was said."""
    said = []
    for way, enter in ways_in(folder).items():
        try:
            enter()
        except KdLoraError as refusal:
            said.append(str(refusal))
        else:
            pytest.fail(f"{way} was let in")
    return "\n".join(said)


def add_own_code(folder: Path, mark: Path) -> None:
    """Make a model whose config and tokenizer ask for Python files in the folder."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
    edit_json(folder / "config.json", model_type="evil", auto_map=classes)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})


def test_no_answer_on_standard_input_lets_a_folder_run_its_code(folder, tmp_path):
    """Transformers asks there whether it may, and there the rows are: the first line was the answer."""
    mark = tmp_path / "owned"
    add_own_code(folder, mark)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_python("-m", "kdlora", "predict", folder, "-", input="y\ntext\ny\ny\n", env=environment)
    assert done.returncode == 2, done.stderr
    assert "Python code of its own" in done.stderr
    assert not mark.exists()


def pickle_as_adapter(folder: Path, mark: Path) -> None:
    """`use_safetensors` does not hold where the config names the file."""
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")


def pickle_beside_a_decoy(folder: Path, mark: Path) -> None:
    """The check for any safetensors file was passed, and transformers took the pickle."""
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))


def index_of(shard: str) -> Callable[[Path, Path], None]:
    """Make an index of weights that lie elsewhere, or are a pickle."""

    def spoil(folder: Path, mark: Path) -> None:
        (folder / "other").mkdir()
        (folder / "model.safetensors").rename(folder / "other" / "real.safetensors")
        (folder / "decoy.safetensors").touch()
        torch.save(load_file(folder / "other" / "real.safetensors"), folder / "pytorch_model.bin")
        names = load_file(folder / "other" / "real.safetensors")
        where = shard.format(folder=folder)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, where)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def setting(**changes: Any) -> Callable[[Path, Path], None]:
    """Change keys of config.json."""
    return lambda folder, mark: edit_json(folder / "config.json", **changes)


def add_adapter(folder: Path, mark: Path) -> None:
    """Put an adapter's settings into a whole model."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))


DETOURS: list[tuple[str, Callable[[Path, Path], None], str]] = [
    ("own code", add_own_code, "Python code of its own"),
    ("a pickle named by the config", pickle_as_adapter, "transformers_weights names other files"),
    ("a pickle beside a decoy", pickle_beside_a_decoy, "model.safetensors"),
    ("an index out of the folder", index_of("other/real.safetensors"), "in the same folder"),
    ("an index up and down", index_of("../model/other/real.safetensors"), "in the same folder"),
    ("an absolute index", index_of("{folder}/other/real.safetensors"), "in the same folder"),
    ("an index of pickles", index_of("pytorch_model.bin"), "in the same folder"),
    ("an adapter beside a whole model", add_adapter, "adapter"),
    ("a kernel of the Hub", setting(attn_implementation="someone/kernel"), "compiled code of the Hub"),
    ("a kernel below", setting(text_config={"_attn_implementation": {"": "a/b:c"}}), "compiled code of the Hub"),
    ("another config", setting(configuration_files=["config.4.0.0.json"]), "names other files"),
    ("quantised weights", setting(quantization_config={"quant_method": "fp8"}), "quantised"),
]


@pytest.mark.parametrize(("spoil", "expected"), [case[1:] for case in DETOURS], ids=[case[0] for case in DETOURS])
def test_a_folder_leads_nowhere_but_to_its_own_weights(folder, tmp_path, monkeypatch, spoil, expected):
    """What a config may name, a stranger may name: code, pickles, compiled kernels, files of other users."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    spoil(folder, tmp_path / "owned")
    assert expected in refusals(folder)
    assert not (tmp_path / "owned").exists()


def test_nothing_of_a_strangers_code_or_template_is_passed_on(folder, tmp_path):
    """Saved with a student, it would run at whoever trusts that; a template's name was a path that was written to."""
    edit_json(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.M"})
    templates = [{"name": "default", "template": "x"}, {"name": "../../../owned", "template": "x"}]
    edit_json(folder / "tokenizer_config.json", chat_template=templates, auto_map={"AutoTokenizer": [None, "evil.T"]})
    from kdlora.models.encoders import save_encoder

    save_encoder(load_encoder(str(folder), tiny.task(), seed=0), tmp_path / "a" / "b" / "saved")
    assert not list(tmp_path.rglob("*.jinja"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "a" / "b" / "saved" / name).read_text()


HUB_MODELS = """
import sys, tiny
from kdlora.errors import ModelError
from kdlora.evidence.records import read_record, read_results
from kdlora.models.encoders import load_encoder
for name in sys.argv[1:]:
    try:
        load_encoder(name, tiny.task(), seed=0)
    except ModelError as refusal:
        print(" ".join(str(refusal).split()))
"""


def test_a_hub_model_leads_to_no_base_and_no_pickle(folder, tmp_path):
    """With an adapter's settings beside it, transformers went to a base that nobody named, and said nothing."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    named = {"peft_type": "LORA", "base_model_name_or_path": "stranger/base", "target_modules": ["query"]}
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    weights = {"model.safetensors.index.json": json.dumps(index).encode(), "pytorch_model.bin": b"never read"}
    with hub_standin.running() as hub:
        hub.add("stranger/base", files)
        hub.add("someone/both", files | {"adapter_config.json": json.dumps(named).encode()})
        hub.add("someone/index", {name: files[name] for name in files if name != "model.safetensors"} | weights)
        environment = os.environ | hub_standin.environment(hub, str(tmp_path / "cache"))
        environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE.parents[1] / "tests"), os.environ["PYTHONPATH"]])
        done = run_python("-c", HUB_MODELS, "someone/both", "someone/index", env=environment)
        both, pickled = done.stdout.splitlines()
        assert "beside a whole model" in both, done.stderr
        assert "in the same folder" in pickled, done.stderr
        assert not list((tmp_path / "cache").rglob("models--stranger--base"))
        assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))


def test_every_load_goes_through_one_place():
    """A loader of its own forgets one of the four settings, and nobody sees it."""
    found = [
        (file.relative_to(SOURCE).as_posix(), node.func.attr, {word.arg for word in node.keywords})
        for file in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("from_pretrained", "from_config", "pipeline")
    ]
    loads = [(file, name) for file, name, _ in found if name != "from_config"]
    own = [("models/adapters.py", "from_pretrained")] * 2  # of our own runs, compared with their records before
    assert [load for load in loads if load[0] != "models/loading.py"] == own
    assert all("trust_remote_code" in words for _, name, words in found if name == "from_config")


def refused(folder: Path, *expected: str, verify: bool = True, **options: Any) -> None:
    """An ONNX folder, or the use of it, is refused as a user's mistake."""
    with pytest.raises(KdLoraError) as caught:
        Classifier.load(folder, verify=verify, **options).predict(["a wonderful film", "a dreadful one, and too long"])
    for part in expected:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.fixture
def graph_folder(tmp_path: Path) -> Path:
    """A folder of a stranger's, with everything but the graph."""
    return graphs.build_folder(tmp_path / "stranger" / "model")


@pytest.fixture
def served(graph_folder: Path) -> Path:
    """The same with a good graph."""
    graphs.build_graph(graph_folder / "model.onnx")
    return graph_folder


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the runtime is reached: what is refused must be refused by kdlora, whatever the runtime does."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was reached"))


OUTSIDE = ("../secret.bin", "{root}/secret.bin", "link.bin", "up/secret.bin", "./../secret.bin", "..\\secret.bin", "")


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_reads_no_file_outside_of_its_folder(graph_folder, no_runtime, location, nested):
    """Runtimes up to 1.23 took any path: what lay there came out as answers. A newer one may forget again."""
    root = graph_folder.parent
    (root / "secret.bin").write_bytes(graphs.table().tobytes())
    (graph_folder / "link.bin").symlink_to("../secret.bin")
    (graph_folder / "up").symlink_to("..")
    graphs.build_graph(graph_folder / "model.onnx", location=location.format(root=root), nested=nested)
    refused(graph_folder, "model.onnx" if location != "link.bin" else "link.bin")


def test_weights_beside_a_graph_are_read_in_a_folder_and_in_the_hubs_cache(graph_folder, tmp_path):
    """The cache consists of links; refusing all of them would refuse every large model of the Hub."""
    plain = graphs.build_folder(tmp_path / "plain")
    graphs.build_graph(plain / "model.onnx")
    expected = Classifier.load(plain).predict_logits(TEXTS[:4])
    graphs.build_graph(graph_folder / "model.onnx", location="model.onnx_data")
    (graph_folder / "model.onnx_data").write_bytes(graphs.table().tobytes())
    np.testing.assert_array_equal(Classifier.load(graph_folder).predict_logits(TEXTS[:4]), expected)
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0123" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in graph_folder.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../../blobs/hash-{file.name}")
    np.testing.assert_array_equal(Classifier.load(snapshot).predict_logits(TEXTS[:4]), expected)
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to(graph_folder / "model.onnx_data")
    refused(snapshot, "a link to a file in another folder")


NO_GRAPHS = (b"\x00" * 9, b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 64, b"\x08location")


@pytest.mark.parametrize("content", NO_GRAPHS)
def test_what_is_no_graph_is_refused(graph_folder, content):
    """A reader of a hostile message must end, and say which file it was."""
    (graph_folder / "model.onnx").write_bytes(content)
    refused(graph_folder, "cannot load it")


def test_the_runtimes_own_format_is_refused(graph_folder, no_runtime):
    """It names files as well, which nothing here would look at."""
    (graph_folder / "model.onnx").write_bytes(b"abcdORTM" + b"\x00" * 99)
    refused(graph_folder, "cannot load it")


_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_SINGLE = [{"SpecialToken": {"id": "X", "type_id": 0}}]
_TEMPLATE = {"type": "TemplateProcessing", "single": _SINGLE, "pair": [], "special_tokens": {}}
PANICS: dict[str, dict[str, Any]] = {
    "when it is read": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    "at a text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "at a pattern": {"pre_tokenizer": _SPLIT},
    "at its own words": {"post_processor": _TEMPLATE},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_panic_of_the_tokenizer_is_an_error_like_others(served, changes):
    """A panic is no `Exception`: it went past every handler of a service and ended it."""
    edit_json(served / "tokenizer.json", **changes)
    with pytest.raises(ArtifactError, match=r"tokenizer.json: the tokenizer (cannot be read|fails on a text)"):
        Classifier.load(served).predict([f"a wonderful {'a' * 60}!"])


@pytest.mark.parametrize("output", ["text", "sequence", "int", "one"])
def test_a_graph_that_gives_no_logits_is_refused(graph_folder, output):
    """One row for all texts was taken for the answer to each; other kinds ended in a traceback."""
    graphs.build_graph(graph_folder / "model.onnx", output=output)
    refused(graph_folder, "model")


SETTINGS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("architectures a number", "config.json", {"architectures": 5}, ("architectures must be",)),
    ("a problem that is a list", "config.json", {"problem_type": ["regression"]}, ("problem_type must be",)),
    ("labels that are a list", "config.json", {"id2label": ["a", "b"]}, ("id2label must be",)),
    ("labels from 1", "config.json", {"id2label": {"1": "a", "2": "b"}}, ("id2label must name the columns 0 to n-1",)),
    ("an unknown problem", "config.json", {"problem_type": "ranking"}, ("problem_type must be one of",)),
    ("labels that are objects", "config.json", {"id2label": {"0": {}, "1": "b"}}, ("id2label must name",)),
    ("equal labels", "config.json", {"id2label": {"0": "a", "1": "a"}}, ("two labels named 'a'",)),
    ("half a character", "config.json", {"id2label": {"0": "\ud800", "1": "b"}}, ("config.json is damaged",)),
    ("a padding list", "config.json", {"pad_token_id": [0]}, ("pad_token_id must be",)),
    ("a padding beyond the words", "config.json", {"pad_token_id": 99999}, ("pad_token_id 99999",)),
    ("no room for tokens", "config.json", {"max_position_embeddings": 2}, ("leaves room for 2 tokens",)),
    ("a temperature that is text", "config.json", {"kdlora_temperature": "1"}, ("kdlora_temperature",)),
    ("a temperature of nothing", "config.json", {"kdlora_temperature": 1e-300}, ("kdlora_temperature",)),
    ("a reading length that is text", "config.json", {"kdlora_max_length": "9"}, ("kdlora_max_length must be",)),
    ("a task that is text", "config.json", {"kdlora_task": "x"}, ("kdlora_task must be",)),
    ("a task of three texts", "config.json", {"kdlora_task": {"text": ["a", "b", "c"]}}, ("kdlora_task must be",)),
    ("windows of text", "config.json", {"kdlora_task": {"windows": {"stride": "4", "pool": "max"}}}, ("windows",)),
    ("a length that is text", "kdlora_export.json", {"max_length": "9"}, ("max_length must be",)),
    ("hashes that are a list", "kdlora_export.json", {"sha256": ["x"]}, ("sha256 must be",)),
    ("a limit that is text", "tokenizer_config.json", {"model_max_length": "9"}, ("model_max_length must be",)),
    ("a padding that is a number", "tokenizer_config.json", {"pad_token": 5}, ("pad_token must be",)),
]


@pytest.mark.parametrize(("file", "changes", "expected"), [case[1:] for case in SETTINGS], ids=[c[0] for c in SETTINGS])
def test_settings_of_a_wrong_type_are_named(served, file, changes, expected):
    """Each was a traceback, or an answer that nobody meant: of two labels with one name, one lost its probability."""
    if changes.get("pad_token_id") is not None:
        edit_json(served / "tokenizer_config.json", pad_token=None)
    edit_json(served / file, **changes)
    refused(served, file, *expected)


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        ({"architectures": [5]}, {}),
        ({"problem_type": ["x"]}, {}),
        ({"num_labels": 10**12}, {}),
        ({"pad_token_id": "zero"}, {}),
        ({"kdlora_task": {"kind": ["x"]}}, {}),
        ({}, {"model_max_length": "long"}),
        ({}, {"model_input_names": 7}),
    ],
)
def test_settings_of_a_model_to_train_are_named_alike(folder, config, tokenizer):
    """The same files reach transformers, which asks for all memory or fails with its own faults."""
    edit_json(folder / "config.json", **config)
    edit_json(folder / "tokenizer_config.json", **tokenizer)
    assert "must be" in refusals(folder)


@pytest.mark.parametrize("name", ["config.json", "kdlora_export.json", "tokenizer_config.json"])
@pytest.mark.parametrize("levels", [80, 900, 99_999])
def test_deep_settings_are_refused(served, name, levels):
    """Too deep for Python's reader, or, worse, only for what copies and writes them later."""
    (served / name).write_text('{"a":' * levels + "1" + "}" * levels)
    refused(served, f"{name} is damaged", "nested too deep")


@pytest.fixture
def exported(made_once, tmp_path: Path) -> Path:
    """An export as kdlora writes it, and its weights outside of the graph, as other tools do."""
    from kdlora.data.tasks import Task
    from kdlora.deploy.export import finish_package, start_package
    from kdlora.deploy.folder import read_model_folder

    source = graphs.build_folder(tmp_path / "source", problem_type="single_label_classification")
    graphs.build_graph(source / "model.onnx")
    described, work = read_model_folder(source), tmp_path / "export"
    work.mkdir()
    start_package(work, described, tiny.train_tokenizer("bert"))
    graphs.build_graph(work / "model.onnx")
    task = Task("single-label", ("text",), ("label",), graphs.LABELS, ("accuracy",))
    finish_package(work, described, task, {"model.onnx": work / "model.onnx"}, {})
    return work


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"id2label": {"0": "positive", "1": "negative"}}),
        ("config.json", {"kdlora_temperature": 9.0}),
        ("config.json", {"problem_type": "multi_label_classification"}),
        ("tokenizer_config.json", {"pad_token": "[MASK]"}),
        ("tokenizer.json", {"normalizer": None}),
        ("kdlora_export.json", {"max_length": 3}),
        ("kdlora_export.json", {"task": {"text": ["label"]}}),
        ("config.json", None),  # without it another default decides
        ("tokenizer_config.json", None),
    ],
)
def test_every_file_that_decides_an_answer_is_compared(exported, file, changes):
    """With the labels exchanged in config.json an export answered the opposite, and was called the verified one."""
    assert Classifier.load(exported).predict(["a wonderful film"])
    (exported / file).unlink() if changes is None else edit_json(exported / file, **changes)
    refused(exported, file)
    assert changes is None or Classifier.load(exported, verify=False).predict(["a wonderful film"])


def test_weights_beside_the_graph_are_compared_and_are_what_runs(exported, monkeypatch):
    """A file that is exchanged after it was hashed, or that was never hashed, is another model."""
    graphs.build_graph(exported / "model.onnx", location="model.onnx_data")
    (exported / "model.onnx_data").write_bytes(graphs.table().tobytes())
    record = json.loads((exported / "kdlora_export.json").read_text())
    record["sha256"] |= hash_files(exported, [exported / "model.onnx", exported / "model.onnx_data"])
    (exported / "kdlora_export.json").write_text(json.dumps(seal(record)))
    expected = Classifier.load(exported).predict_logits(TEXTS[:4])
    opened = onnxruntime.InferenceSession

    def exchange(*arguments: Any, **options: Any) -> Any:
        (exported / "model.onnx_data").write_bytes(bytes(graphs.table().nbytes))
        (exported / "model.onnx").write_bytes(b"")
        return opened(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", exchange)
        found = Classifier.load(exported)
    np.testing.assert_array_equal(found.predict_logits(TEXTS[:4]), expected)
    graphs.build_graph(exported / "model.onnx", location="model.onnx_data")
    refused(exported, "model.onnx_data")


def test_a_new_temperature_is_part_of_the_export(exported):
    """Calibration changes config.json on purpose; what it wrote must pass, and what another wrote must not."""
    save_temperature(exported, 2.5)
    assert Classifier.load(exported).folder.temperature == 2.5
    edit_json(exported / "config.json", kdlora_temperature=5.0)
    refused(exported, "config.json")


CARDS = {
    "no date": ("license: apache-2.0\ndate: 2024-99-99", "apache-2.0"),
    "deep": ("license: mit\nx: " + "[" * 50_000, None),
    "a loop": ("license: &a\n- *a", None),
    "markup": ("license: <img src=x onerror=alert(1)>", None),
    "code": ("license: '`x` | [y](http://192.0.2.1)'", None),
    "an object": ("license: !!python/object/apply:os.system [true]", None),
    "long": ("license: " + "a" * 500, None),
    "usual": ("language: en\nlicense: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
}


@pytest.mark.parametrize(("front", "expected"), CARDS.values(), ids=CARDS)
def test_a_card_costs_no_training_and_brings_no_markup(tmp_path, front, expected):
    """It is read when all training is done: a date that is none ended shipping. Its text was raw HTML in our card."""
    assert read_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert read_licence(str(tmp_path)) == expected


def test_an_endless_card_is_not_read_whole(tmp_path):
    """A card of gigabytes fills the memory for the sake of one word."""
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n")
        file.truncate(8 << 30)
    assert read_licence(str(tmp_path)) is None


TOO_LONG = 300_000
"""Characters, with the limit set to 100,000 for these tests: the real one would make them slow."""


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlora.data.lines.MOST_CHARACTERS", 100_000)
    monkeypatch.setattr("kdlora.data.lines._CHUNK", 1000)


HOSTILE_ROWS: dict[str, tuple[str, str, str]] = {
    "deep JSON": ("rows.jsonl", '{{"text": {deep}}}\n{{"text": "good"}}\n', "nested too deep"),
    "an endless number": ("rows.jsonl", '{{"text": {digits}}}\n{{"text": "good"}}\n', "not JSON"),
    "a long line of text": ("rows.txt", "{long}\ngood\n", "longer than 100,000 characters"),
    "a long line of CSV": ("rows.csv", "text,b\n{long},1\ngood,1\n", "longer than 100,000"),
    "a line of many commas": ("rows.csv", "text,b\n{commas}\ngood,1\n", "longer than 100,000"),
}


@pytest.mark.parametrize(("name", "content", "expected"), HOSTILE_ROWS.values(), ids=HOSTILE_ROWS)
def test_a_hostile_row_costs_its_own_answer_and_no_other(served, tmp_path, short_lines, name, content, expected):
    """One line without an end filled the memory, and one deep object ended the command with a traceback."""
    fill = {"deep": "[" * 50_000, "digits": "9" * 5000, "long": "x" * TOO_LONG, "commas": "," * TOO_LONG}
    source, to = tmp_path / name, tmp_path / "answers.jsonl"
    source.write_text(content.format(**fill))
    summary = predict_file(Classifier.load(served), source, to)
    assert (summary.rows, summary.errors) == (2, 1)
    bad, good = (json.loads(line) for line in to.read_text().splitlines())
    assert expected in bad["error"]
    assert good["label"] in graphs.LABELS


def test_a_line_to_train_on_has_an_end(tmp_path, short_lines):
    """The readers of training data took lines of any length, too."""
    lines, texts = tmp_path / "rows.jsonl", tmp_path / "rows.txt"
    for file in (lines, texts):
        file.write_text("x" * TOO_LONG)
    for file in (lines, texts):
        with pytest.raises(DataError, match="line 1 is longer than 100,000 characters"):
            open_file(file, "data.unlabelled", plain=True).read(("text",))


def write_bomb(file: Path) -> Path:
    """Write a Parquet file of some hundred bytes that holds 20 GB."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * 1_000_000]))
    pq.write_table(pa.table({"text": texts}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 1000
    return file


LIMITED = """
import resource, sys
from kdlora.data.read import open_file
from kdlora.errors import DataError
source = open_file(sys.argv[1], "data.train")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
try:
    source.read(("text",))
except DataError as refusal:
    print(refusal)
"""


def test_a_small_file_of_twenty_gigabytes_is_called_what_it_is(tmp_path):
    """It was called no readable Parquet, with the advice to write it in UTF-8."""
    done = run_python("-c", LIMITED, write_bomb(tmp_path / "bomb.parquet"))
    assert "need more memory than there is" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "metadata",
    [
        "no JSON",
        "[]",
        "[" * 99_999,
        '{"info": {"features": {"label": 5}}}',
        '{"info": {"features": {"label": []}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}',
    ],
)
def test_metadata_of_a_parquet_file_are_no_traceback(tmp_path, metadata):
    """They are anybody's bytes. Passed over, codes would be taken for names."""
    table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="metadata 'huggingface'"):
        open_file(tmp_path / "x.parquet", "data.train").read(("text", "label"))


def test_a_damaged_page_of_parquet_is_no_traceback(served, tmp_path):
    """The footer is sound, so the fault comes in the middle."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"a film {number}" for number in range(2000)]}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[40:2000] = b"\xff" * 1960
    path.write_bytes(content)
    with pytest.raises(DataError, match="no readable Parquet"):
        predict_file(Classifier.load(served), path, tmp_path / "x.csv")


MANIFESTS: dict[str, dict[str, Any]] = {
    "a shard above": {"shards": [{"file": "../secret.parquet", "sha256": "", "truncated": 0}]},
    "an absolute shard": {"shards": [{"file": "/etc/passwd", "sha256": "", "truncated": 0}]},
    "shards that are text": {"shards": "x"},
    "labels that are numbers": {"label_names": [1]},
    "no texts": {"texts": "1"},
    "ingredients that are a list": {"ingredients": []},
    "another version": {"schema_version": [1]},
    "versions that are numbers": {"versions": {"torch": 2}},
}


@pytest.mark.parametrize("changes", [*MANIFESTS.values(), "[" * 99_999], ids=[*MANIFESTS, "deep"])
def test_a_collection_reads_its_own_shards(tmp_path, changes):
    """A manifest that names another file has it read as rows."""
    content = {"schema_version": 1, "complete": True, "fingerprint": "x", "ingredients": {"weights": "x"}}
    content |= {"model": "x", "label_names": ["a", "b"], "texts": 1, "versions": {}, "shards": []}
    text = changes if isinstance(changes, str) else json.dumps(content | changes)
    (tmp_path / COLLECTION_MANIFEST).write_text(text)
    with pytest.raises(DataError, match=COLLECTION_MANIFEST):
        open_collection(tmp_path)
    (tmp_path / COLLECTION_MANIFEST).write_text(json.dumps(content))
    assert open_collection(tmp_path).label_names == ["a", "b"]


def test_a_saved_data_set_reads_its_own_files(tmp_path):
    """`load_from_disk` joins whatever name the folder gives."""
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"text": ["a"], "label": ["x"]})
    DatasetDict({"train": data}).save_to_disk(tmp_path / "whole")
    data.save_to_disk(tmp_path / "secret")
    assert set(open_saved(tmp_path / "whole")) == {"train"}
    (tmp_path / "whole" / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret"]}))
    with pytest.raises(DataError, match=r"dataset_dict\.json"):
        open_saved(tmp_path / "whole")
    place = tmp_path / "secret" / "state.json"
    name = str(next((tmp_path / "whole" / "train").glob("*.arrow")))
    for spoilt in ([{"filename": name}], [{"filename": "../whole/train/x.arrow"}], [{}], [5], 7):
        edit_json(place, _data_files=spoilt)
        with pytest.raises(DataError, match="secret"):
            open_saved(tmp_path / "secret")
    place.write_text("[" * 99_999)
    with pytest.raises(DataError, match=r"state\.json"):
        open_saved(tmp_path / "secret")

    # The manifest of the teacher's logits names files as well.
    shard = {"file": "../secret.parquet", "sha256": "", "truncated": 0}
    fields = {
        "fingerprint": "",
        "ingredients": {},
        "label_names": ["a"],
        "rows": 1,
        "rows_per_shard": 1,
        "versions": {},
    }
    manifest = {"schema_version": 1, "shards": [shard], **fields}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not in the same folder"):
        open_store(tmp_path / "manifest.json")


DATA_CARDS = {
    "absolute": ("data_files: [{{split: train, path: {secret}}}]", "which this data set does not hold"),
    "a scheme": ("data_files: 'file://{secret}'", "which this data set does not hold"),
    "a folder": ("data_dir: {folder}", "which this data set does not hold"),
    "another host": ("data_files: '{url}/stolen.csv'", "which this data set does not hold"),
    "another data set": ("data_files: 'hf://datasets/someone/private/train.csv'", "which this data set does not hold"),
    "upwards": ("data_files: 'a/../../../x.csv'", "which this data set does not hold"),
    "a merge": ("<<: {{data_files: '{url}/stolen.csv'}}", "which this data set does not hold"),
    "behind dashes": ("---a: b\n  data_files: '{url}/stolen.csv'", "which this data set does not hold"),
    "a circle": ("data_files: &a [*a]", "its card README.md cannot be read"),
    "no text": ("? [a]\n  : b", "its card README.md cannot be read"),
    "no list": ("data_files: train.csv\n- 5", "cannot be loaded from the Hub"),
    "usual": ("data_files: [{{split: train, path: train.csv}}]", "('text', 'label')"),
}
HUB_DATA = """
import sys
from kdlora.data.opening import open_hub
from kdlora.errors import DataError
for name in sys.argv[1:]:
    try:
        print(open_hub(name, None, None)["train"].columns)
    except DataError as refusal:
        print(" ".join(str(refusal).split()))
"""


def test_a_data_sets_card_names_no_file_of_this_machine_and_no_other_host(tmp_path):
    """`datasets` before 5.1 reads `/home/you/secret.csv` as rows; every version asks the host that a card names."""
    secret = write_file(tmp_path / "secret" / "x.csv", "text,label\nsecret,1\n")
    with hub_standin.running() as hub:
        for number, (card, _) in enumerate(DATA_CARDS.values()):
            front = card.format(secret=secret, folder=secret.parent, url=hub.url)
            readme = f"---\nconfigs:\n- config_name: default\n  {front}\n---\n".encode()
            hub.add(f"someone/d{number}", {"README.md": readme, "train.csv": b"text,label\nopen,0\n"}, kind="datasets")
        environment = os.environ | hub_standin.environment(hub, str(tmp_path / "cache"))
        names = [f"someone/d{number}" for number in range(len(DATA_CARDS))]
        done = run_python("-c", HUB_DATA, *names, env=environment)
        said = done.stdout.splitlines()
        assert len(said) == len(DATA_CARDS), done.stderr
        for line, (card, expected) in zip(said, DATA_CARDS.values(), strict=True):
            assert expected in line, (card, line)
        assert not [asked for asked in hub.unknown if "stolen" in asked]


def write_file(path: Path, content: str) -> Path:
    """Write a file and the folders that it needs."""
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


ODD = ({"return_dict": False}, {"output_hidden_states": 1.5}, {"vocab_size": 10}, {"hidden_act": "nonsense"})


@pytest.mark.parametrize("changes", [*ODD, {"chunk_size_feed_forward": 3}], ids=lambda one: next(iter(one)))
def test_a_config_that_computes_nothing_is_no_traceback(folder, changes):
    """Such a model loads, and fails at the first text; found by giving every key of config.json odd values."""
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError):
        Classifier.load(folder).predict(["a wonderful film", "x " * 100])


def test_a_panic_under_transformers_is_an_error_too(folder):
    """The same file, read by another library on the way."""
    edit_json(folder / "tokenizer.json", **PANICS["when it is read"])
    assert "tokenizer" in refusals(folder)


@pytest.mark.parametrize("changes", [{"problem_type": "x"}, {"id2label": {"0": "a", "1": "b", "2": "a"}}])
def test_a_teacher_that_labels_is_checked_alike(folder, changes):
    """`kdlora label` takes its task from the model's config."""
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=r"problem_type|two labels"):
        read_task(str(folder))


@pytest.mark.parametrize("content", ["[" * 99_999, '{"runs": ' + "9" * 5000 + "}"], ids=["deep", "an endless number"])
def test_records_of_somebody_elses_experiment_are_no_traceback(tmp_path, content):
    """`kdlora report` and `compare` read folders that colleagues send."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_record(tmp_path / "results.json")
