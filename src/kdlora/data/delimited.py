"""CSV and TSV, as text columns; a ragged, quoted or broken row is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from kdlora.data.faults import encoding_error, refuse_duplicates
from kdlora.errors import DataError

_BLOCK_BYTES = 8 << 20
_QUOTED_FIELD = r'^"([^"]|"")*""([^"]|"")*"$'  # enclosed, with a doubled quote inside: only CSV quoting writes this
_ENCLOSED_FIELD = r'(?s)^".*"$'


@dataclass(frozen=True)
class Dialect:
    """How the rows of a file are written.

    Attributes:
        delimiter: between two columns.
        quoted: whether quotes enclose a value, as in CSV; else a quote is a character.
        header: the columns of a file without a header line.
    """

    delimiter: str
    quoted: bool
    header: tuple[str, ...] = ()


def choose_dialect(file: Path, header: tuple[str, ...] = ()) -> Dialect:
    """Choose by extension: `.tsv` is never quoted; `.csv` is, with the delimiter that its header uses.

    Args:
        file: a `.csv` or `.tsv` file.
        header: columns, where the file has no header line.
    """
    if file.suffix.lower() == ".tsv":
        return Dialect("\t", quoted=False, header=header)
    with file.open("rb") as stream:
        first_line = stream.readline(_BLOCK_BYTES)
    found = [delimiter for delimiter in (",", "\t", ";") if delimiter.encode() in first_line]
    return Dialect(found[0] if found else ",", quoted=True, header=header)


def delimited_columns(file: Path, dialect: Dialect) -> tuple[str, ...]:
    """Read the header.

    Args:
        file: a CSV or TSV file.
        dialect: how it is written.

    Raises:
        DataError: no header, broken UTF-8 in the first 8 MiB, two columns of one name, or a TSV header in quotes.
    """
    if fault := encoding_error(file, _BLOCK_BYTES):
        raise fault
    if dialect.header:
        return dialect.header
    try:
        reader = _open(file, dialect, (), lambda _: "skip")
        columns = tuple(reader.schema.names)
    except UnicodeDecodeError as error:
        raise encoding_error(file) or DataError(f"{file}: the header is not UTF-8 ({error})") from None
    except pa.ArrowInvalid as error:
        if not file.read_bytes().strip():
            raise DataError(f"{file} holds only blank lines; expected a header and examples") from None
        if "Empty CSV" in str(error):  # a header without a line break
            raise DataError(f"{file} has a header but no rows; expected one example per row") from None
        raise encoding_error(file) or DataError(f"{file}: the header cannot be read ({error})") from None
    refuse_duplicates(str(file), columns)
    for column in columns:
        if not dialect.quoted and len(column) > 1 and column[0] == column[-1] == '"':
            raise DataError(f"{file}: the header has quotes around {column}. {_NO_QUOTING}")
    return columns


def delimited_batches(
    file: Path, dialect: Dialect, columns: Sequence[str], wanted: Sequence[str], ragged: list[int] | None
) -> Iterator[pa.RecordBatch]:
    """Read some columns, all as text.

    Args:
        file: a CSV or TSV file.
        dialect: how it is written.
        columns: all columns of the file.
        wanted: the columns to read.
        ragged: gathers the row numbers (from 0) of rows that do not have one value per column, which are then
            left out; None makes them an error.

    Raises:
        DataError: a ragged row, CSV quoting in a TSV file, a quote that is never closed, or broken UTF-8.
    """
    faults: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> str:
        faults.append(row)
        return "skip"

    first_row = 1 if dialect.header else 2  # the reader counts the header as row 1
    read = list(dict.fromkeys([*wanted, columns[-1]]))  # the last column shows whether a quote was left open
    last: pa.RecordBatch | None = None
    try:
        for batch in _open(file, dialect, columns, note, read):
            if faults and ragged is None:
                raise _ragged_error(file, dialect, faults[0], first_row)
            if not dialect.quoted and ragged is None:
                _refuse_quoting(file, batch.select(list(wanted)))
            last = batch if batch.num_rows else last
            yield batch.select(list(wanted))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise encoding_error(file) or DataError(f"{file} cannot be read: {error}") from None
    if faults and ragged is None:
        raise _ragged_error(file, dialect, faults[0], first_row)
    if ragged is not None:
        ragged.extend(row.number - first_row for row in faults)
    if dialect.quoted and last is not None:
        _refuse_open_quote(file, last.column(columns[-1])[-1].as_py())


_NO_QUOTING = (
    "A .tsv file is read without quoting: a quote is a character, and a text holds no tab or line break. "
    "Write the file without quotes, or give it the extension .csv, which is read with quoting"
)


def _open(
    file: Path, dialect: Dialect, columns: Sequence[str], note: object, read: Sequence[str] = ()
) -> pacsv.CSVStreamingReader:
    return pacsv.open_csv(
        file,
        # One thread, or the handler of ragged rows gets no row numbers.
        read_options=pacsv.ReadOptions(
            use_threads=False, block_size=_BLOCK_BYTES, column_names=list(dialect.header) or None
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=dialect.delimiter,
            quote_char='"' if dialect.quoted else False,
            newlines_in_values=dialect.quoted,
            invalid_row_handler=note,
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={column: pa.string() for column in columns},
            include_columns=list(read) or None,
            strings_can_be_null=False,
        ),
    )


def _ragged_error(file: Path, dialect: Dialect, row: pacsv.InvalidRow, first_row: int) -> DataError:
    advice = "Put quotes around a text that holds the delimiter" if dialect.quoted else _NO_QUOTING
    text = row.text if len(row.text) <= 60 else row.text[:60] + "..."
    return DataError(
        f"{file}, row {row.number - first_row + 1}: {row.actual_columns} columns where {row.expected_columns} are "
        f"expected (delimiter {dialect.delimiter!r}): {text!r}. {advice}"
    )


def _refuse_quoting(file: Path, batch: pa.RecordBatch) -> None:
    """CSV quoting in a TSV file shows in doubled quotes, or in quotes around every value."""
    for column in batch.columns:
        quoted = pc.match_substring_regex(column, _QUOTED_FIELD)
        enclosed = batch.num_rows > 1 and pc.all(pc.match_substring_regex(column, _ENCLOSED_FIELD)).as_py()
        if enclosed or pc.any(quoted).as_py():
            value = column[0 if enclosed else pc.index(quoted, True).as_py()].as_py()
            raise DataError(f"{file} has values in CSV quotes, such as {value[:60]}. {_NO_QUOTING}")


def _refuse_open_quote(file: Path, last_value: str) -> None:
    """A quote that is never closed swallows the rest of the file into the last value of the last row."""
    if "\n" not in last_value and "\r" not in last_value:
        return
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        tail = stream.read().rstrip(b"\r\n")
    if not tail.endswith(b'"'):
        raise DataError(
            f"{file}: a quote is opened and never closed; it swallows the end of the file from {last_value[:60]!r} on. "
            "Close it, or double a quote inside a text"
        )
