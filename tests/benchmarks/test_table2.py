from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import table2
import table2_models
import torch
from table2_lengths import TRAIN_COUNTS, VALIDATION_COUNTS, lengths_of
from table2_measure import TIMED, Conditions, Timing, batches_to_run, peak_of_training, time_methods, train_steps
from table2_models import SIZES, Size, count_adapted, count_plain, padded_tokens, synthetic_rows, widest_batch
from table2_text import Figures, memory_section, notes_section, parameters_section, time_section

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
def test_sizes_are_the_published_ones(size):
    """A config that drifts (vocabulary, relative positions) would put a model nobody uses into the table."""
    assert count_plain(size).total == PUBLISHED[size.title]


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("size", ALL, ids=lambda size: size.title)
def test_adapters_have_the_size_that_arithmetic_gives(size, rank):
    """Adapters on other layers than query and value would make a wrong table look as wrong as the paper's."""
    layers = 12 if size.title.endswith("base") else 6
    counts = count_adapted(size, rank)
    assert counts.adapter == rank * (768 + 768) * 2 * layers
    assert counts.head == (1538 if size.title == "BERT-base" else 592_130)
    assert counts.trainable == counts.adapter + counts.head
    assert counts.total == PUBLISHED[size.title]


def test_the_paper_is_ten_times_too_high():
    """The figure that the issue names: rank 8, query and value, 12 layers of 768."""
    assert count_adapted(SIZES["bert"][0], 8).adapter == 294_912


def test_lengths_are_those_of_cola():
    """A table with a lost entry would time another set than the paper's 1,043 sentences."""
    assert (len(lengths_of(TRAIN_COUNTS)), len(lengths_of(VALIDATION_COUNTS))) == (8551, 1043)
    assert min(lengths_of(TRAIN_COUNTS)) >= 3, "[CLS], [SEP] and a word"


def test_length_tables_have_one_entry_for_every_sentence(glue_folder):
    """The tables must be of this data, not of another release of CoLA."""
    for name, counts in (("train", TRAIN_COUNTS), ("dev", VALIDATION_COUNTS)):
        path = glue_folder / "CoLA" / f"{name}.tsv"
        if not path.is_file():
            pytest.skip("no CoLA in the GLUE folder")
        assert len(path.read_text(encoding="utf-8").splitlines()) == sum(counts)


def test_memory_is_measured_on_the_widest_batch_of_an_epoch():
    """An ordinary batch would promise a peak that the first long one breaks."""
    widest = widest_batch([5] * 40 + [6] * 40 + [60], batch=8)
    assert max(widest) == 60
    assert len(widest) == 8
    assert padded_tokens(widest) == 8 * 64


def test_all_batches_together_are_the_whole_set():
    """A lost last batch, or a wrong share, would scale the time of a sample wrongly."""
    lengths = lengths_of(VALIDATION_COUNTS)
    whole, share = batches_to_run(lengths, 1)
    assert sorted(length for batch in whole for length in batch) == lengths
    assert share == 1.0
    some, part = batches_to_run(lengths, 8)
    assert part == pytest.approx(sum(map(padded_tokens, some)) / sum(map(padded_tokens, whole)))
    assert 0.05 < part < 0.25


def test_more_groups_than_batches_still_run_one():
    """An empty sample would divide by zero after minutes of work."""
    batches, share = batches_to_run([5] * 10, 100)
    assert len(batches) == 1
    assert share == 1.0


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


@pytest.mark.parametrize("method", ["FFT", "LoRA", "KD-LoRA"])
@pytest.mark.parametrize("family", SIZES)
def test_every_family_trains_by_every_method(family, method):
    """A family that fails at its real size would fail after ten minutes."""
    size = shrunk(SIZES[family][method == "KD-LoRA"])
    assert train_steps(size, method, [5, 9, 12, 7], 2, Conditions("fp32", rank=2)) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory figures come from Linux' /proc")
def test_peak_holds_weights_gradients_and_optimiser_state():
    """A peak read before Adam has its state, or of the parent's memory, would flatter full fine-tuning."""
    size = shrunk(SIZES["bert"][0], vocabulary=500_000)
    weights = 4 * count_plain(size).total
    full = peak_of_training(size, "FFT", [6] * 4, 2, Conditions("fp32", rank=2))
    adapted = peak_of_training(size, "LoRA", [6] * 4, 2, Conditions("fp32", rank=2))
    assert full is not None
    assert adapted is not None
    assert 4 * weights < full < 6 * weights + 100e6
    assert weights < adapted < full - 2.5 * weights


def test_every_method_is_timed_in_every_round():
    """A method that drops out of a round, or a warm-up that is counted, would bend a mean."""
    pair = (shrunk(SIZES["roberta"][0]), shrunk(SIZES["roberta"][1]))
    timing = time_methods(pair, [5] * 40 + [12] * 40, 2, 1, Conditions("fp32", rank=2))
    assert list(timing.seconds) == list(TIMED)
    assert all(len(values) == 2 and min(values) > 0 for values in timing.seconds.values())
    assert timing.share == 1.0
    assert timing.threads == torch.get_num_threads()
    assert 0 < timing.occupied < 1.5


def figures_of(family: str) -> Figures:
    figures = table2.count_family(SIZES[family])
    figures.memory["fp32"] = {"FFT": 3_000_000_000, "LoRA": 1_000_000_000, "KD-LoRA": None}
    figures.timing["fp32"] = Timing({name: [8.0, 10.0] for name in TIMED[:3]} | {TIMED[3]: [4.0, 5.0]}, 0.5, 1, 0.97)
    return figures


def test_paper_and_ours_stand_in_one_row():
    """Swapped families or methods would set our figures beside those of another model."""
    results = {family: figures_of(family) for family in SIZES}
    text = parameters_section(results)
    assert "| BERT-base | LoRA | 0.295 / 0.590 / 1.180 / 2.359 | 0.002 | 2.9 / 5.9 / 11.8 / 23.6 |" in text
    assert "| DistilBERT | KD-LoRA | 0.147 / 0.295 / 0.590 / 1.180 | 0.592 | 1.2 / 2.4 / 4.7 / 9.4 |" in text
    assert "| RoBERTa-base → DistilRoBERTa | 124.65 → 82.12 | 34.1% | 125 → 82 | 40% |" in text
    assert "| DeBERTaV3-base | FFT | 3000 | 2213 | 2234.5 |" in memory_section(results)
    assert "| DistilRoBERTa | KD-LoRA, merged | 4.500 ± 0.707 | 50.0% | 4.44 | 38.4% |" in time_section(results)


def test_what_could_not_be_measured_is_a_dash():
    """A system without /proc must not print None or zero bytes."""
    text = memory_section({"bert": figures_of("bert")})
    assert "| DistilBERT | KD-LoRA | – | 274 | 296.8 |" in text
    assert "None" not in text


def test_notes_take_their_figures_from_the_families_shown():
    """A sentence about all families under a table of one would be false."""
    text = notes_section({"bert": figures_of("bert")})
    assert "states 9.8 times as much for LoRA and 8.1 times for KD-LoRA" in text
    assert "BERT-base trains 0.30M with LoRA, DistilBERT 0.74M" in text
    assert "its own table gives 12%" in text
    assert "RoBERTa-base" not in text


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
    assert "one warm-up and 1 timed run(s) over 1 of its batches" in printed
    assert "None" not in printed
    assert "nan" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--families", "gpt"], "invalid choice: 'gpt'"),
        (["--steps", "0"], "expected a whole number from 1, got 0"),
        (["--runs", "-3"], "expected a whole number from 1, got -3"),
        (["--every", "x"], "invalid"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, said, capsys):
    """Zero steps would print the peak of no training at all."""
    with pytest.raises(SystemExit) as ended:
        table2.parse(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(capsys):
    """CPU figures under the heading of a GPU."""
    with pytest.raises(SystemExit):
        table2.parse(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err
