"""What an analysis found, and its files: numbers, tables, figures and a sentence or two on how to read them.

On disk ``numbers.json`` holds scalars (never NaN or infinity: what cannot be computed is None or a word such as "below
resolution"), ``tables/<name>.parquet`` and ``figures/<name>.json`` (plotly's own JSON) the rest, ``contents.json`` the
reading and the order of tables and figures. Equal results give equal bytes: keys are sorted and nothing is stamped.
Rejected: one pickle or one JSON for all of it, since a feature table read alone, and by other programs, is what most
readers want.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptArtifact, NumericsError

Number = float | int | str | None

BELOW_RESOLUTION = "below resolution"
"""What a fraction below a density threshold reads where too few firings are expected at the threshold."""


@dataclass(frozen=True)
class AnalysisResult:
    """The outcome of one analysis.

    Attributes:
        numbers: scalars by name; None where the quantity does not exist for this autoencoder.
        tables: Arrow tables by name; the one named ``features`` has a row per feature, keyed by column ``feature``.
        figures: plotly figures by name; ``layout.meta`` may hold a ``caption``.
        reading: two or three sentences on how to read the figures, with this run's outcome.
    """

    numbers: Mapping[str, Number]
    tables: Mapping[str, pa.Table] = field(default_factory=dict[str, pa.Table])
    figures: Mapping[str, go.Figure] = field(default_factory=dict[str, go.Figure])
    reading: str = ""


def to_files(result: AnalysisResult) -> dict[str, bytes]:
    """Serialises a result.

    Returns:
        Relative file names and their bytes.

    Raises:
        NumericsError: a number is NaN or infinite.
    """
    for name, value in result.numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericsError(
                f"analysis number {name} is not finite", found=value, expected="a finite number, or None"
            )
    numbers = json.dumps(dict(result.numbers), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    contents = {"reading": result.reading, "tables": list(result.tables), "figures": list(result.figures)}
    files = {"numbers.json": f"{numbers}\n".encode(), "contents.json": _json(contents)}
    files |= {f"tables/{name}.parquet": _parquet(table) for name, table in result.tables.items()}
    files |= {f"figures/{name}.json": _figure_json(figure) for name, figure in result.figures.items()}
    return files


def from_folder(folder: Path) -> AnalysisResult:
    """Reads back what ``to_files`` made.

    Args:
        folder: where the files were written.

    Raises:
        CorruptArtifact: a file is missing or is not what it should be.
    """
    try:
        numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
        contents = json.loads((folder / "contents.json").read_text(encoding="utf-8"))
        tables = {name: pq.read_table(folder / "tables" / f"{name}.parquet") for name in contents["tables"]}
        figures = {
            name: plotly.io.from_json((folder / "figures" / f"{name}.json").read_text(encoding="utf-8"))
            for name in contents["figures"]
        }
        return AnalysisResult(numbers, tables, figures, contents["reading"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's and json's errors are ValueErrors
        raise CorruptArtifact("analysis files do not read back", where=folder, found=str(error)) from error


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _figure_json(figure: go.Figure) -> bytes:
    return _json(json.loads(str(plotly.io.to_json(figure, engine="json", validate=False))))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
