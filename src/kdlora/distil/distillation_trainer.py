"""Distillation as a small subclass of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from kdlora.config import DistilConfig, Kind
from kdlora.distil.logits import COLUMN, LABELLED
from kdlora.distil.loss_sums import LossSums, term_means
from kdlora.distil.losses import LossTerms, distillation_loss
from kdlora.distil.standardise import TargetScale
from kdlora.errors import ConfigError, DataError


class DistillationTrainer(Trainer):
    """Train on labels and stored teacher logits: `alpha * hard + (1 - alpha) * soft` (KD-LoRA, eq. 3).

    Give it a data set with a column `teacher_logits` (`TeacherLogits.attach` adds it) and any collator that keeps
    it, such as `DataCollatorWithPadding`. The loss is the exact mean over all rows of an optimiser step, whatever
    `gradient_accumulation_steps` and however short the last batch. `loss`, `hard_loss` and `soft_loss` are logged,
    each the mean over the rows since the last log.

    Example:
        ```python
        trainer = DistillationTrainer(
            model, args, kind="single-label", distil=DistilConfig(), train_dataset=teacher.attach(train), ...
        )
        trainer.train()
        ```
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        *,
        kind: Kind = "single-label",
        distil: DistilConfig | None = None,
        target_scale: TargetScale | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """Set up a training; all but `kind`, `distil` and `target_scale` is as in Trainer.

        Args:
            model: a transformers classifier, with or without an adapter; None where `model_init` makes one.
            args: Trainer's arguments.
            kind: kind of the task.
            distil: weights and temperature; None trains on the labels alone.
            target_scale: standardises labels and teacher of a regression; the model then predicts standardised
                values until `fold_into_head`.
            data_collator: must keep `labels` and `teacher_logits`.
            train_dataset: has `teacher_logits` where `distil` is given.
            eval_dataset: may lack it; the loss is then the hard one.
            processing_class: the tokenizer.
            model_init: as in Trainer.
            compute_metrics: as in Trainer.
            callbacks: as in Trainer.
            optimizers: as in Trainer.
            preprocess_logits_for_metrics: as in Trainer.

        Raises:
            ConfigError: label smoothing is asked for.
        """
        if args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {args.label_smoothing_factor:g}, but the soft loss takes its place; "
                "leave it at 0"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=None if callbacks is None else list(callbacks),
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.kind = kind
        self.distil = distil
        self.target_scale = target_scale
        if args.label_names is None:
            self.label_names = ["labels"]  # under PEFT, Trainer may not find them, and eval_loss goes missing
        # Both say the same to different versions: our loss is already divided by the rows of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.window = LossSums(args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the batches of one optimiser step, and count their rows over all processes.

        Args:
            epoch_iterator: gives batches.
            num_batches: gradient accumulation steps.
            device: where the count is needed.

        Returns:
            The batches, and their number of rows.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.mean_rows(sum(self.count_rows(batch) for batch in batches), device)

    def mean_rows(self, rows: int, device: torch.device) -> Any:
        """Give the number of rows to divide by: DDP averages the gradients of the processes, so it is their mean.

        Args:
            rows: of this process in the optimiser step.
            device: where the number is needed.
        """
        if self.args.world_size == 1:
            return rows
        return self.accelerator.gather(torch.tensor([rows], device=device)).sum() / self.args.world_size

    def count_rows(self, batch: Mapping[str, Any]) -> int:
        """Count the examples of a batch.

        Args:
            batch: what the collator made.

        Raises:
            DataError: it has no labels.
        """
        if "labels" not in batch:
            raise DataError(
                f"the batch has no labels, it has {', '.join(batch)}; expected a column `label` or `labels` in the "
                "training data, and a collator that keeps it"
            )
        return len(batch["labels"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and compute the loss.

        Args:
            model: what is trained.
            inputs: the batch, with `labels` and, where a teacher teaches, `teacher_logits`; `labelled` (bool) says
                which labels count, where some rows have none.
            return_outputs: also return what the model gave.
            num_items_in_batch: rows of the whole optimiser step; in evaluation the rows of this batch count.

        Raises:
            DataError: a training batch without teacher logits.
        """
        known = {name: value for name, value in inputs.items() if name not in ("labels", COLUMN, LABELLED)}
        outputs = model(**known)
        terms = self.loss_terms(
            outputs.logits, inputs["labels"], inputs.get(COLUMN), training=model.training, labelled=inputs.get(LABELLED)
        )
        if model.training:
            self.record(terms)
        rows = num_items_in_batch if model.training and num_items_in_batch is not None else len(terms.total)
        loss = terms.total.sum() / rows
        return (loss, outputs) if return_outputs else loss

    def loss_terms(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None, *, training: bool, labelled: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss of every row.

        Args:
            logits: (rows, labels) of the model.
            labels: as `distillation_loss` takes them.
            teacher: (rows, labels), or None.
            training: whether a missing teacher is a fault.
            labelled: (rows,) bool, which rows have a label; None: all of them.

        Raises:
            DataError: no teacher logits where `distil` asks for them.
        """
        if self.distil is None:
            teacher = None
        elif teacher is None and training:
            raise DataError(
                "distil is set, but the batch has no teacher_logits; expected a column of that name in the training "
                "data, and a collator that keeps it. TeacherLogits.attach(dataset) adds the column"
            )
        if self.target_scale is not None:
            labels = self.target_scale.standardise(labels)
            teacher = None if teacher is None else self.target_scale.standardise(teacher)
        distil = self.distil or DistilConfig()
        return distillation_loss(
            logits,
            labels,
            teacher,
            kind=self.kind,
            alpha=distil.alpha,
            temperature=distil.temperature,
            loss=distil.loss,
            labelled=labelled,
        )

    def record(self, terms: LossTerms) -> None:
        """Add the terms of a training batch to the running means.

        Args:
            terms: per-row losses.
        """
        self.window.add(terms, self.state.global_step + 1)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward; stop where the loss is not a finite number.

        Args:
            model: what is trained.
            inputs: the batch.
            num_items_in_batch: rows of the whole optimiser step.

        Raises:
            KdLoraError: the training diverged. On an accelerator this shows at the next log, naming the step.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.device.type == "cpu":  # elsewhere reading a number makes the processor wait for the device
            self.window.check(self.args.learning_rate)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms to what Trainer logs.

        Args:
            logs: what is known already.
            start_time: of the training.
        """
        if "loss" in logs:
            self.window.check(self.args.learning_rate)
            logs = logs | term_means(self.accelerator.reduce(self.window.sums, reduction="sum"))
            self.window.reset()
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns where Trainer drops what the model's forward does not take."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in (COLUMN, LABELLED) if name not in self._signature_columns]
