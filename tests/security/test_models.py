"""Doors at loading: a folder of transformers, or a model of the Hub, that somebody else wrote who means no good."""

import ast
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import safetensors_conversion

import tiny
from experiments import Evil, edit_json
from kdlora.deploy.predict import Classifier
from kdlora.errors import KdLoraError, ModelError
from kdlora.models.encoders import load_encoder, load_fine_tuned, read_task, save_encoder
from kdlora.models.loading import Source, _loading_of

SOURCE = Path(__file__).parents[2] / "src" / "kdlora"


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    """A whole classifier of one's own, to be spoilt."""
    return Path(shutil.copytree(classifier, tmp_path / "model"))


def refusals(folder: Path) -> str:
    """Read a folder in every way that kdlora does; each must be refused as a user's mistake. Gives what was said."""
    said, task = "", tiny.task()
    for enter in (
        lambda: Classifier.load(folder),
        lambda: load_encoder(str(folder), task, seed=0),
        lambda: load_fine_tuned(str(folder), task, label_names=list(task.label_names)),
    ):
        with pytest.raises(KdLoraError) as refusal:
            enter()
        said += f"{refusal.value}\n"
    return said


def add_own_code(folder: Path, mark: Path) -> None:
    """Make a model whose config and tokenizer ask for Python files in the folder."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
    edit_json(folder / "config.json", model_type="evil", auto_map=classes)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})


def test_no_answer_on_standard_input_lets_a_folder_run_its_code(folder, tmp_path, cli, monkeypatch):
    """Transformers asks there whether it may, and there the rows are: the first line was the answer."""
    mark = tmp_path / "owned"
    add_own_code(folder, mark)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\ntext\ny\ny\n")))
    assert "Python code of its own" in cli("predict", folder, "-", code=2).err
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


def setting(file: str = "config.json", **changes: Any) -> Callable[[Path, Path], None]:
    """Change keys of a JSON file, or make it."""
    return lambda folder, mark: edit_json(folder / file, **changes)


def tokenizer_of(key: str, *, legacy: bool = False, several: bool = False) -> Callable[[Path, Path], None]:
    """Have a tokenizer's settings, or its older file of special tokens, name a file of the user's as vocabulary."""

    def spoil(folder: Path, mark: Path) -> None:
        secret = folder.parent / "id_rsa"
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"secret{number}" for number in range(20))]
        secret.write_text("\n".join(pieces))
        (folder / "tokenizer.json").rename(folder / "tokenizer.json.bak")
        settings = {key: [str(secret)] if several else str(secret)}
        edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", **({} if legacy else settings))
        if legacy:
            (folder / "vocab.txt").write_text("\n".join([*pieces[:5], *"abcdefghijklmnop"]))
            (folder / "special_tokens_map.json").write_text(json.dumps(settings))

    return spoil


def link_settings(name: str) -> Callable[[Path, Path], None]:
    """Put a link to a file of the user's in the place of any file, as an archive may hold one."""

    def spoil(folder: Path, mark: Path) -> None:
        (folder.parent / "kaggle.json").write_text('{"username": "jane", "key": "secret"}')
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "kaggle.json")

    return spoil


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "stranger/base", "target_modules": ["query"]}
DETOURS: list[tuple[str, Callable[[Path, Path], None], str]] = [
    ("own code", add_own_code, "Python code of its own"),
    ("a pickle named by the config", pickle_as_adapter, "transformers_weights names other files"),
    ("a pickle beside a decoy", pickle_beside_a_decoy, "model.safetensors"),
    ("an index out of the folder", index_of("other/real.safetensors"), "in the same folder"),
    ("an index up and down", index_of("../model/other/real.safetensors"), "in the same folder"),
    ("an absolute index", index_of("{folder}/other/real.safetensors"), "in the same folder"),
    ("an index of pickles", index_of("pytorch_model.bin"), "in the same folder"),
    ("an adapter beside a whole model", setting("adapter_config.json", **ADAPTER), "adapter"),
    ("a kernel of the Hub", setting(attn_implementation="someone/kernel"), "compiled code of the Hub"),
    ("a kernel below", setting(text_config={"_attn_implementation": {"": "a/b:c"}}), "compiled code of the Hub"),
    ("another config", setting(configuration_files=["config.4.0.0.json"]), "names other files"),
    ("a vocabulary by its path", tokenizer_of("vocab"), "vocab must be"),
    ("a vocabulary by its place", tokenizer_of("init_inputs", several=True), "init_inputs must be"),
    ("a file of a tokenizer", tokenizer_of("spm_file"), "spm_file names the file"),
    ("a file beside special tokens", tokenizer_of("vocab_file", legacy=True), "vocab_file names the file"),
    ("settings by a link", link_settings("tokenizer_config.json"), "tokenizer_config.json is a link out of"),
    ("an unknown file by a link", link_settings("prophetnet.tokenizer"), "prophetnet.tokenizer is a link out of"),
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
    save_encoder(load_encoder(str(folder), tiny.task(), seed=0), tmp_path / "a" / "b" / "saved")
    assert not list(tmp_path.rglob("*.jinja"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (tmp_path / "a" / "b" / "saved" / name).read_text()


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


PANIC = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"num_labels": 10**12}, "must be"),
        ("config.json", {"kdlora_task": {"kind": ["x"]}}, "must be"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "must be"),
        ("tokenizer_config.json", {"model_input_names": 7}, "must be"),
        ("tokenizer.json", {"model": PANIC}, "tokenizer"),
    ],
)
def test_settings_of_a_model_to_train_are_named_alike(folder, file, changes, expected):
    """The same files reach transformers, which asks for all memory, panics, or fails with its own faults."""
    edit_json(folder / file, **changes)
    assert expected in refusals(folder)


def test_weights_of_a_strangers_pull_request_are_not_taken(monkeypatch):
    """Transformers asked a third host for a conversion, then took any pull request that bore its title."""
    request = SimpleNamespace(author="stranger", num=7)
    monkeypatch.setattr(safetensors_conversion, "previous_pr", lambda *_, **__: request)
    api = SimpleNamespace(model_info=lambda name: SimpleNamespace(private=False))
    with pytest.raises(ModelError, match="no safetensors weights"), _loading_of("weights", Source("someone/model")):
        safetensors_conversion.get_conversion_pr_reference(api, "someone/model", token=None)
    request.author = "SFconvertbot"
    with _loading_of("weights", Source("someone/model")):
        assert safetensors_conversion.get_conversion_pr_reference(api, "someone/model", token=None) == "refs/pr/7"


ODD = {"return_dict": False, "output_hidden_states": 1.5, "vocab_size": 10, "hidden_act": "nonsense"}


@pytest.mark.parametrize(("key", "value"), [*ODD.items(), ("chunk_size_feed_forward", 3)])
def test_a_config_that_computes_nothing_is_no_traceback(folder, key, value):
    """Such a model loads, and fails at the first text; found by giving every key of config.json odd values."""
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(ModelError):
        Classifier.load(folder).predict(["a wonderful film", "x " * 100])


def test_a_model_without_its_last_layers_is_refused(folder):
    """It answered with other probabilities, and passed its export's checks."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    edit_json(folder / "config.json", num_hidden_layers=layers - 1)
    assert f"more layers than the {layers - 1} of its config.json" in refusals(folder)


@pytest.mark.parametrize("changes", [{"problem_type": "x"}, {"id2label": {"0": "a", "1": "b", "2": "a"}}])
def test_a_teacher_that_labels_is_checked_alike(folder, changes):
    """`kdlora label` takes its task from the model's config."""
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=r"problem_type|two labels"):
        read_task(str(folder))
