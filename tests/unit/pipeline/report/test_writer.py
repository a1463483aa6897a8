import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from pipeline.report import ReportInputs, write_report

_VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, the text, and what was not closed."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def files(hostile: SimpleNamespace) -> dict[str, bytes]:
    return dict(write_report(hostile.inputs))


@pytest.fixture
def page(files: dict[str, bytes]) -> Page:
    return Page(files["index.html"].decode())


def figures_of(data: bytes) -> tuple[str, dict[str, object]]:
    match = re.fullmatch(r"sparsemill\.add\((\"\w+\"), (.*)\);\n", data.decode())
    assert match is not None
    return json.loads(match[1]), json.loads(match[2])


def test_the_folder_is_complete_and_plotly_lies_in_it_once(files: dict[str, bytes], page: Page) -> None:
    named = {value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")}
    local = {name for name in named if name and not name.startswith(("#", "data:"))}
    pages = {name for name in local if name.endswith(".html")}
    assert pages == {"features.html"}
    assert {name.split("#")[0] for name in local} <= set(files)
    assert sum(len(data) > 1_000_000 for data in files.values()) == 1


def test_no_file_of_ours_names_another_host(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if name not in ("assets/plotly.min.js", "assets/tabulator.min.js") and not name.endswith(".parquet"):
            assert not re.search(rb"https?://|//cdn|url\(", data), name


def test_hostile_text_becomes_no_element_and_no_attribute(page: Page, hostile: SimpleNamespace) -> None:
    assert not page.open
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "iframe", "base"})
    assert all(set(script) == {"defer", "src"} for script in page.all("script"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    text = "".join(page.text)
    assert text.count("<img src=x onerror=alert(1)>") >= 15
    assert "49" not in text  # the braces were not taken for a template
    assert hostile.text in text


def test_hostile_text_in_figure_files_stays_inside_strings(files: dict[str, bytes], hostile: SimpleNamespace) -> None:
    name, figures = figures_of(files["figures/density.js"])
    assert name == "density"
    caption = figures["density"]["layout"]["meta"]["caption"]  # type: ignore[index]
    assert caption == hostile.text
    assert "\u2028" not in files["figures/density.js"].decode()  # plain ASCII, whatever reads it
    assert "<script" not in figures["density"]["data"][0]["hovertemplate"]  # type: ignore[index]


def test_a_passage_marks_its_token(files: dict[str, bytes], hostile: SimpleNamespace) -> None:
    html = files["index.html"].decode()
    assert "<mark>&lt;b&gt;</mark>" in html
    assert "<mark></mark>" in html  # a null token


def test_the_page_locks_out_inline_scripts_and_the_network(page: Page) -> None:
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'self' file:"
    assert "connect-src" not in rules


def test_tables_are_shipped_whole_and_shown_in_part(files: dict[str, bytes], hostile: SimpleNamespace) -> None:
    original = hostile.inputs.sections[0].result.tables["features"]
    passages = hostile.inputs.sections[0].result.tables["top_tokens"]
    assert pq.read_table(io.BytesIO(files["tables/density-top_tokens.parquet"])).equals(passages)
    joined = pq.read_table(io.BytesIO(files["tables/features.parquet"]))
    assert joined.select(original.column_names).to_pydict() == original.to_pydict()
    assert "tables/density-features.parquet" not in files
    rows = list(csv.reader(io.StringIO(files["tables/density-features.csv"].decode())))
    assert rows[0] == ["feature", "label", "value"]
    assert len(rows) == 41
    assert rows[40] == ["39", "'=HYPERLINK(1)", ""]
    html = files["index.html"].decode()
    assert "40 rows, the first 12 shown" in html
    assert html.count("=HYPERLINK(1)") == 2 * 12


def test_cells_that_a_spreadsheet_would_run_are_made_harmless(files: dict[str, bytes]) -> None:
    rows = list(csv.DictReader(io.StringIO(files["tables/density-top_tokens.csv"].decode(), newline="")))
    assert rows[1]["before"] == "'=1+1"
    assert rows[0]["features_firing"] == "12345"


def test_numbers_have_their_labels_units_and_words(page: Page) -> None:
    text = " ".join(part.strip() for part in page.text if part.strip())
    assert "L0: features firing on a token, mean 24" in text
    assert "Dead features 25.0\u202f%" in text
    assert "Features of density < 1e-6 below resolution" in text
    assert "ultra_low_below 0.0001 A feature" in text  # an option with its description


def test_an_analysis_the_registry_does_not_know_is_shown_under_its_own_names(page: Page) -> None:
    text = " ".join(part.strip() for part in page.text if part.strip())
    assert "Not registered" in text
    assert "dead fraction 0.25" in text


def test_figures_leave_their_template_to_the_page_which_has_both(files: dict[str, bytes]) -> None:
    _, figures = figures_of(files["figures/density.js"])
    assert "template" not in figures["density"]["layout"]  # type: ignore[operator,index]
    themes = files["assets/themes.js"].decode()
    assert '"dark":' in themes
    assert '"light":' in themes


def test_equal_inputs_give_equal_bytes(files: dict[str, bytes], hostile: SimpleNamespace) -> None:
    assert dict(write_report(hostile.inputs)) == files


def test_a_report_of_nothing_but_weights_has_no_empty_parts(hostile: SimpleNamespace) -> None:
    bare = ReportInputs("t", "p", {"a": "b"}, [], [])
    html = write_report(bare)["index.html"].decode()
    page = Page(html)
    assert not page.open
    assert "Beside the post" not in html
    section = replace(hostile.inputs.sections[0], result=replace(hostile.inputs.sections[0].result, figures={}))
    files = write_report(replace(bare, sections=[section]))
    assert not any(name.startswith("figures/") for name in files)
