"""The trainer of our own runs: length buckets, micro-batches inside the batch, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlora.config import DistilConfig, Kind
from kdlora.data.batches import PAD_MULTIPLE, Collator, LengthBucketSampler, SharedSampler
from kdlora.distil.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    load_trained_tensors,
    pack_optimizer,
    pack_random_state,
    trained_tensors,
    unpack_optimizer,
    unpack_random_state,
)
from kdlora.distil.distillation_trainer import DistillationTrainer
from kdlora.distil.loss_sums import LossSums, term_means
from kdlora.distil.losses import LossTerms
from kdlora.distil.processes import Processes
from kdlora.distil.session import Session
from kdlora.distil.sharding import is_sharded, shard_moments, whole, whole_tensors
from kdlora.distil.standardise import TargetScale

logger = logging.getLogger(__name__)

MICRO_BATCHES = "micro_batches"


@dataclass
class MicroBatchCollator:
    """Cut the rows of one optimiser step into micro-batches of like length, each padded on its own.

    Attributes:
        collator: pads a micro-batch.
        tokens: most tokens of a micro-batch, padding included; None keeps the batch in one piece.
    """

    collator: Collator
    tokens: int | None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Tensor]]]:
        """Make the micro-batches of one step.

        Args:
            rows: the whole effective batch.

        Returns:
            `micro_batches`; every row is in one of them.
        """
        by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
        batches: list[list[Mapping[str, Any]]] = [[]]
        for row in by_length:
            width = -(-len(row["input_ids"]) // PAD_MULTIPLE) * PAD_MULTIPLE
            if self.tokens is not None and batches[-1] and (len(batches[-1]) + 1) * width > self.tokens:
                batches.append([])
            batches[-1].append(row)
        return {MICRO_BATCHES: [self.collator(batch) for batch in batches]}


class ArmTrainer(DistillationTrainer):
    """Trains one arm; one batch of the loader is one optimiser step."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        kind: Kind,
        distil: DistilConfig | None,
        target_scale: TargetScale | None,
        train_dataset: Any,
        sampler: LengthBucketSampler,
        collator: MicroBatchCollator,
        validate: Callable[[], dict[str, float]],
        checkpoints: CheckpointFolder,
        session: Session,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Set up a training.

        Args:
            model: what is trained; the processes may share it out.
            args: Trainer's arguments.
            kind: kind of the task.
            distil: weights and temperature; None trains on the labels alone.
            target_scale: standardises the targets of a regression.
            train_dataset: token ids, labels, teacher logits.
            sampler: draws the rows of each step, those of all processes.
            collator: makes micro-batches of them.
            validate: gives the validation metrics, and `score`.
            checkpoints: where they go.
            session: what goes on around the steps.
            callbacks: the user's own; they come before the session.
        """
        super().__init__(
            model,
            args,
            kind=kind,
            distil=distil,
            target_scale=target_scale,
            data_collator=collator,
            train_dataset=train_dataset,
            callbacks=[*callbacks, session],
        )
        self.remove_callback(PrinterCallback)  # it prints to the standard output
        self.sampler = sampler
        self.validate = validate
        self.checkpoints = checkpoints
        self.session = session
        self.processes: Processes = session.processes
        self.epoch_sums = LossSums(args.device)
        self.resumed: Checkpoint | None = None
        self.weightless = False
        session.trainee = self
        if is_sharded(model):  # autocast alone: Accelerate would hand a model that it trains to DDP
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: what belongs to the session and to the model's weights now, the rest in `train`.

        Args:
            checkpoint: whole, and of this training.
        """
        self.resumed = checkpoint
        self.session.restore(checkpoint.state["session"])
        self.checkpoints.restore_best(checkpoint)
        load_trained_tensors(self.model, checkpoint.tensors("weights"))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Give the loader of the training rows.

        Accelerate's wrapper is left out: it would shard batches that are whole optimiser steps.
        """
        together = self.processes
        alone = together.count == 1
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler if alone else SharedSampler(self.sampler, together.rank, together.count),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def count_rows(self, batch: Mapping[str, Any]) -> int:
        """Count the examples of one optimiser step.

        Args:
            batch: its micro-batches.
        """
        return sum(super(ArmTrainer, self).count_rows(part) for part in batch[MICRO_BATCHES])

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward over the micro-batches of a step.

        Args:
            model: what is trained.
            inputs: its micro-batches.
            num_items_in_batch: rows of the whole step.
        """
        self.session.examples += self._rows_of_step()
        own: list[dict[str, Any]] = inputs[MICRO_BATCHES]
        # Processes may cut their rows into different numbers of micro-batches. They meet once, at the last; those
        # that share a model out meet in every pass, so that some go over a micro-batch again.
        meets = is_sharded(model)
        passes = self.processes.largest(len(own)) if meets else len(own)
        losses = []
        for number in range(passes):
            # A spare row is another process's, or done already; here it weighs nothing.
            self.weightless = self._is_spare() or number >= len(own)
            rows = torch.tensor(math.inf) if self.weightless else num_items_in_batch
            with contextlib.nullcontext() if meets or number == passes - 1 else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, own[min(number, len(own) - 1)], rows))
        return torch.stack(losses).sum()

    def mean_rows(self, rows: int, device: torch.device) -> Any:
        """Give the number of rows to divide by, which the sampler knows.

        Args:
            rows: of this process in the optimiser step.
            device: where the number is needed.
        """
        return rows if self.processes.count == 1 else self._rows_of_step() / self.processes.count

    def _rows_of_step(self) -> int:
        """Count the rows of the present optimiser step, in all processes."""
        return self.sampler.rows_of(self.state.global_step % len(self.sampler))

    def _is_spare(self) -> bool:
        """Say whether this step has no row for this process."""
        return self.processes.rank >= self._rows_of_step()

    def record(self, terms: LossTerms) -> None:
        """Add the terms to the means since the last log, and to those of the epoch.

        Args:
            terms: per-row losses.
        """
        if self.weightless:
            return
        super().record(terms)
        self.epoch_sums.add(terms, self.state.global_step + 1)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count none: walking over all parameters in every step costs more than the figure is worth.

        Args:
            inputs: of the step.
        """
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Stop before a gradient that is not finite reaches the weights; in fp16 the scaler skips such steps itself."""
        norm = whole(super()._clip_grad_norm(model))
        if not self.args.fp16:
            self.epoch_sums.note_gradient(norm, self.state.global_step + 1)
            if self.args.device.type == "cpu":  # elsewhere it shows before the next checkpoint
                self.epoch_sums.check(self.args.learning_rate)
        return norm

    def rows_of_step(self, step: int) -> list[int]:
        """Name the rows that an optimiser step is made of.

        Args:
            step: from 1.

        Returns:
            Row numbers of the training data.
        """
        epoch, place = divmod(step - 1, len(self.sampler))
        self.sampler.set_epoch(epoch)
        return next(itertools.islice(iter(self.sampler), place, None))

    # What a session needs.

    def begin_epoch(self, epoch: int, *, fresh: bool) -> None:
        """Choose the order of the rows.

        Args:
            epoch: from 0.
            fresh: start the epoch's loss sums at zero.
        """
        self.sampler.set_epoch(epoch)
        if fresh:
            self.epoch_sums.reset()

    def epoch_means(self, *, everywhere: bool = False) -> dict[str, float]:
        """Give the mean loss terms of the epoch so far; stop where they are not finite.

        Args:
            everywhere: over the rows of all processes, which then all must ask.
        """
        self.epoch_sums.check(self.args.learning_rate)
        return term_means(self.processes.total(self.epoch_sums.sums)) if everywhere else self.epoch_sums.means()

    def score_validation(self) -> dict[str, float]:
        """Give the validation metrics, and `score`."""
        return self.validate()

    def keep_best(self) -> None:
        """Keep the weights of now as the best."""
        tensors = whole_tensors(trained_tensors(self.model), keep=self.processes.is_first)
        if self.processes.is_first:
            self.checkpoints.save_best(tensors)

    def tell_callbacks(self, metrics: dict[str, float]) -> None:
        """Log validation metrics to whoever listens to the training.

        Args:
            metrics: by name.
        """
        self.log({f"eval_{name}": value for name, value in metrics.items()})

    def current_rate(self) -> float:
        """Give the learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    # Checkpoints, in place of Trainer's own, which are pickled and hold neither loss sums nor a checksum.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.session.watch.paused():
            self.epoch_sums.check(self.args.learning_rate)
            optimizer, optimizer_rest = pack_optimizer(self.optimizer.state_dict())
            generators = self.processes.gather(pack_random_state())
            scaler = getattr(self.accelerator, "scaler", None)
            state = {
                "session": self.session.state(),
                "optimizer": optimizer_rest,
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": [rest for _, rest in generators],
            }
            losses = {name: self.processes.total(sums.sums) for name, sums in self._loss_sums().items()}
            first = self.processes.is_first
            parts = {"weights": trained_tensors(self.model), "optimizer": optimizer}
            tensors = {name: whole_tensors(values, keep=first) for name, values in parts.items()} | {"losses": losses}
            tensors |= {f"random-{rank}": values for rank, (values, _) in enumerate(generators)}
            documents = {"state": state, "trainer_state": dataclasses.asdict(self.state)}
            if first:
                self.checkpoints.write(self.state.global_step, documents, tensors)
        logger.info("checkpoint at step %d", self.state.global_step)
        self.session.note_saved()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `resume` has put the weights back."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.resumed is None:
            return
        state = self.resumed.state
        moments = unpack_optimizer(self.resumed.tensors("optimizer"), state["optimizer"])
        shard_moments(moments, self.optimizer)
        self.optimizer.load_state_dict(moments)
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.processes.is_first:  # the sums are those of all processes
            losses = self.resumed.tensors("losses")
            for name, sums in self._loss_sums().items():
                sums.sums.copy_(losses[name])

    def _loss_sums(self) -> dict[str, LossSums]:
        return {"window": self.window, "epoch": self.epoch_sums}

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.resumed is not None and self.resumed.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self.resumed.state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.resumed is not None:
            rank = self.processes.rank
            unpack_random_state(self.resumed.tensors(f"random-{rank}"), self.resumed.state["random"][rank])
