"""What goes on around the optimiser steps: evaluation, history, stopping, checkpoints in time, progress."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlora.config import DistilConfig, LoraConfig, SettledTraining
from kdlora.data.batches import LengthBucketSampler
from kdlora.distil.processes import Processes
from kdlora.distil.resume import CheckpointFolder

if TYPE_CHECKING:
    from kdlora.distil.trainer import ArmTrainer

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_GO_ON, _SAVE, _STOP = range(3)


@dataclass(frozen=True)
class ProgressEvent:
    """Where a training stands, of `epochs` and optimiser `steps` in all.

    Losses are means over the epoch's rows so far, None before the first. Evaluation is left out of the speed and of
    the seconds to the last step. `score` is that of the newest evaluation, 0 to 100.
    """

    epoch: float
    epochs: float
    step: int
    steps: int
    loss: float | None
    hard_loss: float | None
    soft_loss: float | None
    examples_per_second: float
    eta_seconds: float | None
    score: float | None


@dataclass(frozen=True)
class TrainingOptions:
    """What a training does, besides its model, its rows and its settings.

    Attributes:
        folder: of this training alone, for checkpoints.
        seed: seeds dropout and the order of the rows.
        precision: `auto`, `fp32`, `bf16` or `fp16`; what `auto` was found to be is kept in the folder.
        device: `auto`, `cpu` or `cuda`.
        distil: weights and temperature; None trains on the labels alone, whether or not there are teacher logits.
        lora: of the model's adapter; a checkpoint of another one is refused, for its scale is in no weight.
        fresh: names of the modules that `head_learning_rate` is for: the encoder's `fresh`.
        rows_per_epoch: rows that an epoch draws; default: every row once. A control with fewer rows thereby does as
            many optimiser steps as the arm that it is compared with.
        copies: how many of the last rows are perturbed copies, of which every step has as many as of the others.
        checkpoint_seconds: training time between two checkpoints.
        keep_checkpoints: newest ones to keep.
        callbacks: transformers' own kind.
        progress: told every half second, and after every epoch, where the training stands.
    """

    folder: Path
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    distil: DistilConfig | None = None
    lora: LoraConfig | None = None
    fresh: Sequence[str] = ()
    rows_per_epoch: int | None = None
    copies: int = 0
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 1
    callbacks: Sequence[TrainerCallback] = ()
    progress: Callable[[ProgressEvent], None] | None = None


class TrainingStoppedError(KeyboardInterrupt):
    """A training was asked to stop, and has saved; the same call continues it."""


class StopSignals:
    """Notes Ctrl-C and SIGTERM while a training runs, where nobody else has asked for them.

    The second one interrupts at once, as the first would have done.
    """

    def __init__(self) -> None:
        """Take nothing yet."""
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Begin to take the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back; one that came too late to be heeded by the training still counts."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if kind is None:
            self.heed("after its last step")

    def heed(self, where: str) -> None:
        """Stop the training if that was asked for."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise TrainingStoppedError(f"the training stopped {where} ({name}); the same call continues it")

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


@dataclass
class Stopwatch:
    """Seconds of training, without the pauses."""

    seconds: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        """Begin or go on."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Pause."""
        self.seconds, self._since = self.read(), None

    def read(self) -> float:
        """Seconds so far."""
        return self.seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


@dataclass
class Session(TrainerCallback):
    """Evaluates after every epoch, keeps the history, and decides when to stop and when to save.

    `validate` gives the validation metrics and `score`; the trainer sets itself. On a request to `stop` the next
    checkpoint comes at once, and is the last.
    """

    settings: SettledTraining
    options: TrainingOptions
    sampler: LengthBucketSampler
    validate: Callable[[], dict[str, float]]
    checkpoints: CheckpointFolder
    processes: Processes
    trainer: ArmTrainer = field(init=False, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)
    evaluation: Stopwatch = field(default_factory=Stopwatch)
    examples: int = 0
    finished: bool = False
    stop: StopSignals = field(default_factory=StopSignals)
    _saved_at: float = 0.0
    _told_at: float = 0.0
    _has_saved: bool = False
    _postponed: bool = False
    _rate: float = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this."""
        return {
            "history": self.history,
            "seconds": self.watch.read(),
            "evaluation_seconds": self.evaluation.read(),
            "examples": self.examples,
            "finished": self.finished,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = list(state["history"])
        self.watch = Stopwatch(float(state["seconds"]))
        self.evaluation = Stopwatch(float(state["evaluation_seconds"]))
        self.examples = int(state["examples"])
        self.finished = bool(state["finished"])
        self._has_saved = True

    @property
    def best(self) -> dict[str, Any] | None:
        """The history's entry with the best score, the earliest of equals."""
        return max(self.history, key=lambda entry: float(entry["score"]), default=None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self.watch.start()
        self._saved_at = self.watch.read()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Choose the order of the rows. A resumed epoch keeps the losses that it has summed."""
        epoch, done = divmod(state.global_step, len(self.sampler))
        self.sampler.set_epoch(epoch)
        if done == 0:
            self.trainer.epoch_sums.sums.zero_()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note the learning rate of this step, before the schedule moves on."""
        self._rate = float(self.trainer.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save when it is time; at the end of an epoch only after the evaluation, which a resumed one would miss."""
        ends_epoch = state.global_step % len(self.sampler) == 0 or state.global_step >= state.max_steps
        wanted = self._is_due() or control.should_save
        self._postponed = wanted and (ends_epoch or control.should_training_stop)
        control.should_save = wanted and not self._postponed
        if self.watch.read() - self._told_at >= _PROGRESS_SECONDS:
            self._tell(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate, keep the best, stop early."""
        settings, means = self.settings, self.trainer.epoch_means(everywhere=True)
        entry = {"epoch": state.epoch, "step": state.global_step, **means, "learning_rate": self._rate}
        with self.watch.paused():
            self.evaluation.start()
            metrics = self.validate()
            self.evaluation.stop()
            entry |= metrics
            self.history.append(entry)
            self.trainer.log({f"eval_{name}": value for name, value in metrics.items()})
            if settings.select == "best" and self.best is entry:
                self.trainer.keep_best()
        logger.info("epoch %g: %s", entry["epoch"], ", ".join(f"{k} {v:.5g}" for k, v in entry.items() if k != "epoch"))
        since_best = next(age for age, entry in enumerate(reversed(self.history)) if entry is self.best)
        if settings.early_stopping_patience is not None and since_best >= settings.early_stopping_patience:
            control.should_training_stop = True
        self.finished = control.should_training_stop
        # A finished training that had been worth a checkpoint must not lose its last minute to a crash afterwards.
        control.should_save = self._is_due() or self._postponed or (self.finished and self._has_saved)
        self._tell(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clocks."""
        self.watch.stop()

    def note_saved(self) -> None:
        """Start waiting for the next checkpoint."""
        self._saved_at = self.watch.read()
        self._has_saved = True
        self.stop.heed("with a checkpoint")

    def _tell(self, state: TrainerState) -> None:
        self._told_at = self.watch.read()
        if self.options.progress is None:
            return
        means, seconds = self.trainer.epoch_means(), self.watch.read()
        left = state.max_steps - state.global_step
        self.options.progress(
            ProgressEvent(
                epoch=float(state.epoch or 0.0),
                epochs=self.settings.epochs,
                step=state.global_step,
                steps=state.max_steps,
                loss=means.get("loss"),
                hard_loss=means.get("hard_loss"),
                soft_loss=means.get("soft_loss"),
                examples_per_second=self.examples / max(seconds, 1e-9),
                eta_seconds=left * seconds / state.global_step if state.global_step else None,
                score=self.history[-1]["score"] if self.history else None,
            )
        )

    def _is_due(self) -> bool:
        """Say whether a checkpoint is wanted; one process that wants it, or is to stop, speaks for all."""
        late = self.watch.read() - self._saved_at >= self.options.checkpoint_seconds
        wish = self.processes.largest(_STOP if self.stop.received is not None else _SAVE if late else _GO_ON)
        if wish == _STOP and self.stop.received is None:
            self.stop.received = signal.SIGTERM
        return wish != _GO_ON
