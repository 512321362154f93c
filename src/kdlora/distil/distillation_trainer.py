"""Distillation as a small subclass of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdlora.config import DistilConfig, Kind
from kdlora.data.tasks import PROBLEM_TYPES
from kdlora.data.windows import Pool
from kdlora.data.word_tokens import WORDS
from kdlora.distil.logits import COLUMN, LABELLED
from kdlora.distil.losses import LossSums, LossTerms, TargetScale, distillation_loss, pool_windows, term_means
from kdlora.errors import ConfigError, DataError


class DistillationTrainer(Trainer):
    """Train on labels and stored teacher logits: `alpha * hard + (1 - alpha) * soft` (KD-LoRA, eq. 3).

    Give it a data set with a column `teacher_logits` (`TeacherLogits.attach` adds it) and any collator that keeps
    it, such as `DataCollatorWithPadding`. The loss is the exact mean over all rows of an optimiser step, whatever
    `gradient_accumulation_steps` and however short the last batch. `loss`, `hard_loss` and `soft_loss` are logged,
    each the mean over the rows since the last log. For `tokens` a row is a word, and `WordCollator` makes the batches.
    A text may have several rows of inputs: `texts` in a batch then says which text each of them is of, and their
    logits are pooled before the loss.

    Examples:
        >>> trainer = DistillationTrainer(
        ...     model,
        ...     TrainingArguments("work/own", max_steps=2, report_to="none"),
        ...     distil=DistilConfig(loss="kl"),
        ...     train_dataset=rows,  # with columns `input_ids`, `label` and `teacher_logits`
        ...     data_collator=DataCollatorWithPadding(encoder.tokenizer),
        ... )
        >>> outcome = trainer.train()
        {'train_runtime': ...}
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        *,
        kind: Kind = "single-label",
        distil: DistilConfig | None = None,
        target_scale: TargetScale | None = None,
        class_weights: Tensor | None = None,
        pool: Pool = "mean",
        callbacks: Sequence[TrainerCallback] | None = None,
        **trainer: Any,
    ) -> None:
        """Set up a training.

        Args:
            model: a transformers classifier, with or without an adapter; None where `model_init` makes one.
            args: Trainer's arguments.
            kind: kind of the task.
            distil: weights and temperature; None trains on the labels alone.
            target_scale: standardises labels and teacher of a regression; the model then predicts standardised
                values until `fold_into_head`, after which set this to None. `predict` and `compute_metrics` give and
                get values on the labels' scale.
            class_weights: (labels,) factors of the hard loss alone, as in `distillation_loss`.
            pool: how the logits of a text's several inputs become one row: their `mean`, or each label's `max`.
            callbacks: as in Trainer.
            trainer: all else that Trainer takes. `train_dataset` has `teacher_logits` where `distil` is given, and
                `data_collator` must keep these and `labels`; `eval_dataset` may lack them: its loss is then the hard
                one.

        Raises:
            ConfigError: label smoothing is asked for.
        """
        if args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {args.label_smoothing_factor:g}, but the soft loss takes its place; "
                "leave it at 0"
            )
        super().__init__(model=model, args=args, callbacks=list(callbacks or ()), **trainer)
        self.kind = kind
        self.distil = distil
        self.target_scale = target_scale
        self.pool = pool
        self.class_weights = None if class_weights is None else class_weights.to(args.device)
        if args.label_names is None:
            self.label_names = ["labels"]  # under PEFT, Trainer may not find them, and eval_loss goes missing
        # Both say the same to different versions: our loss is already divided by the rows of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.window = LossSums(args.device)
        self.evaluated = LossSums(args.device)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as Trainer does; nothing of an earlier training is in the losses that are logged."""
        self.window = LossSums(self.args.device)
        return super().train(*args, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the batches of one optimiser step, and count their rows over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.mean_rows(batches, device)

    def mean_rows(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """Give the number of rows to divide by: DDP averages the gradients of the processes, so it is their mean."""
        if batch := next((batch for batch in batches if "labels" not in batch), None):
            raise DataError(
                f"the batch has no labels, it has {', '.join(batch)}; expected a column `label` or `labels` in the "
                "training data, and a collator that keeps it"
            )
        rows = sum(len(batch["labels"]) for batch in batches)
        if self.args.world_size == 1:
            return rows
        return self.accelerator.gather(torch.tensor([rows], device=device)).sum() / self.args.world_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and compute the loss; in evaluation the rows of this batch count, else those of the step."""
        config: Any = getattr(self.model, "config", None)
        if self.kind != "tokens" and getattr(config, "problem_type", "") is None:  # as transformers' own loss does
            config.problem_type = PROBLEM_TYPES[self.kind]
        outputs = self._outputs(model, inputs)
        labels, teacher = inputs["labels"], None if self.distil is None else inputs.get(COLUMN)
        if self.distil is not None and teacher is None and model.training:
            raise DataError(
                "distil is set, but the batch has no teacher_logits; expected a column of that name in the training "
                "data, and a collator that keeps it. TeacherLogits.attach(dataset) adds the column"
            )
        if self.target_scale is not None:
            labels = self.target_scale.standardise(labels)
            teacher = None if teacher is None else self.target_scale.standardise(teacher)
        recipe = (self.distil or DistilConfig()).model_dump(include={"alpha", "temperature", "loss"})
        recipe |= {"labelled": inputs.get(LABELLED), "class_weights": self.class_weights}
        terms = distillation_loss(outputs.logits, labels, teacher, kind=self.kind, **recipe)
        if model.training:
            self.record(terms)
        elif self.kind == "tokens":
            self.evaluated.add(terms, self.state.global_step)
        rows = num_items_in_batch if model.training and num_items_in_batch is not None else len(terms.total)
        loss = terms.total.sum() / rows
        return (loss, self._restored(outputs)) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluate a batch; without labels Trainer would hand the model all that the collator made."""
        answer = model if "labels" in inputs else lambda **given: self._restored(self._outputs(model, given))
        return super().prediction_step(answer, inputs, prediction_loss_only, ignore_keys)

    def _outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run the model, and leave a row of logits for each label: those of the words, or of whole texts."""
        ours = ("labels", "words", "texts", COLUMN, LABELLED)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ours})
        if "words" in inputs:
            outputs.logits = outputs.logits.flatten(0, 1)[inputs["words"]]
        if "texts" in inputs:
            texts = inputs["texts"]
            rows = len(inputs["labels"]) if "labels" in inputs else int(texts.max()) + 1
            outputs.logits = pool_windows(outputs.logits, texts, rows, self.pool)
        return outputs

    def _restored(self, outputs: Any) -> Any:
        """Bring the predictions of a regression back to the scale of its labels."""
        if self.target_scale is not None:
            outputs.logits = self.target_scale.restore(outputs.logits)
        return outputs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Evaluate as Trainer does, but by words, not texts: none of the last batch is cut, and each counts alike.

        Raises:
            ConfigError: words, of which processes have different numbers, in several processes.
        """
        if self.kind == "tokens" and self.args.world_size > 1:
            raise ConfigError("words are evaluated in one process; train in several, then evaluate in another script")
        if self.kind == "tokens":
            self.gather_function = self.accelerator.gather
            self.evaluated.sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self.kind == "tokens" and (name := f"{metric_key_prefix}_loss") in output.metrics:
            output.metrics[name] = term_means(self.accelerator.reduce(self.evaluated.sums, reduction="sum"))["loss"]
        return output

    def record(self, terms: LossTerms) -> None:
        self.window.add(terms, self.state.global_step + 1)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward; where the loss is not a finite number an accelerator stops at the next log."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.device.type == "cpu":  # elsewhere reading a number makes the processor wait for the device
            self.window.check(self.args.learning_rate)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.window.check(self.args.learning_rate)
            logs = logs | term_means(self.accelerator.reduce(self.window.sums, reduction="sum"))
            self.window.sums.zero_()
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of teacher and words where Trainer drops what the model's forward does not take."""
        super()._set_signature_columns_if_needed()
        kept = (COLUMN, LABELLED, *(("text", *WORDS) if self.kind == "tokens" else ()))
        self._signature_columns += [name for name in kept if name not in self._signature_columns]
