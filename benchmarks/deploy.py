"""What shipping buys: a large teacher in PyTorch against its small student as int8, in one run.

    python benchmarks/deploy.py --models DIR --glue DIR --out DIR [--rounds 5] [--peers]

`--models` holds `mpnet-base` (the teacher; its head is fresh, which does not change its speed) and `minilm-l6` (the
student). The student is trained on the first 8,000 rows of SST-2 and exported; then teacher, student and both exports
are measured side by side on the development set, and the int8 file against ONNX Runtime as a user would call it: a
plain export with the default dynamic quantisation, padded batches of 32 in file order, on a file of mixed lengths.
`--peers` (extra `openvino-export`) measures instead every way to run the student, beside the int8 files that other
tools make of it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from harness import command_line, markdown, tell_machine
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdlora import Classifier, TeacherTrainConfig, benchmark, export_onnx, load_encoder, load_splits, train_teacher
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import Splits
from kdlora.data.spool import label_array
from kdlora.deploy.export import ParityError
from kdlora.deploy.folder import Way
from kdlora.deploy.gates import LabelledTexts
from kdlora.deploy.graph import quiet
from kdlora.deploy.network import spread
from kdlora.deploy.runtimes import ways_to_run
from kdlora.models.encoders import save_encoder
from kdlora.system.environment import default_threads

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


def export_plainly(student: Path, folder: Path) -> Path:
    """Export as a user would without this package: torch.onnx and ONNX Runtime's quantize_dynamic, both by default."""
    import torch
    from onnxruntime.quantization import quantize_dynamic

    file = folder / "model_quantized.onnx"
    if not file.exists():
        model, example = _open_plainly(student, folder)
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        options = {"kwargs": example, "dynamic_shapes": dict.fromkeys(example, axes), "external_data": False}
        with quiet("torch.onnx", "root"):
            torch.onnx.export(model, (), str(folder / "model.onnx"), dynamo=True, verbose=False, **options)
            quantize_dynamic(folder / "model.onnx", file)
    return file


def export_as_optimum(student: Path, folder: Path, texts: Sequence[str]) -> Path:
    """Make static int8 by the calls that sentence-transformers' OpenVINO route makes, with their defaults.

    Those of optimum-intel (August 2026): OpenVINO's conversion of the PyTorch model, and `OVQuantizationConfig()`.
    sentence-transformers pads 384 tokens of SST-2's training sentences for it.
    """
    from kdlora.deploy.openvino_backend import import_untracked, openvino

    nncf = import_untracked("nncf")
    file = folder / "openvino_model_quantized.xml"
    if not file.exists():
        model, example = _open_plainly(student, folder)
        read = AutoTokenizer.from_pretrained(student)(
            spread(texts, 128), padding="max_length", max_length=384, truncation=True, return_tensors="np"
        )
        rows = [{name: array[row : row + 1] for name, array in read.items()} for row in range(128)]
        with quiet("nncf"):
            quantised = nncf.quantize(
                openvino.convert_model(model, example_input=example),
                nncf.Dataset(rows),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=128,
                fast_bias_correction=True,
                model_type=nncf.ModelType.TRANSFORMER,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
            )
        openvino.save_model(quantised, file, compress_to_fp16=False)
    return file


def _open_plainly(student: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load the student with transformers, and an example; its JSON files go to the folder of its export."""
    folder.mkdir(exist_ok=True)
    for file in student.glob("*.json"):
        shutil.copy(file, folder)
    example = AutoTokenizer.from_pretrained(student)(["one text", "and another"], padding=True, return_tensors="pt")
    return AutoModelForSequenceClassification.from_pretrained(student).eval(), dict(example)


def plain_runtime(student: Path, file: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Call a file as a user would: batches of 32 in file order."""
    tokenizer, settings = AutoTokenizer.from_pretrained(student), onnxruntime.SessionOptions()
    settings.intra_op_num_threads = default_threads()
    session = onnxruntime.InferenceSession(str(file), settings)
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
    student = options.out / "student"
    plain = plain_runtime(student, export_plainly(student, options.out / "plain"))
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


def compare_with_peers(options: argparse.Namespace, splits: Splits, texts: LabelledTexts) -> None:
    """Print every way to run our exports of the student beside the files that other tools make of it."""
    out, student, more = options.out, options.out / "student", list(splits.train["text"])
    if not (out / "openvino").exists():
        settings = {"texts": texts, "more_texts": more, "max_length": MAX_LENGTH, "progress": print}
        try:
            # The others ask for no agreement at all.
            export_onnx(student, out / "openvino", formats=("onnx", "openvino"), min_agreement=0.98, **settings)
        except ParityError as failed:  # the table has what held
            print(failed)
    ways = {"student": Way(student)}
    for one in (*ways_to_run(out / "onnx"), *ways_to_run(out / "openvino")):
        ways[f"ours, {one.runtime} {one.precision}"] = one
    ways["quantize_dynamic, onnxruntime int8"] = Way(export_plainly(student, out / "plain"))
    ways["optimum's calls, openvino int8"] = Way(export_as_optimum(student, out / "optimum", more), "openvino", "int8")
    result = benchmark(ways, texts, max_length=MAX_LENGTH, rounds=options.rounds, progress=print)
    said = []
    for way in ways.values():
        model = Classifier.load(way.folder, runtime=way.runtime, precision=way.precision, max_length=MAX_LENGTH)
        said.append(model.predict_logits(texts.texts).argmax(axis=1))
    table = result.table()
    shares = [f"{(labels == said[0]).mean():.2%}" for labels in said]
    print(result.conditions())
    rows = [(*row, share) for row, share in zip(table.texts(), shares, strict=True)]
    print(markdown((*table.columns, "as the student"), rows, 2))


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
    if options.peers:
        compare_with_peers(options, splits, texts)
        tell_machine()
        return
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
    parser.add_argument("--peers", action="store_true", help="all runtimes beside the files that other tools make")
    main(parser.parse_args())
