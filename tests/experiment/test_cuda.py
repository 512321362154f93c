"""A whole experiment on a GPU: trainings, labelling, resuming, scores; skipped where there is none."""

import numpy as np
import pytest
import torch

from experiments import read_rows
from kdlora.deploy.predict import Classifier
from kdlora.evidence.predictions import read_predictions
from kdlora.experiment.run import run_experiment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_trained_on_a_gpu_answers_alike_on_a_cpu(workshop, tmp_path, precision):
    """A tensor left on another device, a peak of memory that is the machine's, a student that is served otherwise."""
    run = {"arms": ["fft", "kd-lora", "student-lora", "student-fft"], "device": "cuda", "precision": precision}
    config = workshop.config({"run": run | {"checkpoint_seconds": 0.01}, "data": {"augment": 1}})

    def cut(stage, event):
        if stage.arm == "kd-lora" and getattr(event, "step", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "out", listen=cut)
    result = run_experiment(config, tmp_path / "out")
    assert not result.failed
    for record in result.records:
        assert (record.device, record.precision) == (torch.cuda.get_device_name(), precision)
        assert record.peak_memory_bytes is None if record.arm == "kd-lora" else record.peak_memory_bytes > 0  # resumed
    scored = read_predictions(result.layout.run(result.shipped.arm, 0).predictions).only("validation")
    texts = [row["text"] for row in read_rows(workshop.validation)]
    found = Classifier.load(result.layout.student).predict_logits(texts)
    np.testing.assert_allclose(found, scored.logits, atol=1e-2)
