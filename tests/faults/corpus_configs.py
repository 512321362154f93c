"""Configs that must be refused: changes of a good one, whole files, and overrides, each with parts of the message."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any], tuple[str, ...]]


def _field(key: str, value: object, *expected: str) -> Case:
    """A config with one key changed; its message names that key."""
    section, *rest = key.split(".")
    nested: Any = value
    for part in reversed(rest):
        nested = {part: nested}
    return f"{key}={value!r}"[:60], {section: nested}, (key, *expected)


FIELDS: list[Case] = [
    _field("student.train.epochs", 0, "greater than 0"),
    _field("student.train.epochs", -1, "greater than 0"),
    _field("student.train.epochs", float("nan"), "finite"),
    _field("student.train.epochs", float("inf"), "finite"),
    _field("student.train.epochs", "many", "number"),
    _field("student.train.epochs", [3], "number"),
    _field("student.train.batch_size", 0, "greater than or equal to 1"),
    _field("student.train.batch_size", 1.5, "integer"),
    _field("student.train.batch_size", "1e400"),
    _field("student.train.learning_rate", 0, "greater than 0"),
    _field("student.train.learning_rate", -1e-3, "greater than 0"),
    _field("student.train.weight_decay", None),
    _field("student.train.weight_decay", -0.1, "greater than or equal to 0"),
    _field("student.train.warmup_fraction", 1.0, "less than 1"),
    _field("student.train.warmup_fraction", -0.1, "greater than or equal to 0"),
    _field("student.train.schedule", "linera", "Did you mean 'linear'?"),
    _field("student.train.max_grad_norm", 0, "greater than 0"),
    _field("student.train.max_length", 3, "greater than or equal to 4"),
    _field("student.train.micro_batch_tokens", 1, "greater than or equal to 16"),
    _field("student.train.select", "bset", "Did you mean 'best'?"),
    _field("student.train", {"early_stopping_patience": 2}, "select: best"),
    _field("student.train", "fast"),
    _field("teacher.train.batch_size", True, "another kind of value than true"),
    _field("run.seeds", [True]),
    _field("teacher.seed", -1, "greater than or equal to 0"),
    _field("lora.rank", 0, "greater than or equal to 1"),
    _field("lora.rank", "eight", "integer"),
    _field("lora.alpha", 0, "greater than 0"),
    _field("lora.dropout", 1, "less than 1"),
    _field("lora.init", "pisa", "Did you mean 'pissa'?"),
    _field("lora.dora", "perhaps", "boolean"),
    _field("lora.rnak", 4, "unknown key", "Did you mean 'rank'?"),
    _field("distil.alpha", 1.5, "less than or equal to 1"),
    _field("distil.alpha", -0.5, "greater than or equal to 0"),
    _field("distil.temperature", 0, "greater than 0"),
    _field("distil.temperature", -2, "greater than 0"),
    _field("distil.temperature", float("inf"), "finite"),
    _field("distil.temperature", float("nan"), "finite"),
    _field("run.arms", []),
    _field("run.arms", ["kd_lora"], "Did you mean 'kd-lora'?"),
    _field("run.arms", ["kd-lora", "kd-lora"], "twice"),
    _field("run.arms", 3),
    _field("run.seeds", [], "at least 1"),
    _field("run.seeds", [-1], "greater than or equal to 0"),
    _field("run.seeds", [1, 1], "twice"),
    _field("run.seeds", ["a"], "integer"),
    _field("run.seeds", 0),
    _field("run.precision", "fp8"),
    _field("run.device", "tpu"),
    _field("run.threads", 0, "greater than or equal to 1"),
    _field("run.checkpoint_seconds", 0, "greater than 0"),
    _field("run.sedes", [1], "Did you mean 'seeds'?"),
    _field("export.formats", ["onix"], "Did you mean 'onnx'?"),
    _field("export.max_metric_drop", -1),
    _field("export.min_agreement", 1.1),
    _field("data.validation_fraction", 0, "greater than 0"),
    _field("data.validation_fraction", 1, "less than 1"),
    _field("data.max_train_examples", 0),
    _field("data.trian", "x.csv", "Did you mean 'train'?"),
    _field("name", "../../x"),
    _field("name", "a/b"),
    _field("name", "a\nb"),
    _field("name", "-x"),
    _field("name", ""),
    _field("name", "x" * 101),
    _field("family", "brt", "Did you mean 'bert'?"),
    _field("task.kind", "classification"),
    _field("task.name", "cloa", "Did you mean 'cola'?"),
    _field("task.text", ["a", "b", "c"]),
    _field("task.label_names", ["a", "a"], "twice"),
    _field("student.from_teacher_layers", []),
    _field("tsak", {"kind": "auto"}, "Did you mean 'task'?"),
    _field("run.seeds", [2**32], "less than 4294967296"),
    _field("teacher.seed", 10**40, "less than 4294967296"),
    _field("data.split_seed", 2**32, "less than 4294967296"),
    _field("lora.rank", 10**400, "less than or equal to 8192"),
    _field("student.train.max_length", 10**30, "less than or equal to 2147483647"),
    _field("student.train.batch_size", 2**31, "less than or equal to 2147483647"),
    _field("run.threads", 10**6, "less than or equal to 1024"),
    _field("data.augment", 10**12, "less than or equal to 1000"),
    _field("data.train", "~nobody-here/a.csv", "does not exist"),
    _field("family", ["bert"]),
    _field(
        "recipe", "paper-tunde", "input should be 'default', 'paper' or 'paper-tuned'", "Did you mean 'paper-tuned'?"
    ),
    _field("recipe", ["paper"]),
    # Without any adapter only the head trains, and the run still finishes; counting from 1 is the usual mistake.
    _field("lora.targets", ["qery"], "qery"),
    _field(
        "student", {"model": None, "from_teacher_layers": [1, 2]}, "student.from_teacher_layers", "layer 2", "0 to 1"
    ),
    (
        "squared errors of probabilities",
        {"teacher": {"probabilities": "a"}, "distil": {"loss": "mse"}},
        ("set distil.loss to kl",),
    ),
    (
        "a table that is not there",
        {"teacher": {"model": None, "logits": "/nowhere/none.parquet"}, "run": {"arms": ["kd-lora"]}},
        ("none.parquet",),
    ),
    ("two students", {"student": {"from_teacher_layers": [0]}}, ("student.model", "both set")),
    ("two teachers", {"teacher": {"logits": "a.parquet", "probabilities": "b.parquet"}}, ("one teacher only",)),
    ("order without a model", {"teacher": {"label_names": ["a", "b"]}}, ("teacher.fine_tuned, which is not set",)),
    ("lora without its base", {"teacher": {"model": None}, "run": {"arms": ["lora"]}}, ("teacher.model",)),
    ("no teacher", {"teacher": {"model": None}, "run": {"arms": ["kd-lora"]}}, ("need a teacher",)),
    ("no student", {"student": {"model": None}}, ("no student: set student.model",)),
    ("GLUE with columns", {"task": {"name": "cola", "text": "sentence"}}, ("known columns", "task.text")),
    ("no data", {"data": {"train": None, "validation": None}}, ("no data: set data.path", "data.train")),
    ("subset of files", {"data": {"subset": "x"}}, ("data.subset", "data.path")),
]

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("expected sections",)),
    ("a list", b"- a\n- b\n", ("expected sections", "list")),
    ("a number", b"3\n", ("expected sections", "int")),
    ("unclosed", b"data: [a, b\n", ("not valid YAML", "line 2")),
    ("a tab", b"data:\n\ttrain: x\n", ("not valid YAML", "line 2")),
    ("key twice", b"data: {train: a.csv, train: b.csv}\n", ("'train' stands twice", "line 1")),
    ("section twice", b"data: {train: a.csv}\ndata: {train: b.csv}\n", ("'data' stands twice", "line 2")),
    ("numbers as keys", b"1: 2\n", ("expected sections",)),
    ("a Python object", b"name: !!python/object/apply:os.system ['touch owned']\n", ("not valid YAML", "python")),
    ("another tag", b"name: !secret x\n", ("not valid YAML",)),
    ("not UTF-8", "name: caf\xe9\n".encode("latin-1"), ("UTF-8",)),
    ("UTF-16", "name: x\n".encode("utf-16"), ("UTF-8",)),
    ("a zero byte", b"name: a\x00b\n", ("not valid YAML",)),
    ("two documents", b"name: a\n---\nname: b\n", ("not valid YAML",)),
    ("unknown alias", b"name: *nobody\n", ("not valid YAML", "nobody")),
    ("nested too deep", b"name: " + b"[" * 5000 + b"]" * 5000, ("nested",)),
    ("an endless number", b"lora: {rank: " + b"9" * 5000 + b"}\n", ("digits",)),
    ("a date as a number", b"data: {train: a.csv}\nlora: {rank: 2026-01-01}\n", ("lora.rank", "2026-01-01")),
    ("an impossible date", b"name: 2026-13-45\n", ("not valid YAML",)),
    ("a bomb of aliases", BOMB.encode(), ("expands",)),
    ("a loop of aliases", b"name: &a [*a]\n", ("refers to itself",)),
    ("a section that is text", b"data: train.csv\nrun: fast\n", ("data", "run")),
    ("a section that is null", b"data:\n", ("data",)),
    ("a mapping as a key", b"{a: 1}: 2\n", ("YAML",)),
    ("merge of nothing", b"<<: 3\n", ("YAML",)),
    ("a zero byte in a path", b'data: {train: "a\\0b"}\n', ("data.train", "zero byte")),
    ("half a character", b'data: {train: a.csv}\ntask: {label: "\\ud800"}\n', ("not valid YAML", "surrogates")),
    ("half a character in a path", b'data: {train: "a\\udcff.csv"}\n', ("not valid YAML", "surrogates")),
    ("binary", bytes(range(128, 256)) * 4, ("UTF-8",)),
]

OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    ("lora.rank", ("expected key=value",)),
    ("=3", ("expected key=value",)),
    ("lora.rank=[", ("not valid YAML",)),
    ("lora.rank=two", ("lora.rank", "integer")),
    ("lora.rang=2", ("unknown key", "Did you mean 'rank'?")),
    ("lora=2", ("lora",)),
    ("lora..rank=2", ("lora",)),
    ("student.train.epochs.x=2", ("student.train.epochs",)),
    ("run.seeds=0,1", ("run.seeds",)),
    ("lora.rank=" + "9" * 5000, ("digits",)),
    ("lora.rank=" + "[" * 5000, ("nested",)),
    ("lora.rank=!!python/name:os.system", ("not valid YAML",)),
]
