"""A training that is cut off continues, and ends in the bits of one that was left alone."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from interruptions import CutAfter, PowerCutError, SaveAt, assert_resumes, assert_same_bits, weights

from kdlora.config import DistilConfig, LoraSettings
from kdlora.distil import precision
from kdlora.distil.processes import Processes
from kdlora.distil.resume import CheckpointFolder
from kdlora.distil.trainer import ArmTrainer
from kdlora.errors import ArtifactError
from kdlora.system.ownership import owned_name, remove

CASES = {
    "regression": {"kind": "regression", "epochs": 2.5, "head_learning_rate": 2e-2},
    "tokens": {"kind": "tokens", "micro_batch_tokens": 100, "unlabelled": 8},
    "best": {"lora": False, "learning_rate": 2e-2, "select": "best", "epochs": 4},
    "every part": {
        "dropout": 0.1,
        "epochs": 3,
        "of the training": {"dropout": 0.2},
        "distil": DistilConfig(loss="mse", alpha=0.1),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_undisturbed(make_setup, tmp_path, case):
    """Dropout, row order, optimiser, schedule, loss sums, best weights or a base that start anew change a little."""
    settings = dict(CASES[case])
    options = {"distil": settings.pop("distil", DistilConfig())}
    own = settings.pop("of the training", {})

    def make():
        setup = make_setup(**settings)
        setup.settings = setup.settings.model_copy(update=own)
        return setup

    assert_resumes(make, tmp_path, *((9, 6) if case in ("best", "every part") else (9,)), **options)


def test_of_several_processes_one_brings_the_best_weights_back(make_setup, tmp_path):
    """Two that link and copy one file at the same time end the run, each time it is started again."""
    setup = make_setup(lora=False, select="best")
    with pytest.raises(PowerCutError):
        setup.run(tmp_path, callbacks=[SaveAt(9), CutAfter(11)])
    folder = CheckpointFolder(
        tmp_path, json.loads(next(tmp_path.glob("step-*/manifest.json")).read_text())["ingredients"]
    )
    checkpoint = folder.latest()
    for rank, restored in ((1, False), (0, True)):
        remove(folder.best)
        ArmTrainer._restore(
            SimpleNamespace(checkpoints=folder, processes=Processes(rank, 2), model=setup.model), checkpoint
        )
        assert folder.best.exists() == restored


def test_a_resumed_training_keeps_its_number_format(make_setup, tmp_path, monkeypatch):
    """`auto` is timed: a second timing that comes out otherwise would refuse the training's own checkpoint, of bf16."""
    timings = iter([2.0, 2.0, 1.0])  # of the undisturbed, the cut, and the resumed one
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(precision, "_bf16_speed_up", lambda: next(timings))
    assert_resumes(make_setup, tmp_path, 9, precision="bf16", resumed={"precision": "auto"})


def test_a_finished_training_is_not_trained_on(make_setup, tmp_path):
    """A crash after the last step, while the weights are being kept, must not cost an epoch, nor add a step."""
    for case in ({"epochs": 2.5}, {"epochs": 9, "learning_rate": 1e-9, "select": "best", "early_stopping_patience": 2}):
        folder = tmp_path / str(case["epochs"])
        first, again = make_setup(**case), make_setup(**case)
        expected = first.run(folder, callbacks=[SaveAt(3)])
        assert len(expected.history) == 3, "patience counts from the best epoch, here the first"
        seen: list[int] = []
        outcome = again.run(folder, callbacks=[CutAfter(-1, seen)])
        assert seen == []
        assert_same_bits(weights(first.model), weights(again.model))
        assert outcome.history == expected.history
        assert outcome.train_seconds == pytest.approx(expected.train_seconds, abs=0.5)


def test_damaged_checkpoints_are_passed_over(make_setup, tmp_path, caplog):
    """A half-written checkpoint taken for whole resumes from garbage, or crashes for good."""
    undisturbed, resumed, seen = make_setup(), make_setup(), []
    expected = undisturbed.run(tmp_path / "undisturbed")
    with pytest.raises(PowerCutError):
        make_setup().run(tmp_path / "cut", callbacks=[SaveAt(3, 9), CutAfter(11)], keep_checkpoints=2)
    (tmp_path / "cut" / f".step-000000010.tmp-{owned_name().split('-')[0]}-999999999-0-0123abcd").mkdir()
    manifest = json.loads((tmp_path / "cut" / "step-000000003" / "manifest.json").read_text())
    for number, (file, damage) in enumerate(
        [
            ("manifest.json", None),
            ("optimizer.safetensors", None),
            ("weights.safetensors", lambda content: content[:-4]),
            ("weights.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ]
    ):
        folder = Path(shutil.copytree(tmp_path / "cut", tmp_path / str(number)))
        spoilt = folder / "step-000000009" / file
        content = spoilt.read_bytes()
        spoilt.unlink()
        if damage is not None:
            spoilt.write_bytes(damage(content))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert CheckpointFolder(folder, manifest["ingredients"]).latest().folder == folder / "step-000000003"
        assert "step-000000009 is unfinished or damaged" in caplog.text
        assert list(folder.glob(".step*")) == []
    # Sorted behind every new one, the damaged one pushed it out as soon as it was written.
    CheckpointFolder(tmp_path / "0", manifest["ingredients"]).write(5, {"state": {}}, {})
    assert [path.name for path in (tmp_path / "0").glob("step-*")] == ["step-000000005"]
    outcome = resumed.run(folder, callbacks=[CutAfter(-1, seen)])
    assert seen[0] == 4
    assert_same_bits(weights(undisturbed.model), weights(resumed.model))
    assert outcome.history == expected.history


def test_checkpoints_of_another_training_are_refused(make_setup, tmp_path):
    """Going on from another training's checkpoint mixes two experiments in one record."""
    with pytest.raises(PowerCutError):
        make_setup().run(tmp_path, callbacks=[SaveAt(3), CutAfter(4)], lora=LoraSettings())
    for change, named in (
        ({"learning_rate": 1e-3}, "the training settings"),
        ({"seed": 4}, "the seed"),
        ({"precision": "bf16"}, "the number format"),
        ({"distil": DistilConfig(alpha=0.4)}, "the distillation settings"),
        ({"lora": False}, "the model or its initial weights"),
        ({"adapter": LoraSettings(alpha=32.0)}, "the adapter's settings"),  # its scale is in no weight
        ({"rows": 40}, "the training rows or their teacher logits"),
    ):
        options = {key: change[key] for key in ("seed", "precision", "distil") if key in change}
        setup = make_setup(**{key: value for key, value in change.items() if key not in (*options, "adapter")})
        options["lora"] = change.get("adapter", LoraSettings())
        with pytest.raises(ArtifactError, match=f"of another training: .*{named}.* changed. Delete"):
            setup.run(tmp_path, **options)
    kept = shutil.copytree(tmp_path, tmp_path.with_name("less-memory"))
    make_setup(micro_batch_tokens=64).run(kept, lora=LoraSettings())  # after running out of it
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}, "a pickle would run code where it is resumed"
    assert all(json.loads(path.read_text(encoding="utf-8")) for path in files if path.suffix == ".json")
