"""The survey stage on a real store: made once, resumed to the same bits, and what it says of the store's rows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import surveying, training
from pipeline.analysis.surveying import SurveyState
from pipeline.config import Runtime, SurveyConfig, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.errors import SparsemillError
from storage.reader import ShardReader

CONFIG = SurveyConfig(rows=20_000, top_firings=4, sample_firings=8, kept_firings=16)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("home") / "store"
    return Workspace.open(Runtime(root=root, threads=1, checkpoint_seconds=1e-6), Quiet())


@pytest.fixture(scope="module")
def sae(tiny_preset: Path, workspace: Workspace) -> Artifact:
    return Chain(load_preset(str(tiny_preset)), workspace, run_directly).train()


def test_an_interrupted_pass_goes_on_where_it_was_and_ends_with_the_same_bytes(
    sae: Artifact, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    class KilledError(Exception):
        pass

    take, taken = SurveyState.take, []

    def stop_at_the_third(state: SurveyState, *batch: object) -> None:
        if len(taken) == 2:
            raise KilledError
        taken.append(int(state.rows[0]))
        take(state, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SurveyState, "take", stop_at_the_third)
    with pytest.raises(KilledError):
        surveying.survey(CONFIG, sae, workspace)
    went_on: list[int] = []

    def count(state: SurveyState, *batch: object) -> None:
        went_on.append(int(state.rows[0]))
        take(state, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SurveyState, "take", count)
    made = surveying.survey(CONFIG, sae, workspace)
    assert made.status == "resumed"
    assert went_on[0] == 2 * surveying.BATCH_ROWS
    uninterrupted = surveying.survey(CONFIG.model_copy(update={"kept_firings": 17}), sae, workspace)
    assert surveying.survey(CONFIG, sae, workspace).status == "cached"
    assert list(made.artifact.manifest.files) == [surveying.SURVEY]
    found, whole = surveying.load_survey(made.artifact), surveying.load_survey(uninterrupted.artifact)
    np.testing.assert_array_equal(found.total, whole.total)
    for one, other in ((found.top, whole.top), (found.sample, whole.sample)):
        for part, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, same)


def test_firings_are_where_the_store_has_them(sae: Artifact, workspace: Workspace):
    found = surveying.load_survey(surveying.survey(CONFIG, sae, workspace).artifact)
    reader = ShardReader.of(workspace.store.parent(sae, "activations"))
    acts = training.load_autoencoder(sae).encode(torch.from_numpy(reader.read(0, 20_000).rows)).numpy()
    near_zero = (acts > 0) & (acts < 1e-5)
    assert (abs((acts > 0).sum(axis=0) - found.count) <= near_zero.sum(axis=0)).all()
    np.testing.assert_allclose(found.largest, acts.max(axis=0), rtol=1e-5, atol=1e-6)
    feature = int(found.count.argmax())
    for firings in (found.top, found.sample):
        rows = torch.from_numpy(reader.rows_at(firings.prompt[feature], firings.position[feature]))
        again = training.load_autoencoder(sae).encode(rows)[:, feature].numpy()
        np.testing.assert_allclose(again, firings.activation[feature], rtol=1e-4)


def statuses(preset: Path, root: Path, sae: Artifact, name: str, override: str) -> dict[str, str]:
    workspace = Workspace.open(Runtime(root=root, threads=1), Quiet())
    chain = Chain(load_preset(str(preset), [override]), workspace, run_directly)
    chain.analyze(sae, [name])
    return {stage.name: stage.made.status for stage in chain.runs}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("density", "bin_width=0.2"),
        ("rare_cluster", "aligned_above=0.9"),
        ("loss_recovered", "prompts=8"),
        ("null_space", "tolerance=0.001"),
        ("case_studies", "top_examples=2"),
        ("training_dynamics", "paths=3"),
    ],
)
def test_another_option_makes_its_analysis_alone_again_and_reads_no_shard(
    name: str, option: str, tiny_preset: Path, sae: Artifact, workspace: Workspace, tmp_path: Path
):
    statuses(tiny_preset, workspace.store.root, sae, name, "tokenize.seed=0")
    root = Path(shutil.copytree(workspace.store.root, tmp_path / "store"))
    for shard in (root / "harvest").glob("*/store.zarr/activations/c"):
        shutil.rmtree(shard)
    found = statuses(tiny_preset, root, sae, name, f"analyze.options.{name}.{option}")
    assert found.pop(name) == "made"
    assert set(found.values()) <= {"cached"}
    with pytest.raises(SparsemillError, match="c/"):  # what does read rows misses them
        statuses(tiny_preset, root, sae, "rare_direction", "analyze.options.rare_direction.features=[1,2]")
