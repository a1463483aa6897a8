"""Rows of a file: JSON lines (plain, gzip, zstd), Parquet, Arrow and text, from any row on.

JSON is read a line at a time and Parquet a row group at a time, by pyarrow, which inflates and checks gzip and zstd
too. Rows that were read already are passed over unparsed: whole row groups of Parquet, and lines of JSON, which are
only inflated and counted. Memory: one line, or one row group's column of one file.

Rejected: ``datasets``' own readers. They stop at the first malformed line of a block without saying which, cannot go on
behind it, and decode a row at a time into Python objects at several times the cost. (``datasets`` says which files a
data set of the Hub consists of: ``pipeline.corpus.hub``.)
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.documents import Flaw
from storage.errors import InputError

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
_BUFFER_BYTES = 1 << 20
_INFLATED_BYTES = 1 << 12  # at a time: what came before a break in the last of them is lost with it
_LONG_LINE_BYTES = 1 << 20
_ROWS_AT_ONCE = 64  # made Python objects together

Read = Callable[[Path, str, int], Iterator[tuple[int, Any]]]
"""(file, field, rows to pass over) -> (number of the row from 1, its value or a ``Flaw``)."""


class Format(NamedTuple):
    """How a kind of file is read, and what a row of it is called."""

    read: Read
    unit: str


def format_of(name: str) -> Format:
    """The format of a file by its name's ending.

    Raises:
        InputError: a kind of file that is not read.
    """
    for suffix, found in FORMATS.items():
        if name.endswith(suffix):
            return found
    raise InputError("not a kind of file that is read", where=name, expected=", ".join(FORMATS))


def _json_lines(path: Path, field: str, first: int) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open(path) as lines:
            while line := lines.readline():
                number += 1
                if number > first and not line.isspace():
                    box = [line.removeprefix(codecs.BOM_UTF8) if number == 1 else line]
                    del line  # it may be long: nothing holds it, or its text, longer than it takes to parse it
                    yield number, _json_value(box, field)
    except OSError as error:
        if number >= first:
            yield number + 1, _broken(error)


def _json_value(box: list[bytes], field: str) -> Any:
    """What a field of a line holds; the line is taken out of its box."""
    row = _parsed(box)
    if isinstance(row, Flaw):
        return row
    if not isinstance(row, dict):
        return Flaw("malformed line", type(row).__name__, "a JSON object a line")
    values = cast("dict[str, Any]", row)
    return values[field] if field in values else Flaw("missing field", ", ".join(values)[:80], field)


def _parsed(box: list[bytes]) -> Any:
    """A line's value, or the flaw that keeps it from having one.

    By ``orjson``, which takes a seventh of the time; the standard library says what a line is that it refuses, and has
    the long ones, of which it holds one copy fewer.
    """
    if len(box[0]) <= _LONG_LINE_BYTES:
        try:
            return orjson.loads(box[0])
        except orjson.JSONDecodeError:
            pass
    return _parsed_plainly(box)


def _parsed_plainly(box: list[bytes]) -> Any:
    try:
        text = box.pop().decode()
    except UnicodeDecodeError as error:
        return Flaw("invalid UTF-8", str(error))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Flaw("malformed line", str(error), "a JSON object a line")


def _parquet(path: Path, field: str, first: int) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        file = pq.ParquetFile(path, memory_map=True)
        _check_column(path, file.schema_arrow, field)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= first:
                row += rows
                continue
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[field]):
                for value in _values(batch.column(0)):
                    row += 1
                    if row > first:
                        yield row, value
    except (OSError, pa.ArrowException) as error:
        if row >= first:
            yield row + 1, _broken(error)


def _arrow(path: Path, field: str, first: int) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        for batch in _record_batches(path):
            _check_column(path, batch.schema, field)
            column = _within_its_buffers(batch.column(field))
            passed = min(max(first - row, 0), len(column))
            row += passed
            for start in range(passed, len(column), _ROWS_AT_ONCE):
                for value in _values(column.slice(start, _ROWS_AT_ONCE)):
                    row += 1
                    yield row, value
    except (OSError, pa.ArrowException) as error:
        if row >= first:
            yield row + 1, _broken(error)


def _record_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Of an IPC file, or of a stream, which is what ``Dataset.save_to_disk`` writes."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if not is_file:
            yield from pa.ipc.open_stream(source)
            return
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _within_its_buffers(column: pa.Array) -> pa.Array:
    """A column of an Arrow file, checked: Arrow believes lengths and offsets, and would read whatever lies there.

    Of strings the bytes, as which ones are UTF-8 is looked at row by row.
    """
    if column.type in _BYTES:
        column = column.view(_BYTES[column.type])
    column.validate(full=True)
    return column


def _text(path: Path, field: str, first: int) -> Iterator[tuple[int, Any]]:  # noqa: ARG001 - it has no fields
    if first == 0:
        try:
            yield 1, path.read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            yield 1, _broken(error)


def _open(path: Path) -> BinaryIO:
    codec = _CODECS.get(path.suffix)
    if codec is None:
        return path.open("rb", buffering=_BUFFER_BYTES)
    inflated = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", inflated), _INFLATED_BYTES))


def _values(column: pa.Array) -> Iterator[Any]:
    """Of strings the bytes, which need not be UTF-8; of lists arrays; of anything else Python's own."""
    if pa.types.is_dictionary(column.type):
        column = cast("pa.DictionaryArray", column).dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from (item.values.to_numpy(zero_copy_only=False) if item.is_valid else None for item in column)
    else:
        yield from column.to_pylist()


def _check_column(path: Path, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise InputError("no such field", where=path, found=", ".join(schema.names), expected=field)


def _broken(error: Exception) -> Flaw:
    return Flaw("broken file", str(error))


FORMATS = {
    ".jsonl": Format(_json_lines, "line"),
    ".jsonl.gz": Format(_json_lines, "line"),
    ".jsonl.zst": Format(_json_lines, "line"),
    ".json": Format(_json_lines, "line"),
    ".json.gz": Format(_json_lines, "line"),
    ".json.zst": Format(_json_lines, "line"),
    ".parquet": Format(_parquet, "row"),
    ".arrow": Format(_arrow, "row"),
    ".txt": Format(_text, "row"),
}
"""By the ending of a file's name. A ``.json`` holds an object a line too, as those of the Hub do."""
