"""What a language model is to be asked, and within which limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kdlora.errors import ConfigError

Protocol = Literal["chat", "completions"]
Selection = Literal["random", "uncertain", "diverse"]
Codes = Literal["letters", "names"]
DEFAULT_URL = "https://api.openai.com/v1"
LEAST_AUDIT_ROWS = 40
"""Half of them fit the temperature, which takes 20."""
_BOUNDS = {
    **dict.fromkeys(("shots", "votes", "temperature", "price_in", "price_out"), (0, math.inf)),
    **dict.fromkeys(("answer_tokens", "concurrency", "rows", "max_requests", "max_tokens"), (1, math.inf)),
    "seed": (0, 2**32 - 1),
    "top_logprobs": (2, 20),  # what servers show
    "audit": (LEAST_AUDIT_ROWS, math.inf),
    "max_cost": (1e-6, math.inf),
    "timeout": (0.001, math.inf),
}


@dataclass(frozen=True)
class AskSettings:
    """How a language model is asked.

    Attributes:
        model: its name on the server.
        base_url: address of the server, ending in `/v1`. Default: `OPENAI_BASE_URL`, else OpenAI's.
        key_variable: environment variable that holds the key. Your own server may need none.
        protocol: interface of the server, `chat` or `completions`.
        prompts: file with a Jinja template. Default: kdlora's. Several prompts are compared on the audited rows.
        labels: label names with descriptions (or empty). Default: the names in the label column.
        text: text column, or the two of a pair.
        label: label column of rows that people labelled.
        codes: what the model answers with, `letters` or `names` of labels. Small models know names better.
        id_column: column with the ids of rows. Without it, the id is the row number from 0.
        shots: labelled rows that each prompt shows as examples.
        seed: seed of all random choices.
        votes: answers per row that are counted, for servers without log-probabilities. 0: none.
        answer_tokens: limit of a vote's tokens. A model that thinks before it answers needs hundreds.
        temperature: sampling temperature of the answers. Default: 0; with votes: 1.
        top_logprobs: likely tokens that the server returns, at most 20. More labels take two steps.
        audit: file of rows that people labelled, or a number of labelled rows to draw.
        unlabelled: file of more texts, without labels. All of them are asked about.
        rows: ask about only this many rows of the data. Default: all.
        select: how these rows are chosen: `random`, `diverse`, or `uncertain` (needs `select_by`).
        select_by: model folder, such as a first student. Rows about which it is unsure are chosen.
        concurrency: number of requests at the same time.
        max_requests: limit of requests, failed ones and earlier calls included.
        max_tokens: limit of tokens, read and written.
        max_cost: limit of money, computed with `price_in` and `price_out`.
        price_in: price of a million tokens read.
        price_out: price of a million tokens written.
        timeout: seconds for one answer.

    Examples:
        >>> settings = AskSettings(model="default", text=("review",), label="sentiment", audit=40)
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    protocol: Protocol = "chat"
    prompts: tuple[str, ...] = ()
    labels: Mapping[str, str] | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    codes: Codes = "letters"
    id_column: str = "id"
    shots: int = 0
    seed: int = 0
    votes: int = 0
    answer_tokens: int = 8
    temperature: float | None = None
    top_logprobs: int = 20
    audit: str | Path | int | None = None
    unlabelled: str | Path | None = None
    rows: int | None = None
    select: Selection = "random"
    select_by: str | None = None
    concurrency: int = 16
    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("text", "prompts"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        labels: Any = self.labels
        if labels is not None and not isinstance(labels, Mapping):
            object.__setattr__(self, "labels", dict.fromkeys((labels,) if isinstance(labels, str) else labels, ""))
        if odd := [name for name in self.labels or () if not isinstance(name, str)]:
            raise ConfigError(f"labels are names, got {odd[0]!r:.80}; write each as a str")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not (least <= value <= most and value != math.inf):
                above = "" if most == math.inf else f" and at most {most:,}"
                raise ConfigError(f"{name} is at least {least}{above}, got {value}")
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise ConfigError("max_cost needs price_in and price_out, the prices of a million tokens")
        if self.votes > 1 and self.heat == 0:
            raise ConfigError("votes at temperature 0 are one answer, counted several times; leave temperature out")
        for name, kind in (("protocol", Protocol), ("select", Selection), ("codes", Codes)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} is one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if len(self.prompts) > 1 and self.audit is None:
            raise ConfigError("several prompts are compared on rows with labels by people; give them as audit")
        if (self.select == "uncertain") != (self.select_by is not None) or (self.rows is None and self.select_by):
            raise ConfigError("select: uncertain needs select_by, a model folder, and rows; the others take no model")
        if "@" in self.url or "?" in self.url or not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"base_url is http:// or https://, without user and parameters (keys come from the environment); got "
                f"{self.url.split('?')[0]!r}"
            )

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")

    @property
    def heat(self) -> float:
        """Temperature of the answers."""
        return (1.0 if self.votes else 0.0) if self.temperature is None else self.temperature

    def cost(self, read: float, written: float) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (read * self.price_in + written * self.price_out) / 1e6
