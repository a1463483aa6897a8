"""Autoencoders of other programs through the whole pipeline, and ours out of it; by the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipeline import reporting, training
from pipeline.analysis import ANALYSES
from pipeline.analyzing import available
from pipeline.checkpoints import read_checkpoint
from pipeline.checkpoints.bundle import export_bundle
from pipeline.checkpoints.exporting import export_autoencoder
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.sharing import lineage
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError
from tests.integration.hub import Hub

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


def test_with_its_activations_a_checkpoint_has_every_analysis_but_that_of_the_training_log(
    chain: Chain, trained: Artifact, author: Path, workspace: Workspace
):
    done = sparsemill(workspace, "import", author, "--activations", trained.parents["activations"].id)
    assert done.returncode == 0, done.stderr
    imported = workspace.store.resolve(done.stdout.strip(), stage=training.AUTOENCODER_STAGES)
    assert imported.stage == "import"
    names = [name for name, one in ANALYSES.items() if one.requires <= available(imported)]
    of_one = {name for name, one in ANALYSES.items() if "companions" not in one.requires}
    assert of_one - set(names) == {"training_dynamics"}
    assert numbers(chain.analyze(imported, names)) == numbers(chain.analyze(trained, names))
    with pytest.raises(ConfigError, match="training_log missing"):
        chain.analyze(imported, ["training_dynamics"])
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


def test_a_saelens_export_says_how_the_prompts_began_and_what_was_trained_on(
    trained: Artifact, author: Path, tiny_preset: Path, workspace: Workspace, tmp_path: Path
):
    def said(sae: Artifact, folder: Path) -> tuple[object, ...]:
        export_autoencoder(sae, "saelens", folder, workspace)
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        return tuple(metadata[name] for name in ("prepend_bos", "seqpos_slice", "context_size", "training_tokens"))

    rows = facts(trained)["rows_seen"]
    assert said(trained, tmp_path / "with") == (True, [1, None], 16, rows)
    assert read_checkpoint(str(tmp_path / "with")).train_tokens == rows
    changes = ["tokenize.bos=false", "tokenize.train_tokens=8192", "harvest.include_bos=true"]
    harvested = Chain(load_preset(str(tiny_preset), changes), workspace, run_directly).harvest()
    elsewhere = import_checkpoint(str(author), workspace, activations=harvested).artifact
    assert said(elsewhere, tmp_path / "without") == (False, [None, None], 16, None)
    alone = import_checkpoint(str(author), workspace, hook_name=HOOK).artifact
    assert said(alone, tmp_path / "alone") == (None, None, None, None)


def test_a_plain_export_has_the_very_bits_and_imports_back(trained: Artifact, workspace: Workspace, tmp_path: Path):
    done = sparsemill(workspace, "export", trained.id, tmp_path / "out", "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "autoencoder.safetensors").read_bytes() == trained.read_bytes("autoencoder.safetensors")
    back = sparsemill(workspace, "import", tmp_path / "out", "--activations", trained.parents["activations"].id)
    assert back.returncode == 0, back.stderr
    imported = workspace.store.resolve(back.stdout.strip())
    assert imported.read_bytes("autoencoder.safetensors") == trained.read_bytes("autoencoder.safetensors")
    assert facts(imported)["rows_seen"] == facts(trained)["rows_seen"]


@pytest.fixture(scope="module")
def reported(chain: Chain, trained: Artifact) -> Artifact:
    return chain.report(trained, ["density", "enc_dec"])


def test_a_bundle_has_all_that_belongs_to_an_autoencoder(
    trained: Artifact, reported: Artifact, workspace: Workspace, tmp_path: Path
):
    bundle = tmp_path / "bundle"
    done = sparsemill(workspace, "export", reported.id, bundle, "--bundle")
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(["sha256sum", "--check", "--strict", "checksums.sha256"], cwd=bundle, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert len(checked.stdout.splitlines()) == len(files) - 1
    assert {bundle / name for name in files} == {Path(line) for line in done.stdout.splitlines()}
    assert (bundle / "report" / "index.html").read_bytes() == reported.read_bytes("index.html")
    for one in lineage(reported, workspace.store):
        assert (bundle / "lineage" / f"{one.id}.json").read_bytes() == (one.folder / "manifest.json").read_bytes()
    density = workspace.store.parent(reported, "density")
    table = pq.read_table(density.checked_file("tables/features.parquet"))
    found = load_file(bundle / "densities.safetensors")["density"]
    assert found.tolist() == table["density"].to_pylist()
    assert pq.read_table(bundle / "features.parquet")["density"].to_pylist() == found.tolist()
    card = ModelCard.load(bundle / "README.md", ignore_metadata_errors=False)
    assert "sparse-autoencoder" in card.data.to_dict()["tags"]
    assert reporting.headline_markdown(reported, workspace) in card.text
    assert all(f"`{parent.id}`" in card.text for parent in (trained, workspace.store.parent(trained, "activations")))
    again = tmp_path / "again"
    assert sparsemill(workspace, "export", trained.id, again, "--bundle").returncode == 0  # the only report on it
    assert {name: (again / name).read_bytes() for name in files} == {
        name: (bundle / name).read_bytes() for name in files
    }


def test_a_bundles_card_computes_what_the_autoencoder_computes(
    trained: Artifact, reported: Artifact, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_bundle(reported, tmp_path / "bundle", workspace)
    sae = training.load_autoencoder(trained)
    x = torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(0))
    code = (tmp_path / "bundle" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "bundle")
    names: dict[str, object] = {"x": x}
    exec(code, names)
    torch.testing.assert_close(names["feature_acts"], sae.encode(x))
    torch.testing.assert_close(names["sae_out"], sae(x).sae_out)


def test_a_bundle_imports_to_the_same_autoencoder_and_a_damaged_one_does_not(
    trained: Artifact, reported: Artifact, workspace: Workspace, tmp_path: Path
):
    bundle = tmp_path / "bundle"
    export_bundle(reported, bundle, workspace)
    imported = import_checkpoint(str(bundle), workspace).artifact
    assert imported.read_bytes("autoencoder.safetensors") == trained.read_bytes("autoencoder.safetensors")
    assert training.settings(imported)["hook_name"] == HOOK
    weights = bundle / "autoencoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="not the one that was published"):
        import_checkpoint(str(bundle), workspace)


def test_what_has_no_single_report_makes_no_bundle(
    author: Path, chain: Chain, trained: Artifact, reported: Artifact, workspace: Workspace, tmp_path: Path
):
    alone = import_checkpoint(str(author), workspace, hook_name=HOOK).artifact
    with pytest.raises(InputError, match="no report"):
        export_bundle(alone, tmp_path / "out", workspace)
    other = reporting.report("another", alone, chain.analyze(alone, ["kurtosis"]), workspace).artifact
    export_bundle(other, tmp_path / "weights", workspace)
    assert not (tmp_path / "weights" / "densities.safetensors").exists()
    reporting.report("twice", alone, chain.analyze(alone, ["kurtosis"]), workspace)
    with pytest.raises(InputError, match="several reports"):
        export_bundle(alone, tmp_path / "out", workspace)
    with pytest.raises(InputError, match="comparison"):
        export_bundle(reporting.compare([reported, other], None, workspace).artifact, tmp_path / "out", workspace)
    assert not (tmp_path / "out").exists()


IMPORT = """
import sys
from pathlib import Path
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.config import Runtime
from pipeline.progress import Quiet
from pipeline.workspace import Workspace
root, hook_name, *sources = sys.argv[1:]
workspace = Workspace.open(Runtime(root=Path(root), threads=1), Quiet())
for source in sources:
    try:
        print(import_checkpoint(source, workspace, hook_name=hook_name).artifact.id)
    except Exception as error:
        print(error)
"""


def import_elsewhere(workspace: Workspace, home: Path, sources: Sequence[str], **environment: str) -> list[str]:
    """In a process of its own, since huggingface_hub reads its settings when it is imported."""
    settings = {"HF_HUB_OFFLINE": "1"} | environment | {"HF_HOME": str(home)}
    command = [sys.executable, "-c", IMPORT, str(workspace.store.root), HOOK, *sources]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_layout_comes_from_the_hub_online_and_from_its_cache_offline(
    trained: Artifact, reported: Artifact, author: Path, workspace: Workspace, tmp_path: Path
):
    config = json.dumps({"site": "post", "layer": 0, "model_name": "gelu-1l"}).encode()
    hub = Hub(tmp_path / "remote")
    posted = {"README.md": b"#", "25.pt": author, "25_cfg.json": config, "run/47.pt": author}
    commit = hub.commit("NeelNanda/sparse_autoencoder", posted)
    peers: dict[str, Path | bytes] = {}
    for folder, name in (("sae/blocks.0", "saelens"), ("dictionary/trainer_0", "dictionary_learning")):
        files = export_autoencoder(trained, name, tmp_path / name, workspace)
        peers |= {f"{folder}/{path.name}": path for path in files}
    hub.commit("owner/peers", peers)
    bundle = export_bundle(reported, tmp_path / "bundle", workspace)
    hub.commit("owner/bundle", {path.relative_to(tmp_path / "bundle").as_posix(): path for path in bundle})
    sources = [
        "hf://NeelNanda/sparse_autoencoder/25.pt",
        f"hf://NeelNanda/sparse_autoencoder@{commit}/25.pt",
        "hf://NeelNanda/sparse_autoencoder/run",
        "hf://owner/peers/sae/blocks.0",
        "hf://owner/peers/dictionary",
        "hf://owner/bundle",
    ]
    with hub.served() as online:
        *found, missing, nowhere = import_elsewhere(
            workspace, tmp_path / "home", [*sources, "hf://owner/peers/none.pt", "hf://owner/none"], **online
        )
    assert "no such checkpoint" in missing
    assert "not to be had" in nowhere
    artifacts = [workspace.store.open(one) for one in found]
    assert [one.config["format"] for one in artifacts] == [
        "author", "author", "author", "saelens", "dictionary_learning", "safetensors"
    ]  # fmt: skip
    assert found[0] == found[1] != found[2]
    assert {one.read_bytes("autoencoder.safetensors") for one in artifacts} == {
        trained.read_bytes("autoencoder.safetensors")
    }
    assert not [asked for asked in hub.requests if "sparse_autoencoder" in asked and "README.md" in asked]
    assert import_elsewhere(workspace, tmp_path / "home", sources) == found
