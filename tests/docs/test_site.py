"""The site builds without a warning, so every link within it leads somewhere; and so do links in the sources."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.analysis import ANALYSES
from pipeline.config import HarvestConfig, preset_names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "--keep-going",
        "-d",
        str(out / "trees"),
        "docs",
        str(out / "html"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / "html"


class _Assets(HTMLParser):
    """Where a page's scripts, styles, fonts and images come from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.found += [value for name, value in attrs if name in ("src", "href") and value is not None]


def test_every_page_is_built_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    for page in site.rglob("*.html"):
        assets = _Assets()
        assets.feed(page.read_text())
        assert not [one for one in assets.found if "://" in one or one.startswith("//")]


def test_reference_pages_are_made_from_the_code(site: Path) -> None:
    configuration = (site / "reference/configuration.html").read_text()
    assert all(f">{name}</span>" in configuration for name in HarvestConfig.model_fields)
    assert "NoneType" not in configuration
    assert all(f">{name}</span>" in configuration for name in preset_names())
    command_line = (site / "reference/cli.html").read_text()
    assert "--rewrite" in command_line
    assert "\N{EN DASH}" not in command_line  # as two dashes in prose become
    assert "open_activations" in (site / "reference/api.html").read_text()
    findings = (site / "explanation/findings.html").read_text()
    assert all(f'id="{name.replace("_", "-")}' in findings for name in ANALYSES)


def test_the_house_names_every_module() -> None:
    named = set(re.findall(r"\w+", (ROOT / "docs/architecture.md").read_text()))
    tops = [ROOT / name for name in ("flows", "pipeline", "sae", "storage")]
    modules = {path.stem for top in tops for path in top.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for top in tops for path in top.glob("*/__init__.py")}
    assert sorted((modules | packages) - named) == []


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text('extensions = ["myst_parser"]\nmyst_heading_anchors = 4\n')
    (tmp_path / "index.md").write_text("# A page\n\n[gone](no-such-page.md), [here](#no-such-heading)\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "--keep-going", str(tmp_path), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "no-such-page.md" in done.stderr
    assert "no-such-heading" in done.stderr


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,4} (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text())
    assert links or page.name != "README.md"
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor and "<!-- generated" not in target.read_text():  # the build looks at what is made from code
            assert anchor in anchors(target), f"{file}#{anchor}"


def test_the_readme_cites_what_the_citation_file_cites() -> None:
    cited = re.findall(r'url: "(.+)"', (ROOT / "CITATION.cff").read_text())
    assert re.findall(r"url += \{(.+)\}", (ROOT / "README.md").read_text()) == cited


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|\w+) = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    lines = [line for one in lists for line in one.splitlines() if re.match(r'  "[\w\[\]-]+[<>]', line)]
    assert len(lines) > 30
    assert not [line for line in lines if "  # " not in line]
