"""A small model that answers what it is sure of, and a large one, or a service, that answers the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdlora.deploy.predict import Classifier, Text, iterate_texts
from kdlora.errors import DataError, ModelError
from kdlora.evidence.defer import Sureness, check_sureness, measure_sureness

if TYPE_CHECKING:
    from kdlora.deploy.gates import LabelledTexts

Service = Callable[[Sequence[Text]], Sequence[str]]
"""A teacher of the user's own: from texts to the name of a label for each."""


@dataclass(frozen=True, slots=True)
class CascadeAnswer:
    """What the cascade says about one text."""

    label: str  # the label
    by: Literal["student", "teacher"]  # who gave it
    probabilities: dict[str, float]  # label name to probability, of whoever gave it; empty where that was a function
    sureness: float  # of the student


class Cascade:
    """The student answers where it is sure enough; the teacher answers the rest.

    Examples:
        >>> cascade = Cascade.load("runs/reviews/student", "runs/reviews/teacher", 0.9)
        >>> cascade.predict(["a film that stays with you for days"])[0].by in ("student", "teacher")
        True
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | Service,
        threshold: float,
        *,
        sureness: Sureness = "probability",
    ) -> None:
        """Join two loaded models; most callers want `load`, which says what they are."""
        models = [student, *([teacher] if isinstance(teacher, Classifier) else [])]
        for model in models:
            if model.folder.kind != "single-label":
                raise ModelError(f"{model.folder.path}: a cascade wants single-label models, got {model.folder.kind}.")
        if odd := set(student.label_names) ^ set(models[-1].label_names):
            raise ModelError(
                f"student and teacher must have the same labels; only one of them has {', '.join(sorted(odd)):.200}."
            )
        read = [model.folder.texts for model in models]
        if len({texts for texts in read if texts}) > 1:
            raise ModelError(f"student and teacher differ: one reads {read[0]} text a row, the other {read[1]}.")
        if not isinstance(teacher, Classifier) and not callable(teacher):
            raise ModelError(f"a teacher is a model, its folder, or a function of texts; got {teacher!r:.80}.")
        check_sureness(sureness)
        if not isinstance(threshold, int | float | np.floating) or np.isnan(threshold):
            raise DataError(f"the threshold of a cascade must be a number, got {threshold!r:.80}.")
        self.student, self.teacher, self.threshold, self.sureness = student, teacher, threshold, sureness

    @classmethod
    def load(
        cls,
        student: str | Path,
        teacher: str | Path | Classifier | Service,
        threshold: float | None = None,
        *,
        sureness: Sureness = "probability",
        threads: int | None = None,
    ) -> Cascade:
        """Load both models.

        Args:
            student: folder or Hub id of the small model.
            teacher: folder or Hub id of the large one, in PyTorch or ONNX; or a function from texts to label names.
            threshold: the student answers where its sureness is at least this; by default that of the error rate which
                the student's folder promises, with its kind of sureness.
            sureness: what is compared with the threshold.
            threads: as in `Classifier.load`.

        Returns:
            The cascade, ready to predict.

        Raises:
            ModelError: a folder that is no model, another kind of task, labels or numbers of texts that differ.
        """
        small = Classifier.load(student, threads=threads, decisions="all" if threshold is None else "thresholds")
        if threshold is None:
            if (promise := small.decisions.promise) is None:
                raise ModelError(
                    f"{small.folder.path} promises no error rate; give a threshold, or run kdlora defer first."
                )
            threshold, sureness = promise.threshold, promise.sureness
        if isinstance(teacher, str | Path):
            teacher = Classifier.load(teacher, threads=threads, decisions="thresholds")
        return cls(small, teacher, threshold, sureness=sureness)

    def predict(self, texts: Sequence[Text]) -> list[CascadeAnswer]:
        """Answer texts, in the order given.

        Args:
            texts: as in `Classifier.predict`.

        Returns:
            One answer for each.

        Raises:
            DataError: an empty text; a function that gives another number of labels, or one that nobody knows.
        """
        texts = list(iterate_texts(texts))
        logits = self.student.predict_logits(texts)
        sure = measure_sureness(logits, self.sureness, self.student.folder.temperature)
        answers = [
            CascadeAnswer(label, "student", said, value)
            for (label, said), value in zip(_read(self.student, logits), sure.tolist(), strict=True)
        ]
        handed_on = np.flatnonzero(sure < self.threshold).tolist()
        for row, (label, said) in zip(handed_on, self._ask([texts[row] for row in handed_on]), strict=True):
            answers[row] = CascadeAnswer(label, "teacher", said, answers[row].sureness)
        return answers

    def _ask(self, texts: list[Text]) -> list[tuple[str, dict[str, float]]]:
        if not texts:
            return []
        if isinstance(self.teacher, Classifier):
            return _read(self.teacher, self.teacher.predict_logits(texts))
        given = self.teacher(texts)
        labels = list(given) if isinstance(given, Iterable) else None
        if labels is None or len(labels) != len(texts):
            raise DataError(f"expected a label for each of {len(texts)} texts from the teacher, got {given!r:.80}.")
        if unknown := [label for label in labels if label not in self.student.label_names]:
            known = ", ".join(self.student.label_names)
            raise DataError(f"the teacher's function gave {unknown[0]!r:.80}; the labels are {known:.200}.")
        return [(label, {}) for label in labels]


def _read(model: Classifier, logits: np.ndarray) -> list[tuple[str, dict[str, float]]]:
    """Give label and probabilities of each text, whether or not the model is sure of them."""
    said = zip(model.decide(logits), model.to_predictions(logits), strict=True)
    return [(str(label), one.probabilities) for label, one in said]


@dataclass(frozen=True)
class CascadePoint:
    """A cascade at one threshold."""

    threshold: float  # of the student's sureness
    handed_on: float  # share of the texts that the teacher answers, 0..1
    score: float  # of the cascade, 0..100
    cost: float  # time of the cascade as a share of the teacher's, 0..1 and more


@dataclass(frozen=True)
class CascadeCurve:
    """Cascades of one student and one teacher, from none to all of the texts handed on."""

    texts: int  # how many
    points: tuple[CascadePoint, ...]  # in the order of what is handed on


def measure_cascade(student: Classifier, teacher: Classifier, given: LabelledTexts) -> CascadeCurve:
    """Score every share of handed-on texts on labelled rows, with the time that both models take for them.

    A threshold that is read off the curve was chosen on these rows: judge it on others.
    """
    Cascade(student, teacher, 0.0)  # which refuses what cannot be one
    if given.task is None or given.labels is None or set(given.task.label_names) != set(student.label_names):
        raise DataError("a cascade is scored on rows with the models' labels; give a labelled file of their task.")
    texts: list[Any] = list(given.texts)
    # The teacher's time goes by tokens, and the texts that a student is not sure of may be the long ones.
    lengths = np.array([len(one.ids) for one in teacher.encode(texts)])
    outputs, seconds = [], []
    for model in (student, teacher):
        model.predict_logits(texts[:32])
        start = perf_counter()
        outputs.append(model.predict_logits(texts))
        seconds.append(perf_counter() - start)
    sure = measure_sureness(outputs[0], temperature=student.folder.temperature)
    small, large = (
        model.shift(logits)[:, [model.label_names.index(name) for name in given.task.label_names]]
        for model, logits in zip((student, teacher), outputs, strict=True)
    )
    thresholds = np.append(np.unique(np.quantile(sure, np.arange(100) / 100, method="lower")), sys.float_info.max)
    points = []
    for threshold in thresholds:
        passed = sure < threshold
        total = given.score(given.task, np.where(passed[:, None], large, small))
        cost = seconds[0] / seconds[1] + float(lengths[passed].sum() / lengths.sum())
        points.append(CascadePoint(float(threshold), float(passed.mean()), total, cost))
    return CascadeCurve(len(texts), tuple(points))
