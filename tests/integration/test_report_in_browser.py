"""The report in a real browser, from disk: it draws, reaches for nothing, and runs nothing that came with the data."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import expect, sync_playwright

from pipeline.analysis import AnalysisResult, figures
from pipeline.analysis.figures import Series
from pipeline.report import ReportInputs, write_report
from tests.planted_features import sections

pytestmark = pytest.mark.system
HOSTILE = '<img src=x onerror="window.owned=1"><script>window.owned=1;alert(1)</script>\u2028</script>'
WORDS = ["the", " of", "\n", HOSTILE, "<b>bold</b>", '" onmouseover="window.owned=1', "javascript:window.owned=1", " x"]
N_FEATURES = 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        missing = "no chromium (Debian's package chromium)"
        if os.environ.get("SPARSEMILL_REQUIRE_SYSTEM") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=[*quiet, "--disable-sync"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    values = [
        Series("frequent", rng.normal(size=500), "frequent", np.arange(500)),
        Series(HOSTILE, rng.normal(size=9), "rare"),
    ]
    figure = figures.histogram(values, np.linspace(-3, 3, 31), caption=HOSTILE, x_title="value")
    passage = pa.table({"before": [HOSTILE], "token": [HOSTILE], "after": [HOSTILE]})
    points = figures.new_figure("Points", x_title="x", y_title="y")
    points.add_trace(
        figures.scatter(np.arange(3.0), np.zeros(3), np.array([5, 6, 7]), name="points", role="rare", hover="y %{y}")
    )
    density, *others = sections(N_FEATURES, WORDS)
    result = AnalysisResult(
        {"l0": 24.0}, {"top_tokens": passage, **density.result.tables}, {"density": figure, "points": points}, HOSTILE
    )
    folder = tmp_path_factory.mktemp("report")
    inputs = ReportInputs(HOSTILE, "demo", {"model": HOSTILE}, [], [replace(density, result=result), *others])
    for name, data in write_report(inputs).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Watched:
    """A page of the report, and what went wrong on it."""

    def __init__(self, browser: Any, width: int = 1280, scheme: str = "light", **options: Any):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def close(self) -> None:
        """Nothing of the corpus ran, nothing was asked of a network, nothing failed, nothing hangs over the edge."""
        assert self.page.evaluate("window.owned") is None
        assert self.page.evaluate("document.querySelectorAll('main img, main script, main b b').length") == 0
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not self.problems
        assert all(url.startswith(("file:", "data:", "blob:")) for url in self.requests)
        self.context.close()


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    page = Watched(browser)
    yield page
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_draws_offline_without_errors_or_overflow(browser: Any, report: Path, width: int, scheme: str) -> None:
    watched = Watched(browser, width, scheme)
    page = watched.page
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    fill = page.eval_on_selector(".bars path", "bar => getComputedStyle(bar).fill")
    expected = (figures.DARK if scheme == "dark" else figures.LIGHT)["frequent"]
    assert fill == f"rgb({', '.join(str(int(expected[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert page.title().replace("\u2028", "") == f"{HOSTILE} · sparsemill".replace("\u2028", "")
    watched.close()


def test_it_follows_the_system_into_the_dark_and_back(browser: Any, report: Path) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    bar = page.locator(".bars path").first
    light = bar.evaluate("bar => getComputedStyle(bar).fill")
    page.emulate_media(color_scheme="dark")
    expect(bar).not_to_have_css("fill", light)
    page.emulate_media(color_scheme="light")
    expect(bar).to_have_css("fill", light)
    page.close()


def test_hovering_a_bar_names_features_and_text_stays_text(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    bar = page.locator("[data-figure=density] .bars path").nth(15)
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.8 * box["height"])
    page.wait_for_selector("[data-figure=density] .hoverlayer .hovertext")
    assert "feature" in str(page.locator("[data-figure=density] .hoverlayer").text_content())
    assert page.evaluate("window.owned") is None
    page.close()


def features_of(page: Any) -> list[str]:
    return [text for text in page.locator(".tabulator-row a").all_inner_texts() if text]


def open_explorer(watched: Watched, report: Path, hash_: str = "") -> Any:
    watched.page.goto((report / "features.html").as_uri() + hash_)
    watched.page.wait_for_selector(".examples li" if hash_ else ".tabulator-row a")
    return watched.page


def first_feature(page: Any, wanted: int) -> None:
    expect(page.locator(".tabulator-row a").first).to_have_text(str(wanted))


def test_headings_sort_by_pointer_and_by_keyboard(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report)
    first_feature(page, 0)
    assert page.locator("#count").inner_text() == f"{N_FEATURES} features"
    assert len(features_of(page)) < N_FEATURES  # only rows in view are drawn
    heading = page.get_by_role("button", name="density", exact=True)
    heading.click()
    first_feature(page, N_FEATURES - 1)
    heading.focus()
    page.keyboard.press("Enter")
    first_feature(page, 0)


def test_search_compares_numbers_and_finds_words(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report)
    page.fill("#search", "density>0.009")  # feature i has density (i + 1) / 200 / 100
    expect(page.locator("#count")).to_have_text("20 of 200 features")
    first_feature(page, 180)
    page.fill("#search", "17")
    expect(page.locator("#count")).to_have_text("1 of 200 features")
    first_feature(page, 17)
    page.fill("#search", "onerror")
    expect(page.locator("#count")).to_have_text("25 of 200 features")
    page.fill("#search", "rare=yes density<0.0002")
    expect(page.locator("#count")).to_have_text("3 of 200 features")
    page.fill("#search", "nothing-like-it")
    page.wait_for_selector(".tabulator-placeholder")


def test_columns_can_be_chosen(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report)
    heading = page.get_by_role("button", name="nearest feature")
    assert not heading.is_visible()
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("nearest feature").check()
    heading.wait_for(state="visible")


def test_a_feature_opens_shows_its_texts_and_leads_to_its_neighbours(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report)
    page.locator("#table a[href='#/feature/3']:visible").click()
    page.wait_for_selector(".examples li")
    assert page.url.endswith("#/feature/3")
    assert page.locator("h1:visible").inner_text() == "Feature 3"
    assert page.title().startswith("Feature 3 ")
    assert page.locator(".examples li").count() == 5
    page.wait_for_selector(".histogram .bars path")
    headings = page.locator(".details h2").all_inner_texts()
    assert headings[2:] == ["Activations", "Logits raised", "Logits lowered", "Nearest features", "Largest neurons"]
    page.locator(".bars a[href='#/feature/4']").click()
    expect(page.locator("#feature h1")).to_have_text("Feature 4")
    page.go_back()
    expect(page.locator("#feature h1")).to_have_text("Feature 3")
    page.get_by_role("link", name="All features").click()
    page.locator("#table").wait_for(state="visible")


def test_every_text_of_the_corpus_shows_as_text(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report, "#/feature/100")
    shown = page.locator("#feature").text_content()
    for feature in range(100, 108):
        page.evaluate(f"location.hash = '#/feature/{feature}'")
        expect(page.locator("#feature h1")).to_have_text(f"Feature {feature}")
        page.wait_for_selector(".examples li")
        shown += page.locator("#feature").text_content()
        for word in page.locator(".examples .at").all():
            word.hover()
    for word in (WORDS[3], WORDS[4], WORDS[5], WORDS[6]):
        assert word in shown
    assert page.locator("#feature :is(img, script, b b)").count() == 0


def test_a_token_tells_its_activation_and_its_effect_to_pointer_and_keyboard(watched: Watched, report: Path) -> None:
    page = open_explorer(watched, report, "#/feature/60")
    tip = page.locator("#tip")
    assert not tip.is_visible()
    page.locator(".examples .at").first.hover()
    assert "activation 1.3" in tip.inner_text()  # 1 + 60 / 200
    assert "effect on the next token’s logit" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator(".examples .at").nth(1).focus()
    assert tip.is_visible()


def test_a_feature_that_never_fired_and_one_that_is_not_there_say_so(watched: Watched, report: Path) -> None:
    page = watched.page
    page.goto((report / "features.html").as_uri() + f"#/feature/{N_FEATURES - 1}")
    page.get_by_text("It fired on no token").wait_for()
    page.evaluate("location.hash = '#/feature/5000'")
    page.get_by_text("There is no such feature").wait_for()


@pytest.mark.parametrize("hash_", ["", "#/feature/12"])
def test_the_explorer_fits_a_phone_in_the_dark(browser: Any, report: Path, hash_: str) -> None:
    watched = Watched(browser, 390, "dark", has_touch=True)
    page = open_explorer(watched, report, hash_)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    expected = figures.DARK["paper"]
    assert background == f"rgb({', '.join(str(int(expected[i : i + 2], 16)) for i in (1, 3, 5))})"
    if hash_:
        page.locator(".examples .at").first.tap()
        assert page.locator("#tip").is_visible()
    watched.close()


def test_tables_of_the_front_page_sort_and_search_whole(watched: Watched, report: Path) -> None:
    page = watched.page
    page.goto((report / "index.html").as_uri())
    page.locator("#density summary").click()
    place = page.locator("#density details .table").first
    place.get_by_role("button", name="sort and search").click()
    page.wait_for_selector("#density details .tabulator-row a")
    place.get_by_role("button", name="density").click()
    first_feature(page, N_FEATURES - 1)
    page.keyboard.press("Tab")
    place.get_by_role("searchbox").fill("199")
    expect(page.locator("#density details .count")).to_contain_text(" of 200 rows")
    assert place.locator("a", has_text="199").first.get_attribute("href") == "features.html#/feature/199"
    passages = page.locator("#density > .table")
    passages.get_by_role("button").click()
    page.wait_for_selector("#density > .table .tabulator-row mark")
    assert HOSTILE in passages.locator(".tabulator-row").inner_text()


def test_a_point_of_a_figure_names_its_feature_and_leads_to_it(watched: Watched, report: Path) -> None:
    page = watched.page
    page.goto((report / "index.html").as_uri())
    plot = page.locator("[data-figure=points]")
    plot.locator(".point").nth(1).wait_for()
    box = plot.locator(".point").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    plot.locator(".hoverlayer .hovertext").wait_for()
    assert "feature 6" in str(plot.locator(".hoverlayer").text_content())
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url("**/features.html#/feature/6")
    page.wait_for_selector(".examples li")


def test_figures_offer_to_save_themselves_as_svg(watched: Watched, report: Path) -> None:
    page = watched.page
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("[data-figure=density] .bars path")
    page.locator("[data-figure=density]").hover()
    with page.expect_download() as download:
        page.locator("[data-figure=density] [data-title*=ownload]").first.click()
    assert download.value.suggested_filename == "density-density.svg"


def test_without_case_studies_the_explorer_is_the_table_alone(browser: Any, tmp_path: Path) -> None:
    for name, data in write_report(ReportInputs("t", "p", {}, [], sections(20, WORDS)[:2])).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    watched = Watched(browser)
    watched.page.goto((tmp_path / "features.html").as_uri())
    watched.page.locator("#table a[href='#/feature/3']:visible").click()
    watched.page.get_by_text("made without the case studies").wait_for()
    watched.close()
