"""Autoencoders of other programs through the whole pipeline, and ours out of it; by the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import training
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact

ROOT = Path(__file__).parents[2]
HOOK = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("home") / "store"
    return Workspace.open(Runtime(root=root, threads=1), Quiet())


@pytest.fixture(scope="module")
def chain(tiny_preset: Path, workspace: Workspace) -> Chain:
    return Chain(load_preset(str(tiny_preset)), workspace, run_directly)


@pytest.fixture(scope="module")
def trained(chain: Chain) -> Artifact:
    return chain.train()


@pytest.fixture(scope="module")
def author(trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained autoencoder as the post's author would have saved it."""
    sae = training.load_autoencoder(trained)
    path = tmp_path_factory.mktemp("author") / "25.pt"
    torch.save({"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}, path)
    return path


def sparsemill(workspace: Workspace, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments), "--home", str(workspace.store.root)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def numbers(findings: dict[str, Artifact]) -> dict[str, dict[str, object]]:
    return {name: facts(artifact)["numbers"] for name, artifact in findings.items()}


def test_with_its_activations_a_checkpoint_has_every_analysis_that_a_trained_one_has(
    chain: Chain, trained: Artifact, author: Path, workspace: Workspace
):
    done = sparsemill(workspace, "import", author, "--activations", trained.parents["activations"].id)
    assert done.returncode == 0, done.stderr
    imported = workspace.store.resolve(done.stdout.strip(), stage=training.AUTOENCODER_STAGES)
    assert imported.stage == "import"
    assert numbers(chain.analyze(imported)) == numbers(chain.analyze(trained))
    again = sparsemill(workspace, "import", author, "--activations", trained.parents["activations"].id)
    assert again.stdout == done.stdout


def test_alone_it_has_the_analyses_of_weights(
    chain: Chain, trained: Artifact, author: Path, workspace: Workspace, tiny_model: Path
):
    done = sparsemill(workspace, "import", author, "--hook-name", HOOK)
    assert done.returncode == 0, done.stderr
    alone = workspace.store.resolve(done.stdout.strip())
    found = chain.analyze(alone)
    assert list(found) == ["neuron_sparsity", "kurtosis", "enc_dec"]
    assert all(set(artifact.parents) == {"sae"} for artifact in found.values())
    assert (
        numbers(found)["kurtosis"]["decoder_median"]
        == numbers(chain.analyze(trained, ["kurtosis"]))["kurtosis"]["decoder_median"]
    )
    refused = sparsemill(workspace, "analyze", alone.id, "--only", "density")
    assert refused.returncode == 1
    assert "--activations" in refused.stderr
    done = sparsemill(workspace, "import", author, "--hook-name", HOOK, "--model", tiny_model)
    with_model = chain.analyze(workspace.store.resolve(done.stdout.strip()))
    assert "null_space" in with_model
    assert (
        numbers(with_model)["null_space"]["rank"]
        == numbers(chain.analyze(trained, ["null_space"]))["null_space"]["rank"]
    )


def test_a_site_that_is_not_known_or_another_is_refused(author: Path, trained: Artifact, workspace: Workspace):
    harvest = trained.parents["activations"].id
    for arguments, message in (
        ([], "does not say its site"),
        (["--activations", harvest, "--hook-name", "blocks.0.hook_mlp_out"], "another site"),
    ):
        done = sparsemill(workspace, "import", author, *arguments)
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_an_export_imports_back_to_the_same_weights(name: str, trained: Artifact, workspace: Workspace, tmp_path: Path):
    done = sparsemill(workspace, "export", trained.id, tmp_path / "out", "--format", name)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_file() for line in done.stdout.splitlines())
    back = sparsemill(workspace, "import", tmp_path / "out", "--activations", trained.parents["activations"].id)
    assert back.returncode == 0, back.stderr
    ours, theirs = (
        training.load_autoencoder(artifact) for artifact in (trained, workspace.store.resolve(back.stdout.strip()))
    )
    assert torch.equal(ours.W_enc, theirs.W_enc)
    assert torch.equal(ours.W_dec, theirs.W_dec)
    again = sparsemill(workspace, "export", trained.id, tmp_path / "out", "--format", name)
    assert again.returncode == 1
    assert "not empty" in again.stderr
