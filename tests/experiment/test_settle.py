"""What a config leaves open: steps by rows, rates by width, settled once and kept."""

import numpy as np
import pytest

from kdlora.config import TrainConfig
from kdlora.configfile import build_config
from kdlora.data.batches import LengthBucketSampler
from kdlora.data.tasks import Task
from kdlora.defaults import adapter_rate, epochs_for, full_rate
from kdlora.errors import ConfigError
from kdlora.evidence.predictions import Predictions
from kdlora.experiment.scoring import unknown_classes
from kdlora.experiment.settle import Chosen, closed, settings_for

CONFIG = {
    "data": {"train": "t.csv"},
    "task": {"text": "text", "label": "label"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


@pytest.mark.parametrize(
    ("role", "rows", "epochs"),
    [("teacher", 300, 30), ("teacher", 1_500, 6), ("teacher", 67_349, 2), ("student", 300, 60), ("student", 67_349, 4)],
)
def test_few_rows_get_more_passes_and_many_rows_fewer(role, rows, epochs):
    """Fixed epochs leave a teacher of 300 rows half trained, and take days on 100,000."""
    assert epochs_for(role, rows, 32) == epochs


def test_a_wider_model_takes_a_lower_rate():
    """One rate for all widths: the narrow model hardly learns, the wide one collapses."""
    assert (full_rate(768), full_rate(384)) == (5e-5, 1e-4)
    assert (adapter_rate(768), adapter_rate(384), adapter_rate(128)) == (5e-4, 1e-3, 3e-3)


def test_only_what_is_null_is_settled():
    """A rate that the user set and that is replaced in silence is somebody else's experiment."""
    chosen = Chosen(64, 1500, {"teacher": 768, "student": 384})
    config = chosen.fill_in(build_config(CONFIG | {"teacher": {"model": "t", "train": {"learning_rate": 1e-5}}}))
    assert (config.teacher.train.learning_rate, config.teacher.train.epochs) == (1e-5, 6)
    assert (config.student.train.max_length, config.student.train.learning_rate) == (64, 1e-3)
    assert settings_for(config, "lora").learning_rate == 5e-4
    assert settings_for(config, "student-fft").learning_rate == 1e-4
    assert settings_for(config, "student-fft").head_learning_rate == config.teacher.train.head_learning_rate
    paper = chosen.fill_in(build_config(CONFIG | {"recipe": "paper"}))
    assert (paper.teacher.train.learning_rate, paper.student.train.epochs) == (2e-5, 5)
    assert settings_for(paper, "lora").learning_rate == settings_for(paper, "kd-lora").learning_rate == 5e-4


def test_what_is_open_is_not_trained_with():
    """A null that reaches the optimiser is a traceback, or worse, a default of another library."""
    with pytest.raises(ConfigError, match=r"train\.max_length is null"):
        closed(TrainConfig())


def test_a_step_has_a_copy_beside_every_row():
    """Copies that take the place of labelled rows taught a student less than its control knew."""
    sampler = LengthBucketSampler(np.arange(50) + 3, 4, seed=0, beside=40)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        rows = [row for batch in batches for row in batch]
        assert sorted(row for row in rows if row < 10) == list(range(10))
        assert len({row for row in rows if row >= 10}) == 10
        assert [len(batch) for batch in batches] == [8, 8, 4]
        assert [sampler.rows_of(place) for place in range(len(sampler))] == [8, 8, 4]


def test_a_class_that_the_teacher_never_gets_right_is_named():
    """A teacher that answers the largest class only scores well, and takes the rare ones from its student."""
    task = Task("single-label", ("text",), ("label",), ("common", "rare"), ("accuracy",))
    logits = np.zeros((8, len(task.label_names)), np.float32)
    logits[:, 0] = 1.0
    labels = [0, 0, 0, 0, 0, 1, 1, 1]
    seen = Predictions(tuple("abcdefgh"), ("validation",) * 8, logits, task.label_names, np.asarray(labels))
    assert unknown_classes(task, seen) == [task.label_names[1]]
