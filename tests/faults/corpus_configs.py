"""Configs that must be refused: changes of a good one, whole files, and overrides, each with parts of the message."""

from typing import Any

Case = tuple[dict[str, Any], tuple[str, ...]]


FROM_0, FROM_1, SEED = "greater than or equal to 0", "greater than or equal to 1", "less than 4294967296"
VALUES: dict[str, list[tuple[Any, ...]]] = {
    "student.train.epochs": [(0, "greater than 0"), (float("nan"), "finite"), ("many", "number"), ([3], "number")],
    "student.train.batch_size": [(0, FROM_1), (1.5, "integer"), (2**31, "less than or equal to 2147483647")],
    "student.train.schedule": [("linera", "Did you mean 'linear'?")],
    "student.train.class_weights": [
        ("balance", "Did you mean 'balanced'?", "a valid mapping"),
        ({"spam": 0}, "class_weights.spam: input should be greater than 0"),
        ({"spam": "five"}, "class_weights.spam: input should be a valid number"),
        ({"spam": True}, "class_weights.spam: input should be a valid number"),
        ({}, "should have at least 1 item"),
    ],
    "task.metric": [
        ({"costs": {}}, "Did you mean 'cost'?"),
        ({"cost": {"a": {"b": -1}}}, "cost.a.b: input should be greater than or equal to 0"),
        ({"cost": 5}, "cost: input should be a valid mapping"),
    ],
    "student.train": [({"early_stopping_patience": 2}, "select: best"), ("fast",)],
    "teacher.train.batch_size": [
        (True, "another kind of value than true; a name such as yes, no, on or off needs quotes in YAML")
    ],
    "run.seeds": [([True],), ([], "at least 1"), ([-1], FROM_0), ([1, 1], "twice"), ([2**32], SEED)],
    "lora.rank": [(0, FROM_1), ("eight", "integer"), (10**400, "less than or equal to 8192")],
    "lora.rnak": [(4, "unknown key", "Did you mean 'rank'?")],
    "run.arms": [([],), (["kd_lora"], "Did you mean 'kd-lora'?"), (["kd-lora", "kd-lora"], "twice"), (3,)],
    "run.precision": [("fp8",)],
    "data.trian": [("x.csv", "Did you mean 'train'?")],
    "name": [("../../x",), ("a/b",), ("a\nb",), ("-x",), ("",), ("x" * 101,)],
    "family": [("brt", "Did you mean 'bert'?"), (["bert"],)],
    "task.text": [(["a", "b", "c"],)],
    "task.label_names": [(["a", "a"], "twice")],
    "student.from_teacher_layers": [([],)],
    "tsak": [({"kind": "auto"}, "Did you mean 'task'?")],
    "data.train": [("~nobody-here/a.csv", "does not exist")],
    "recipe": [("paper-tunde", "'default', 'paper' or 'paper-tuned'", "Did you mean 'paper-tuned'?"), (["paper"],)],
    "lora.targets": [(["qery"], "qery")],
    "student": [({"model": None, "from_teacher_layers": [1, 2]}, "student.from_teacher_layers is [1, 2]", "0 to 1")],
}
"""Values of a key, each with parts of the message, which names the key."""


def _nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


FIELDS: list[Case] = [
    *((_nested(key, value), (key, *expected)) for key, cases in VALUES.items() for value, *expected in cases),
    # Squared errors of probabilities, and a table that is not there.
    ({"teacher": {"probabilities": "a"}, "distil": {"loss": "mse"}}, ("set distil.loss to kl",)),
    ({"teacher": {"model": None, "logits": "/nowhere/none.parquet"}, "run": {"arms": ["kd-lora"]}}, ("none.parquet",)),
    # Models that are set twice, or wanted and not set.
    ({"student": {"from_teacher_layers": [0]}}, ("student.model", "both set")),
    ({"teacher": {"logits": "a.parquet", "probabilities": "b.parquet"}}, ("one teacher only",)),
    ({"teacher": {"label_names": ["a", "b"]}}, ("teacher.fine_tuned, which is not set",)),
    ({"teacher": {"model": None}, "run": {"arms": ["lora"]}}, ("teacher.model",)),
    ({"teacher": {"model": None}, "run": {"arms": ["kd-lora"]}}, ("need a teacher",)),
    ({"student": {"model": None}}, ("no student: set student.model",)),
    # GLUE's columns and metrics are its own.
    ({"task": {"name": "cola", "text": "sentence"}}, ("known columns", "task.text")),
    ({"task": {"name": "cola", "metric": "accuracy"}}, ("known columns and metric", "task.metric")),
    ({"data": {"train": None, "validation": None}}, ("no data: set data.path", "data.train")),
    ({"data": {"subset": "x"}}, ("data.subset", "data.path")),
]

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("expected sections",)),
    ("a list", b"- a\n- b\n", ("expected sections", "list")),
    ("unclosed", b"data: [a, b\n", ("not valid YAML", "line 2")),
    ("a tab", b"data:\n\ttrain: x\n", ("not valid YAML", "line 2")),
    ("key twice", b"data: {train: a.csv, train: b.csv}\n", ("'train' stands twice", "line 1")),
    ("numbers as keys", b"1: 2\n", ("expected sections",)),
    ("a Python object", b"name: !!python/object/apply:os.system ['touch owned']\n", ("not valid YAML", "python")),
    ("not UTF-8", "name: caf\xe9\n".encode("latin-1"), ("UTF-8",)),
    ("a zero byte", b"name: a\x00b\n", ("not valid YAML",)),
    ("nested too deep", b"name: " + b"[" * 5000 + b"]" * 5000, ("nested",)),
    ("an endless number", b"lora: {rank: " + b"9" * 5000 + b"}\n", ("digits",)),
    ("an impossible date", b"name: 2026-13-45\n", ("not valid YAML",)),
    ("a bomb of aliases", BOMB.encode(), ("expands",)),
    ("a loop of aliases", b"name: &a [*a]\n", ("refers to itself",)),
    ("a section that is text", b"data: train.csv\nrun: fast\n", ("data", "run")),
    ("a section that is null", b"data:\n", ("data",)),
    ("merge of nothing", b"<<: 3\n", ("YAML",)),
    ("a zero byte in a path", b'data: {train: "a\\0b"}\n', ("data.train", "zero byte")),
    ("half a character", b'data: {train: a.csv}\ntask: {label: "\\ud800"}\n', ("not valid YAML", "surrogates")),
]

OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    ("lora.rank", ("expected key=value",)),
    ("lora.rank=[", ("not valid YAML",)),
    ("lora.rank=two", ("lora.rank", "integer")),
    ("lora.rang=2", ("unknown key", "Did you mean 'rank'?")),
    ("data.max_length=64", ("Did you mean 'student.train.max_length' or 'teacher.train.max_length'?",)),
    ("run.seed=3", ("Did you mean 'run.seeds'?",)),
    ("lora=2", ("lora",)),
    ("run.seeds=0,1", ("run.seeds",)),
    ("lora.rank=" + "9" * 5000, ("digits",)),
    ("lora.rank=!!python/name:os.system", ("not valid YAML",)),
]
