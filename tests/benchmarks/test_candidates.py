"""The candidates for a better recipe: each does what its paper says, and the key of its work says that it did."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from candidate_averaging import LastEpochs, MovingAverage
from candidate_relations import RelationTransfer, keep_projections, open_features, relation_loss
from candidate_sad import SpectralAlignment, alignment_loss, input_covariances, shrunk_covariance, spectral_basis
from candidate_teachers import folds_of, joined_logits, mean_logits, rows_of_fold, without_fold
from candidate_terms import with_loss
from candidate_warm_up import last_layer_loss, warmed_up
from study import run
from study_plan import NO_PARTS, Parts, Places, Study, Work, configure, read_study, teachers_of

from kdlora.config import LoraConfig
from kdlora.data.batches import Collator, tokenise
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.distil.logits import TeacherLogits
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import load_encoder, student_from_layers

RATING = Task("regression", ("text",), ("label",), ("score",), ("pearson",))
PLACES = Places(Path("/models"), Path("/glue"), Path("/out"))
STUDY = read_study(Path(__file__).parents[2] / "benchmarks" / "studies" / "candidates.yaml")


def test_parts_are_in_the_key_of_the_arms_that_read_them():
    """A key without them gives the candidate the score of the recipe that it is compared with."""
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    recipes = {name: recipe.parts for name, recipe in STUDY.recipes.items() if recipe.parts != NO_PARTS}
    plain = {arm: Work("sst2", arm, 0, config).key for arm in ("fft", "kd-lora")}
    taught = {Work("sst2", "kd-lora", 0, config, parts=parts).key for parts in recipes.values()}
    assert len(taught | {plain["kd-lora"]}) == len({str(parts) for parts in recipes.values()}) + 1
    assert {Work("sst2", "fft", 0, config, parts=parts).key for parts in recipes.values()} == {plain["fft"]}


class Scalar(nn.Module):
    """One trained number, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.tensor(7.0), requires_grad=False)

    def set(self, value: float) -> None:
        self.trained.data.fill_(value)


def test_the_mean_of_the_last_epochs_is_scored():
    """Copies that follow the weights would all be the last ones, and their mean would look right."""
    model, average = Scalar(), LastEpochs(3)
    for value in (100.0, 1.0, 2.0, 6.0):
        model.set(value)
        average.on_epoch_end(None, None, None, model=model)
    average.on_train_end(None, None, None, model=model)
    assert (model.trained.item(), model.frozen.item()) == (3.0, 7.0)


def test_the_moving_average_forgets_the_initial_weights():
    """Started at the initial weights, the average of a short training would be mostly these."""
    model, average = Scalar(), MovingAverage(0.5)
    for value in (4.0, 8.0, 2.0):
        model.set(value)
        average.on_step_end(None, None, None, model=model)
    average.on_train_end(None, None, None, model=model)
    # (1/4 * 4 + 1/2 * 8 + 1 * 2) / (1/4 + 1/2 + 1) = 7 / 1.75
    assert model.trained.item() == pytest.approx(4.0)
    assert model.frozen.item() == 7.0


def taught(ids: list[str], values: list[float]) -> TeacherLogits:
    return TeacherLogits(ids, np.asarray(values, np.float32)[:, None], ("score",), "print")


def test_teachers_of_other_seeds_are_averaged():
    """A mean over the rows, or of one teacher taken thrice, would look as smooth."""
    mean = mean_logits([taught(["a", "b"], [1.0, 2.0]), taught(["a", "b"], [3.0, -6.0])])
    assert mean.ids.to_pylist() == ["a", "b"]
    assert mean.logits.tolist() == [[2.0], [-2.0]]
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    work = Work("sst2", "kd-lora", 5, config, parts=Parts(teachers=3))
    assert [(one.arm, one.seed) for one in teachers_of(work)] == [("fft", 0), ("fft", 1), ("fft", 2)]
    assert teachers_of(work)[0].key == teachers_of(Work("sst2", "kd-lora", 5, config))[0].key
    assert teachers_of(Work("sst2", "student-lora", 0, config, parts=Parts(teachers=3))) == []


def test_no_teacher_answers_for_what_it_was_trained_on():
    """A copy that goes to another fold than its text is answered by a teacher that knows the text."""
    ids = [f"r{row}" for row in range(10)]
    copies = [f"{name}~{copy}" for copy in (1, 2) for name in ids]
    folds = folds_of(ids, ids, 3)
    assert sorted(np.bincount(folds).tolist()) == [3, 3, 4]
    assert folds_of(copies, ids, 3).tolist() == [*folds, *folds]
    rows = Dataset.from_dict({"id": ids, "label": [0.0] * 10})
    answered = []
    for fold in range(3):
        seen = without_fold(Splits(None, rows, rows), fold, 3)
        own = rows_of_fold(Dataset.from_dict({"id": copies}), ids, fold, 3)["id"][:]
        assert not {name.partition("~")[0] for name in own} & set(seen.train["id"])
        assert len(seen.train) + len(own) // 2 == 10
        answered += own
    assert sorted(answered) == sorted(copies)


def test_the_answers_for_the_folds_are_put_together():
    """Logits beside the ids of another fold would teach every row something else."""
    joined = joined_logits([taught(["b"], [2.0]), taught(["a", "c"], [1.0, 3.0])])
    rows = joined.attach(Dataset.from_dict({"id": ["a", "b", "c"]}))
    assert rows["teacher_logits"][:] == [[1.0], [2.0], [3.0]]
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    teachers = teachers_of(Work("sst2", "kd-lora", 0, config, parts=Parts(folds=3)))
    assert [one.fold for one in teachers] == [(0, 3), (1, 3), (2, 3)]
    assert len({one.key for one in teachers} | {Work("sst2", "fft", 0, config).key}) == 4


def test_a_term_is_added_to_the_gradient_and_the_logits_stay():
    """A term that changes the logits changes the loss against the labels; one without gradient teaches nothing."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    logits = with_loss(weight * 5, 0.5 * weight.square().sum())
    assert logits.tolist() == [10.0, 15.0]
    logits[0].backward()
    assert weight.grad.tolist() == [5.0 + 2.0, 3.0]


def test_relations_are_compared_token_by_token():
    """Padding that takes part, or a divergence the wrong way round, would show in no curve."""
    student = torch.tensor([[[1.0], [0.0], [9.0]]], dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.zeros(1, 3, 1), torch.tensor([[True, True, False]])
    loss = relation_loss(student, teacher, mask, heads=1)
    # The teacher relates both tokens equally. The student's first: softmax(1, 0); its second: softmax(0, 0).
    first = -math.log(2) - 0.5 * math.log(math.e / (math.e + 1) ** 2)
    assert loss.tolist() == pytest.approx([(first + 0) / 2])
    loss.sum().backward()
    assert student.grad[0, 2].item() == 0.0
    assert student.grad.isfinite().all()
    # Two heads of width 1, the second of zeros: half of it. Dot products are divided by the root of a head's width.
    two = torch.cat([student, torch.zeros_like(student)], dim=2)
    assert relation_loss(two, torch.zeros(1, 3, 4), mask, heads=2).tolist() == pytest.approx([first / 4])
    wide = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    scaled = math.log(math.exp(2**0.5) + 1) - 0.5 * 2**0.5 - math.log(2)
    assert relation_loss(wide, torch.zeros(1, 2, 2), torch.ones(1, 2).bool(), 1).tolist() == pytest.approx([scaled / 2])


def test_the_teacher_s_vectors_are_found_by_the_text(tiny_model_folder, tmp_path):
    """Vectors of another text, or of its neighbour in the file, have the right shape."""
    task = RATING
    teacher = load_encoder(str(tiny_model_folder("bert", hidden=32)), task, seed=0)
    texts = ["the film was superb", "a plot", "what a boring story and so on"]
    parts = [tokenise(Dataset.from_dict({"id": ["a", "b"], "text": texts[:2]}), teacher.tokenizer, 16)]
    parts.append(tokenise(Dataset.from_dict({"id": ["c"], "text": texts[2:]}), teacher.tokenizer, 16))
    open_features(teacher, parts, tmp_path / "vectors")
    features = open_features(None, parts, tmp_path / "vectors")  # read, not computed
    batch = Collator.of(teacher.tokenizer, "regression", 16)([parts[1].dataset[0], parts[0].dataset[1]])
    mask = batch["attention_mask"].bool()
    found = features.batch(batch["input_ids"], mask)
    seen = {}
    handles = keep_projections(teacher.model, seen)
    teacher.model(**batch)
    for vectors, name in zip(found, ("query", "key", "value"), strict=True):
        assert torch.allclose(vectors[mask], seen[name][mask], atol=2e-3)
        assert not vectors[~mask].any()
    for handle in handles:
        handle.remove()


def test_relations_that_agree_teach_nothing(tiny_model_folder, tmp_path):
    """The term must see the student's own pass, and leave no hook on what is merged and saved."""
    task = RATING
    encoder = load_encoder(str(tiny_model_folder("bert", hidden=32)), task, seed=0)
    part = tokenise(Dataset.from_dict({"id": ["a"], "text": ["a superb film"]}), encoder.tokenizer, 16)
    batch = Collator.of(encoder.tokenizer, "regression", 16)([part.dataset[0]])
    transfer = RelationTransfer(open_features(encoder, [part], tmp_path / "vectors"), 100.0)
    model = add_adapter(encoder, LoraConfig(), seed=0).train()
    transfer.on_train_begin(None, None, None, model=model)
    layer = model.get_base_model().bert.encoder.layer[-1].attention.self.query
    for changed in (False, True):
        for module in model.modules():
            module.training = module is model  # without dropout both passes are the same
        (model(**batch).logits * 0).sum().backward()
        size = layer.lora_B["default"].weight.grad.abs().max().item()
        assert (size > 0.1) == changed
        with torch.no_grad():
            layer.lora_B["default"].weight += 1.0
    transfer.on_train_end(None, None, None)
    assert not any(module._forward_hooks for module in model.modules())


def test_directions_are_those_that_the_inputs_use():
    """Without the covariance, the largest weights would give the direction, though no input may ever reach them."""
    change = torch.diag(torch.tensor([3.0, 2.0]))
    assert spectral_basis(change, torch.eye(2), 1).abs().tolist() == [[1.0], [0.0]]
    assert spectral_basis(change, torch.diag(torch.tensor([1.0, 4.0])), 1).abs().tolist() == [[0.0], [1.0]]


def test_alignment_is_measured_between_spaces():
    """A loss that compared the matrices would punish a B that is merely longer, or turned within its space."""
    basis = torch.eye(3)[:, :2]
    assert alignment_loss(torch.tensor([[5.0, 1.0], [2.0, 3.0], [0.0, 0.0]]), basis).item() == pytest.approx(
        0, abs=1e-6
    )
    assert alignment_loss(torch.tensor([[0.0, 7.0], [0.0, 0.0], [2.0, 0.0]]), basis).item() == pytest.approx(0.5)
    up = torch.tensor([[1.0], [1.0]], requires_grad=True)
    loss = alignment_loss(up, torch.tensor([[1.0], [0.0]]))
    assert loss.item() == pytest.approx(0.5)  # at 45 degrees
    loss.backward()
    assert up.grad[:, 0].tolist() == pytest.approx([-0.5, 0.5])  # d/db of b2^2 / (b1^2 + b2^2), at (1, 1)


def test_covariances_are_of_the_tokens_alone():
    """Padding would pull every covariance towards one vector."""
    layer = nn.Sequential(nn.Linear(2, 2))
    mask = torch.tensor([[True, True, False]])
    model = nn.Module()
    model.layer, model.forward = layer, lambda inputs, attention_mask: layer(inputs)
    batch = {"inputs": torch.tensor([[[1.0, 0.0], [3.0, 0.0], [99.0, 99.0]]]), "attention_mask": mask}
    (found,) = input_covariances(model, ["layer.0"], [batch, batch]).values()
    # Values 1 and 3: variance 1, and 0 in the other direction; a tenth of the mean variance, 0.5, is added to 90%.
    assert found.tolist() == [pytest.approx([0.95, 0.0]), pytest.approx([0.0, 0.05])]
    even = shrunk_covariance(torch.zeros(2), 4 * torch.eye(2), 4)
    assert even.tolist() == [pytest.approx([1.0, 0.0]), pytest.approx([0.0, 1.0])]


def test_adapters_begin_at_the_basis(tiny_model_folder):
    """Adapters that stay as PEFT made them would be held to a space that they cannot see."""
    encoder = load_encoder(str(tiny_model_folder("bert", hidden=32)), RATING, seed=0)
    model = add_adapter(encoder, LoraConfig(rank=2, alpha=2), seed=0).train()
    names = [
        name.removeprefix("base_model.model.") for name, one in model.named_modules() if isinstance(one, LoraLayer)
    ]
    alignment = SpectralAlignment({name: torch.eye(32)[:, :2] for name in names}, 10.0)
    alignment.on_train_begin(None, None, None, model=model)
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    assert torch.equal(layer.lora_B["default"].weight, torch.eye(32)[:, :2])
    assert not layer.lora_A["default"].weight.any()
    with torch.no_grad():
        layer.lora_B["default"].weight[2, 0] = 1.0  # the first column is now at 45 degrees
    (model(input_ids=torch.tensor([[2, 9, 3]])).logits * 0).sum().backward()
    # 10 / 4 layers, over rank 2, times the 0.5 of a single column
    assert layer.lora_B["default"].weight.grad[2, 0].item() == pytest.approx(10 / 4 / 2 * 0.5)
    alignment.on_train_end(None, None, None)
    assert not model._forward_hooks


def test_the_last_layers_are_compared_token_by_token():
    """Padding would be most of what a short text learns from."""
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    teacher = torch.tensor([[[3.0, 1.0], [50.0, 50.0]]])
    assert last_layer_loss(student, teacher, torch.tensor([[True, False]])).item() == pytest.approx((4 + 1) / 2)


def test_a_warm_up_brings_a_student_nearer_and_is_done_once(tiny_model_folder, tmp_path):
    """A warm-up that trains a copy, or the head, leaves every figure as it was."""
    source = str(tiny_model_folder("bert", layers=3, hidden=32))
    teacher = load_encoder(source, RATING, seed=0)
    rows = [f"a {word} film of {row} words" for row in range(20) for word in ("superb", "boring")]
    texts = Dataset.from_dict({"id": [str(row) for row in range(40)], "text": rows})
    part = tokenise(texts, teacher.tokenizer, 16)
    batch = Collator.of(teacher.tokenizer, "regression", 16)([part.dataset[row] for row in range(40)])

    def distance(encoder):
        with torch.no_grad():
            ends = [one.model.eval().base_model(**batch).last_hidden_state for one in (encoder, teacher)]
        return last_layer_loss(*ends, batch["attention_mask"].bool()).item()

    student = student_from_layers(source, [0, 2], RATING, seed=1)
    before, head = distance(student), student.model.classifier.weight.clone()
    after = distance(warmed_up(student, teacher, part, 20, tmp_path / "warm.safetensors"))
    assert after < 0.5 * before
    assert torch.equal(student.model.classifier.weight, head)
    again = student_from_layers(source, [0, 2], RATING, seed=2)
    assert distance(warmed_up(again, None, part, 20, tmp_path / "warm.safetensors")) == after


def test_students_of_other_layers_have_keys_of_their_own():
    """All students of a teacher's layers would else share the first one's score."""
    study = read_study(Path(__file__).parents[2] / "benchmarks" / "studies" / "layers.yaml")
    keys = set()
    for name, recipe in study.recipes.items():
        config = configure(study, PLACES, "sst2", name, {})
        keys |= {Work("sst2", arm, 0, config, parts=recipe.parts).key for arm in ("kd-lora", "student-lora")}
        assert (config.student.model is None) == (config.student.from_teacher_layers is not None)
    assert len(keys) == 2 * (len(study.recipes) - 1)  # full-0-1 differs from layers-0-1 in what full tuning reads


def test_every_part_runs_in_a_study(tiny_model_folder, tmp_path):
    """A part that never takes hold, or a teacher that is not trained before it is asked, would show after hours."""
    models, out = tmp_path / "models", tmp_path / "out"
    for name, layers in (("large", 2), ("small", 1)):
        shutil.copytree(tiny_model_folder("bert", layers=layers), models / name)
    (models / "vader").mkdir()
    lines = [f"{row}\t{row % 4 - 1.5}\ta {('good', 'bad', 'dull', 'fine')[row % 4]} film" for row in range(40)]
    (models / "vader" / "ratings.txt").write_text("\n".join(lines), encoding="utf-8")
    parts = {
        "plain": {},
        "average": {"average": 1},  # the last epoch's weights
        "ema": {"ema": 0.9},
        "teachers": {"teachers": 2},
        "folds": {"folds": 2},
        "relations": {"relations": 1.0},
        "sad": {"sad": 0.2},
    }
    train = {"epochs": 1, "batch_size": 8}
    values = {
        "teacher": "large",
        "student": "small",
        "base": {"recipe": "paper", "teacher": {"train": train}, "student": {"train": train}, "data": {"augment": 1}},
        "tasks": {"ratings": {"vader": "ratings.txt", "rows": 24}},
        "search": {"tasks": ["ratings"], "grid": {"student.train.learning_rate": [1e-2]}},
        "recipes": {name: {"parts": found, "arms": ["kd-lora"]} for name, found in parts.items()},
        "reference": "plain",
        "full": "plain",
        "steps": [{"recipes": list(parts), "tasks": ["ratings"]}],
    }
    study, places = Study.model_validate(values), Places(models, tmp_path, out)
    assert run(study, places, minutes=10) == 0
    records = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/*.json")]
    scores = {next(iter(one["parts"]), "plain"): one["score"] for one in records if one["arm"] == "kd-lora"}
    assert scores.keys() == parts.keys()
    assert scores["average"] == scores["plain"]
    assert len(set(scores.values())) == len(parts) - 1
    teachers = [(one["seed"], one["fold"], one["rows"]["train"]) for one in records if one["arm"] == "fft"]
    assert sorted(teachers, key=str) == [(0, None, 24), (0, [0, 2], 12), (0, [1, 2], 12), (1, None, 24)]
    assert [one["arm"] for one in records].count("student-fft") == 1
