"""The documentation's code: Python runs against a tiny run, commands are parsed by the application, presets load.

Blocks are found by a CommonMark parser, so those within lists count. Python blocks of a page share a namespace, as a
reader would type them one after the other.
"""

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from pipeline.analysis import ANALYSES
from pipeline.cli import app
from pipeline.config import Runtime, Source, load_preset
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHEAP = re.compile(
    r"artifacts (ls( \w+)?|du|prune .*|lineage latest)|presets.*|hooks( demo)?|verify latest|explain.*|export latest.*"
)
"""Commands that run here; none of them names an artifact of somebody else's, a model that is elsewhere, or a bucket."""


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            assert token.map is not None
            yield token.info.split(" ")[0], token.content, token.map[0] + 2


def commands(page: Path) -> list[str]:
    """The ``sparsemill`` commands of a page, without prompt, environment and comment."""
    found: list[str] = []
    for language, text, _ in blocks(page):
        for line in text.replace("\\\n", " ").splitlines() if language in ("", "sh", "bash", "console") else ():
            command = re.match(r"(?:[$] )?(?:[A-Z_]+=\S+ )*sparsemill (.*)", line)
            found += [command[1]] if command else []
    return found


def commands_in_help() -> list[str]:
    """What help texts give "for instance"."""
    sentences = re.findall(r"^For instance: (.+?)[.]$", app.generate_docs(), re.MULTILINE | re.DOTALL)
    return [command for sentence in sentences for command in " ".join(sentence.split()).split("; ")]


EVERY_COMMAND = [
    pytest.param(command, id=f"{page.name}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands(page))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_preset: Path) -> Path:
    """A working folder with a finished tiny run in ``artifacts``, and the tutorial's preset."""
    folder = tmp_path_factory.mktemp("reader")
    workspace = Workspace.open(Runtime(root=folder / "artifacts", threads=1))
    chain = Chain(load_preset(str(tiny_preset), ['analyze.analyses=["density"]']), workspace, run_directly)
    chain.report()
    (folder / "mine.toml").write_text(tutorial_preset())
    return folder


@pytest.fixture
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SPARSEMILL_HOME", raising=False)
    monkeypatch.delenv("SPARSEMILL_REMOTE", raising=False)
    return folder


def tutorial_preset() -> str:
    (text,) = [text for language, text, _ in blocks(ROOT / "docs/tutorial.md") if language == "toml"]
    return text


def with_python() -> list[Path]:
    return [page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))]


@pytest.mark.parametrize("page", with_python(), ids=lambda page: page.name)
@pytest.mark.usefixtures("at_home")
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {}
    for language, text, line in blocks(page):
        if language == "python":
            code = compile("\n" * (line - 1) + text, str(page), "exec")
            if "://" not in text:  # a bucket that a reader has and a test has not: it compiles
                exec(code, namespace)


@pytest.mark.parametrize("command", commands_in_help())
@pytest.mark.usefixtures("at_home")
def test_commands_in_help_are_what_the_application_takes(command: str) -> None:
    program, _, arguments = command.partition(" ")
    assert program == "sparsemill"
    take(arguments)


@pytest.mark.parametrize("command", EVERY_COMMAND)
@pytest.mark.usefixtures("at_home")
def test_commands_are_what_the_application_takes(command: str) -> None:
    take(command)


def take(command: str) -> None:
    """Has the application parse a command, without running it, and load its settings."""
    words = ["cross-seed" if word == "STUDY" else word for word in shlex.split(command, comments=True)]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False, help_on_error=False)
    run = bound.arguments.get("run", None)
    preset, overrides = (run.preset, run.set_) if run else map(bound.arguments.get, ("preset", "set_"))
    load_preset(preset or "demo", overrides or ())
    named = bound.arguments.get("only") or ""
    assert {name for name in named.split(",") if name} <= set(ANALYSES)


@pytest.mark.parametrize(
    "command", [param for param in EVERY_COMMAND if CHEAP.fullmatch(str(param.values[0]).split("#")[0].strip())]
)
def test_cheap_commands_run(command: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stray in at_home.glob("my-*"):
        stray.rename(at_home / f"old-{os.urandom(4).hex()}")  # an export wants a folder of its own
    app(shlex.split(command, comments=True), exit_on_error=False, print_error=False, result_action="return_none")
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_presets_and_sources_load(page: Path, tmp_path: Path) -> None:
    for language, text, _ in blocks(page):
        if language == "toml" and "[tokenize]" in text:
            (tmp_path / "page.toml").write_text(text)
            load_preset(str(tmp_path / "page.toml"))
        elif language == "toml":
            for part in text.split("\n\n"):
                assert [Source(**source) for source in tomllib.loads(part)["sources"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_artifacts_named_are_those_of_the_demo_that_the_readme_shows(page: Path) -> None:
    shown = re.findall(r"^\w+ +([a-z]+-[0-9a-f]{12}) +made", (ROOT / "README.md").read_text(), re.MULTILINE)
    texts = "\n".join([page.read_text(), *commands_in_help()])
    for named in re.findall(r"\b(?:tokenize|harvest|train|survey|analyze|report)-(?!00000)[0-9a-f]{4,12}\b", texts):
        assert any(artifact.startswith(named) for artifact in shown), f"{page.name}: {named} is none of {shown}"


def test_an_option_that_is_not_there_would_be_found() -> None:
    with pytest.raises(Exception, match="--no-such"):
        app.parse_args(["verify", "latest", "--no-such"], exit_on_error=False, print_error=False, help_on_error=False)
