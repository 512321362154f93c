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
from dataclasses import asdict
from pathlib import Path

import numpy as np
from harness import command_line, markdown, tell_machine

from kdlora.config import DataConfig, TaskConfig, TeacherTrainConfig
from kdlora.data.load import Splits, load_splits
from kdlora.deploy.benchmark import benchmark
from kdlora.deploy.export import export_onnx
from kdlora.deploy.gates import LabelledTexts
from kdlora.deploy.onnx_backend import default_threads
from kdlora.deploy.predict import Classifier
from kdlora.experiment.arms import train_teacher
from kdlora.experiment.scoring import label_array
from kdlora.models.encoders import load_encoder, save_encoder
from kdlora.report.plots import plot_benchmark
from kdlora.report.shipped import BenchmarkResult
from kdlora.system.storage import write_json_atomic

MAX_LENGTH = 128
GOALS = {
    "throughput, teacher x": ("at least", 24.0),
    "p50 latency, 1/teacher": ("at least", 30.0),
    "size, % of teacher": ("at most", 5.5),
    "memory, % of teacher": ("at most", 20.0),
    "score lost to the fp32 student, points": ("at most", 0.5),
    "throughput, fp32 student x": ("at least", 3.5),
    "throughput, plain ONNX Runtime x": ("at least", 1.7),
    "cold start, s": ("at most", 0.5),
}


def prepare(options: argparse.Namespace) -> tuple[Splits, Path, Path, Path]:
    """Train and export what is not there yet: (data, teacher, student, exported student)."""
    data = DataConfig(path=str(options.glue), max_train_examples=8000)
    splits = load_splits(TaskConfig(name="sst2"), data)
    teacher, student, exported = (options.out / name for name in ("teacher", "student", "onnx"))
    if not teacher.exists():
        save_encoder(load_encoder(str(options.models / "mpnet-base"), splits.task, seed=0), teacher)
    if not student.exists():
        trained = train_teacher(
            str(options.models / "minilm-l6"),
            splits,
            TeacherTrainConfig(learning_rate=5e-5),
            folder=options.out / "training",
        )
        save_encoder(trained.encoder, student)
    if not exported.exists():
        result = export_onnx(
            student,
            exported,
            texts=LabelledTexts(list(splits.validation["text"]), label_array(splits.validation), splits.task),
            more_texts=list(splits.train["text"]),
            max_length=MAX_LENGTH,
            progress=print,
        )
        print(f"int8: {result.recipe}")
    return splits, teacher, student, exported


def mixed_texts(splits: Splits, count: int = 2000) -> list[str]:
    """Join neighbouring sentences into texts of mixed lengths, shuffled."""
    draw = np.random.default_rng(0)
    sentences = list(splits.validation["text"]) + list(splits.train["text"])[:8000]
    texts = []
    for _ in range(count):
        start = int(draw.integers(0, len(sentences) - 12))
        texts.append(" ".join(sentences[start : start + int(draw.integers(1, 12))]))
    return texts


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
        example = tokenizer(["one text", "and another one"], padding=True, return_tensors="pt")
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (),
                str(folder / "fp32.onnx"),
                kwargs=dict(example),
                dynamic_shapes=dict.fromkeys(example, axes),
                dynamo=True,
                external_data=False,
            )
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


def compare_with_plain_runtime(options: argparse.Namespace, splits: Splits, student: Path, exported: Path) -> float:
    """Give our throughput over the plain one's, median of interleaved rounds."""
    texts = mixed_texts(splits)
    plain = plain_runtime(student, options.out / "plain")
    ours = Classifier.load(exported)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for call in (plain, ours.predict_logits):
        call(texts[:200])
    for _ in range(options.rounds):
        for name, call in (("plain", plain), ("ours", ours.predict_logits)):
            start = time.perf_counter()
            call(texts)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: {len(texts) / statistics.median(times):,.0f} texts of mixed lengths a second")
    return statistics.median(seconds["plain"]) / statistics.median(seconds["ours"])


def cold_start(exported: Path) -> float:
    """Time a fresh process from its start to its first answer, median of five, seconds."""
    code = "import sys; from kdlora.deploy.predict import Classifier; Classifier.load(sys.argv[1]).predict(['a text'])"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(exported)], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratios(result: BenchmarkResult, plain: float, start: float) -> dict[str, float]:
    """Compute the figures that have a goal."""
    teacher, student, _, int8 = result.models
    memory = 100 * (int8.peak_memory_bytes or 0) / (teacher.peak_memory_bytes or 1)
    values = (
        int8.texts_per_second / teacher.texts_per_second,
        teacher.p50_ms / int8.p50_ms,
        100 * int8.size_bytes / teacher.size_bytes,
        memory,
        (student.score or 0.0) - (int8.score or 0.0),
        int8.texts_per_second / student.texts_per_second,
        plain,
        start,
    )
    return dict(zip(GOALS, values, strict=True))


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    options.out.mkdir(parents=True, exist_ok=True)
    splits, teacher, student, exported = prepare(options)
    result = benchmark(
        {
            "teacher": teacher,
            "student": student,
            "student ONNX": exported / "model.onnx",
            "student int8": exported / "model_quantized.onnx",
        },
        LabelledTexts(list(splits.validation["text"]), label_array(splits.validation), splits.task),
        max_length=MAX_LENGTH,
        rounds=options.rounds,
        batch_sizes=(32,),
        progress=print,
    )
    found = ratios(result, compare_with_plain_runtime(options, splits, student, exported), cold_start(exported))
    write_json_atomic(options.out / "deploy.json", {**asdict(result), "ratios": found})
    plot_benchmark(result, options.out / "deploy.svg")
    print(f"{result.texts} texts of SST-2, {result.threads} threads, {result.rounds} rounds")
    print(markdown(*result.table()))
    for name, (side, goal) in GOALS.items():
        good = found[name] >= goal if side == "at least" else found[name] <= goal
        print(f"{'met ' if good else 'MISSED'} {name}: {found[name]:.2f} ({side} {goal:g})")
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue", "out")
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
