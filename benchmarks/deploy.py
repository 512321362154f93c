"""What shipping buys: a large teacher in PyTorch against its small student as int8, in one run.

    python benchmarks/deploy.py --models DIR --glue DIR --out DIR [--rounds 5]

`--models` holds `mpnet-base` (the teacher; its head is fresh, which does not change its speed) and `minilm-l6` (the
student). The student is trained on the first 8,000 rows of SST-2 and exported; then teacher, student and both exports
are measured side by side on the development set, and the int8 file against ONNX Runtime as a user would call it: a
plain export with the default dynamic quantisation, padded batches of 32 in file order, on a file of mixed lengths.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from harness import command_line, markdown, tell_machine

from kdlora import Classifier, TeacherTrainConfig, benchmark, export_onnx, load_encoder, load_splits, train_teacher
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import Splits
from kdlora.data.spool import label_array
from kdlora.deploy.gates import LabelledTexts
from kdlora.deploy.onnx_backend import default_threads
from kdlora.models.encoders import save_encoder

MAX_LENGTH = 128


def prepare(options: argparse.Namespace, splits: Splits, texts: LabelledTexts) -> None:
    """Train and export what is not there yet."""
    teacher, student, exported = (options.out / name for name in ("teacher", "student", "onnx"))
    if not teacher.exists():
        save_encoder(load_encoder(str(options.models / "mpnet-base"), splits.task, seed=0), teacher)
    if not student.exists():
        settings, folder = TeacherTrainConfig(learning_rate=5e-5), options.out / "training"
        trained = train_teacher(str(options.models / "minilm-l6"), splits, settings, folder=folder)
        save_encoder(trained.encoder, student)
    if not exported.exists():
        more = list(splits.train["text"])
        result = export_onnx(student, exported, texts=texts, more_texts=more, max_length=MAX_LENGTH, progress=print)
        print(f"int8: {result.recipe}")


def mixed_texts(splits: Splits, count: int = 2000) -> list[str]:
    """Join neighbouring sentences into texts of mixed lengths, shuffled."""
    draw = np.random.default_rng(0)
    sentences = list(splits.validation["text"]) + list(splits.train["text"])
    starts, lengths = draw.integers(0, len(sentences) - 12, count), draw.integers(1, 12, count)
    return [" ".join(sentences[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def plain_runtime(student: Path, folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Export and call as a user would without this package: default quantisation, batches of 32 in file order."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(student)
    if not (folder / "int8.onnx").exists():
        model = AutoModelForSequenceClassification.from_pretrained(student).eval()
        example = dict(tokenizer(["one text", "and another one"], padding=True, return_tensors="pt"))
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        options = {"kwargs": example, "dynamic_shapes": dict.fromkeys(example, axes), "external_data": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (), str(folder / "fp32.onnx"), dynamo=True, **options)
        quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = default_threads()
    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), settings)
    names = [value.name for value in session.get_inputs()]

    def classify(texts: Sequence[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), 32):
            rows = list(texts[start : start + 32])
            batch = tokenizer(rows, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="np")
            parts.append(session.run(None, {name: batch[name].astype(np.int64) for name in names})[0])
        return np.concatenate(parts)

    return classify


def compare_with_plain_runtime(options: argparse.Namespace, texts: list[str]) -> float:
    """Give our throughput over the plain one's, median of interleaved rounds."""
    plain = plain_runtime(options.out / "student", options.out / "plain")
    calls = {"plain": plain, "ours": Classifier.load(options.out / "onnx").predict_logits}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(texts if turn else texts[:200])
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print({name: f"{len(texts) / median:,.0f} texts of mixed lengths a second" for name, median in medians.items()})
    return medians["plain"] / medians["ours"]


def cold_start(exported: Path) -> float:
    """Time a fresh process from its start to its first answer, median of five, seconds."""
    code = "import sys; from kdlora import Classifier; Classifier.load(sys.argv[1]).predict(['a text'])"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(exported)], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    splits = load_splits(TaskConfig(name="sst2"), DataConfig(path=str(options.glue), max_train_examples=8000))
    texts = LabelledTexts(list(splits.validation["text"]), label_array(splits.validation), splits.task)
    prepare(options, splits, texts)
    models = {name: out / name for name in ("teacher", "student")}
    models |= {"student ONNX": out / "onnx" / "model.onnx", "student int8": out / "onnx" / "model_quantized.onnx"}
    result = benchmark(models, texts, max_length=MAX_LENGTH, rounds=options.rounds, batch_sizes=(32,), progress=print)
    print(f"{result.texts} texts of SST-2, {result.threads} threads, {result.rounds} rounds")
    print(markdown(result.table().columns, result.table().texts()))
    teacher, student, _, int8 = result.models
    memory = 100 * (int8.peak_memory_bytes or 0) / (teacher.peak_memory_bytes or 1)
    found = [
        ("throughput, teacher x", int8.texts_per_second / teacher.texts_per_second, "at least", 24.0),
        ("p50 latency, 1/teacher", teacher.p50_ms / int8.p50_ms, "at least", 30.0),
        ("size, % of teacher", 100 * int8.size_bytes / teacher.size_bytes, "at most", 5.5),
        ("memory, % of teacher", memory, "at most", 20.0),
        ("score lost to the fp32 student, points", (student.score or 0.0) - (int8.score or 0.0), "at most", 0.5),
        ("throughput, fp32 student x", int8.texts_per_second / student.texts_per_second, "at least", 3.5),
        ("throughput, plain ONNX x", compare_with_plain_runtime(options, mixed_texts(splits)), "at least", 1.7),
        ("cold start, s", cold_start(out / "onnx"), "at most", 0.5),
    ]
    for name, value, side, goal in found:
        good = value >= goal if side == "at least" else value <= goal
        print(f"{'met ' if good else 'MISSED'} {name}: {value:.2f} ({side} {goal:g})")
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue", "out")
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
