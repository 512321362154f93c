"""The trainer of our own runs: length buckets, micro-batches inside the batch, checkpoints that resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlora.config import Kind
from kdlora.data.batches import PAD_MULTIPLE, Collator, SharedSampler
from kdlora.distil.distillation_trainer import DistillationTrainer
from kdlora.distil.losses import LossSums, LossTerms, term_means
from kdlora.distil.resume import (
    Checkpoint,
    load_trained_tensors,
    pack_optimizer,
    pack_random_state,
    trained_tensors,
    unpack_optimizer,
    unpack_random_state,
)
from kdlora.distil.session import Session
from kdlora.distil.standardise import TargetScale
from kdlora.errors import ConfigError

logger = logging.getLogger(__name__)

MICRO_BATCHES = "micro_batches"
ADAPTED = "base_model.model."
"""What PEFT puts before the names of a model's parameters."""


@dataclass
class MicroBatchCollator:
    """Cut the rows of one optimiser step into micro-batches of like length, of at most `tokens` tokens with padding."""

    collator: Collator
    tokens: int | None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Tensor]]]:
        """Make the micro-batches of one step."""
        batches: list[list[Mapping[str, Any]]] = [[]]
        for row in sorted(rows, key=lambda row: len(row["input_ids"])):
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
        session: Session,
        *,
        kind: Kind,
        target_scale: TargetScale | None,
        rows: Dataset,
        collator: Collator,
    ) -> None:
        """Set up a training."""
        super().__init__(
            model,
            args,
            kind=kind,
            distil=session.options.distil,
            target_scale=target_scale,
            data_collator=MicroBatchCollator(collator, session.settings.micro_batch_tokens),
            train_dataset=rows,
            callbacks=[*session.options.callbacks, session],
        )
        self.remove_callback(PrinterCallback)  # it prints to the standard output
        self.session, self.sampler, self.processes = session, session.sampler, session.processes
        self.epoch_sums = LossSums(args.device)
        self.resumed: Checkpoint | None = None
        self.weightless = False
        session.trainer = self

    def run(self) -> None:
        """Train, from the last checkpoint where there is one."""
        if self.processes.count > 1:  # each draws its own dropout; the weights are those of the first
            torch.manual_seed(self.session.options.seed * self.processes.count + self.processes.rank)
        checkpoint = self.session.checkpoints.latest()
        if checkpoint is not None:
            self.resumed = checkpoint
            self.session.restore(checkpoint.state["session"])
            self.session.checkpoints.restore_best(checkpoint)
            load_trained_tensors(self.model, checkpoint.tensors("weights"))
            logger.info("continuing from %s", checkpoint.folder)
        if not self.session.finished:
            with self.session.stop:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))

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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimiser; fresh modules with a rate of their own leave its groups for others like them."""
        made, rate = self.optimizer is None, self.session.settings.head_learning_rate
        optimizer = super().create_optimizer(model)
        if rate is None or not made:
            return optimizer
        fresh = tuple(f"{name}." for name in self.session.options.fresh)
        head = {
            id(parameter)
            for name, parameter in (model or self.model).named_parameters()
            if name.removeprefix(ADAPTED).startswith(fresh)
        }
        if not head:
            raise ConfigError("head_learning_rate is set, but no fresh module is trained; leave it at null")
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in head]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward over the micro-batches of a step."""
        rows = self._rows_of_step()
        self.session.examples += rows
        own: list[dict[str, Any]] = inputs[MICRO_BATCHES]
        # With fewer rows than processes, a spare process has a row of another's; here it weighs nothing.
        self.weightless = self.processes.rank >= rows
        divisor = torch.tensor(math.inf) if self.weightless else num_items_in_batch
        losses = []
        for number, micro_batch in enumerate(own, start=1):
            # Processes may cut their rows into different numbers of micro-batches; they meet once, at the last.
            with contextlib.nullcontext() if number == len(own) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, divisor))
        return torch.stack(losses).sum()

    def mean_rows(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """Give the number of rows to divide by, which the sampler knows."""
        rows = self._rows_of_step()
        return rows if self.processes.count == 1 else rows / self.processes.count

    def _rows_of_step(self) -> int:
        """Count the rows of the present optimiser step, in all processes."""
        return self.sampler.rows_of(self.state.global_step % len(self.sampler))

    def record(self, terms: LossTerms) -> None:
        """Add the terms to the means since the last log, and to those of the epoch."""
        if not self.weightless:
            super().record(terms)
            self.epoch_sums.add(terms, self.state.global_step + 1)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count none: walking over all parameters in every step costs more than the figure is worth."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Stop before a gradient that is not finite reaches the weights; in fp16 the scaler skips such steps itself."""
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16:
            self.epoch_sums.note_gradient(norm, self.state.global_step + 1)
            if self.args.device.type == "cpu":  # elsewhere it shows before the next checkpoint
                self.epoch_sums.check(self.args.learning_rate)
        return norm

    def rows_of_step(self, step: int) -> list[int]:
        """Name the rows that an optimiser step is made of."""
        epoch, place = divmod(step - 1, len(self.sampler))
        self.sampler.set_epoch(epoch)
        return next(itertools.islice(iter(self.sampler), place, None))

    def epoch_means(self, *, everywhere: bool = False) -> dict[str, float]:
        """Give the mean loss terms of the epoch so far, here or in all processes; stop where they are not finite."""
        self.epoch_sums.check(self.args.learning_rate)
        return term_means(self.processes.total(self.epoch_sums.sums) if everywhere else self.epoch_sums.sums)

    def keep_best(self) -> None:
        """Keep the weights of now as the best."""
        if self.processes.is_first:
            self.session.checkpoints.save_best(trained_tensors(self.model))

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
            losses = {
                "window": self.processes.total(self.window.sums),
                "epoch": self.processes.total(self.epoch_sums.sums),
            }
            tensors = {"weights": trained_tensors(self.model), "optimizer": optimizer, "losses": losses}
            tensors |= {f"random-{rank}": values for rank, (values, _) in enumerate(generators)}
            documents = {"state": state, "trainer_state": dataclasses.asdict(self.state)}
            if self.processes.is_first:
                self.session.checkpoints.write(self.state.global_step, documents, tensors)
        logger.info("checkpoint at step %d", self.state.global_step)
        self.session.note_saved()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `run` has put the weights back."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        state = self.resumed.state
        self.optimizer.load_state_dict(unpack_optimizer(self.resumed.tensors("optimizer"), state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.processes.is_first:  # the sums are those of all processes
            losses = self.resumed.tensors("losses")
            self.window.sums.copy_(losses["window"])
            self.epoch_sums.sums.copy_(losses["epoch"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.resumed is not None and self.resumed.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self.resumed.state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            rank = self.processes.rank
            unpack_random_state(self.resumed.tensors(f"random-{rank}"), self.resumed.state["random"][rank])
