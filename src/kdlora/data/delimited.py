"""CSV and TSV, as text columns; a ragged, quoted or broken row is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from kdlora.data.faults import encoding_error, refuse_duplicates
from kdlora.data.lines import choose_delimiter
from kdlora.errors import DataError

_BLOCK_BYTES = 8 << 20
_QUOTED_FIELD = r'^"([^"]|"")*""([^"]|"")*"$'  # enclosed, with a doubled quote inside: only CSV quoting writes this
_ENCLOSED_FIELD = r'(?s)^".*"$'
_NO_QUOTING = (
    "A .tsv file is read without quoting: a quote is a character, and a text holds no tab or line break. "
    "Write the file without quotes, or give it the extension .csv, which is read with quoting"
)


@dataclass(frozen=True)
class Delimited:
    """A file of text columns: CSV, quoted, with the delimiter of its header, or TSV, never quoted."""

    path: Path
    header: tuple[str, ...]
    drop_ragged: bool

    @cached_property
    def quoted(self) -> bool:
        """Whether quotes enclose a value; else a quote is a character."""
        return self.path.suffix.lower() == ".csv"

    @cached_property
    def delimiter(self) -> str:
        """What stands between two columns."""
        if not self.quoted:
            return "\t"
        with self.path.open("rb") as stream:
            return choose_delimiter(stream.readline(_BLOCK_BYTES).decode("utf-8", "replace"))

    def columns(self) -> tuple[str, ...]:
        """Read the header."""
        if fault := encoding_error(self.path, _BLOCK_BYTES):
            raise fault
        if self.header:
            return self.header
        try:
            columns = tuple(self._stream((), (), lambda _: "skip").schema.names)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            if not self.path.read_bytes().strip():
                raise DataError(f"{self.path} holds only blank lines; expected a header and examples") from None
            if "Empty CSV" in str(error):  # a header without a line break
                raise DataError(f"{self.path} has a header but no rows; expected one example per row") from None
            self._refuse("the header cannot be read", error)
        refuse_duplicates(str(self.path), columns)
        for column in columns:
            if not self.quoted and len(column) > 1 and column[0] == column[-1] == '"':
                raise DataError(f"{self.path}: the header has quotes around {column}. {_NO_QUOTING}")
        return columns

    def batches(self, columns: tuple[str, ...], wanted: list[str], ragged: list[int]) -> Iterator[pa.RecordBatch]:
        """Read some columns; `ragged` gathers the numbers of the rows that are left out, where any may be."""
        faults: list[pacsv.InvalidRow] = []

        def note(row: pacsv.InvalidRow) -> str:
            faults.append(row)
            return "skip" if self.drop_ragged else "error"

        read = list(dict.fromkeys([*wanted, columns[-1]]))  # the last column shows whether a quote was left open
        last = ""
        try:
            for batch in self._stream(columns, read, note):
                self._refuse_quoting(batch.select(wanted))
                last = batch.column(columns[-1])[-1].as_py() if batch.num_rows else last
                yield batch.select(wanted)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            if faults and not self.drop_ragged:
                raise self._ragged_error(faults[0]) from None
            self._refuse("it cannot be read", error)
        ragged += [row.number - self._first_row for row in faults]
        if self.quoted:
            self._refuse_open_quote(last)

    def _stream(self, columns: Sequence[str], read: Sequence[str], note: object) -> pacsv.CSVStreamingReader:
        return pacsv.open_csv(
            self.path,
            # One thread, or the handler of ragged rows gets no row numbers.
            read_options=pacsv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=list(self.header) or None
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
                invalid_row_handler=note,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={column: pa.string() for column in columns},
                include_columns=list(read) or None,
                strings_can_be_null=False,
            ),
        )

    @property
    def _first_row(self) -> int:
        return 1 if self.header else 2  # pyarrow counts the header as row 1

    def _refuse(self, what: str, error: Exception) -> NoReturn:
        raise encoding_error(self.path) or DataError(f"{self.path}: {what} ({error})") from None

    def _ragged_error(self, row: pacsv.InvalidRow) -> DataError:
        advice = "Put quotes around a text that holds the delimiter" if self.quoted else _NO_QUOTING
        text = row.text if len(row.text) <= 60 else row.text[:60] + "..."
        return DataError(
            f"{self.path}, row {row.number - self._first_row + 1}: {row.actual_columns} columns where "
            f"{row.expected_columns} are expected (delimiter {self.delimiter!r}): {text!r}. {advice}"
        )

    def _refuse_quoting(self, batch: pa.RecordBatch) -> None:
        """CSV quoting in a TSV file shows in doubled quotes, or in quotes around every value."""
        for column in () if self.quoted or self.drop_ragged else batch.columns:
            quoted = pc.match_substring_regex(column, _QUOTED_FIELD)
            enclosed = batch.num_rows > 1 and pc.all(pc.match_substring_regex(column, _ENCLOSED_FIELD)).as_py()
            if enclosed or pc.any(quoted).as_py():
                value = column[0 if enclosed else pc.index(quoted, True).as_py()].as_py()
                raise DataError(f"{self.path} has values in CSV quotes, such as {value[:60]}. {_NO_QUOTING}")

    def _refuse_open_quote(self, last_value: str) -> None:
        """A quote that is never closed swallows the rest of the file into the last value of the last row."""
        if "\n" not in last_value and "\r" not in last_value:
            return
        with self.path.open("rb") as stream:
            stream.seek(max(0, self.path.stat().st_size - 4096))
            tail = stream.read().rstrip(b"\r\n")
        if not tail.endswith(b'"'):
            raise DataError(
                f"{self.path}: a quote is opened and never closed; it swallows the end of the file from "
                f"{last_value[:60]!r} on. Close it, or double a quote inside a text"
            )
