"""docs/storage-format.md on a finished run: a program written from that page reads and checks all of it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipeline import language_model
from pipeline.config import Runtime, load_preset
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from tests.unit.storage import specified_reader


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory, tiny_preset: Path) -> Path:
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("store") / "artifacts", threads=1))
    return Chain(load_preset(str(tiny_preset)), workspace, run_directly).harvest().folder


def test_every_row_is_that_of_its_token(harvest: Path, tiny_model: Path):
    manifest = specified_reader.check_artifact(harvest)
    group = harvest / "store.zarr"
    specified_reader.check_places(group)
    layout = json.loads((group / "zarr.json").read_text())["attributes"]["sparsemill"]["layout"]
    rows = specified_reader.decode(group, specified_reader.read_array(group / "activations"))
    prompt, position = (specified_reader.read_array(group / name) for name in ("prompt", "position"))
    places = list(specified_reader.places(layout))
    assert len(places) == len(rows)
    assert all((prompt[row], position[row]) == (p, t) for p, t, row in places)

    parent = manifest["spec"]["parents"]["tokens"]
    tokens = harvest.parents[1] / "tokenize" / parent["id"]
    assert hashlib.sha256((tokens / "manifest.json").read_bytes()).hexdigest() == parent["manifest_sha256"]
    said = specified_reader.check_artifact(tokens)["stats"]
    ids = specified_reader.training_prompts(tokens)
    assert ids.shape == (layout["n_prompts"], said["prompt_tokens"])
    assert (ids[:, 0] == said["bos_id"]).all()
    shown = np.random.default_rng(0).integers(0, len(rows), 20)
    model = language_model.load(str(tiny_model))
    computed = model.activations(torch.from_numpy(ids[prompt[shown]]).long(), "blocks.0.mlp.hook_post").numpy()
    np.testing.assert_allclose(rows[shown], computed[np.arange(20), position[shown]], atol=1e-5)


def test_certificate_and_statistics_can_be_computed_again(harvest: Path):
    said = specified_reader.check_artifact(harvest)["stats"]["certificate"]
    group = harvest / "store.zarr"
    layout = json.loads((group / "zarr.json").read_text())["attributes"]["sparsemill"]["layout"]
    found = specified_reader.certificate(layout, specified_reader.read_array(group / "prompt"), said["order"])
    assert {name: said[name] for name in found} == pytest.approx(found)
    assert said["order"]["pool_rows"] == 20 * layout["chunk_rows"]
    assert (said["order"]["batch_rows"], said["order"]["lanes"], said["order"]["seed"]) == (4096, 8, 0)

    rows = specified_reader.decode(group, specified_reader.read_array(group / "activations"))
    statistics = load_file(harvest / "statistics.safetensors")
    assert statistics["rows"] == len(rows)
    np.testing.assert_allclose(statistics["total"], rows.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(statistics["low"], rows.min(0))
    np.testing.assert_array_equal(statistics["high"], rows.max(0))
    assert statistics["second_moment"].shape == (layout["d_in"], layout["d_in"])
    windows = [load_file(path) for path in sorted((harvest / "statistics").glob("window-*.safetensors"))]
    assert len(windows) == layout["n_windows"]
    assert sum(int(window["rows"]) for window in windows) == len(rows)
