"""Time of a forward pass, as a record tells it."""

import time

from datasets import Dataset

import tiny
from kdlora.experiment.scoring import measure_latency, time_calls
from kdlora.models.encoders import load_encoder


def test_times_are_in_milliseconds_after_warm_up():
    """The first calls pay for allocation; seconds taken for milliseconds would look splendid."""
    calls: list[int] = []

    def work(value: int) -> None:
        calls.append(value)
        time.sleep(0.1 if len(calls) <= 5 else 0.004)

    p50, p95 = time_calls(work, [1, 2, 3], 6, 10.0)
    assert 4 <= p50 <= p95 < 60
    assert calls == [1, 2, 3, 1, 2, 1, 2, 3, 1, 2, 3]
    assert time_calls(lambda _: time.sleep(0.02), [0], 50, 0.01)[0] >= 20


def test_latency_of_a_model_on_real_rows(tiny_model_folder):
    """Padding to the maximum or a model in training mode would time something that nobody runs.

    A run whose `max_length` exceeded the model's positions died after its training, when it was timed.
    """
    encoder = load_encoder(str(tiny_model_folder("bert")), tiny.task(), seed=0)
    model, tokenizer = encoder.model.train(), encoder.tokenizer
    shapes: list[tuple[int, ...]] = []

    def watch(module: object, arguments: object, named: dict) -> None:
        assert not model.training
        shapes.append(tuple(named["input_ids"].shape))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    texts = {"text": ["good film", "bad", "a wonderful story " * 60], "text_pair": ["x", "y", "z"]}
    rows = Dataset.from_dict(texts)
    found = measure_latency(model, tokenizer, rows, max_length=16, batch_sizes=(1, 4), repeats=3)
    assert [one.batch_size for one in found] == [1, 4]
    assert all(0 < one.p50_ms <= one.p95_ms and one.threads >= 1 for one in found)
    assert {shape[0] for shape in shapes} == {1, 4}
    assert max(shape[1] for shape in shapes) == 16
    assert min(shape[1] for shape in shapes) < 16
    assert model.training
    measure_latency(model, tokenizer, rows, max_length=512, batch_sizes=(1,), repeats=3)
    assert max(shape[1] for shape in shapes) == tokenizer.model_max_length < 512
