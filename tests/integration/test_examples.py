import doctest
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsemill
from pipeline import features, texts, torch_batches
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.encoding import ENCODINGS, Encoding
from storage.errors import ArtifactNotFound

EXAMPLES = Path(__file__).parents[2] / "examples"
STORE, FEATURES = EXAMPLES / "activation_store.ipynb", EXAMPLES / "autoencoder_features.ipynb"


def home_with(root: Path, preset: Path, encoding: Encoding, steps: int = 0) -> Path:
    """An artifact store with the tiny pipeline's activations and, where steps are asked for, autoencoder."""
    overrides = (f"harvest.encoding={encoding}", f"train.autoencoder.steps={steps or 1}")
    chain = Chain(
        load_preset(str(preset), overrides), Workspace.open(Runtime(root=root, threads=1), Quiet()), run_directly
    )
    if steps:
        chain.train()
    else:
        chain.harvest()
    return root


@pytest.fixture(scope="module")
def home(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_with(tmp_path_factory.mktemp("home") / "store", tiny_preset, "float16", steps=5)


def run_cells(path: Path) -> dict[str, object]:
    """Runs a notebook's code cells one after the other in one namespace, which it returns."""
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name} cell {number}", "exec"), names)
    return names


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_notebook_runs_on_a_store_of_each_encoding(
    encoding: Encoding,
    tiny_preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("SPARSEMILL_HOME", str(home_with(tmp_path / "store", tiny_preset, encoding)))
    run_cells(STORE)
    shown = capsys.readouterr().out
    assert f"kept as {encoding}" in shown
    assert "False" not in shown  # each comparison that it prints holds
    assert shown.count("True") == 8


def ours(home: Path, folder: Path) -> str:
    return sparsemill.artifacts(home).resolve("latest", stage="train").id


def the_authors(home: Path, folder: Path) -> str:
    sae = sparsemill.open_sae(ours(home, folder), root=home)
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    torch.save(tensors, folder / "25.pt")
    (folder / "25_cfg.json").write_text(json.dumps({"site": "post", "layer": 0, "num_tokens": 2_000_000_000}))
    return str(folder / "25.pt")


def saelenses(home: Path, folder: Path) -> str:
    sparsemill.export_sae(ours(home, folder), folder / "saelens", root=home)
    return str(folder / "saelens")


@pytest.mark.parametrize(("kind", "stage"), [(ours, "train"), (the_authors, "import"), (saelenses, "import")])
def test_the_notebook_on_features_runs_on_an_autoencoder_of_each_kind(
    kind: Callable[[Path, Path], str],
    stage: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("SPARSEMILL_HOME", str(home))
    monkeypatch.setenv("SPARSEMILL_SAE", kind(home, tmp_path))
    names = run_cells(FEATURES)
    opened = names["features"]
    assert isinstance(opened, sparsemill.Features)
    assert opened.artifact.stage == stage
    assert torch.equal(opened.sae.W_enc, sparsemill.open_sae(ours(home, tmp_path), root=home).W_enc)
    assert names["best"]
    shown = capsys.readouterr().out
    assert "False" not in shown
    assert shown.count("True") == 4


@pytest.mark.parametrize("notebook", [STORE, FEATURES], ids=lambda path: path.stem)
def test_outputs_kept_in_a_notebook_are_of_one_run_from_top_to_bottom(notebook: Path):
    code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


@pytest.mark.parametrize("module", [sparsemill, features, texts, torch_batches], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_hold(module: object, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSEMILL_HOME", str(home))
    order = sparsemill.BatchOrder(seed=0, batch_rows=256, pool_rows=131072)
    names = {"sparsemill": sparsemill, "order": order, "step": torch.sum}
    finder = doctest.DocTestFinder()
    tests = finder.find(module, extraglobs=names)
    assert any(test.examples for test in tests)
    for test in tests:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0, test.name


def test_statistics_are_those_of_the_rows(home: Path):
    activations = sparsemill.open_activations(root=home)
    rows = activations.read(0, activations.n_rows).rows.astype(np.float64)
    statistics = sparsemill.open_statistics(root=home)
    np.testing.assert_allclose(statistics.mean, rows.mean(0), atol=1e-3)  # kept before rows were rounded to float16
    np.testing.assert_allclose(statistics.low, rows.min(0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(statistics.high, rows.max(0), rtol=1e-3, atol=1e-6)


def test_texts_are_those_of_the_rows_tokens(home: Path):
    activations, texts, tokens = (
        sparsemill.open_activations(root=home),
        sparsemill.open_texts(root=home),
        sparsemill.open_tokens(root=home),
    )
    batch = activations.read(0, 50)
    for prompt, position in zip(batch.prompt, batch.position, strict=True):
        token = tokens.prompts("train", [prompt])[0, position]
        expected = "<|EOS|>" if token == 1 else f"word_{token - 2}"
        assert texts.around(prompt, position).token.strip() == expected


def test_texts_need_the_tokens_in_the_same_store(home: Path, tmp_path: Path):
    activations = sparsemill.artifacts(home).resolve("latest", stage="harvest")
    with pytest.raises(ArtifactNotFound):
        sparsemill.open_texts(str(activations.folder) + os.sep, root=tmp_path / "elsewhere")
