"""Turn texts into padded arrays with `tokenizers` alone, the same way for every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlora.deploy.folder import CONFIG_FILE, TOKENIZER, ModelFolder
from kdlora.errors import ArtifactError, DataError, KdLoraError, ModelError, first_line
from kdlora.foreign import panics_as_errors

if TYPE_CHECKING:
    from tokenizers import Encoding

Text = str | tuple[str, str]
INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Names of the arrays that a text becomes, and where an encoding has them."""

BATCH_SIZE = 32
BATCH_TOKENS = 1024
"""Most padded tokens that one forward pass holds: enough to keep the cores busy, and memory small."""


def most_characters(max_length: int) -> int:
    """Say how much of a text is worth reading: what lies beyond would be truncated anyway."""
    return max(20_000, 100 * max_length)


class TextEncoder:
    """A tokenizer with fixed truncation; it is never changed after construction, so threads may share it."""

    def __init__(self, folder: ModelFolder, input_names: Sequence[str], tokenizer_json: str) -> None:
        self.input_names = tuple(input_names)
        if "input_ids" not in self.input_names:
            raise ModelError(f"{folder.path}: the model does not take input_ids, so it reads no text.")
        self.max_length = folder.max_length
        self.most_characters = most_characters(folder.max_length)
        self._path = folder.path / TOKENIZER
        try:
            from tokenizers import Tokenizer

            with panics_as_errors():
                self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except ImportError:
            raise KdLoraError("tokenizers is not installed: pip install 'kdlora[serve]'") from None
        except Exception as error:  # the library raises a bare one for a damaged file
            raise ArtifactError(f"{self._path}: the tokenizer cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(folder.max_length, strategy="longest_first")
        self._pad = _pad_token_id(folder, self._tokenizer)

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """Tokenise texts that `check_text` has passed.

        A text is first cut to 100 characters a token of `max_length` (at least 20,000): what lies beyond would
        be truncated anyway, and ten megabytes in one row must not be tokenised to find that out.
        """
        most = self.most_characters
        cut = [text[:most] if isinstance(text, str) else (text[0][:most], text[1][:most]) for text in texts]
        try:
            with panics_as_errors():
                encodings: list[Encoding] = self._tokenizer.encode_batch(cut)
        except Exception as error:
            raise ArtifactError(f"{self._path}: the tokenizer fails on a text: {first_line(error)}") from None
        return encodings

    def batches(
        self, texts: Sequence[Text], batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Give the arrays that the model takes, texts of like length together, and which texts these are."""
        encodings = self.encode(texts)
        for rows in length_batches([len(encoding) for encoding in encodings], batch_size, batch_tokens):
            yield rows, self.pad([encodings[row] for row in rows])

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """Pad encodings on the right into the arrays that the model takes."""
        shape = len(encodings), max(map(len, encodings))
        filling = {"input_ids": self._pad}
        arrays = {name: np.full(shape, filling.get(name, 0), dtype=np.int64) for name in self.input_names}
        for row, encoding in enumerate(encodings):
            for name, array in arrays.items():
                array[row, : len(encoding)] = getattr(encoding, INPUTS[name])
        return arrays


def check_text(text: Any, where: str) -> Text:
    """Refuse what cannot be classified, rather than give it the label of an empty string."""
    if isinstance(text, tuple | list):
        if len(text) != 2:
            raise DataError(f"{where}: expected a text or a pair of texts, got {len(text)} values.")
        first, second = (_check_one(part, f"{where}, text {number}") for number, part in enumerate(text, 1))
        return first, second
    return _check_one(text, where)


def _check_one(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got {type(text).__name__} ({text!r:.40}).")
    if not text or text.isspace():
        raise DataError(f"{where}: the text is empty. Remove the row or give it a text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text is not valid UTF-8 (at character {error.start}).") from None
    return text


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Group rows of like length, so that little padding is computed."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for row in order:
        current = batches[-1] if batches else None
        if current is None or len(current) >= batch_size or (len(current) + 1) * lengths[row] > batch_tokens:
            batches.append([row])
        else:
            current.append(row)
    return batches


def spread(texts: Sequence[Text], count: int) -> list[Text]:
    """Take some texts, evenly spaced."""
    return [texts[row] for row in np.linspace(0, len(texts) - 1, min(count, len(texts)), dtype=int)]


def _pad_token_id(folder: ModelFolder, tokenizer: Any) -> int:
    """Find the padding id; its value hardly matters, as padding is masked, but it must be in the vocabulary."""
    found = tokenizer.token_to_id(folder.pad_token) if folder.pad_token is not None else None
    if found is None:
        found = max(0, folder.pad_token_id or 0)
    if tokenizer.id_to_token(found) is None:
        raise ModelError(f"{folder.path / CONFIG_FILE}: pad_token_id {found} is no token of {TOKENIZER}.")
    return int(found)
