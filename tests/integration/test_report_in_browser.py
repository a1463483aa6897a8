"""The report in a real browser, from disk: it draws, reaches for nothing, and runs nothing that came with the data."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis import AnalysisResult, figures
from pipeline.analysis.figures import Series
from pipeline.report import ReportInputs, Section, write_report

pytestmark = pytest.mark.system
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        missing = "no chromium (Debian's package chromium)"
        if os.environ.get("SPARSEMILL_REQUIRE_SYSTEM") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
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
    result = AnalysisResult({"l0": 24.0}, {"top_tokens": passage}, {"density": figure}, HOSTILE)
    folder = tmp_path_factory.mktemp("report")
    inputs = ReportInputs(HOSTILE, "demo", {"model": HOSTILE}, [], [Section("density", "analyze-0", {}, result)])
    for name, data in write_report(inputs).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_draws_offline_without_errors_or_overflow(browser: Any, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    fill = page.eval_on_selector(".bars path", "bar => getComputedStyle(bar).fill")
    expected = (figures.DARK if scheme == "dark" else figures.LIGHT)["frequent"]
    assert fill == f"rgb({', '.join(str(int(expected[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.title() == f"{HOSTILE} · sparsemill"
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert not problems
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
    context.close()


def test_it_follows_the_system_into_the_dark_and_back(browser: Any, report: Path) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    read = "() => getComputedStyle(document.querySelector('.bars path')).fill"
    light = page.evaluate(read)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ({read})() !== before", arg=light)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"before => ({read})() === before", arg=light)
    page.close()


def test_hovering_a_bar_names_features_and_text_stays_text(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((report / "index.html").as_uri())
    page.wait_for_selector("figure .main-svg .bars path")
    box = page.locator(".bars path").nth(15).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.8 * box["height"])
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "feature" in str(page.locator(".hoverlayer").text_content())
    assert page.title() != "owned"
    page.close()
