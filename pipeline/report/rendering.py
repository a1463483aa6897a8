"""What all pages of a report share: templates, assets, figures, and data that a page loads when it needs it.

Browsers refuse to fetch files beside a page opened from disk, so data travels as JavaScript files that call one
function. Figures are plain JSON there. Tables and details are larger: their JSON is deflated and written in base64,
about a quarter of its length, and the browser's own ``DecompressionStream`` unpacks it. Text of a corpus then never
stands in a script as text at all, and pages set it as text content. Rejected: a binary format of our own (a little
smaller, and one more thing to get wrong), and a server.
"""

import base64
import json
import zlib
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

_OWN = ("report.css", "sparsemill.js", "report.js", "feature.js", "explorer.js")
_VENDORED = {
    "tabulator.min.js": "tabulator/tabulator.min.js",
    "tabulator.min.css": "tabulator/tabulator.min.css",
    "tabulator.LICENSE.txt": "tabulator/LICENSE",
}


def assets() -> dict[str, bytes]:
    """Scripts and styles of every report."""
    vendored = resources.files("pipeline.report").joinpath("vendor")
    found = {f"assets/{name}": _template(name).encode() for name in _OWN}
    found |= {f"assets/{name}": vendored.joinpath(path).read_bytes() for name, path in _VENDORED.items()}
    return found | {"assets/plotly.min.js": get_plotlyjs().encode(), "assets/themes.js": _themes()}


def page(template: str, **values: object) -> bytes:
    """A page from its template; what is put into it is escaped."""
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
    return environment.get_template(template).render(**values).encode()


def packed(name: str, value: object) -> bytes:
    """A data file: a call that hands a value, deflated, to the page.

    Args:
        name: path of the file in the report's folder, without ``.js``.
        value: what JSON can hold.
    """
    data = base64.b64encode(zlib.compress(plain_json(value).encode(), 6)).decode()
    return f'sparsemill.receive({plain_json(name)}, "{data}");\n'.encode()


def figure_script(section: str, drawn: Mapping[str, go.Figure]) -> bytes:
    """A file of figures; the template is left to the page, which has both."""
    contents: dict[str, Any] = {}
    for name, figure in drawn.items():
        contents[name] = json.loads(str(plotly.io.to_json(figure, engine="json", validate=False)))
        contents[name]["layout"].pop("template", None)
    return f"sparsemill.add({plain_json(section)}, {plain_json(contents)});\n".encode()


def figure_frame(name: str, figure: go.Figure) -> dict[str, Any]:
    """What a template shows around a figure."""
    layout: Any = figure.layout
    meta = layout.meta
    caption = meta.get("caption") if isinstance(meta, Mapping) else None
    return {"name": name, "caption": caption or tables.humanise(name), "height": int(layout.height or 380)}


def labels(name: str, numbers: Mapping[str, Number]) -> Sequence[NumberLabel]:
    """Labels of an analysis' numbers; one that the registry no longer has keeps its own names."""
    known = ANALYSES.get(name)
    return [NumberLabel(key, tables.humanise(key)) for key in numbers] if known is None else known.numbers


def title(name: str) -> str:
    """Heading of an analysis' section."""
    return ANALYSES[name].title if name in ANALYSES else tables.humanise(name).capitalize()


def shown(value: Number, label: NumberLabel) -> tuple[str, str]:
    """A number as the page shows it, and whether that is a ``number`` or ``text``."""
    return show(value, label.unit), "text" if isinstance(value, str) else "number"


def plain_json(value: object) -> str:
    """JSON in ASCII that is a JavaScript literal too, and closes no script."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _template(name: str) -> str:
    return resources.files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")


def _themes() -> bytes:
    palettes = {"light": figures.LIGHT, "dark": figures.DARK}
    themes = {name: figures.template(palette).to_plotly_json() for name, palette in palettes.items()}
    return f"sparsemill.themes = {plain_json(themes)};\nsparsemill.darkOf = {plain_json(figures.DARK_OF)};\n".encode()


def _option(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
