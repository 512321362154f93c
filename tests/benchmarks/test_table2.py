"""Table 2 at real size: the models are the published ones, and what is measured is what the page says."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import table2
import table2_models
import torch
from table2_measure import TIMED, Conditions, Timing, time_methods, train_steps
from table2_models import (
    SIZES,
    TRAIN_COUNTS,
    VALIDATION_COUNTS,
    Size,
    batches_to_run,
    count,
    lengths_of,
    padded_tokens,
    synthetic_rows,
    widest_batch,
)

from kdlora.system.children import run_in_child

ALL = [size for pair in SIZES.values() for size in pair]
PUBLISHED = {
    "BERT-base": 109_483_778,
    "DistilBERT": 66_955_010,
    "RoBERTa-base": 124_647_170,
    "DistilRoBERTa": 82_119_938,
    "DeBERTaV3-base": 184_423_682,
    "DeBERTaV3-small": 141_896_450,
}


def shrunk(size: Size, *, vocabulary: int = 200) -> Size:
    """The same architecture, two layers of width 32."""
    small = {"vocab_size": vocabulary, "max_position_embeddings": 66}
    if size.model_type == "distilbert":
        small |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    else:
        small |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if size.model_type == "deberta-v2":
        small |= {"pooler_hidden_size": 32, "position_buckets": 16}
    return replace(size, settings=size.settings | small)


@pytest.mark.parametrize("size", ALL, ids=lambda size: size.title)
def test_models_and_adapters_have_the_published_sizes(size):
    """A config that drifts, or adapters on other layers, would put a model that nobody uses into the table."""
    layers = 12 if size.title.endswith("base") else 6
    assert count(size).total == PUBLISHED[size.title]
    for rank in (8, 64):
        counts = count(size, rank)
        assert counts.adapter == rank * (768 + 768) * 2 * layers
        assert counts.head == (1538 if size.title == "BERT-base" else 592_130)
        assert counts.trainable == counts.adapter + counts.head
        assert counts.total == PUBLISHED[size.title]


def test_lengths_are_those_of_cola(glue_folder):
    """A table with a lost entry would time another set than the paper's 1,043 sentences."""
    assert (len(lengths_of(TRAIN_COUNTS)), len(lengths_of(VALIDATION_COUNTS))) == (8551, 1043)
    assert min(lengths_of(TRAIN_COUNTS)) >= 3, "[CLS], [SEP] and a word"
    for name, counts in (("train", TRAIN_COUNTS), ("dev", VALIDATION_COUNTS)):
        path = glue_folder / "CoLA" / f"{name}.tsv"
        if not path.is_file():
            pytest.skip("no CoLA in the GLUE folder")
        assert len(path.read_text(encoding="utf-8").splitlines()) == sum(counts)


def test_memory_is_measured_on_the_widest_batch_of_an_epoch():
    """An ordinary batch would promise a peak that the first long one breaks."""
    widest = widest_batch([5] * 40 + [6] * 40 + [60], batch=8)
    assert (max(widest), len(widest), padded_tokens(widest)) == (60, 8, 8 * 64)


def test_all_batches_together_are_the_whole_set():
    """A lost last batch, or a wrong share, would scale the time of a sample wrongly; none would divide by zero."""
    lengths = lengths_of(VALIDATION_COUNTS)
    whole, share = batches_to_run(lengths, 1)
    assert sorted(length for batch in whole for length in batch) == lengths
    assert share == 1.0
    some, part = batches_to_run(lengths, 8)
    assert part == pytest.approx(sum(map(padded_tokens, some)) / sum(map(padded_tokens, whole)))
    assert 0.05 < part < 0.25
    assert batches_to_run([5] * 10, 100) == ([[5] * 10], 1.0)


@pytest.mark.parametrize("size", ALL, ids=lambda size: size.title)
def test_rows_hold_no_padding_and_the_inputs_that_the_model_takes(size):
    """A padding id inside a text would shift RoBERTa's positions; missing token types are another input than BERT's."""
    rows = synthetic_rows(size, [4, 9], taught=True).dataset
    ids = [token for row in rows["input_ids"] for token in row]
    assert size.settings["pad_token_id"] not in ids
    assert max(ids) < size.settings["vocab_size"]
    assert [len(row) for row in rows["input_ids"]] == list(rows["length"]) == [4, 9]
    assert ("token_type_ids" in rows.column_names) == (size.model_type == "bert")
    assert "teacher_logits" in rows.column_names


@pytest.mark.parametrize("method", ["FFT", "KD-LoRA"])
@pytest.mark.parametrize("family", SIZES)
def test_every_family_trains(family, method):
    """A family that fails at its real size would fail after ten minutes."""
    size = shrunk(SIZES[family][method == "KD-LoRA"])
    assert train_steps(size, method, [5, 9, 12, 7], Conditions())[0] == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory figures come from Linux' /proc")
def test_peak_holds_weights_gradients_and_optimiser_state():
    """A peak read before Adam has its state, or of the parent's memory, would flatter full fine-tuning."""
    size = shrunk(SIZES["bert"][0], vocabulary=500_000)
    weights = 4 * count(size).total
    (_, full), (_, adapted) = (
        run_in_child(train_steps, size, method, [6] * 4, Conditions()) for method in ("FFT", "LoRA")
    )
    assert 4 * weights < full < 6 * weights + 100e6
    assert weights < adapted < full - 2.5 * weights


def test_every_method_is_timed_in_every_round():
    """A method that drops out of a round, or a warm-up that is counted, would bend a mean."""
    timing = time_methods((shrunk(SIZES["roberta"][0]), shrunk(SIZES["roberta"][1])), Conditions(runs=2, every=10))
    assert list(timing.seconds) == list(TIMED)
    assert all(len(values) == 2 and min(values) > 0 for values in timing.seconds.values())
    assert timing.threads == torch.get_num_threads()
    assert 0 < timing.occupied < 1.5


def figures_of(family: str) -> table2.Figures:
    figures = table2.count_family(family)
    figures.memory["fp32"] = {"FFT": 3_000_000_000, "LoRA": 1_000_000_000, "KD-LoRA": None}
    figures.timing["fp32"] = Timing({name: [8.0, 10.0] for name in TIMED[:3]} | {TIMED[3]: [4.0, 5.0]}, 1, 0.97)
    return figures


def test_paper_and_ours_stand_in_one_row():
    """Swapped families or methods would set our figures beside those of another model."""
    results = {family: figures_of(family) for family in SIZES}
    text = table2.render(results, table2.parse([]))
    assert "| BERT-base | LoRA | 0.295 / 0.590 / 1.180 / 2.359 | 0.002 | 2.9 / 5.9 / 11.8 / 23.6 |" in text
    assert "| DistilBERT | KD-LoRA | 0.147 / 0.295 / 0.590 / 1.180 | 0.592 | 1.2 / 2.4 / 4.7 / 9.4 |" in text
    assert "| RoBERTa-base → DistilRoBERTa | 124.65 → 82.12 | 34.1% | 125 → 82 |" in text
    assert "| DeBERTaV3-base | FFT | 3000 | 2213 | 2234.5 |" in text
    assert "| DistilRoBERTa | KD-LoRA, merged | 4.500 ± 0.707 | 50.0% | 4.44 | 38.4% |" in text
    assert "| DistilBERT | KD-LoRA | – | 274 | 296.8 |" in text, "what could not be measured is a dash"
    assert "None" not in text


def test_times_from_a_shared_cpu_carry_a_warning():
    """Eight times the seconds, printed as the model's own, when a neighbour held the core."""
    options = table2.parse([])
    figures = figures_of("bert")
    assert "Others used the CPU" not in table2.conditions_text({"bert": figures}, options)
    figures.timing["fp32"] = replace(figures.timing["fp32"], occupied=0.06)
    assert "as little as 6% of their threads" in table2.conditions_text({"bert": figures}, options)


@pytest.mark.slow
def test_the_command_measures_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    """The whole way at tiny sizes: child processes must find the benchmark's own modules."""
    monkeypatch.setitem(table2_models.SIZES, "bert", tuple(shrunk(size) for size in SIZES["bert"]))
    out = tmp_path / "table2.md"
    table2.main(["--families", "bert", "--runs", "1", "--every", "40", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.strip() == out.read_text(encoding="utf-8").strip()
    assert "## Memory of training at rank 8" in printed
    assert "one warm-up and 1 timed run(s) over one of 40 batches" in printed
    assert "None" not in printed
    assert "nan" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(capsys):
    """CPU figures under the heading of a GPU."""
    with pytest.raises(SystemExit):
        table2.parse(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err
