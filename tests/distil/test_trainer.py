"""Training of one model: what it learns, from whom, and that batches, seeds and numbers are what they claim to be."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interruptions import CutAfter, PowerCutError, assert_same_bits, callback, weights
from sklearn.utils.class_weight import compute_class_weight

from kdlora.config import DistilConfig
from kdlora.data.tasks import Task
from kdlora.distil import inference
from kdlora.distil import train as train_module
from kdlora.distil import trainer as trainer_module
from kdlora.distil.inference import predict_logits
from kdlora.distil.logits import labelled_values
from kdlora.distil.losses import distillation_loss, start_at_shares
from kdlora.distil.resume import CheckpointFolder
from kdlora.distil.train import class_weights
from kdlora.distil.trainer import ProgressEvent


@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_recomputes_the_same_bits_and_another_seed_gives_others(make_setup, tmp_path, lora):
    """Dropout that drew other elements the second time would train on gradients of another network."""
    kept, again = (make_setup(lora=lora, epochs=1, gradient_checkpointing=wanted) for wanted in (False, True))
    calls, histories = [], []
    for setup in (kept, again):
        calls.append(0)
        layer = setup.encoder.model.base_model.encoder.layer[0].attention.self

        def count(module, *_):
            calls[-1] += module.training

        handle = layer.register_forward_hook(count)
        histories.append(setup.run(tmp_path / str(len(calls))).history)
        handle.remove()
    assert_same_bits(weights(kept.model), weights(again.model))
    assert calls[1] == 2 * calls[0] > 0
    assert histories[0] == histories[1] != make_setup(lora=lora, epochs=1).run(tmp_path / "other", seed=4).history
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.model.modules())


def test_history_progress_and_micro_batches(make_setup, tmp_path, monkeypatch):
    """Loss terms that are not means over the rows would not add up; a budget that does not bind runs out of memory."""
    monkeypatch.setattr(trainer_module, "_PROGRESS_SECONDS", 0.0)
    setup, shapes = make_setup(epochs=2.5, micro_batch_tokens=48), []
    setup.encoder.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape)) if module.training else None
    )
    events: list[ProgressEvent] = []
    outcome = setup.run(tmp_path, distil=DistilConfig(alpha=0.3), progress=events.append)
    assert [entry["epoch"] for entry in outcome.history] == [1.0, 2.0, 2.5]
    assert [entry["step"] for entry in outcome.history] == [6, 12, 15]
    for entry in outcome.history:
        assert entry["loss"] == pytest.approx(0.3 * entry["hard_loss"] + 0.7 * entry["soft_loss"], rel=1e-6)
        assert entry["score"] == pytest.approx(100 * entry["accuracy"])
    assert (outcome.steps, outcome.examples, outcome.best_epoch) == (15, 2 * 44 + 3 * 8, 2.5)
    assert outcome.history[0]["learning_rate"] > outcome.history[-1]["learning_rate"] > 0.0
    assert all(rows == 1 or rows * width <= 48 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == outcome.examples
    assert [event.step for event in events] == [*range(1, 7), 6, *range(7, 13), 12, 13, 14, 15, 15]
    last = events[-1]
    assert (last.steps, last.epoch, last.epochs) == (15, 2.5, 2.5)
    assert last.loss == pytest.approx(0.3 * last.hard_loss + 0.7 * last.soft_loss, rel=1e-6)
    assert (events[0].score, last.score) == (None, outcome.history[-1]["score"])
    assert all(event.examples_per_second > 0 for event in events)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 0.0, [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
        ("constant", 0.5, [0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule(make_setup, tmp_path, schedule, warmup, expected):
    """A schedule silently ignored costs a few points; transformers' `constant` ignores the warm-up."""
    rates = []
    watch = callback("on_pre_optimizer_step", lambda optimizer, **_: rates.append(optimizer.param_groups[0]["lr"]))
    setup = make_setup(epochs=1, schedule=schedule, warmup_fraction=warmup, learning_rate=1e-3)
    outcome = setup.run(tmp_path, callbacks=[watch])
    assert rates == pytest.approx([1e-3 * share for share in expected], rel=1e-2)
    assert outcome.history[0]["learning_rate"] == rates[-1]


@pytest.mark.parametrize("lora", [True, False])
def test_fresh_modules_have_a_rate_of_their_own(make_setup, tmp_path, lora):
    """A rate that reaches other modules, or none, or a bias that then decays, changes the figures only a little."""
    setup = make_setup(lora=lora, head_learning_rate=1e-12, schedule="constant", warmup_fraction=0.0)
    before, groups = weights(setup.model), []
    look = callback("on_train_begin", lambda optimizer, **_: groups.extend(optimizer.param_groups))
    outcome = setup.run(tmp_path / "one", callbacks=[look])
    trained = [(name, value) for name, value in setup.model.named_parameters() if value.requires_grad]
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in trained}
    fresh = [name for name in moved if any(f"{own}." in name for own in setup.encoder.fresh)]
    assert len(fresh) >= 2, "weight and bias"
    assert max(moved[name] for name in fresh) < 1e-8
    assert max(moved[name] for name in moved.keys() - set(fresh)) > 1e-3
    assert [entry["learning_rate"] for entry in outcome.history] == [5e-3, 5e-3]
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    assert rates == [(5e-3, 0.01), (5e-3, 0.0), (1e-12, 0.01), (1e-12, 0.0)]


def test_best_epoch_is_restored(make_setup, tmp_path, monkeypatch):
    """Reporting the best epoch's score while shipping the last epoch's weights is a classic."""
    scores = iter([10.0, 30.0, 30.0, 20.0])
    monkeypatch.setattr(train_module, "score", lambda task, metrics: next(scores))
    after_epoch = []
    setup = make_setup(epochs=4, select="best")
    keep = callback("on_epoch_end", lambda model, **_: after_epoch.append(weights(model)))
    outcome = setup.run(tmp_path, callbacks=[keep])
    assert outcome.best_epoch == 2.0
    assert_same_bits(weights(setup.model), after_epoch[1])
    assert any(not torch.equal(after_epoch[1][name], after_epoch[3][name]) for name in after_epoch[1])


def test_checkpoints_are_written_by_the_clock_and_seldom_where_they_take_long(make_setup, tmp_path, monkeypatch):
    """Evaluations longer than the training cost several epochs; a teacher that wrote 1.3 GB a minute stood still."""
    clock, written = [0.0], []

    def slow_score(task, metrics):
        clock[0] += 100.0
        return 1.0

    def slow_write(folder, step, *_):
        written.append(step)
        clock[0] += 11.0

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(train_module, "score", slow_score)
    with pytest.raises(PowerCutError):
        make_setup().run(tmp_path / "quick", callbacks=[CutAfter(7)], checkpoint_seconds=60.0)
    assert [path.name for path in tmp_path.glob("quick/step-*")] == ["step-000000006"], "the evaluation counts"
    monkeypatch.setattr(CheckpointFolder, "write", slow_write)
    make_setup(epochs=5).run(tmp_path / "slow", checkpoint_seconds=60.0)
    assert written == [6, 18, 30], "200 s apart; and at the end, since there are some"


def test_many_epochs_are_validated_seldom_where_the_last_one_counts(make_setup, tmp_path):
    """With 100 rows and 1,000 to validate, scores that chose nothing took four times as long as the training."""

    def setup(select="last"):
        return make_setup(epochs=23, rows=8, select=select)

    whole = setup().run(tmp_path / "last").history
    assert [entry["epoch"] for entry in whole] == [5, 10, 15, 20, 23]
    every = setup("best").run(tmp_path / "best").history
    assert (len(every), every[-1]) == (23, whole[-1])
    with pytest.raises(PowerCutError):
        setup().run(tmp_path / "cut", callbacks=[CutAfter(5)], checkpoint_seconds=1e-9)
    assert setup().run(tmp_path / "cut").history == whole


def test_passes_on_a_cpu_fit_its_caches(make_setup, tmp_path, monkeypatch):
    """Passes of 16,384 tokens made a large teacher label at a third of its speed; padding took a fifth of all time."""
    for module in (inference, train_module):
        monkeypatch.setattr(module, "CPU_TOKENS", 48)
    setup, sizes, widths = make_setup(epochs=1), {True: [], False: []}, set()
    embeddings = setup.encoder.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: sizes[module.training].append(args[0].numel()))
    embeddings.register_forward_hook(lambda module, args, output: widths.add(args[0].shape[1]))
    setup.run(tmp_path)
    assert max(sizes[False]) <= 48 < max(sizes[True]) <= 96
    assert predict_logits(setup.model, setup.encoder.tokenizer, setup.train, batch_tokens=16_384).shape == (44, 2)
    assert max(sizes[False]) <= 48
    assert {width % 2 for width in widths} == {0} != {width % 8 for width in widths}


def test_bf16_training_leaves_the_model_in_fp32(make_setup, tmp_path):
    """Accelerate leaves a forward under autocast behind; every later fp32 figure would be one of bf16."""
    setup = make_setup()
    before = weights(setup.model)
    config = copy.deepcopy(setup.encoder.model.config.to_dict())
    setup.run(tmp_path, precision="bf16")
    frozen = {name for name, parameter in setup.model.named_parameters() if not parameter.requires_grad}
    after = weights(setup.model)
    assert_same_bits({name: before[name] for name in frozen}, {name: after[name] for name in frozen})
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(before[name], after[name]) for name in after.keys() - frozen)
    assert "forward" not in vars(setup.model)
    assert vars(setup.model).keys().isdisjoint({"_original_forward", "_is_accelerate_prepared"})
    assert setup.encoder.model.config.to_dict() == config
    tokens = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        exact = copy.deepcopy(setup.model).double()(**tokens).logits
        torch.testing.assert_close(setup.model(**tokens).logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_balanced_weights_are_those_of_scikit_learn():
    """Weights whose mean over the rows is not 1 would change how much the teacher's term counts, too."""
    draw = np.random.default_rng(0)
    names = ("a", "b", "c", "never")
    task = Task("single-label", ("text",), ("label",), names, ("accuracy",))
    labels = draw.choice(3, 200, p=[0.9, 0.07, 0.03])
    found = class_weights(task, "balanced", labels).numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert found.tolist() == pytest.approx([*expected, 1.0])
    assert found[labels].mean() == pytest.approx(1.0)
    several = Task("multi-label", ("text",), names, names, ("micro_f1",))
    marks = (draw.random((200, 4)) < [0.5, 0.1, 0.02, 0.0]).astype(float)
    rows = marks[:, :3].sum(axis=0)
    assert class_weights(several, "balanced", marks).tolist() == pytest.approx([*((200 - rows) / rows), 1.0])
    assert class_weights(several, {"B": 7.0}, marks).tolist() == [1.0, 7.0, 1.0, 1.0]
    assert class_weights(task, None, labels) is class_weights(task, "auto", labels) is None
    assert class_weights(replace(task, metrics=("macro_f1",)), "auto", labels).tolist() == found.tolist()


@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_weighed_rows_are_averaged_over_the_rows(make_setup, tmp_path, kind):
    """A mean over the weights, or over the labelled rows alone, or the teacher's logits of other rows, would train."""
    factors = {"positive": 5.0} if kind == "single-label" else {"b": 3.0}
    still = {"dropout": 0.0, "unlabelled": 12, "learning_rate": 1e-12, "epochs": 1}
    plain, setup = make_setup(kind, **still), make_setup(kind, **still, class_weights=factors)
    found, rows = setup.run(tmp_path / "still").history[-1], plain.train.dataset
    by_label = torch.tensor([1.0, 5.0] if kind == "single-label" else [1.0, 3.0, 1.0])
    if kind == "multi-label":  # as the training itself begins
        start_at_shares(plain.model, plain.task, labelled_values(rows), by_label)
    logits = torch.tensor(predict_logits(plain.model, plain.encoder.tokenizer, plain.train))
    labels, teacher, labelled = (
        torch.tensor(np.asarray(rows[name])) for name in ("label", "teacher_logits", "labelled")
    )
    terms = distillation_loss(logits, labels, teacher, kind=kind, class_weights=by_label, labelled=labelled)
    assert found["hard_loss"] == pytest.approx(float(terms.hard.sum() / 44), rel=1e-4)
    assert found["soft_loss"] == pytest.approx(float(terms.soft.mean()), rel=1e-4)
