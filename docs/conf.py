"""The documentation as a site: ``make docs`` builds it into ``build/docs``, without a network, warnings as errors.

Reference pages are made from what they describe when the site is built: a page says ``<!-- generated: NAME -->`` where
the text of :data:`GENERATED` belongs. The public functions of ``sparsemill.py`` come by autodoc. MyST checks that each
link to a page, a heading or a file leads somewhere. Rejected: Material for MkDocs, whose maintenance has ended, on
MkDocs 1, which has none.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the site shows this tree, installed or not

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

from pipeline.analysis import ANALYSES, Analysis
from pipeline.analysis.post import PUBLISHED
from pipeline.cli import app as command_line
from pipeline.config import Preset, Runtime, load_preset, preset_names

project = "sparsemill"
author = copyright = "The sparsemill authors"  # noqa: A001  (Sphinx's name)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "sparsemill"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True  # an attribute that is documented in its class's docstring as well as by itself is listed once


def configuration() -> str:
    """Every field of every config model: a section a model, in the order in which they are first named."""
    seen: dict[type[BaseModel], None] = {Preset: None}
    queue: list[type[BaseModel]] = [Preset]
    while queue:
        inner = [model for field in queue.pop(0).model_fields.values() for model in _models_in(field.annotation)]
        new = [model for model in dict.fromkeys(inner) if model not in seen]
        seen |= dict.fromkeys(new)
        queue += new
    return "\n\n".join(_section(model) for model in [*seen, Runtime])


def presets() -> str:
    """The presets that come along."""
    rows = [[f"`{name}`", load_preset(name).description] for name in preset_names()]
    return _table(["preset", "what it is for"], rows)


def commands() -> str:
    """Every command with its options, as cyclopts describes them; what many have in common once, at the end."""
    text = command_line.generate_docs(output_format="markdown", heading_level=1)
    body = text[text.index("\n**Before a run**") :]  # above it: what the page itself says, and a table of contents
    body = re.sub(r"^```console$", "```text", body, flags=re.MULTILINE)
    body = re.sub(r"^For instance: (.+?)[.]$(?=\n\n)", _examples, body, flags=re.MULTILINE | re.DOTALL)
    shared = re.compile(r"\*\*Which run[^\n]*\*\*:\n\n(.*?)(?=\n\n#|\Z)", re.DOTALL)
    parts = re.split(r"(```.*?```|`[^`\n]*`)", body, flags=re.DOTALL)  # every other one is code
    body = "".join(part if part[:1] == "`" else re.sub(r"--[a-z][a-z-]*", r"`\g<0>`", part) for part in parts)
    (options,) = set(shared.findall(body))
    body = shared.sub("Also the [options of a run](#options-of-a-run).", body)
    return f"{body}\n\n## Options of a run\n\nOf every command that runs stages:\n\n{options}"


def findings() -> str:
    """Every analysis: its question, what the post says, how it is computed, its numbers and options."""
    return "\n\n".join(map(_analysis, ANALYSES.values()))


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration, "presets": presets, "commands": commands, "findings": findings,
}  # fmt: skip


def setup(app: Sphinx) -> None:
    """Registers what fills generated pages in."""
    app.connect("source-read", _fill_in)


def _fill_in(_: Sphinx, __: str, source: list[str]) -> None:
    source[0] = re.sub(
        r"(?:\*What follows is made[^\n]*\n\n)?<!-- generated: (\w+) -->",
        lambda found: GENERATED[found[1]](),
        source[0],
    )


def _analysis(analysis: Analysis) -> str:
    text = inspect.getdoc(sys.modules[analysis.run.__module__]) or ""
    how, _, source = text.rpartition("Source: ")
    published = [[item.quantity, item.post, item.source] for item in PUBLISHED if item.analysis == analysis.name]
    options = analysis.options.model_fields.items()
    parts = [
        f"## `{analysis.name}`: {analysis.title}",
        f"*{analysis.question}*",
        _prose(how or text).strip(),
        *([f"Source: {_prose(source)}"] if how else []),
        *([_table(["the post's number", "", "where"], published)] if published else []),
        "**Numbers**: " + "; ".join(f"`{number.key}`, {number.label}" for number in analysis.numbers) + ".",
        _table(
            ["option", "default", ""], [[f"`{name}`", _default(f), _prose(f.description or "")] for name, f in options]
        ),
    ]
    return "\n\n".join(parts)


def _examples(found: re.Match[str]) -> str:
    """Commands of a help text, which stand one after the other in a sentence, as a block."""
    return "\n".join(["```text", *" ".join(found[1].split()).split("; "), "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _section(model: type[BaseModel]) -> str:
    rows = [
        [f"`{name}`", _type(field.annotation), _default(field), _prose(field.description or "")]
        for name, field in model.model_fields.items()
    ]
    table = _table(["field", "type", "default", "what it is"], rows)
    return f"## {model.__name__}\n\n{_prose(inspect.getdoc(model) or '')}\n\n{table}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    if field.default is PydanticUndefined:  # made anew each time: what it is says the description
        made = field.default_factory() if isinstance(field.default_factory, type) else None  # type: ignore[call-arg]
        return "" if made is None or isinstance(made, BaseModel) else f"`{made!r}`"
    return f"`{type(field.default).__name__}()`" if isinstance(field.default, BaseModel) else f"`{field.default!r}`"


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        name = annotation.__name__
        return f"[{name}](#{name.lower()})" if issubclass(annotation, BaseModel) else f"`{name}`"
    models = list(_models_in(annotation))
    if models:
        return " or ".join(map(_type, models)) if get_origin(annotation) is not tuple else f"list of {_type(models[0])}"
    return f"`{re.sub(r'(typing|pathlib|collections.abc)[.]', '', _plain(annotation))}`"


def _plain(annotation: Any) -> str:
    """A type without its constraints: validators say what is out of range."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _plain(arguments[0])
    if origin is UnionType or str(origin) == "typing.Union":
        return " | ".join(map(_plain, arguments))
    if origin in (tuple, dict):
        inner = ", ".join("..." if argument is Ellipsis else _plain(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _prose(text: str) -> str:
    """A docstring as Markdown: literals have one backquote."""
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
