"""How long CoLA's sentences are, so that the benchmark needs the lengths and not the data.

    python benchmarks/table2_lengths.py GLUE TOKENIZER

prints the two tables below anew: `GLUE` is a folder in GLUE's own layout, `TOKENIZER` a folder or Hub id. Those here
are of bert-base-uncased's tokenizer, with [CLS] and [SEP]. The other families cut words a little differently; one
table for all keeps the work the same, so that only the models differ.
"""

from __future__ import annotations

import argparse

import numpy as np

# Entry n is the number of sentences of n tokens.
TRAIN_COUNTS = (
    *(0, 0, 0, 0, 7, 129, 310, 649, 979, 1154, 1129, 916, 797, 574, 452, 334, 235, 182, 145, 125, 96, 66, 67, 66),
    *(41, 26, 21, 17, 6, 8, 6, 1, 8, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1),
)
VALIDATION_COUNTS = (
    *(0, 0, 0, 0, 0, 19, 55, 78, 108, 136, 133, 99, 84, 65, 47, 42, 34, 27, 17, 25, 19, 8, 11, 9),
    *(4, 2, 0, 4, 3, 6, 1, 1, 1, 3, 0, 2),
)


def lengths_of(counts: tuple[int, ...]) -> list[int]:
    """Spell a table out.

    Args:
        counts: entry n is the number of sentences of n tokens.

    Returns:
        One length per sentence, in tokens, the shortest first.
    """
    return [length for length, count in enumerate(counts) for _ in range(count)]


def count_lengths(glue: str, tokenizer: str) -> dict[str, list[int]]:
    """Count the tokens of CoLA's sentences.

    Args:
        glue: folder in GLUE's own layout.
        tokenizer: folder or Hub id of a model.

    Returns:
        For `train` and `validation` the table.
    """
    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.batches import tokenise
    from kdlora.data.load import load_splits
    from kdlora.models.checkpoints import open_source, read_tokenizer

    splits = load_splits(TaskConfig(name="cola"), DataConfig(path=glue))
    own = read_tokenizer(open_source(tokenizer, None, False))
    rows = {"train": splits.train, "validation": splits.validation}
    return {name: np.bincount(tokenise(split, own, 512).dataset["length"]).tolist() for name, split in rows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", metavar="GLUE")
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    arguments = parser.parse_args()
    for split_name, table in count_lengths(arguments.glue, arguments.tokenizer).items():
        print(f"{split_name}: {tuple(table)}")
