"""Findings -> a folder of HTML, JavaScript data and tables.

The page is one template with autoescaping; every value that reaches it is text. Figures travel as JavaScript files that
call one function, since browsers refuse to fetch files beside a page opened from disk; plotly.js lies there once. The
figures are stored in light colours, and the page swaps palette and template for the dark. Equal inputs give equal
bytes: no clock, no random ids. Rejected: ``plotly.io.write_html`` a figure (a copy of plotly.js each, fixed colours),
and one self-contained page (5 MB of script before the first line of text).
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, FunctionLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from pipeline.analysis import ANALYSES, figures
from pipeline.analysis.display import show
from pipeline.analysis.registry import NumberLabel
from pipeline.analysis.result import Number
from pipeline.report import tables
from pipeline.report.inputs import ReportInputs, Section

_ASSETS = ("report.css", "report.js")


def write_report(inputs: ReportInputs) -> Mapping[str, bytes]:
    """Renders a report.

    Args:
        inputs: everything it shows.

    Returns:
        Relative file names and their bytes; ``index.html`` is the page.
    """
    sections = [_section(section) for section in inputs.sections]
    files = {f"assets/{name}": _template(name).encode() for name in _ASSETS}
    files["assets/plotly.min.js"] = get_plotlyjs().encode()
    files["assets/themes.js"] = _themes()
    for section in inputs.sections:
        if section.result.figures:
            files[f"figures/{section.name}.js"] = _figures(section)
        for name, table in section.result.tables.items():
            files |= tables.files(section.name, name, table)
    page = _environment().get_template("index.html.j2")
    return files | {"index.html": page.render(report=inputs, sections=sections).encode()}


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = tables.humanise
    environment.filters["option"] = _option
    return environment


def _template(name: str) -> str:
    return resources.files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")


def _section(section: Section) -> dict[str, Any]:
    """What the template shows of an analysis; an analysis that the registry no longer has keeps its own names."""
    analysis = ANALYSES.get(section.name)
    numbers = section.result.numbers
    labels = [NumberLabel(key, tables.humanise(key)) for key in numbers] if analysis is None else analysis.numbers
    fields = {} if analysis is None else analysis.options.model_fields
    return {
        "name": section.name,
        "title": tables.humanise(section.name).capitalize() if analysis is None else analysis.title,
        "question": "" if analysis is None else analysis.question,
        "reading": section.result.reading,
        "artifact_id": section.artifact_id,
        "command": section.command,
        "numbers": _grouped(labels, numbers),
        "figures": [_figure_frame(name, figure) for name, figure in section.result.figures.items()],
        "tables": [tables.view(section.name, name, table) for name, table in section.result.tables.items()],
        "options": [
            (name, value, (fields[name].description or "") if name in fields else "")
            for name, value in section.options.items()
        ],
    }


def _grouped(labels: Sequence[NumberLabel], numbers: Mapping[str, Number]) -> list[list[tuple[str, str, str]]]:
    """A label that begins with an ellipsis continues the one before it, and stays with it on the page."""
    groups: list[list[tuple[str, str, str]]] = []
    for item in labels:
        if numbers.get(item.key) is None:
            continue
        value = numbers[item.key]
        kind = "text" if isinstance(value, str) else "number"
        row = (item.label.removeprefix("…").strip(), show(value, item.unit), kind)
        if groups and item.label.startswith("…"):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _figure_frame(name: str, figure: go.Figure) -> dict[str, Any]:
    meta = figure.layout.meta
    caption = meta.get("caption") if isinstance(meta, Mapping) else None
    return {"name": name, "caption": caption or tables.humanise(name), "height": int(figure.layout.height or 380)}


def _figures(section: Section) -> bytes:
    drawn: dict[str, Any] = {}
    for name, figure in section.result.figures.items():
        content = json.loads(str(plotly.io.to_json(figure, engine="json", validate=False)))
        content["layout"].pop("template", None)  # the page sets it, light or dark
        drawn[name] = content
    return f"sparsemill.add({_json(section.name)}, {_json(drawn)});\n".encode()


def _themes() -> bytes:
    palettes = {"light": figures.LIGHT, "dark": figures.DARK}
    themes = {name: figures.template(palette).to_plotly_json() for name, palette in palettes.items()}
    return f"sparsemill.themes = {_json(themes)};\nsparsemill.darkOf = {_json(figures.DARK_OF)};\n".encode()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _option(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
