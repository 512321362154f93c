"""A sentence-transformers model as the student: a larger one teaches it, and its encoder stays usable.

python examples/sentence_transformer_student.py
"""

import csv
import random
from pathlib import Path

from kdlora import build_config, run_experiment

WORDS = {
    "positive": ["superb", "moving", "charming", "brilliant"],
    "negative": ["dreadful", "boring", "clumsy", "awful"],
}


def write_reviews(path: Path, count: int, seed: int) -> None:
    """Invent film reviews."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(count):
            label = draw.choice(list(WORDS))
            rows.writerow([f"the {draw.choice(['film', 'story', 'plot'])} was {draw.choice(WORDS[label])}", label])


write_reviews(Path("films.csv"), 300, seed=0)
write_reviews(Path("films-validation.csv"), 100, seed=1)
config = build_config(
    {
        "data": {"train": "films.csv", "validation": "films-validation.csv"},
        "teacher": {"model": "sentence-transformers/all-mpnet-base-v2", "train": {"epochs": 2}},
        "student": {"model": "sentence-transformers/paraphrase-MiniLM-L3-v2", "train": {"epochs": 3}},
        "run": {"arms": ["fft", "kd-lora", "student-lora"], "seeds": [0]},
        "export": {"formats": [], "benchmark": False},
    }
)
result = run_experiment(config, "runs/films")
print(result)

# The student is a plain transformers classifier; its encoder still gives token vectors, to be pooled as before.
from transformers import AutoModel, AutoTokenizer  # noqa: E402

encoder = AutoModel.from_pretrained(result.layout.student)
tokenizer = AutoTokenizer.from_pretrained(result.layout.student)
vectors = encoder(**tokenizer(["a superb film"], return_tensors="pt")).last_hidden_state.mean(dim=1)
print(f"a sentence as {vectors.shape[1]} numbers")
