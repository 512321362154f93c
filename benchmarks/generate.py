"""Make texts like those of a file, for `data.unlabelled` where there are none of one's own.

    python benchmarks/generate.py --model DIR --texts train.csv --column text --number 2700 --to generated.csv

Without --model, two texts of the file in a row are a new one. With it, a language model writes: each prompt is a list
of some texts of the file, drawn at random, and the model goes on with it. A line that is a text of the file, was
written before, or is shorter or longer than nearly all texts of the file is left out, and counted.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import command_line, tell_machine
from transformers import AutoModelForCausalLM, AutoTokenizer

SHOWN = 8
"""Texts in a prompt."""
AT_ONCE = 64
"""Prompts in a forward pass."""
WRITTEN = 5
"""Texts that a prompt may give: so many times the median length of the shown ones, in tokens."""


class Writer:
    """A causal language model with its tokenizer."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Load it from a folder."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def go_on(self, lists: list[list[str]]) -> list[str]:
        """Continue each list of texts; the last line of each is cut by the limit of tokens, and left out."""
        prompts = ["\n".join(f"- {text}" for text in shown) + "\n-" for shown in lists]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        shown = self.tokenizer([text for texts in lists for text in texts]).input_ids
        median = int(np.median([len(ids) for ids in shown]))
        with torch.inference_mode():
            written = self.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_p=0.95, max_new_tokens=WRITTEN * (median + 2)
            )
        answers = self.tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [line.strip().removeprefix("-").strip() for answer in answers for line in answer.split("\n")[:-1]]


def write_texts(writer: Writer, texts: list[str], number: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Collect so many new texts; also count the lines by what became of them."""
    draw, lengths = np.random.default_rng(seed), np.array([len(text) for text in texts])
    shortest, longest = np.quantile(lengths, [0.01, 0.99])
    seen, kept, fates = {text.casefold() for text in texts}, list[str](), Counter[str]()
    while len(kept) < number:
        for line in writer.go_on([list(draw.choice(texts, SHOWN, replace=False)) for _ in range(AT_ONCE)]):
            fate = "kept"
            if line.casefold() in seen:
                fate = "known or written before"
            elif not shortest <= len(line) <= longest:
                fate = "too short or too long"
            fates[fate] += 1
            if fate == "kept":
                seen.add(line.casefold())
                kept.append(line)
    return kept[:number], fates


def main() -> int:
    """Write the file, and print how fast it went."""
    parser = command_line(__doc__, "texts", "to")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--column", required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    texts = pd.read_csv(options.texts, dtype=str, keep_default_na=False)[options.column].tolist()
    start = time.perf_counter()
    if options.model is None:
        draw, fates = np.random.default_rng(options.seed), Counter[str]()
        kept = [" ".join(draw.choice(texts, 2, replace=False)) for _ in range(options.number)]
    else:
        kept, fates = write_texts(Writer(options.model, options.dtype), texts, options.number, options.seed)
    seconds = time.perf_counter() - start
    pd.DataFrame({options.column: kept}).to_csv(options.to, index=False)
    print(json.dumps({"texts": len(kept), "lines": fates, "seconds": round(seconds)}))
    tell_machine()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
