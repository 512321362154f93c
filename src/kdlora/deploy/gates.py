"""Hold a stage of an export to the one before it: logits, decisions and score on the same texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.data.tags import Words, spans_of
from kdlora.data.tasks import Task, find_label
from kdlora.deploy import Runtime
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.network import Backend, spread
from kdlora.deploy.predict import Text, check_text
from kdlora.deploy.tagger import Model, Tagger, check_words, model_type, word_offsets
from kdlora.errors import DataError, ModelError
from kdlora.evidence.defer import shift_logits
from kdlora.evidence.metrics import compute_metrics, predict_labels, score
from kdlora.evidence.stats import PairedArms, contrast
from kdlora.report.shipped import Parity

ENOUGH_ROWS = 2_000
"""Where validation has fewer rows, training rows fill up to this many."""
_CALIBRATION = 300
"""Texts that the scales of static int8 are measured on."""
_REGRESSION_SHARE = 0.1
_MOST_CHANGED = 1_000
_FEW = 20
"""Of fewer decisions none may differ; of one row, the allowed one would be all."""
"""Rows with another decision that are put back one at a time, to see whether all but one hold."""
_PROBES = ("a", "one short text", "a longer text of a dozen words or so, with 2 digits!", "long " * 600)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to judge a model on, and what is right for them.

    Attributes:
        texts: texts, pairs as tuples, or `Words`.
        labels: label index, value or 0/1 row of each text; of `Words` a label index for each word of all texts, -100
            for a word that has none. Without them no score is computed.
        task: columns and score metrics.
        groups: group of each text (MNLI).
        thresholds: probability above which a label is said, before any temperature, as an export is checked; 0.5 for
            labels without one.

    Examples:
        >>> judged = LabelledTexts(["what a wonderful film", "a dull plot"], [1, 0], splits.task)
    """

    texts: Sequence[Text | Words]
    labels: Sequence[Any] | np.ndarray | None = None
    task: Task | None = None
    groups: Sequence[str] | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        count, what = (len(self.texts), "text") if self.offsets is None else (self.offsets[-1], "word")
        if len(self.labels) != count or not count:
            raise DataError(f"expected one label a {what}, got {len(self.labels)} labels for {count} {what}s.")

    def shift(self, task: Task, logits: np.ndarray) -> np.ndarray:
        """Move logits so that their usual decisions are those by the thresholds."""
        return shift_logits(logits, task.label_names, self.thresholds)

    @property
    def offsets(self) -> np.ndarray | None:
        """Where the words of each text begin among those of all; None where a text has one label."""
        words = [text for text in self.texts if isinstance(text, Words)]
        return word_offsets(words) if words else None

    def score(self, task: Task, logits: np.ndarray) -> float:
        """Score the logits of the labelled texts, with which they begin, 0..100."""
        labels = np.asarray(self.labels)
        try:
            return score(task, compute_metrics(task, logits[: len(labels)], labels, self.groups, self.offsets))
        except ValueError as error:
            raise DataError(f"the labels do not fit the {task.kind} task: {error}") from None


@dataclass(frozen=True)
class Gate:
    """What a stage must hold; a limit of None is not checked."""

    largest_difference: float | None = None  # of two logits; for regression, relative to the largest output above 1
    agreement: float | None = None  # least share of equal decisions, 0..1; one may differ, unless it is 1
    drop: float | None = None  # most points that the score may fall beside one row or an entity's share, unless it is 0


class Checks:
    """What every stage of one export is judged on: texts, and the logits of the latest stage that held."""

    def __init__(
        self,
        task: Task,
        folder: ModelFolder,
        backend: Backend,
        given: LabelledTexts,
        more: Sequence[Text | Words] = (),
        recall: Mapping[str, float] | None = None,
    ) -> None:
        """Run PyTorch on the texts; its logits are what the first stage is compared with."""
        self.task, self.folder, self.given = task, folder, given
        self.least_recall = recall or {}  # share of the entities of a type that every stage must find
        self.stages: list[Parity] = []  # that held
        self.attempts: list[Parity] = []  # that did not
        self.texts = check_texts(given.texts, task.kind, "validation text")
        more = check_texts(more, task.kind, "training text")
        self.texts += spread(more, max(0, ENOUGH_ROWS - len(self.texts)))
        self.texts = self.texts or check_texts(list(map(folder.example, _PROBES)), task.kind, "text")
        self.calibration = spread(more or self.texts, _CALIBRATION)
        self.offsets = word_offsets(self.texts) if task.kind == "tokens" else None
        self.stage, self.model = "pytorch", model_type(folder)(folder, backend)
        self.logits = given.shift(task, self.model.predict_logits(self.texts))
        self.score = None if given.labels is None else given.score(task, self.logits)
        if faults := self._find_recall(self.model)[1]:
            raise ModelError(f"{folder.path}: not exported, since of what min_recall asks {'; '.join(faults)}.")

    def judge(
        self,
        stage: str,
        file: Path,
        gate: Gate,
        *,
        optimised: bool = True,
        runtime: Runtime = "onnxruntime",
        half: bool = False,
    ) -> Parity:
        """Run a file on the texts, with the tokenizer beside it, and compare it with the latest fp32 stage."""
        record: dict[str, Any] | None = {} if optimised else None
        described = replace(self.folder, path=file.parent, file=file, record=record, runtime=runtime, half=half)
        model = model_type(described).open(described, verify=False, decisions="none")
        try:
            after = self.given.shift(self.task, model.predict_logits(self.texts))
        except ModelError as fault:  # such as values that are not finite
            reason = str(fault).removeprefix(f"{described.path}: ").rstrip(".")
            self.attempts.append(failed := Parity(stage, self.stage, len(self.texts), 0.0, reason=reason))
            return failed
        parity, (recall, faults) = self._compare(stage, after, gate), self._find_recall(model)
        parity = replace(parity, reason="; ".join(filter(None, (parity.reason, *faults))), recall=recall)
        (self.stages if parity.passed else self.attempts).append(parity)
        if parity.passed and gate.largest_difference is not None:
            self.stage, self.model, self.logits, self.score = stage, model, after, parity.score
        return parity

    def _find_recall(self, model: Model) -> tuple[dict[str, float], list[str]]:
        """Give the share of the labelled spans of each type with a limit that a model finds; say which fall short."""
        if not self.least_recall:
            return {}, []
        if self.given.offsets is None or self.given.labels is None or not isinstance(model, Tagger):
            raise DataError("the recall of a type (min_recall) wants validation texts with labelled words.")
        counts, found, faults = count_spans(self.given, model), {}, []
        for asked, least in self.least_recall.items():
            name = self.task.label_types[find_label(asked, self.task.label_types, "min_recall")]
            right, total, _ = (one[name] for one in counts)
            found[name] = right / max(1, total)
            if found[name] < least:
                faults.append(f"{right} of {total} {name} are found, {found[name]:.2%} and not {least:.2%}")
        return found, faults

    def _compare(self, stage: str, after: np.ndarray, gate: Gate) -> Parity:
        difference = float(np.nanmax(np.abs(self.logits - after)))  # a word that cannot be read has no logits
        agreement = measure_agreement(self.task, self.logits, after, self.offsets)
        own = drop = low = high = unseen = labelled = None
        labels, offsets = np.asarray(self.given.labels), self.given.offsets
        if self.score is not None:
            own = self.given.score(self.task, after)
            drop = self.score - own
            pair = [part[: len(labels)] for part in (self.logits, after)]
            interval = contrast([PairedArms(self.task, labels, pair[:1], pair[1:], self.given.groups, offsets=offsets)])
            low, high = interval.low, interval.high
            unseen, labelled = measure_agreement(self.task, pair[0], pair[1], offsets), len(self.given.texts)
        faults = []
        if gate.largest_difference is not None:
            largest = float(np.nanmax(np.abs(self.logits)))
            allowed = gate.largest_difference * max(1.0, largest / (1 if self.task.kind == "regression" else 10))
            if not difference <= allowed:
                faults.append(f"logits differ by {difference:.2e}, more than {allowed:.1e}")
        if gate.agreement is not None:
            decisions = len(after)
            # Most words are no entity, and without labels no score sees what is lost.
            if self.task.kind == "multi-label" or (self.task.kind == "tokens" and self.score is None):
                agreement, decisions = _dice(
                    *(predict_labels(self.task, one, self.offsets) for one in (self.logits, after))
                )
            one_may_differ = gate.agreement < 1 and decisions >= _FEW
            least = min(gate.agreement, 1 - 1 / decisions) if one_may_differ else gate.agreement
            if not agreement >= least - 1e-9:
                faults.append(f"{agreement:.2%} of predictions agree, fewer than {least:.2%}")
        if gate.drop is not None and drop is not None:
            # B- tags are odd, so these are entities; of recall:TYPE those of the type count.
            begin, names = f"B-{self.task.metrics[0].partition(':')[2]}", self.task.label_names
            entities = labels == names.index(begin) if begin in names else labels % 2
            rows = len(self.given.texts) if offsets is None else max(1, entities.sum())
            allowed = max(gate.drop, 100 / rows) if gate.drop else 0.0
            if not drop <= allowed + 1e-9 and (
                faults or not gate.drop or not _holds_but_one(self.task, self.given, self.logits, after, gate.drop)
            ):
                faults.append(f"the score falls by {drop:.2f} points, more than {allowed:.2f}")
        figures = (agreement, difference, own, drop, low, high)
        return Parity(stage, self.stage, len(self.texts), *figures, "; ".join(faults), unseen=unseen, labelled=labelled)


def _holds_but_one(task: Task, given: LabelledTexts, before: np.ndarray, after: np.ndarray, drop: float) -> bool:
    """Say whether the score holds beside one labelled row, such as the only one of its class in macro F1."""
    if task.kind in ("tokens", "regression"):
        return False
    before, after = before[: len(given.texts)], after[: len(given.texts)]
    first, second = (predict_labels(task, logits).reshape(len(after), -1) for logits in (before, after))
    changed, places = np.flatnonzero((first != second).any(axis=1)), np.arange(len(after))[:, None]
    least, mended = given.score(task, before) - drop - 1e-9, (np.where(places == row, before, after) for row in changed)
    return len(changed) <= _MOST_CHANGED and any(given.score(task, logits) >= least for logits in mended)


def count_spans(given: LabelledTexts, tagger: Tagger) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Count by type the labelled spans that a tagger finds in the plain texts, all labelled ones, and all it marks."""
    words = [text for text in given.texts if isinstance(text, Words)]
    right, wanted, marked = Counter[str](), Counter[str](), Counter[str]()
    rows = np.split(np.asarray(given.labels), word_offsets(words)[1:-1])
    for text, tags, entities in zip(words, rows, tagger.predict([one.text for one in words]), strict=True):
        found = {(one.start, one.end, one.label) for one in entities}
        marked.update(one.label for one in entities)
        for span in spans_of(tags, tagger.label_names):
            wanted[span.type] += 1
            right[span.type] += (text.starts[span.start], text.ends[span.end - 1], span.type) in found
    return right, wanted, marked


def check_texts(texts: Sequence[Any], kind: str, noun: str) -> list[Any]:
    """Give the texts, those of tokens as `Words`; what cannot be read is refused by its row."""
    check: Callable[[Any, str], Any] = check_words if kind == "tokens" else check_text
    return [check(text, f"{noun} {row}") for row, text in enumerate(texts)]


def _dice(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """Give the share of equal decisions among the labels that are given, or the tags but `O`, and their number."""
    count = int((first > 0).sum() + (second > 0).sum())
    return float(2 * ((first == second) & (first > 0)).sum() / count) if count else 1.0, count


def measure_agreement(task: Task, before: np.ndarray, after: np.ndarray, offsets: np.ndarray | None = None) -> float:
    """Give the share of equal decisions, on texts or on words; of several labels, of those that are given (Dice)."""
    first, second = (predict_labels(task, logits, offsets) for logits in (before, after))
    if task.kind == "regression":
        # A constant reference leaves no spread to measure by; then only fp32's last digits may differ.
        allowed = max(_REGRESSION_SHARE * float(first.std()), 1e-6 * float(np.abs(first).max()))
        return float((np.abs(first - second) <= allowed).mean())
    if task.kind == "multi-label":
        return _dice(first, second)[0]
    return float((first == second).mean())
