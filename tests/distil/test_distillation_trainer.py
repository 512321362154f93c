"""The trainer in a plain transformers script: no code of ours around it."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from interruptions import callback, weights
from transformers import AutoConfig, DataCollatorWithPadding, TrainingArguments

from kdlora.config import DistilConfig
from kdlora.data.tasks import PROBLEM_TYPES
from kdlora.deploy.predict import Classifier
from kdlora.distil.distillation_trainer import DistillationTrainer
from kdlora.distil.inference import predict_logits
from kdlora.distil.losses import TargetScale, distillation_loss
from kdlora.errors import ConfigError, DataError


def encoded(setup) -> Dataset:
    """What a script has after its own tokenisation: texts and ids still there, `label` not renamed."""
    rows = setup.train.dataset
    return rows.add_column("text", ["unused"] * len(rows)).remove_columns("length")


def arguments(folder, **settings) -> TrainingArguments:
    values = {"learning_rate": 1e-3, "num_train_epochs": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    values |= {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "seed": 5, "logging_steps": 1}
    return TrainingArguments(**(values | {"save_strategy": "no", "disable_tqdm": True} | settings))


def trainer_for(setup, args, *, distil: DistilConfig | None = DistilConfig(), **options) -> DistillationTrainer:
    return DistillationTrainer(
        setup.model,
        args,
        kind=setup.task.kind,
        distil=distil,
        processing_class=setup.encoder.tokenizer,
        **({"train_dataset": encoded(setup), "eval_dataset": encoded(setup)} | options),
    )


def test_a_second_training_begins_anew(make_setup, tmp_path):
    """Rows since the last log were added to the next training's; after one that diverged, all others "diverged"."""
    setup = make_setup("single-label", dropout=0.0, rows=24)
    trainer = trainer_for(setup, arguments(tmp_path, learning_rate=0.0, logging_steps=2))
    first, second = ((trainer.train(), trainer.state.log_history[0]["loss"])[1] for _ in range(2))
    assert first == second
    trainer.window.first_bad.fill_(3)
    trainer.train()


def test_words_are_evaluated_in_one_process(make_setup, tmp_path, monkeypatch):
    """The numbers of words differ between processes: Gloo failed, and NCCL would wait for ever."""
    trainer = trainer_for(make_setup("tokens", dropout=0.0), arguments(tmp_path))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match="words are evaluated in one process"):
        trainer.evaluate()


@pytest.mark.parametrize(("kind", "rows"), [("multi-label", 44), ("regression", 41)])
def test_accumulation_gives_one_gradient(make_setup, tmp_path, kind, rows):
    """Batch 8 × 1 and 2 × 4 differed by a factor of 4 in other projects, and on the last, short step in most."""
    parameters, losses = [], []
    for batch, steps in ((8, 1), (2, 4)):
        setup = make_setup(kind, dropout=0.0, rows=rows)
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        scale = TargetScale.of(np.asarray(setup.train.dataset["label"])) if kind == "regression" else None
        trainer = trainer_for(setup, arguments(tmp_path, **cut, optim="sgd", learning_rate=0.05), target_scale=scale)
        trainer.train()
        assert trainer.state.global_step == math.ceil(rows / 8)
        parameters.append(weights(setup.model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    if scale is not None:  # `compute_metrics` compared standardised predictions with the labels
        expected = scale.restore(predict_logits(setup.model, setup.encoder.tokenizer, setup.train))
        for given in (encoded(setup), encoded(setup).remove_columns("label")):
            np.testing.assert_allclose(trainer.predict(given).predictions, expected, rtol=1e-4)
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=1e-6, atol=1e-6, msg=name)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_gradient_is_the_mean_over_the_rows(make_setup, tmp_path):
    """Two ways that agree may agree on a wrong factor: compare with the gradient written out."""
    setup = make_setup(dropout=0.0, rows=8)
    before = weights(setup.model)
    columns = encoded(setup).select_columns(["input_ids", "token_type_ids", "label", "teacher_logits"])
    batch = DataCollatorWithPadding(setup.encoder.tokenizer)(list(columns))
    labels, teacher = batch.pop("labels"), batch.pop("teacher_logits")
    terms = distillation_loss(setup.model.train()(**batch).logits, labels, teacher, kind="single-label", alpha=0.5)
    trained = {name: value for name, value in setup.model.named_parameters() if value.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(terms.total.mean(), list(trained.values())), strict=True))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer_for(setup, arguments(tmp_path, **cut, optim="sgd", learning_rate=0.5)).train()
    for name, value in weights(setup.model).items():
        expected = before[name] - 0.5 * gradients[name] if name in gradients else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_whole_script(make_setup, tmp_path):
    """Trainer drops the column before collation, crashes on `num_items_in_batch`, and loses eval_loss under PEFT."""
    setup, steps = make_setup(lora=True), []
    counters = [callback("on_step_end", lambda place=place, **_: steps.append(place)) for place in "ab"]
    args = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        num_train_epochs=2,
    )

    def accuracy(predictions) -> dict[str, float]:
        return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}

    trainer = trainer_for(setup, args, callbacks=counters, compute_metrics=accuracy)
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    assert (steps.count("a"), steps.count("b")) == (12, 12)
    evaluation = trainer.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= evaluation.keys()
    predictions = trainer.predict(encoded(setup).remove_columns(["label", "teacher_logits"]))
    assert predictions.predictions.shape == (44, 2)


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_the_saved_model_says_what_its_outputs_mean(make_setup, tmp_path, kind):
    """A multi-label model without a problem type was taken for one that gives a single label."""
    setup = make_setup(kind, lora=False, rows=8)
    setup.model.config.problem_type = None  # as `from_pretrained` leaves it
    trainer = trainer_for(setup, arguments(tmp_path, max_steps=1))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert Classifier.load(tmp_path / "saved").folder.kind == kind
    assert AutoConfig.from_pretrained(tmp_path / "saved").problem_type == PROBLEM_TYPES[setup.task.kind]


def test_terms_are_logged_separately(make_setup, tmp_path):
    """One number for both losses hides a soft loss that never falls; means over batches weigh a short one double."""
    setup = make_setup(dropout=0.0)
    args = arguments(tmp_path, per_device_train_batch_size=8, logging_steps=3, learning_rate=1e-12)
    trainer = trainer_for(setup, args, distil=DistilConfig(alpha=0.25))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(0.25 * entry["hard_loss"] + 0.75 * entry["soft_loss"], rel=1e-6)
    everything = trainer.evaluate()["eval_loss"]
    assert (logged[0]["loss"] * 24 + logged[1]["loss"] * 20) / 44 == pytest.approx(everything, rel=1e-4)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("teacher_logits", r"the batch has no teacher_logits.*collator that keeps it"),
        ("labels", r"the batch has no labels, it has .*teacher_logits"),
    ],
)
def test_a_collator_that_drops_a_column(make_setup, tmp_path, column, message):
    """Without the teacher's the training would go on as plain fine-tuning, under the name of distillation."""
    setup = make_setup()
    pad = DataCollatorWithPadding(setup.encoder.tokenizer)

    def forgetful(rows):
        return {key: value for key, value in pad(rows).items() if key != column}

    trainer = trainer_for(setup, arguments(tmp_path), data_collator=forgetful)
    with pytest.raises(DataError, match=message):
        trainer.train()
