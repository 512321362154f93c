"""Own data with several labels a text: write a file, distil, predict.

python examples/multi_label.py
"""

import csv
import random
from pathlib import Path

from kdlora import Classifier, build_config, run_experiment

SIGNS = {
    "battery": ["it dies before noon", "the battery holds for two days", "it charges slowly"],
    "screen": ["the screen is dim", "colours look wonderful", "it scratches at once"],
    "price": ["far too expensive", "a bargain", "I expected more for the money"],
    "support": ["nobody answers the phone", "the shop replaced it at once", "they were rude"],
}


def write_reviews(path: Path, count: int, seed: int) -> None:
    """Invent reviews that speak of one to three of the topics."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", *SIGNS])
        for _ in range(count):
            topics = draw.sample(list(SIGNS), draw.randint(1, 3))
            text = ", and ".join(draw.choice(SIGNS[topic]) for topic in topics)
            rows.writerow([text, *(int(topic in topics) for topic in SIGNS)])


write_reviews(Path("phones.csv"), 400, seed=0)
write_reviews(Path("phones-test.csv"), 200, seed=1)
config = build_config(
    {
        "task": {"text": "review", "label": list(SIGNS)},
        "data": {"train": "phones.csv", "test": "phones-test.csv"},
        "teacher": {"model": "sentence-transformers/all-MiniLM-L6-v2", "train": {"epochs": 3, "learning_rate": 1e-4}},
        "student": {"from_teacher_layers": [0, 3], "train": {"epochs": 5, "learning_rate": 2e-3}},
        "run": {"arms": ["fft", "kd-lora", "student-lora"], "seeds": [0]},
        "export": {"benchmark": False},
    }
)
result = run_experiment(config, "runs/phones")
classify = Classifier.load(result.layout.student)
for answer in classify.predict(["it dies before noon, and nobody answers the phone", "a bargain"]):
    print(answer.label, {name: round(value, 2) for name, value in answer.probabilities.items()})
