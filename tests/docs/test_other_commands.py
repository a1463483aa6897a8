"""Commands in the documentation that are not ``sparsemill``'s, in blocks and in sentences, and its YAML.

Targets and variables of ``make`` are the Makefile's, deployments and their parameters those of ``prefect.yaml`` and the
flows, modules and files are there, options of ``dask`` are its own.
"""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("make", "prefect", "torchrun", "python", "dask")
DASK = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
PROGRAM_IN_A_LINE = re.compile(r'python -c "\n(.*?)\n"', re.DOTALL)


def tokens(page: Path) -> Iterator[Token]:
    for token in MarkdownIt().parse(page.read_text()):
        yield token
        yield from token.children or ()


def blocks(page: Path, *languages: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info in languages]


def commands(page: Path) -> list[str]:
    """Lines of blocks and pieces of code in sentences that begin with one of the programs."""
    lines = [
        line
        for text in blocks(page, "", "sh", "bash", "console")
        for line in PROGRAM_IN_A_LINE.sub("", text).replace("\\\n", " ").splitlines()
    ]
    lines += [token.content for token in tokens(page) if token.type == "code_inline"]
    begins = re.compile(rf"(?:[$] )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?((?:{'|'.join(PROGRAMS)}) .*)")
    return [match[1] for match in map(begins.match, lines) if match]


EVERY_COMMAND = [
    pytest.param(command, id=f"{page.name}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands(page))
]


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_what_a_command_names_is_there(command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    {"make": make, "prefect": prefect, "torchrun": module, "python": python, "dask": dask}[program](words)


def make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) [?:]?=", text, re.MULTILINE))
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets), f"the Makefile has no {name}"


def prefect(words: list[str]) -> None:
    if words[:2] != ["deployment", "run"]:
        assert " ".join(words[:2]) in ("work-pool create", "worker start", "server start", "flow-run cancel")
        return
    flow_name, _, deployment = words[2].partition("/")
    if not deployment:  # the README tells of the error
        return
    found = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    path, _, function = found[deployment]["entrypoint"].partition(":")
    flow: Any = getattr(import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == flow_name
    given = {words[place + 1].partition("=")[0] for place, word in enumerate(words) if word == "-p"}
    assert given <= set(flow.parameters.properties)


def module(words: list[str]) -> None:
    name = words[words.index("-m") + 1]
    if name != "bench.NAME":
        assert find_spec(name) is not None


def python(words: list[str]) -> None:
    if words[0] == "-m":
        module(words)
    else:
        assert (ROOT / words[0]).is_file()


def dask(words: list[str]) -> None:
    options = {option for parameter in DASK[words[0]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_a_name_that_is_not_there_would_be_found() -> None:
    for command in (
        "make no-such", "make demo NO_SUCH=1", "prefect deployment run harvest/no-such",
        "prefect deployment run harvest/train", "prefect deployment run harvest/harvest -p no_such=1",
        "torchrun -m pipeline.no_such", "python -m bench.no_such", "python no_such.py", "dask worker --no-such 1",
    ):  # fmt: skip
        with pytest.raises((AssertionError, KeyError)):
            test_what_a_command_names_is_there(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_parses_and_programs_in_a_line_compile(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert list(yaml.safe_load_all(text))
    for text in blocks(page, ""):
        for program in PROGRAM_IN_A_LINE.findall(text):
            compile(program, str(page), "exec")
