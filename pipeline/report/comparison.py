"""Several autoencoders side by side: what differs between them, their headline tables, and every analysis they share.

It is a page of its own in a folder of its own, with the same looks and the same figures; the explorer and the tables
are in the report on each autoencoder, which the page links to where both lie in one artifact store. A quantity that one
of them lacks keeps its row, with a dash. Rejected: figures with the traces of both (colours already stand for groups of
features).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.display import NOTHING
from pipeline.report import rendering
from pipeline.report.features import feature_table
from pipeline.report.inputs import Column, ComparisonInputs, Section


def write_comparison(inputs: ComparisonInputs) -> Mapping[str, bytes]:
    """Renders a comparison.

    Args:
        inputs: everything it shows.

    Returns:
        Relative file names and their bytes; ``index.html`` is the page.
    """
    files = rendering.assets()
    shared = _shared(inputs.columns)
    for sections in shared.values():
        for column, section in zip(inputs.columns, sections, strict=True):
            files |= _figure_files(f"{column.letter}-{section.name}", section)
    if inputs.matches is not None:
        files |= _figure_files(inputs.matches.name, inputs.matches)
    page = rendering.page(
        "compare.html.j2",
        report=inputs,
        explorable=[column.letter for column in inputs.columns if feature_table(column.sections) is not None],
        differences=_differences(inputs.columns),
        headline=_headline(inputs.columns),
        sections=[_side_by_side(inputs.columns, sections) for sections in shared.values()],
        matches=None if inputs.matches is None else _matches(inputs.matches),
        scripts=sorted(name for name in files if name.startswith("figures/")),
    )
    return files | {"index.html": page}


def _figure_files(source: str, section: Section) -> dict[str, bytes]:
    drawn = section.result.figures
    return {f"figures/{source}.js": rendering.figure_script(source, drawn)} if drawn else {}


def _shared(columns: Sequence[Column]) -> dict[str, list[Section]]:
    """The analyses that all have, in the first one's order."""
    by_name = [{section.name: section for section in column.sections} for column in columns]
    return {name: [each[name] for each in by_name] for name in by_name[0] if all(name in each for each in by_name)}


def _differences(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Facts, and the settings in which they differ."""
    facts = _rows([column.facts for column in columns])
    settings = _rows([column.settings for column in columns])
    return facts + [(name, values) for name, values in settings if len(set(values)) > 1]


def _rows(tables: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name, NOTHING) for table in tables]) for name in names]


def _headline(columns: Sequence[Column]) -> list[dict[str, Any]]:
    values = _rows([{row.quantity: row.here for row in column.headline} for column in columns])
    known = {row.quantity: row for column in columns for row in column.headline}
    return [{"quantity": name, "here": here, "post": known[name].post} for name, here in values]


def _side_by_side(columns: Sequence[Column], sections: Sequence[Section]) -> dict[str, Any]:
    name = sections[0].name
    labels = {label.key: label for section in sections for label in rendering.labels(name, section.result.numbers)}
    rows = [
        (
            label.label.removeprefix("…").strip(),
            [rendering.shown(one.result.numbers.get(key), label) for one in sections],
        )
        for key, label in labels.items()
        if any(one.result.numbers.get(key) is not None for one in sections)
    ]
    figures = dict.fromkeys(figure for one in sections for figure in one.result.figures)
    return {
        "name": name,
        "title": rendering.title(name),
        "rows": rows,
        "figures": [
            [
                (column.letter, f"{column.letter}-{name}", _frame(section, figure))
                for column, section in zip(columns, sections, strict=True)
            ]
            for figure in figures
        ],
    }


def _frame(section: Section, figure: str) -> dict[str, Any] | None:
    drawn = section.result.figures.get(figure)
    return None if drawn is None else rendering.figure_frame(figure, drawn)


def _matches(section: Section) -> dict[str, Any]:
    numbers = section.result.numbers
    return {
        "name": section.name,
        "title": rendering.title(section.name),
        "reading": section.result.reading,
        "artifact_id": section.artifact_id,
        "command": section.command,
        "numbers": [
            (label.label.removeprefix("…").strip(), *rendering.shown(numbers[label.key], label))
            for label in rendering.labels(section.name, numbers)
            if numbers.get(label.key) is not None
        ],
        "figures": [rendering.figure_frame(name, figure) for name, figure in section.result.figures.items()],
    }
