"""Tables of a result as the report shows and ships them: whole as Parquet and CSV, the first rows on the page.

A table with columns ``before``, ``token`` and ``after`` holds text from the corpus around a token; the page shows the
three as one passage. CSV cells of text that a spreadsheet would run as a formula get an apostrophe in front: text of a
corpus is untrusted there too. The Parquet file holds every value as it is.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.analysis.display import show
from pipeline.analysis.result import Number

PREVIEW_ROWS = 12
_PASSAGE = ("before", "token", "after")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Cell:
    """One cell on the page.

    Attributes:
        text: what it shows; for a passage, what comes before the token.
        token: the token of a passage.
        after: what follows the token.
        kind: ``number``, ``text`` or ``passage``.
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
    """

    name: str
    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    file: str
    passages: bool = False


def view(section: str, name: str, table: pa.Table) -> TableView:
    """What the page shows of a table.

    Args:
        section: the analysis it belongs to.
        name: its name.
        table: all of it.
    """
    shown = [column for column in table.column_names if column not in _PASSAGE]
    passage = set(_PASSAGE) <= set(table.column_names)
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
    title, file = humanise(name).capitalize(), f"tables/{section}-{name}"
    return TableView(name, title, columns, rows, table.num_rows, file, passage)


def files(section: str, name: str, table: pa.Table) -> dict[str, bytes]:
    """The table's files in the report's folder."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    base = f"tables/{section}-{name}"
    return {f"{base}.parquet": sink.getvalue(), f"{base}.csv": to_csv(table)}


def to_csv(table: pa.Table) -> bytes:
    """CSV in UTF-8, a header first; nulls are empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    columns = [table[name].to_pylist() for name in table.column_names]
    writer.writerows([_harmless(value) for value in row] for row in zip(*columns, strict=True))
    return text.getvalue().encode("utf-8", "replace")


def humanise(name: str) -> str:
    """A column or figure name as words."""
    return name.replace("_", " ")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _cell(column: str, value: Number) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, str):
        return Cell(value, kind="text")
    if isinstance(value, int):
        return Cell(str(value) if column in {"feature", "prompt", "position"} else f"{value:,}")
    return Cell(show(value, digits=4))
