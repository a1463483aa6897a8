"""The studies on the tiny model: each trains what is missing, compares, and finds everything the second time."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import studies, training
from pipeline.cli import app
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.studies import Study, look_ahead
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made
from storage.errors import ConfigError, InputError

ROOT = Path(__file__).parents[2]
FEW = (
    "harvest.second_moment_stride=1",
    "train.autoencoder.steps=20",
    'analyze.analyses=["density"]',
    "analyze.options.loss_recovered.prompts=8",
)
MLP_OUT = "blocks.0.hook_mlp_out"


def chain(preset: Path, root: Path, *overrides: str) -> Chain:
    workspace = Workspace.open(Runtime(root=root, threads=1), Quiet())
    return Chain(load_preset(str(preset), (*FEW, *overrides)), workspace, run_directly)


@pytest.fixture(scope="module")
def trained(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A store with an autoencoder, and that."""
    root = tmp_path_factory.mktemp("home") / "store"
    return root, chain(tiny_preset, root).train()


@pytest.fixture
def root(trained: tuple[Path, Artifact], tmp_path: Path) -> Path:
    """A store of its own with the autoencoder."""
    return Path(shutil.copytree(trained[0], tmp_path / "store"))


def run(
    study: Study, preset: Path, root: Path, *overrides: str, sae: str | None = None
) -> tuple[Chain, dict[str, Any]]:
    """Runs a study; returns the chain and the comparison's numbers."""
    done = chain(preset, root, *overrides)
    report = study.run(done, sae)
    page = (report.folder / "index.html").read_text()
    assert study.analysis in page
    return done, facts(done.workspace.store.parent(report, study.analysis))["numbers"]


def made(done: Chain) -> list[str]:
    return [stage.name for stage in done.runs if stage.made.status != "cached"]


def ids(done: Chain) -> list[str]:
    return [stage.made.artifact.id for stage in done.runs]


STUDIES = {
    "cross_seed": studies.cross_seed(2),
    "orthogonal_rerun": studies.orthogonal_rerun((1, 2, 3)),
    "encoder_sparsity": studies.encoder_sparsity(l1=(1e-4,), l2=(1e-3,)),
    "site_comparison": studies.site_comparison(l1_factors=(1.0, 3.0)),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_made_once_and_then_found(
    name: str, tiny_preset: Path, root: Path, trained: tuple[Path, Artifact]
) -> None:
    first, numbers = run(STUDIES[name], tiny_preset, root, sae="latest")
    assert any(stage.startswith("train ") for stage in made(first))
    assert numbers
    # latest is the autoencoder that no study trained, though others are newer now
    again, same = run(STUDIES[name], tiny_preset, root, sae="latest")
    assert made(again) == []
    assert ids(again) == ids(first)
    assert same == numbers
    assert all(facts(stage.made.artifact) for stage in again.runs if stage.name == "study")
    assert again.workspace.store.ids("train")[0] != trained[1].id


def test_a_killed_study_goes_on_with_the_same_autoencoder(
    tiny_preset: Path, root: Path, trained: tuple[Path, Artifact]
) -> None:
    killed = chain(tiny_preset, root)

    def until_the_second(name: str, work: Callable[[], Made]) -> Made:
        if name == "train seed 2":
            raise KeyboardInterrupt
        return work()

    killed.run = until_the_second
    with pytest.raises(KeyboardInterrupt):
        studies.cross_seed(3).run(killed, "latest")
    done, _ = run(studies.cross_seed(3), tiny_preset, root, sae="latest")
    assert made(done)[0] == "train seed 2"
    assert done.workspace.store.parent(done.runs[-1].made.artifact, "sae").id == trained[1].id


def test_seeds_differ_in_weights_and_order_alone(tiny_preset: Path, root: Path) -> None:
    done, numbers = run(studies.cross_seed(3), tiny_preset, root)
    assert numbers["n_compared"] == 3
    found = {
        stage.name: training.settings(stage.made.artifact)["config"]
        for stage in done.runs
        if stage.made.artifact.stage == "train"
    }
    configs = [found[name] for name in ("train", "train seed 1", "train seed 2")]
    assert [(one.pop("reader_seed"), one["autoencoder"].pop("seed")) for one in configs] == [(0, 0), (1, 1), (2, 2)]
    assert configs[0] == configs[1] == configs[2]


def test_a_variation_is_the_artifact_that_the_same_settings_give_by_hand(tiny_preset: Path, root: Path) -> None:
    by_hand = chain(tiny_preset, root, "train.autoencoder.encoder_l1=1e-4").train()
    done, _ = run(studies.encoder_sparsity(l1=(1e-4,)), tiny_preset, root)
    assert next(stage for stage in done.runs if stage.name == "train encoder_l1 0.0001").made.artifact.id == by_hand.id


def test_the_rerun_never_leaves_the_orthogonal_space(tiny_preset: Path, root: Path) -> None:
    done, numbers = run(studies.orthogonal_rerun((1, 2, 3)), tiny_preset, root)
    stages = {stage.name: stage.made.artifact for stage in done.runs}
    first, rerun = (training.load_autoencoder(stages[name]).W_enc.double() for name in ("train", "train orthogonal"))
    mean = first[:, [1, 2, 3]].mean(dim=1)
    cosines = torch.nn.functional.cosine_similarity(rerun, mean[:, None], dim=0).abs()
    assert float(cosines.max()) < 1e-6
    assert numbers["excluded_cosine_max"] == pytest.approx(float(cosines.max()), abs=1e-9)
    start = torch.nn.functional.cosine_similarity(first, mean[:, None], dim=0).abs()
    assert float(start.median()) > 1e-3  # so that the test can fail


def test_without_a_cluster_there_is_no_direction_to_avoid(tiny_preset: Path, root: Path) -> None:
    with pytest.raises(InputError, match="--features"):
        run(studies.orthogonal_rerun(), tiny_preset, root, "analyze.options.orthogonal_rerun.ultra_low_below=1e-9")
    everything = "analyze.options.orthogonal_rerun.ultra_low_below=0.999"
    _, numbers = run(studies.orthogonal_rerun(), tiny_preset, root, everything)
    assert numbers["direction_cosine_possible"] == pytest.approx(0, abs=1e-6)


def test_the_other_site_is_harvested_from_the_same_prompts(tiny_preset: Path, root: Path) -> None:
    done, numbers = run(studies.site_comparison(l1_factors=(1.0,)), tiny_preset, root)
    stages = {stage.name: stage.made.artifact for stage in done.runs}
    there, here = stages[f"harvest {MLP_OUT}"], stages["harvest"]
    assert there.parents == here.parents
    assert numbers["other_site"] == MLP_OUT
    (name,) = [stage for stage in stages if stage.startswith(f"train {MLP_OUT}")]
    l1 = training.settings(stages[name])["config"]["autoencoder"]["l1_coeff"]
    store = [np.concatenate([batch.rows for batch in _rows(one)]) for one in (there, here)]
    spread = [float(np.sqrt(rows.astype(np.float64).var(axis=0).sum())) for rows in store]
    assert l1 == pytest.approx(0.05 * spread[0] / spread[1], rel=0.006)  # three digits


def _rows(artifact: Artifact) -> Any:
    from storage.reader import ShardReader

    with ShardReader.of(artifact).sequential(4096) as batches:
        yield from batches


def test_looking_ahead_makes_nothing(tiny_preset: Path, root: Path, tmp_path: Path) -> None:
    before = sorted(root.rglob("manifest.json"))
    lines = look_ahead(studies.cross_seed(3), chain(tiny_preset, root), "latest")
    assert "2 of 2 to train" in lines[0]
    assert lines[1:] == ["  seed 1: to train", "  seed 2: to train"]
    sites = look_ahead(studies.site_comparison(), chain(tiny_preset, root), "latest")
    assert sites == ["site-comparison: harvest comes first, and decides what is trained"]
    nothing = look_ahead(studies.cross_seed(2), chain(tiny_preset, tmp_path / "empty"), None)
    assert nothing == ["cross-seed: tokenize comes first, and decides what is trained"]
    assert sorted(root.rglob("manifest.json")) == before
    assert not (tmp_path / "empty").exists()


def test_a_comparison_without_others_says_how_to_get_them(tiny_preset: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"study cross-seed.*--with"):
        chain(tiny_preset, root).report(only=("cross_seed",))
    with pytest.raises(ConfigError, match="at least 2"):
        studies.cross_seed(1)


def sparsemill(*arguments: str) -> None:
    app([*arguments], result_action="return_value")


def test_the_command_line_previews_trains_and_prints_what_was_found(
    tiny_preset: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--preset", str(tiny_preset), "--home", str(root), "--threads", "1"]
    settings += [part for override in FEW for part in ("--set", override)]
    command = ["study", "cross-seed", "--sae", "latest", "--seeds", "2", *settings]
    sparsemill(*command, "--dry-run")
    assert "1 of 1 to train" in capsys.readouterr().out
    sparsemill(*command)
    printed = capsys.readouterr().out
    assert "Best match of a random direction" in printed
    page = Path(printed.splitlines()[-1])
    newest, first = Workspace.open(Runtime(root=root), Quiet()).store.ids("train")
    by_hand = ["analyze", first, "--only", "cross_seed", "--with", newest]
    assert f"sparsemill {' '.join(by_hand)}" in page.read_text()
    before = sorted((root / "analyze").iterdir())
    sparsemill(*by_hand, *settings)
    assert sorted((root / "analyze").iterdir()) == before


def test_the_flow_finds_what_the_command_line_made(tiny_preset: Path, root: Path, tmp_path: Path) -> None:
    done, _ = run(studies.cross_seed(2), tiny_preset, root, sae="latest")
    code = (
        "import json, sys\nfrom flows.studies import cross_seed\n"
        "state = cross_seed(**json.loads(sys.argv[1]), return_state=True)\n"
        "print(json.dumps([state.name, state.message]))"
    )
    parameters = {"preset": str(tiny_preset), "overrides": [*FEW], "sae": "latest", "root": str(root), "threads": 1}
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    flow = subprocess.run(
        [sys.executable, "-c", code, json.dumps(parameters)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert flow.returncode == 0, flow.stderr[-3000:]
    assert json.loads(flow.stdout.splitlines()[-1]) == ["Cached", ids(done)[-1]]
