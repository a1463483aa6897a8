"""Findings -> a folder of HTML, JavaScript data and tables.

The front page is one template with autoescaping; every value that reaches it is text. Figures travel as JavaScript
files; plotly.js lies there once. The figures are stored in light colours, and the page swaps palette and template for
the dark. Beside it lies the feature explorer, ``features.html``. Equal inputs give equal bytes: no clock, no random
ids. Memory: all files until they are written, and up to twice the analyses' tables.
Rejected: ``plotly.io.write_html`` a figure (a copy of plotly.js each, fixed colours), and one self-contained page (5 MB
of script before the first line of text).
"""

from collections.abc import Mapping
from typing import Any

from pipeline.analysis import ANALYSES
from pipeline.analysis.result import Number
from pipeline.report import features, rendering, tables
from pipeline.report.inputs import ReportInputs, Section


def write_report(inputs: ReportInputs) -> Mapping[str, bytes]:
    """Renders a report.

    Args:
        inputs: everything it shows.

    Returns:
        Relative file names and their bytes; ``index.html`` is the page, ``features.html`` the feature explorer.
    """
    files = rendering.assets()
    for section in inputs.sections:
        files |= _section_files(section)
    table = features.feature_table(inputs.sections)
    if table is not None:
        files |= features.explorer_files(table, inputs.sections)
        detailed = features.has_details(inputs.sections)
        files["features.html"] = rendering.page(
            "features.html.j2", report=inputs, detailed=detailed, shard=features.SHARD_FEATURES
        )
    n_features = 0 if table is None else table.num_rows
    sections = [_section(section) for section in inputs.sections]
    return files | {
        "index.html": rendering.page("index.html.j2", report=inputs, sections=sections, n_features=n_features)
    }


def _section_files(section: Section) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if section.result.figures:
        files[f"figures/{section.name}.js"] = rendering.figure_script(section.name, section.result.figures)
    for name, table in section.result.tables.items():
        view = _view(section, name)
        if view.place != "artifact" and name != tables.FEATURES:
            files[view.parquet] = tables.to_parquet(table)
        if view.place == "page":
            files[f"{view.file}.csv"] = tables.to_csv(table)
            files[f"{view.file}.js"] = rendering.packed(view.file, tables.columns(table))
    return files


def _section(section: Section) -> dict[str, Any]:
    """What the template shows of an analysis."""
    analysis = ANALYSES.get(section.name)
    fields = {} if analysis is None else analysis.options.model_fields
    return {
        "name": section.name,
        "title": rendering.title(section.name),
        "question": "" if analysis is None else analysis.question,
        "reading": section.result.reading,
        "artifact_id": section.artifact_id,
        "command": section.command,
        "numbers": _grouped(section.name, section.result.numbers),
        "figures": [rendering.figure_frame(name, figure) for name, figure in section.result.figures.items()],
        "tables": [_view(section, name) for name in section.result.tables],
        "options": [
            (name, value, (fields[name].description or "") if name in fields else "")
            for name, value in section.options.items()
        ],
    }


def _view(section: Section, name: str) -> tables.TableView:
    return tables.view(section.name, name, section.result.tables[name], features.place_of(section.name, name))


def _grouped(name: str, numbers: Mapping[str, Number]) -> list[list[tuple[str, str, str]]]:
    """A label that begins with an ellipsis continues the one before it, and stays with it on the page."""
    groups: list[list[tuple[str, str, str]]] = []
    for label in rendering.labels(name, numbers):
        if numbers.get(label.key) is None:
            continue
        row = (label.label.removeprefix("…").strip(), *rendering.shown(numbers[label.key], label))
        if groups and label.label.startswith("…"):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
