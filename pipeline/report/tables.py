"""Tables of a result as the report shows and ships them: whole as Parquet, and the first rows on the page.

The rest of a table comes to the page when a reader wants to sort or search it, from a data file of its columns; there
is CSV beside it. Tables of features are one Parquet file, joined; longer ones than anyone reads on a page are shipped
as Parquet alone. What the feature explorer shows of each feature (texts, logits, histograms...) is as large as all else
together and stands there and in the analysis' artifact, not here once more.

A table with columns ``before``, ``token`` and ``after`` holds text from the corpus around a token; the page shows the
three as one passage. Lists are in the files alone. CSV cells of text that a spreadsheet would run as a formula get an
apostrophe in front: text of a corpus is untrusted there too. The Parquet file holds every value as it is.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.analysis.display import show
from pipeline.analysis.result import Number

PREVIEW_ROWS = 12
MOST_ROWS = 100_000
"""Longer tables are shipped as Parquet alone."""
FEATURES = "features"
"""Name of a table with a row a feature."""
FEATURE_COLUMNS = ("feature", "nearest_feature", "neighbour")
"""Columns that name a feature of the autoencoder the report is on."""
_PLACES = ("prompt", "position", "neuron", "matched_feature")
_PASSAGE = ("before", "token", "after")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


Place = Literal["page", "file", "artifact"]


@dataclass(frozen=True)
class Cell:
    """One cell on the page.

    Attributes:
        text: what it shows; for a passage, what comes before the token.
        token: the token of a passage.
        after: what follows the token.
        kind: ``number``, ``text``, ``feature`` or ``passage``.
    """

    text: str
    token: str = ""
    after: str = ""
    kind: str = "number"


@dataclass(frozen=True)
class TableView:
    """One table on the page.

    Attributes:
        name: its name.
        title: its name for people.
        columns: headings and the kind of each column.
        rows: the first rows.
        n_rows: rows there are.
        file: path of its files without the ending.
        passages: whether its rows hold text from the corpus.
        place: ``page`` where the page can show all of it, and there is CSV; ``file`` where it is shipped as Parquet
            alone; ``artifact`` where it is not shipped.
    """

    name: str
    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    file: str
    passages: bool = False
    place: Place = "page"

    @property
    def parquet(self) -> str:
        """Path of its Parquet file; a table of features is part of the joined one."""
        return f"tables/{FEATURES}.parquet" if self.name == FEATURES else f"{self.file}.parquet"

    @property
    def open(self) -> bool:
        """Whether the page shows it unasked: texts of the corpus, and what is short enough."""
        return self.place == "page" and (self.passages or self.n_rows <= PREVIEW_ROWS)


def view(section: str, name: str, table: pa.Table, place: Place = "page") -> TableView:
    """What the page shows of a table.

    Args:
        section: the analysis it belongs to.
        name: its name.
        table: all of it.
        place: where it is shown at most.
    """
    title, file = humanise(name).capitalize(), f"tables/{section}-{name}"
    if place != "page" or table.num_rows > MOST_ROWS:
        return TableView(name, title, (), (), table.num_rows, file, place="file" if place == "page" else place)
    passage = set(_PASSAGE) <= set(table.column_names)
    left_out = {field.name for field in table.schema if pa.types.is_list(field.type)} | set(_PASSAGE if passage else ())
    shown = [column for column in table.column_names if column not in left_out]
    head = table.slice(0, PREVIEW_ROWS).to_pylist()
    rows = [[_cell(column, row[column]) for column in shown] for row in head]
    columns = [
        (humanise(column), "text" if pa.types.is_string(table.schema.field(column).type) else "number")
        for column in shown
    ]
    if passage:
        columns.append(("text", "passage"))
        for cells, row in zip(rows, head, strict=True):
            cells.append(Cell(row["before"] or "", row["token"] or "", row["after"] or "", "passage"))
    return TableView(name, title, columns, rows, table.num_rows, file, passage)


def to_parquet(table: pa.Table) -> bytes:
    """Parquet, with every value as it is."""
    sink = io.BytesIO()
    few = [field.name for field in table.schema if not _holds_floats(field.type)]  # floats seldom repeat
    pq.write_table(table, sink, compression="zstd", compression_level=9, use_dictionary=few)  # pyright: ignore[reportArgumentType] - its stub knows flags alone
    return sink.getvalue()


def columns(table: pa.Table) -> list[dict[str, object]]:
    """A table for a page to sort and search: name, heading, kind and values of each column; lists are left out.

    Kinds are ``feature``, ``place`` (a prompt, a position), ``integer``, ``number``, ``flag`` and ``text``; numbers
    keep five significant digits.
    """
    kept = [field for field in table.schema if not pa.types.is_list(field.type)]
    return [
        {
            "name": field.name,
            "label": humanise(field.name),
            "kind": _kind(field),
            "values": rounded(table[field.name], 5).to_pylist(),
        }
        for field in kept
    ]


def to_csv(table: pa.Table) -> bytes:
    """CSV in UTF-8, a header first; nulls are empty, numbers have nine significant digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    columns = [rounded(table[name], 9).to_pylist() for name in table.column_names]
    writer.writerows([_harmless(value) for value in row] for row in zip(*columns, strict=True))
    return text.getvalue().encode("utf-8", "replace")


def rounded(column: pa.ChunkedArray | pa.Array, digits: int) -> pa.Array:
    """A column with its floats to so many significant digits, large ones whole, and null where not finite."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_floating(whole.type):
        return whole
    values = whole.to_numpy(zero_copy_only=False).astype(np.float64)
    finite = np.isfinite(values)
    size = np.abs(np.where(finite & (values != 0), values, 1.0))
    scale = 10.0 ** np.clip(digits - 1 - np.floor(np.log10(size)), 0, 300)
    return pa.array(np.rint(np.where(finite, values, 0.0) * scale) / scale, mask=~finite)


def humanise(name: str) -> str:
    """A column or figure name as words."""
    return name.replace("_", " ")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def visible(text: str) -> str:
    """Text with the white space marked that a reader would not see; pages do the same."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def _holds_floats(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind.value_type if pa.types.is_list(kind) else kind)


def _kind(field: pa.Field) -> str:
    if field.name in FEATURE_COLUMNS:
        return "feature"
    if pa.types.is_boolean(field.type):
        return "flag"
    if pa.types.is_integer(field.type):
        return "place" if field.name in _PLACES else "integer"
    return "number" if pa.types.is_floating(field.type) else "text"


def _cell(column: str, value: Number) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, str):
        return Cell(visible(value), kind="text")
    if column in FEATURE_COLUMNS and value is not None:
        return Cell(str(value), kind="feature")
    if isinstance(value, int):
        return Cell(str(value) if column in _PLACES else f"{value:,}")
    return Cell(show(value, digits=4))
