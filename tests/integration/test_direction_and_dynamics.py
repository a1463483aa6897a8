"""The analyses that read a training's log, the store's statistics and the model's gradients, on a real small run."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import training
from pipeline.analysis.result import AnalysisResult
from pipeline.analyzing import load_result
from pipeline.config import Runtime, TrainConfig, load_preset
from pipeline.memory import density_bytes
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact

SETTINGS = (
    "train.autoencoder.steps=50",
    "train.autoencoder.resampling.scheme=reinit",
    "train.autoencoder.resampling.interval_steps=17",  # between two rows of the log, one every ten steps
    "train.autoencoder.resampling.window_rows=2560",
    "train.autoencoder.resampling.threshold=0.5",
    "train.autoencoder.resampling.exempt_fraction=0.25",
    'analyze.options.rare_direction={"ultra_low_below": 0.9, "rows": 5000, "gradient_prompts": 9}',
)


@pytest.fixture(scope="module")
def sae_and_results(
    tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, dict[str, AnalysisResult]]:
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("home") / "store", threads=1), Quiet())
    chain = Chain(load_preset(str(tiny_preset), SETTINGS), workspace, run_directly)
    sae = chain.train()
    findings = chain.analyze(sae, ["rare_direction", "training_dynamics"])
    return sae, {name: load_result(artifact) for name, artifact in findings.items()}


def test_dynamics_are_those_that_the_training_logged(sae_and_results: tuple[Artifact, dict[str, AnalysisResult]]):
    sae, results = sae_and_results
    found, log = training.training_densities(sae), training.training_log(sae)
    numbers = results["training_dynamics"].numbers
    assert numbers["n_windows"] == 50 * 256 // 4096 == len(found.rows)
    assert found.counts.nbytes == density_bytes(TrainConfig.model_validate(training.settings(sae)["config"]))
    assert numbers["n_resamplings"] == 2
    assert [event.step for event in found.resamplings] == [17, 34]
    first, second = (len(event.features) for event in found.resamplings)
    assert first > 0
    assert dict(zip(log["step"].to_pylist(), log["resampled"].to_pylist(), strict=True)) == {
        10: 0, 20: first, 30: 0, 40: second, 50: 0,
    }  # fmt: skip
    assert numbers["n_resampled"] == first + second
    assert numbers["n_followed"] == found.exempt.sum() == 16
    assert not set(np.flatnonzero(found.exempt)) & {one for event in found.resamplings for one in event.features}
    assert results["training_dynamics"].tables["windows"]["tokens"].to_pylist() == [4096, 8192, 12288]


def test_the_direction_is_measured_on_the_runs_own_store_and_model(
    sae_and_results: tuple[Artifact, dict[str, AnalysisResult]],
):
    sae, results = sae_and_results
    numbers, features = results["rare_direction"].numbers, results["density"].tables["features"]
    rare = features["density"].to_numpy() < 0.9
    encoder = training.load_autoencoder(sae).W_enc.double().numpy()
    mean = encoder[:, rare].mean(axis=1)
    assert numbers["n_rare"] == rare.sum() > 1
    assert numbers["positive_share"] == (mean > 0).mean()
    assert numbers["n_rows"] == 5000
    assert all(numbers[f"gradient_{loss}_all"] is not None for loss in ("autoencoder", "model"))
    top = results["rare_direction"].tables["top_tokens"].to_pylist()
    assert all(row["token"].startswith(("word_", "<|")) for row in top)
