from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.report import Column, ComparisonInputs, write_comparison
from tests.unit.pipeline.report.test_writer import Page


@pytest.fixture
def inputs(hostile: SimpleNamespace) -> ComparisonInputs:
    one = hostile.inputs
    column = Column("A", hostile.text, "report-a", one.facts, {"seed": "0", "steps": "9"}, one.headline, one.sections)
    fewer = replace(
        one.sections[0], result=replace(one.sections[0].result, figures={}, numbers={"l0": 7.5, "dead_fraction": None})
    )
    other = replace(
        column, letter="B", report_id="report-b", settings={"seed": "1", "steps": "9"}, headline=(), sections=[fewer]
    )
    return ComparisonInputs([column, other], one.sections[0], hostile.text, hostile.text)


@pytest.fixture
def page(inputs: ComparisonInputs) -> Page:
    return Page(write_comparison(inputs)["index.html"].decode())


def words(page: Page) -> str:
    return " ".join(part.strip() for part in page.text if part.strip())


def test_settings_that_differ_are_shown_and_equal_ones_are_not(page: Page) -> None:
    assert "seed 0 1" in words(page)
    assert "steps" not in words(page)


def test_numbers_stand_beside_each_other_and_a_missing_one_is_a_dash(page: Page) -> None:
    assert "L0: features firing on a token, mean 24 7.5" in words(page)
    assert "Dead features 25.0\u202f% –" in words(page)
    assert "quantity one 94 % – 92 %" in words(page)


def test_an_analysis_that_one_lacks_is_left_out(page: Page) -> None:
    assert "Not registered" not in words(page)


def test_it_links_to_the_reports_beside_it(page: Page) -> None:
    links = {link["href"] for link in page.all("a")}
    assert {"../report-a/index.html", "../report-b/index.html", "../report-a/features.html"} <= links


def test_figures_are_there_once_an_autoencoder(inputs: ComparisonInputs, page: Page) -> None:
    files = write_comparison(inputs)
    assert {name for name in files if name.startswith("figures/")} == {"figures/A-density.js", "figures/density.js"}
    assert [(one["data-section"], one["data-figure"]) for one in page.all("figure")] == [
        ("density", "density"), ("A-density", "density"),
    ]  # fmt: skip
    assert "It has no such figure." in words(page)


def test_hostile_text_becomes_no_element(page: Page, hostile: SimpleNamespace) -> None:
    assert not page.open
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "iframe", "base"})
    assert all(set(script) == {"defer", "src"} for script in page.all("script"))
    assert hostile.text in "".join(page.text)
    assert "49" not in words(page)


def test_without_matches_it_has_no_section_on_them(inputs: ComparisonInputs) -> None:
    html = write_comparison(replace(inputs, matches=None))["index.html"].decode()
    assert not Page(html).open
    assert html.count('class="reading"') == 0
