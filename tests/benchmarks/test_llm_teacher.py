"""The benchmark of language models as teachers: what is drawn, asked and compared, and that a call goes on."""

import csv
import json

import llm_server
import llm_teacher
import pytest
import torch

import llm_standin
import tiny
from experiments import read_rows


def test_what_is_kept_of_a_beginning_changes_no_answer(tmp_path):
    """A cache that is cut at the wrong token gives the answer to another prompt."""
    model = llm_server.Model(str(tiny.build_model_folder("llama", tmp_path / "llama")), "float32")
    model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    begin = "Labels:\nA: a superb film\nB: a dull film"
    texts = ["a superb film", "a dull film to the end", "a superb film", "a dull film, said nobody"]
    for prompt in (f"{start}\n\nText: {text}\nAnswer:" for text in texts for start in (begin, begin + " again")):
        likely, read = model.answer(prompt)
        tokens = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            alone = model.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert read == len(tokens)
        torch.testing.assert_close(likely, alone, atol=1e-4, rtol=0)


@pytest.fixture
def prepared(tmp_path, tiny_model_folder):
    """The files of SST-2 with rows of ours, and what every call is told."""
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name, seed, count in (("train", 0, 300), ("dev", 1, 200)):
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            lines = csv.writer(file, delimiter="\t")
            lines.writerow(["sentence", "label"])
            for number, row in enumerate(tiny.sentiment_rows(count, seed)):
                lines.writerow([f"{row['text']} {seed} {number}", int(row["label"] == "positive")])
    models = {"--student": tiny_model_folder("bert"), "--encoder": tiny_model_folder("bert", seed=1)}
    given = ["--data", tmp_path, "--models", "/", "--out", tmp_path / "out", "--sets", "sst2", "--scored", 60]
    given += ["--teacher-epochs", 1, "--epochs", 1, *(item for pair in models.items() for item in pair)]
    return tmp_path, [str(item) for item in given]


def call(monkeypatch, *given: str) -> None:
    """Call it as a shell does."""
    monkeypatch.setattr("sys.argv", ["llm_teacher.py", *given])
    llm_teacher.main()


def test_prompted(prepared, monkeypatch, capsys):
    """Texts that people labelled among those that are asked about, or scored rows among either, flatter everybody."""
    folder, given = prepared
    sizes = ["--human", "8", "--texts", "10", "20", "--shots", "0", "--steps", "4"]
    with llm_standin.running() as model:
        call(monkeypatch, "prompted", *given, *sizes, "--url", model.url)
        first = capsys.readouterr().out
        asked = model.number
        call(monkeypatch, "prompted", *given, *sizes, "--url", model.url)
    assert asked == model.number == 8 + 20 + 60
    place = folder / "out" / "prompted" / "sst2"
    people, texts, scored = (read_rows(place / f"{name}.csv") for name in ("people-8", "texts", "scored"))
    assert [row["label"] for row in people].count("positive") == 4
    assert len({row["text"] for row in [*people, *texts, *scored]}) == 8 + 20 + 60
    assert "label" not in texts[0]
    for row in ("people-8", "alone-0-10", "alone-0-20: FFT", "alone-0-20: KD-LoRA", "both-0-8"):
        assert f"| {row} |" in first.replace("**", ""), row
    record = json.loads((place / "runs" / "alone-0-20" / "runs" / "kd-lora-seed0" / "run.json").read_text())
    assert (record["rows"]["train"], record["rows"]["unlabelled"]) == (8, 20)
    assert record["config"]["distil"]["alpha"] == 0
    assert (place / "compared-0" / "compare.html").read_text().count("Score against texts") >= 1
