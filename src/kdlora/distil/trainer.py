"""The trainer of our own runs: length buckets, micro-batches, evaluation, and checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlora.config import DistilConfig, LoraSettings, SettledTraining
from kdlora.data.batches import MICRO_BATCHES, LengthBucketSampler, SharedSampler
from kdlora.distil.distillation_trainer import DistillationTrainer
from kdlora.distil.losses import LossSums, LossTerms, term_means
from kdlora.distil.processes import StopSignals, current_processes
from kdlora.distil.resume import (
    Checkpoint,
    CheckpointFolder,
    load_optimizer,
    load_trained_tensors,
    optimizer_tensors,
    random_state,
    restore_random_state,
    trained_tensors,
)

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_MOST_SECONDS = 600.0
"""Between two checkpoints, however long one takes to write."""
_ADAPTED = "base_model.model."  # what PEFT puts before the names of a model's parameters


@dataclass(frozen=True)
class ProgressEvent:
    """Where a training stands, of `epochs` and optimiser `steps` in all; losses are means over the epoch so far."""

    epoch: float
    epochs: float
    step: int
    steps: int
    examples_per_second: float  # without evaluation
    score: float | None = None  # the newest
    scored: float = 0.0  # the epoch that it is of
    loss: float | None = None
    hard_loss: float | None = None
    soft_loss: float | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """What a training does, besides its model, its rows and its settings."""

    folder: Path  # of this training alone, for checkpoints
    seed: int = 0  # of dropout and the order of the rows
    precision: str = "auto"  # what `auto` was found to be is kept in the folder
    device: str = "auto"
    distil: DistilConfig | None = None  # None trains on the labels alone, whether or not there are teacher logits
    lora: LoraSettings | None = None  # a checkpoint of another adapter is refused, for its scale is in no weight
    fresh: Sequence[str] = ()  # the encoder's `fresh`, which `head_learning_rate` is for
    rows_per_epoch: int | None = None  # None draws every row once; a control with fewer rows draws some again
    copies: int = 0  # so many of the last rows are perturbed copies, of which a step has as many as of the others
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 1
    callbacks: Sequence[TrainerCallback] = ()
    progress: Callable[[ProgressEvent], None] | None = None  # told every half second, and after every epoch


@dataclass
class TrainOutcome:
    """What a training leaves besides the weights, as far as it has come."""

    history: list[dict[str, Any]] = field(default_factory=list)
    """Per epoch: `epoch`, `step`, means over the epoch's rows of `loss`, `hard_loss` and, where a teacher taught,
    `soft_loss` (of a regression on the standardised scale), `learning_rate`, validation metrics, `score`."""
    train_seconds: float = 0.0  # data included; evaluation and saving excluded
    evaluation_seconds: float = 0.0
    examples: int = 0  # rows trained on, repeats included
    finished: bool = False  # no step is left
    resumed: bool = False  # this process saw a part of it, or none
    best_epoch: float = 0.0  # whose weights the model holds

    @property
    def steps(self) -> int:
        return int(self.history[-1]["step"])

    @property
    def best(self) -> dict[str, Any]:
        """The history's entry with the best score, the earliest of equals."""
        return max(self.history, key=lambda entry: float(entry["score"]))

    @property
    def examples_per_second(self) -> float:
        return self.examples / max(self.train_seconds, 1e-9)


class ArmTrainer(DistillationTrainer, TrainerCallback):
    """Trains one arm, and is the last of its own callbacks; one batch of the loader is one optimiser step."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        settings: SettledTraining,
        options: TrainingOptions,
        *,
        sampler: LengthBucketSampler,
        checkpoints: CheckpointFolder,
        validate: Callable[[], dict[str, float]],
        **trainer: Any,
    ) -> None:
        """Prepare a training; `validate` gives the validation metrics and `score`."""
        self.settings, self.options, self.processes = settings, options, current_processes()
        self.sampler, self.checkpoints, self.validate = sampler, checkpoints, validate
        self.outcome, self.stop = TrainOutcome(), StopSignals()
        self.saved = self.postponed = False
        self.began = self.saved_at = self.save_seconds = self.told_at = self.rate = 0.0
        self.resumed: Checkpoint | None = None
        super().__init__(model, args, distil=options.distil, callbacks=[*options.callbacks, self], **trainer)
        self.remove_callback(PrinterCallback)  # it prints to the standard output
        self.epoch_sums = LossSums(args.device)

    def run(self) -> TrainOutcome:
        """Train, or go on from the last checkpoint, and leave the model with the weights of the epoch that counts."""
        if self.processes.count > 1:  # each draws its own dropout; the weights are those of the first
            torch.manual_seed(self.options.seed * self.processes.count + self.processes.rank)
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self._restore(checkpoint)
        outcome = self.outcome
        if not outcome.finished:
            with self.stop.taken():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
            outcome.train_seconds = self.seconds()
        self.processes.first_says(None)  # its best weights lie on the disk now
        if is_best := self.settings.selection(self.kind) == "best":
            load_trained_tensors(self.model, load_file(self.checkpoints.best))
        self.model.eval()
        outcome.best_epoch = float((outcome.best if is_best else outcome.history[-1])["epoch"])
        return outcome

    def seconds(self) -> float:
        """Seconds of training so far, of this process and those before it, without the pauses."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - start

    # What goes on around the steps.

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved_at = time.monotonic()
        self.began = self.saved_at - self.outcome.train_seconds

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Choose the order of the rows. A resumed epoch keeps the losses that it has summed."""
        epoch, done = divmod(state.global_step, len(self.sampler))
        self.sampler.set_epoch(epoch)
        if done == 0:
            self.epoch_sums.sums.zero_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save when it is time; at the end of an epoch only after the evaluation, which a resumed one would miss."""
        ends_epoch = state.global_step % len(self.sampler) == 0 or state.global_step >= state.max_steps
        wanted = self._is_due() or control.should_save
        self.postponed = wanted and (ends_epoch or control.should_training_stop)
        control.should_save = wanted and not self.postponed
        if self.seconds() - self.told_at >= _PROGRESS_SECONDS:
            self._tell()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        settings, outcome, means = self.settings, self.outcome, self._epoch_means(everywhere=True)
        if not control.should_training_stop and round(state.epoch or 0.0) % settings.scored_every(self.kind):
            control.should_save = self._is_due() or self.postponed
            self._tell()
            return
        entry = {"epoch": state.epoch, "step": state.global_step, **means, "learning_rate": self.rate}
        with self._paused():
            start = time.monotonic()
            metrics = self.validate()
            outcome.evaluation_seconds += time.monotonic() - start
            entry |= metrics
            outcome.history.append(entry)
            self.log({f"eval_{name}": value for name, value in metrics.items()})
            if settings.selection(self.kind) == "best" and outcome.best is entry and self.processes.is_first:
                self.checkpoints.save_best(trained_tensors(self.model))
        logger.info("epoch %g: %s", entry["epoch"], ", ".join(f"{k} {v:.5g}" for k, v in entry.items() if k != "epoch"))
        since_best = next(age for age, entry in enumerate(reversed(outcome.history)) if entry is outcome.best)
        if settings.early_stopping_patience is not None and since_best >= settings.early_stopping_patience:
            control.should_training_stop = True
        outcome.finished = control.should_training_stop
        # A finished training that had been worth a checkpoint must not lose its last minute to a crash afterwards.
        control.should_save = self._is_due() or self.postponed or (outcome.finished and self.saved)
        self._tell()

    def _tell(self) -> None:
        self.told_at = seconds = self.seconds()
        if self.options.progress is None:
            return
        self.options.progress(
            ProgressEvent(
                epoch=float(self.state.epoch or 0.0),
                epochs=self.settings.epochs,
                step=self.state.global_step,
                steps=self.state.max_steps,
                examples_per_second=self.outcome.examples / max(seconds, 1e-9),
                score=self.outcome.history[-1]["score"] if self.outcome.history else None,
                scored=self.outcome.history[-1]["epoch"] if self.outcome.history else 0.0,
                **self._epoch_means(),
            )
        )

    def _is_due(self) -> bool:
        """Say whether a checkpoint is wanted; one process that wants it, or is to stop, speaks for all."""
        # Those of a large model take long to write: at most about a 20th of the time. Only the first process writes.
        apart = max(self.options.checkpoint_seconds, min(20 * (self.save_seconds - 1), _MOST_SECONDS))
        late = self.processes.is_first and time.monotonic() - self.saved_at >= apart  # with the evaluations
        wishes = torch.tensor([int(late), int(self.stop.received is not None)])
        save, stop = self.processes.total(wishes).tolist()
        if stop and self.stop.received is None:
            self.stop.received = signal.SIGTERM
        return save + stop > 0

    # The steps.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Give the loader; Accelerate's wrapper is left out, which would shard batches that are whole steps."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=SharedSampler(self.sampler, self.processes.rank, self.processes.count),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimiser; fresh modules with a rate of their own leave its groups for others like them."""
        optimizer, rate = super().create_optimizer(model), self.settings.head_learning_rate
        if rate is None:
            return optimizer
        fresh, named = tuple(f"{name}." for name in self.options.fresh), self.model.named_parameters()
        head = {id(value) for name, value in named if name.removeprefix(_ADAPTED).startswith(fresh)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in head]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        rows = self._rows_of_step()
        self.outcome.examples += rows
        self.rate = float(self.optimizer.param_groups[0]["lr"])  # of this step: the schedule moves on after it
        own: list[dict[str, Any]] = inputs[MICRO_BATCHES]
        # With fewer rows than processes, a spare process has a row of another's; here it weighs nothing.
        divisor = num_items_in_batch if self.processes.rank < rows else torch.tensor(math.inf)
        losses = []
        for number, micro_batch in enumerate(own, start=1):
            # Processes may cut their rows into different numbers of micro-batches; they meet once, at the last.
            with contextlib.nullcontext() if number == len(own) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, divisor))
        return torch.stack(losses).sum()

    def mean_rows(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """Give the number of rows to divide by, which the sampler knows, or of words, which these batches have."""
        rows = self._rows_of_step()
        if self.kind == "tokens":
            own = sum(len(one["labels"]) for batch in batches for one in batch[MICRO_BATCHES])
            rows = max(1, int(self.processes.total(torch.tensor(own if self.processes.rank < rows else 0))))
        return rows if self.processes.count == 1 else rows / self.processes.count

    def _rows_of_step(self) -> int:
        return self.sampler.rows_of(self.state.global_step % len(self.sampler))

    def rows_of_step(self, step: int) -> list[int]:
        epoch, place = divmod(step - 1, len(self.sampler))
        self.sampler.set_epoch(epoch)
        return next(itertools.islice(iter(self.sampler), place, None))

    def record(self, terms: LossTerms) -> None:
        if self.processes.rank < self._rows_of_step():
            super().record(terms)
            self.epoch_sums.add(terms, self.state.global_step + 1)

    def _epoch_means(self, *, everywhere: bool = False) -> dict[str, float]:
        """Give the mean loss terms of the epoch so far, here or in all processes; stop where they are not finite."""
        self.epoch_sums.check(self.args.learning_rate)
        return term_means(self.processes.total(self.epoch_sums.sums) if everywhere else self.epoch_sums.sums)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count none: walking over all parameters in every step costs more than the figure is worth."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Stop before a gradient that is not finite reaches the weights; in fp16 the scaler skips such steps itself."""
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16:
            self.epoch_sums.note(norm, self.state.global_step + 1)
            if self.args.device.type == "cpu":  # elsewhere it shows before the next checkpoint
                self.epoch_sums.check(self.args.learning_rate)
        return norm

    # Checkpoints, in place of Trainer's own, which are pickled and hold neither loss sums nor a checksum.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.outcome.train_seconds, start = self.seconds(), time.monotonic()
        with self._paused():
            self.epoch_sums.check(self.args.learning_rate)
            scaler = getattr(self.accelerator, "scaler", None)
            sums = torch.stack([self.window.sums, self.epoch_sums.sums])
            state = {
                "outcome": dataclasses.asdict(self.outcome),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "losses": self.processes.total(sums).tolist(),
                "random": self.processes.gather(random_state()),
            }
            tensors = {"weights": trained_tensors(self.model), "optimizer": optimizer_tensors(self.optimizer)}
            documents = {"state": state, "trainer_state": dataclasses.asdict(self.state)}
            if self.processes.is_first:
                self.checkpoints.write(self.state.global_step, documents, tensors)
        logger.info("checkpoint at step %d", self.state.global_step)
        self.saved, self.saved_at = True, time.monotonic()
        self.save_seconds = self.saved_at - start
        self.stop.heed("with a checkpoint")

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over what Trainer does not load itself, below."""
        self.outcome = TrainOutcome(**checkpoint.state["outcome"] | {"resumed": True})
        self.resumed, self.saved = checkpoint, True
        if self.processes.is_first:  # the others wait for it before they read the file
            self.checkpoints.restore_best(checkpoint)
        load_trained_tensors(self.model, checkpoint.tensors("weights"))
        logger.info("continuing from %s", checkpoint.folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `_restore` has put the weights back."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        state = self.resumed.state
        self.lr_scheduler.load_state_dict(state["scheduler"])
        load_optimizer(self.optimizer, self.resumed.tensors("optimizer"), self.lr_scheduler.get_last_lr())
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.processes.is_first:  # the sums are those of all processes
            for sums, values in zip((self.window.sums, self.epoch_sums.sums), state["losses"], strict=True):
                sums.copy_(torch.tensor(values, dtype=sums.dtype))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            restore_random_state(self.resumed.state["random"][self.processes.rank])
