"""Reports on the tiny model: sections in order, two autoencoders side by side, images, and a server on this machine."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import webbrowser
from html import unescape
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from pipeline import reporting
from pipeline.analysis import ANALYSES
from pipeline.cli import app
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.report import images
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound, ConfigError

FEW = ("train.autoencoder.steps=20", 'analyze.analyses=["density", "kurtosis"]')


def chain(preset: Path, root: Path, *overrides: str) -> Chain:
    workspace = Workspace.open(Runtime(root=root, threads=1), Quiet())
    return Chain(load_preset(str(preset), (*FEW, *overrides)), workspace, run_directly)


def sparsemill(*arguments: object) -> None:
    app([str(argument) for argument in arguments], result_action="return_value")


@pytest.fixture(scope="module")
def trained(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Artifact], Artifact]:
    """A store with two autoencoders, these, and the report on the first."""
    root = tmp_path_factory.mktemp("home") / "store"
    first = chain(tiny_preset, root)
    report = first.report()
    saes = [first.workspace.store.parent(report, "sae"), chain(tiny_preset, root, "train.autoencoder.seed=1").train()]
    return root, saes, report


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses given to the browser."""
    found: list[str] = []
    monkeypatch.setattr(webbrowser, "open", found.append)
    return found


def test_open_finds_the_newest_report_or_the_one_on_an_artifact(
    trained: tuple[Path, list[Artifact], Artifact], opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, (first, second), report = trained
    page = report.folder.resolve() / "index.html"
    for reference in ("latest", report.id, first.id):
        sparsemill("report", "open", reference, "--home", root)
        assert capsys.readouterr().out == f"{page}\n"
    assert opened == [page.as_uri()] * 3
    with pytest.raises(ConfigError, match=rf"analyze {second.id}"):
        sparsemill("report", "open", second.id, "--home", root)


def test_open_of_a_store_without_reports_says_so(tmp_path: Path, opened: list[str]) -> None:
    with pytest.raises(ArtifactNotFound, match="no report yet"):
        sparsemill("report", "open", "--home", tmp_path / "empty")
    assert not opened


def test_sections_follow_the_registry_in_whatever_order_they_were_asked_for(
    trained: tuple[Path, list[Artifact], Artifact], tiny_preset: Path, tmp_path: Path
) -> None:
    root, (first, _), _ = trained
    asked = ["null_space", "kurtosis", "loss_recovered", "neuron_sparsity", "enc_dec", "density"]
    expected = ["density", "loss_recovered", "neuron_sparsity", "kurtosis", "enc_dec", "null_space"]
    assert expected == [name for name in ANALYSES if name in asked]
    there = chain(tiny_preset, shutil.copytree(root, tmp_path / "store"))
    made = there.report(first, asked)
    html = (made.folder / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)" class="analysis">', html) == expected
    findings = reporting.findings_of(made, there.workspace)
    assert list(findings) == expected
    shutil.rmtree(made.folder.parent)
    backwards = dict(reversed(findings.items()))
    again = reporting.report(there.preset.name, first, backwards, there.workspace)
    assert again.status == "made"
    assert again.artifact.manifest_sha256 == made.manifest_sha256


def test_the_headline_table_as_markdown_is_the_pages(
    trained: tuple[Path, list[Artifact], Artifact], tiny_preset: Path
) -> None:
    root, _, report = trained
    lines = reporting.headline_markdown(report, chain(tiny_preset, root).workspace).splitlines()
    assert lines[:2] == ["| quantity | this run | the post | comparable |", "| --- | --- | --- | --- |"]
    table = re.search(
        r'<table class="headline">.*?<tbody>(.*?)</tbody>', (report.folder / "index.html").read_text(), re.DOTALL
    )
    assert table is not None
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table[1])
    shown = [re.sub(r"<[^>]+>", "", cell).replace(" · ", ": ") for cell in cells]
    assert [cell for line in lines[2:] for cell in line.strip("| ").split(" | ")] == shown
    assert any(line.startswith("| Ultra-low features, density &lt; 1e-4 | ") for line in lines)


def test_a_comparison_makes_what_is_missing_and_is_found_again(
    trained: tuple[Path, list[Artifact], Artifact],
    tiny_preset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, (first, second), report = trained
    own = shutil.copytree(root, tmp_path / "store")
    settings = ["--preset", tiny_preset, "--home", own, "--threads", 1]
    settings += [part for override in FEW for part in ("--set", override)]
    sparsemill("report", "compare", first.id, second.id, *settings)
    made, page = capsys.readouterr().out.splitlines()
    html = Path(page).read_text()
    assert f"../{report.id}/index.html" in html
    assert "autoencoder.seed" in html
    assert "Best match of a random direction" in html  # of cross_seed
    assert "A-density" in html
    assert "B-kurtosis" in html
    again = re.search(r'This comparison again: <code class="command">(.*?)</code>', html)
    assert again is not None
    assert 'analyze.analyses=["density", "kurtosis"]' in shlex.split(unescape(again[1]))
    before = sorted(own.rglob("manifest.json"))
    sparsemill("report", "compare", first.id, second.id, *settings)
    assert capsys.readouterr().out.splitlines() == [made, page]
    assert sorted(own.rglob("manifest.json")) == before
    workspace = Workspace.open(Runtime(root=own), Quiet())
    found = reporting.findings_of(workspace.store.resolve(made), workspace)
    assert list(found) == ["cross_seed", "A-density", "A-kurtosis", "B-density", "B-kurtosis"]


def test_an_imported_autoencoder_has_a_report_of_its_weights(
    trained: tuple[Path, list[Artifact], Artifact],
    tiny_preset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, (first, _), _ = trained
    sparsemill("export", first.id, tmp_path / "saelens", "--home", root)
    capsys.readouterr()
    own = tmp_path / "store"
    sparsemill("import", tmp_path / "saelens", "--home", own)
    imported = capsys.readouterr().out.strip()
    sparsemill("analyze", imported, "--only", "kurtosis", "--preset", tiny_preset, "--home", own)
    html = Path(capsys.readouterr().out.splitlines()[-1]).read_text()
    assert "imported from saelens" in html
    assert f"sparsemill analyze {imported}" in html


def test_a_comparison_takes_two_that_differ(trained: tuple[Path, list[Artifact], Artifact], tiny_preset: Path) -> None:
    root, (first, _), _ = trained
    for others in ([], [first.id]):
        with pytest.raises(ConfigError, match="different autoencoders"):
            sparsemill("report", "compare", first.id, *others, "--preset", tiny_preset, "--home", root)


def test_it_is_served_to_this_machine_until_interrupted(trained: tuple[Path, list[Artifact], Artifact]) -> None:
    root, _, report = trained
    server = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "report", "serve", "--port", "0", "--home", str(root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(address).read() == (report.folder / "index.html").read_bytes()
        outside = address.replace(f"{report.id}/index.html", "../train/")
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(outside)
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert errors == ""


def test_a_port_that_is_taken_is_refused(trained: tuple[Path, list[Artifact], Artifact]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--port 0"):
            sparsemill("report", "serve", "--port", taken.getsockname()[1], "--home", trained[0])


def test_images_need_kaleido_and_a_browser(
    trained: tuple[Path, list[Artifact], Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="apt-get install chromium"):
        sparsemill("report", "images", "--folder", tmp_path / "images", "--home", trained[0])
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ConfigError, match=r"sparsemill\[images\]"):
        sparsemill("report", "images", "--folder", tmp_path / "images", "--home", trained[0])
    assert not (tmp_path / "images").exists()


@pytest.mark.system
@pytest.mark.parametrize(("kind", "start"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_every_figure_becomes_an_image(
    trained: tuple[Path, list[Artifact], Artifact],
    kind: Any,
    start: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        images.browser()
    except ConfigError as missing:
        if os.environ.get("SPARSEMILL_REQUIRE_SYSTEM") == "1":
            raise
        pytest.skip(str(missing))
    root, _, _ = trained
    sparsemill("report", "images", "--format", kind, "--folder", tmp_path, "--home", root)
    names = {f"{name}.{kind}" for name in ("density-density", "density-l0", "kurtosis-decoder", "kurtosis-encoder")}
    assert set(capsys.readouterr().out.split()) == {str(tmp_path / name) for name in names}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(start) for path in tmp_path.iterdir())
