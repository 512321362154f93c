"""OpenVINO as a second runtime: its stages of an export, its files, and the choice by a measurement."""

import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from deploy_folders import TEXTS
from kdlora.deploy import runtimes
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.export import export_onnx
from kdlora.deploy.folder import EXPORT_RECORD, Way, read_model_folder
from kdlora.deploy.network import find_model
from kdlora.deploy.predict import Classifier
from kdlora.deploy.runtimes import fastest_way, store_speeds, ways_to_run
from kdlora.deploy.stream import predict_file
from kdlora.deploy.tagger import Tagger
from kdlora.deploy.webpage import write_web_page
from kdlora.errors import ArtifactError, ModelError
from kdlora.system.integrity import seal

pytestmark = pytest.mark.skipif(find_spec("nncf") is None, reason="the extra openvino-export is not installed")


@pytest.fixture(scope="module")
def folder(made_once, classifier_folder):
    """An export for both runtimes; read only."""

    def make(place):
        settings = {"formats": ("onnx", "onnx-int8", "openvino"), "min_agreement": 0.5, "max_metric_drop": 50}
        return export_onnx(classifier_folder(), place / "onnx", texts=TEXTS[:40], more_texts=TEXTS[40:], **settings)

    return made_once("export-openvino", make).folder


def test_every_stage_is_judged_in_its_own_runtime(folder):
    """A file that was never run in the runtime that it ships for, or int8 that is no smaller."""
    record = json.loads((folder / "kdlora_export.json").read_text())
    names = [stage["stage"].partition(" ")[0] for stage in record["stages"]]
    assert names[:4] == ["onnx", "onnx-optimised", "onnx-int8", "openvino"]
    assert names[-1] == "openvino-int8"
    assert set(record["sha256"]) >= {"openvino_model_quantized.xml", "openvino_model_quantized.bin"}
    exact = Classifier.load(folder, precision="fp32").predict_logits(TEXTS)
    fp32 = Classifier.load(folder, precision="fp32", runtime="openvino")
    assert (fp32.folder.backend, fp32.folder.precision) == ("openvino", "fp32")
    assert np.abs(fp32.predict_logits(TEXTS) - exact).max() < 1e-4
    int8 = Classifier.load(folder, runtime="openvino")
    assert int8.folder.precision == "int8"
    # Random weights are sensitive: 0.76 on a processor without VNNI.
    assert 0.6 < np.corrcoef(int8.predict_logits(TEXTS).ravel(), exact.ravel())[0, 1] < 0.9999999
    assert np.array_equal(
        int8.predict_logits(TEXTS), Classifier.load(folder / int8.folder.file.name).predict_logits(TEXTS)
    )
    weights = folder / "openvino_model_quantized.bin"
    assert int8.folder.size_bytes > weights.stat().st_size < fp32.folder.size_bytes
    told = [name for name in sys.modules if name.startswith("openvino_telemetry.")]
    assert not told, "a library that sends to its makers what is run, and marks the user by a file in the home folder"


def test_a_tagger_runs_in_it_if_it_was_checked_there(exported, tmp_path):
    """A runtime that flattens the tokens of a batch, that a tagger silently does not take, or that nobody checked."""
    copy = shutil.copytree(exported("bert", "tokens"), tmp_path / "copy")
    record = json.loads((copy / EXPORT_RECORD).read_text())
    with pytest.raises(ModelError, match="openvino is not among its stages"):
        Tagger.load(copy, precision="fp32", runtime="openvino")
    record |= {"stages": [*record["stages"], {"stage": "openvino"}]}
    (copy / EXPORT_RECORD).write_text(json.dumps(seal(record)))
    onnx, other = (Tagger.load(copy, precision="fp32", runtime=runtime) for runtime in ("onnxruntime", "openvino"))
    assert (onnx.folder.backend, other.folder.backend) == ("onnx", "openvino")
    assert np.abs(onnx.predict_logits(TEXTS) - other.predict_logits(TEXTS)).max() < 1e-4


def test_an_export_for_it_alone_has_its_files_alone(classifier_folder, traced_once, tmp_path):
    """The ONNX file that it was made of, which nobody asked for, beside it."""
    settings = {"formats": ("openvino",), "min_agreement": 0.5, "max_metric_drop": 50}
    export = tmp_path / "student-onnx"
    found = export_onnx(classifier_folder(), export, texts=TEXTS[:40], more_texts=TEXTS[40:], **settings)
    assert [path.name for path in export.glob("*.[ob]*n*")] == ["openvino_model_quantized.bin"]
    assert found.size_bytes["openvino"] > (export / "openvino_model_quantized.bin").stat().st_size
    shutil.copytree(classifier_folder(), tmp_path / "student")  # by which the experiment predicts
    (tmp_path / "in.txt").write_text("wonderful\n")
    assert predict_file(tmp_path, tmp_path / "in.txt", tmp_path / "out.jsonl").errors == 0
    # `auto` asked for an ONNX file, and nothing said what would run this one.
    assert Classifier.load(export, runtime="auto").folder.backend == "openvino"
    with pytest.raises(ModelError, match=r"model_quantized\.xml is run by OpenVINO; name that file, or runtime="):
        Classifier.load(export)
    named = export / "openvino_model_quantized.xml"
    assert Classifier.load(named).predict(["wonderful"]) == Classifier.load(export, runtime="openvino").predict(
        ["wonderful"]
    )
    with pytest.raises(ModelError, match="a page needs the ONNX file"):
        write_web_page(named, tmp_path / "page")


def test_bf16_is_run_where_the_processor_has_it_and_refused_elsewhere(folder, classifier_folder, tmp_path, monkeypatch):
    """A precision that is asked for and quietly another one, or that `auto` finds no runtime for."""
    from kdlora.deploy import openvino_backend

    with pytest.raises(ModelError, match="runtime='openvino'"):
        Classifier.load(folder, precision="bf16")
    if openvino_backend.has_bf16():
        exact = Classifier.load(folder, precision="fp32").predict_logits(TEXTS)
        half = Classifier.load(folder, precision="bf16", runtime="openvino").predict_logits(TEXTS)
        assert 0.9 < np.corrcoef(half.ravel(), exact.ravel())[0, 1] < 0.9999999, "a random model is sensitive"
    monkeypatch.setattr(openvino_backend, "has_bf16", lambda: False)
    with pytest.raises(ModelError, match=r"needs a processor|openvino-bf16 is not among its stages"):
        Classifier.load(folder, precision="bf16", runtime="openvino")
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / EXPORT_RECORD).read_text())
    record |= {"stages": [*record["stages"], {"stage": "openvino-bf16"}]}
    (copy / EXPORT_RECORD).write_text(json.dumps(seal(record)))
    found = find_model(Way(copy, "auto", "bf16"))
    assert (found.backend, found.precision) == ("openvino", "bf16")
    with pytest.raises(ModelError, match="needs a processor"):
        Classifier.load(copy / "model.onnx", precision="bf16", runtime="auto")
    with pytest.raises(ModelError, match="run `kdlora export` first"):
        Classifier.load(classifier_folder(), precision="bf16", runtime="auto")


def test_weights_that_were_exchanged_are_refused(folder, classifier_folder, tmp_path):
    """Weights of another model beside a graph that was checked; a PyTorch folder that OpenVINO was to run."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "openvino_model_quantized.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    with pytest.raises(ArtifactError, match=r"quantized\.bin: not the file that was exported"):
        Classifier.load(copy, runtime="openvino")
    (copy / "openvino_model_quantized.xml").write_text("<net")
    with pytest.raises(ArtifactError, match=r"OpenVINO .* cannot load it"):
        Classifier.load(copy, runtime="openvino", verify=False)
    with pytest.raises(ModelError, match="run `kdlora export` first"):
        Classifier.load(classifier_folder(), runtime="openvino")


def test_auto_takes_what_was_the_fastest_on_this_host(folder, tmp_path, monkeypatch):
    """Figures of another machine, of an earlier export or of another batch size that decide here."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert Classifier.load(copy, runtime="auto").folder.backend == "onnx", "nothing was measured"
    figures = {("onnxruntime", "int8"): {1: 900, 32: 1000}, ("openvino", "int8"): {1: 500, 32: 2000}}
    figures |= {("openvino", "fp32"): {1: 100, 32: 700}, ("onnxruntime", "fp32"): {1: 400, 32: 600}}
    store_speeds({Way(copy, *way): speeds for way, speeds in figures.items()})
    chosen = [fastest_way(copy, "auto", size) for size in (1, 4, 64)]
    assert [(way.runtime, way.precision) for way in chosen] == [
        ("onnxruntime", "int8"),
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
    ]
    assert fastest_way(copy, "fp32", 32).runtime == "openvino"
    loaded = Classifier.load(copy, runtime="auto", batch_size=64).folder
    assert (loaded.backend, loaded.precision) == ("openvino", "int8")
    assert Classifier.load(copy / "model.onnx", runtime="auto").folder.precision == "fp32", "the file that is named"
    write_decisions(read_model_folder(copy), Decisions(thresholds={}))
    assert ways_to_run(copy) == [Way(copy, precision="int8")], "a benchmark cannot load the others"
    assert fastest_way(copy, "auto", 64).runtime == "onnxruntime", "thresholds are of one file in one runtime"
    (copy / "kdlora_decisions.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "describe_machine", lambda: {"cpu": "another", "cores": "2"})
        assert fastest_way(copy, "auto", 64) == Way(copy)
    record = copy / "kdlora_export.json"
    record.write_bytes(record.read_bytes() + b"\n")
    assert fastest_way(copy, "auto", 64) == Way(copy), "of an earlier export"
    (copy / "kdlora_runtimes.json").write_text('{"export": 1}')
    with pytest.raises(ArtifactError, match=r"damaged.*kdlora benchmark"):
        fastest_way(copy, "auto", 64)
    record.unlink()
    assert fastest_way(copy, "auto", 64) == Way(copy), "no export any more"
