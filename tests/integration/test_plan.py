import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import Runtime, load_preset
from pipeline.planning import calibration
from pipeline.planning.plan import Plan, plan
from pipeline.planning.table import duration, print_plan
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.torch_batches import TorchBatch, to_device
from pipeline.training import DENSITIES, WEIGHTS
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.batches import Batch
from storage.errors import MemoryBudgetExceeded, StorageFull, UnknownHook

ROOT = Path(__file__).parents[2]
FULL = 1_000_000
BOTH_SITES = 'harvest.also_hook_names=["blocks.0.hook_mlp_out"]'


def workspace(root: Path) -> Workspace:
    return Workspace.open(Runtime(root=root, threads=1), Quiet())


def quick(preset: Path, root: Path, *overrides: str) -> Plan:
    found, refusal = plan(load_preset(str(preset), overrides), workspace(root), full_tokens=FULL, calibrated=False)
    assert refusal is None
    return found


def bytes_in(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.name not in {"manifest.json", "run.json"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "store"


@pytest.fixture(scope="module")
def harvested(tiny_preset: Path, root: Path) -> Artifact:
    return Chain(load_preset(str(tiny_preset), [BOTH_SITES]), workspace(root), run_directly).harvest()


@pytest.fixture(scope="module")
def trained(harvested: Artifact, tiny_preset: Path, root: Path) -> Artifact:
    assert harvested.stage == "harvest"
    return Chain(load_preset(str(tiny_preset)), workspace(root), run_directly).train()


@pytest.mark.parametrize("encoding", ["float32", "uint8"])
def test_the_plan_is_what_the_harvest_writes(tiny_preset: Path, tmp_path: Path, encoding: str):
    home, overrides = tmp_path / "store", (f"harvest.encoding={encoding}", BOTH_SITES)
    chain = Chain(load_preset(str(tiny_preset), overrides), workspace(home), run_directly)
    chain.tokenize()
    planned = quick(tiny_preset, home, *overrides)
    chain.harvest()
    stores = {store.site.hook_name: store for store in planned.run.stores}
    made = list(chain.workspace.store.list("harvest"))
    assert {str(one.config["hook_name"]) for one in made} == set(stores)
    for artifact in made:
        store, found = stores[str(artifact.config["hook_name"])], facts(artifact)
        assert (store.rows, store.windows, store.shards) == (found["rows"], found["windows"], found["shards"])
        assert (store.site.d_in, store.prompts_left_out) == (found["d_in"], found["prompts_left_out"])
        assert store.files == sum(path.is_file() for path in artifact.folder.rglob("*"))
        # A statistics file's header names sizes, so it differs by some digits a window.
        assert abs(store.bytes - bytes_in(artifact.folder)) <= 64 * (store.windows + 1)


def test_stages_that_are_there_are_found_and_none_is_made(
    trained: Artifact, tiny_preset: Path, root: Path, tmp_path: Path
):
    before = sorted(workspace(root).store.ids())
    planned = quick(tiny_preset, root)
    assert planned.run.made == ("tokenize", "harvest", "train")
    assert planned.run.disk_bytes == 0
    assert planned.run.tokens.exact
    assert sorted(workspace(root).store.ids()) == before
    written = sum(trained.manifest.files[name].bytes for name in (WEIGHTS, DENSITIES))
    assert planned.run.training.bytes <= written <= planned.run.training.bytes + 1000
    assert quick(tiny_preset, root, "harvest.seed=9").run.made == ("tokenize",)
    assert quick(tiny_preset, tmp_path / "new").run.made == ()
    assert not (tmp_path / "new").exists()


def test_of_what_is_made_it_says_so_with_the_time_that_it_took(
    trained: Artifact,
    tiny_preset: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "160")
    planned = quick(tiny_preset, root)
    took = json.loads((trained.folder / "run.json").read_text())["seconds"]
    assert set(planned.made_seconds) == {"tokenize", "harvest", "train"}
    assert planned.made_seconds["train"] == took
    print_plan(planned)
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"time: train none: made already, in {duration(took)}" in printed
    assert any(line.startswith("tokens, activations and autoencoder are made already") for line in printed)
    print_plan(quick(tiny_preset, root, "train.autoencoder.steps=7"))
    printed = capsys.readouterr().out
    assert "time: harvest" in printed
    assert "time: train" not in printed  # not calibrated
    assert "autoencoder are made" not in printed


def test_few_held_out_prompts_are_warned_of(tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    planned = quick(tiny_preset, tmp_path / "store")
    assert len(planned.warnings) == 1
    assert "few held-out prompts: 37." in planned.warnings[0]
    print_plan(planned)
    assert "warning: few held-out prompts: 37." in capsys.readouterr().out
    assert quick(tiny_preset, tmp_path / "store", "tokenize.held_out_tokens=1600").warnings == ()


def test_the_full_run_stands_beside_with_its_sizes_at_both_sites(tiny_preset: Path, tmp_path: Path):
    planned = quick(tiny_preset, tmp_path / "store")
    assert planned.full.tokens.train_tokens == FULL
    assert [sizes.site.d_in for sizes in planned.sizes] == [24, 16]
    assert planned.sizes[0].full["float32"] == planned.full.stores[0].bytes
    assert planned.sizes[1].run["uint8"] < planned.sizes[1].run["float16"] < planned.sizes[0].run["float16"]
    assert Plan.model_validate_json(planned.model_dump_json()) == planned


def test_an_unknown_hook_is_named_before_anything_is_planned(tiny_preset: Path, tmp_path: Path):
    with pytest.raises(UnknownHook, match=r"blocks\.0\.mlp\.hook_post"):
        quick(tiny_preset, tmp_path / "store", "harvest.hook_name=blocks.0.mlp.hook_pots")


def test_a_calibration_measures_times_and_leaves_nothing(tiny_preset: Path, tmp_path: Path):
    preset = load_preset(str(tiny_preset))
    planned, refusal = plan(preset, workspace(tmp_path / "store"), full_tokens=FULL)
    assert refusal is None
    rates = planned.calibration
    assert rates is not None
    assert min(rates.compute_rows_per_second, rates.write_bytes_per_second, rates.read_rows_per_second) > 0
    assert rates.harvest_rows_per_second > 0
    assert planned.seconds["train"] == pytest.approx(60 * rates.step_seconds)
    assert planned.full_seconds["harvest"] > planned.seconds["harvest"]
    assert rates.step_l0 == pytest.approx(16, rel=0.3)
    assert list(tmp_path.iterdir()) == []


def test_steps_are_timed_on_the_device_of_the_run(tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    moved: list[torch.device] = []

    def own_device(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    def watched(batches: Iterable[Batch], device: torch.device) -> Iterator[TorchBatch]:
        for batch in to_device(batches, device):
            moved.append(device)
            yield batch

    monkeypatch.setattr(calibration, "own_device", own_device)
    monkeypatch.setattr(calibration, "to_device", watched)
    monkeypatch.setattr(calibration, "_PHASE_SECONDS", 0.01)
    planned, _ = plan(load_preset(str(tiny_preset)), workspace(tmp_path / "store"), full_tokens=FULL)
    assert planned.calibration is not None
    assert asked == ["cpu"]
    assert moved == [torch.device("cpu")] * (planned.calibration.steps + calibration._WARM_STEPS)


def test_a_full_disk_is_refused_with_the_plan_at_hand(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from storage import atomic

    monkeypatch.setattr(atomic, "free_bytes", lambda _: 1_000_000)
    planned, refusal = plan(load_preset(str(tiny_preset)), workspace(tmp_path / "store"), full_tokens=FULL)
    assert isinstance(refusal, StorageFull)
    assert planned.refusal == str(refusal)
    assert planned.calibration is None
    assert "harvest.encoding=uint8" in str(refusal)


def test_a_memory_budget_is_refused_with_the_window_that_fits(tiny_preset: Path, tmp_path: Path):
    preset = load_preset(str(tiny_preset), ["harvest.window_prompts=2048", "harvest.chunk_rows=32"])
    room = workspace(tmp_path / "store")
    needs = plan(preset, room, full_tokens=FULL, calibrated=False)[0]
    budget = needs.machine.resident_bytes + sum(needs.memory["harvest"].values()) // 2
    planned, refusal = plan(preset, room, full_tokens=FULL, calibrated=False, budget_bytes=budget)
    assert isinstance(refusal, MemoryBudgetExceeded)
    assert "window" in str(refusal)
    assert planned.machine.room_bytes <= budget


def sparsemill(*arguments: str, home: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SPARSEMILL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    script = f"{code}\nimport pipeline.cli\npipeline.cli.main()"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


def test_a_run_too_large_for_its_device_is_refused_and_its_parts_are_printed(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("pipeline.planning.plan.device_room_bytes", lambda _device: 2**20)
    preset = load_preset(str(tiny_preset))
    found, refusal = plan(preset, workspace(tmp_path / "store"), full_tokens=FULL, calibrated=False)
    assert isinstance(refusal, MemoryBudgetExceeded)
    assert "the device's memory" in str(refusal)
    assert not set(found.memory["train"]) & {"a step", "weights and Adam's moments"}
    print_plan(found)
    printed = capsys.readouterr().out
    assert "device memory: train" in printed
    assert "of 1.0 MiB: too much" in printed
    assert "device memory for train: batches" in printed


def test_the_command_prints_tables(tiny_preset: Path, tmp_path: Path):
    arguments = ("plan", str(tiny_preset), "--no-calibration", "--tokens", str(FULL))
    done = sparsemill(*arguments, home=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    for expected in ("34,560 of 24", "196 prompts (3,136 tokens)", "disk in all", "memory: train", "not calibrated"):
        assert expected in done.stdout
    assert not (tmp_path / "store").exists()


def test_the_command_refuses_a_run_that_does_not_fit(tiny_preset: Path, tmp_path: Path):
    code = "import storage.atomic\nstorage.atomic.free_bytes = lambda path: 2_000_000"
    done = sparsemill("plan", str(tiny_preset), home=tmp_path / "store", code=code)
    assert done.returncode == 1
    assert "disk in all" in done.stdout
    assert "Traceback" not in done.stderr
    for choice in ("encoding=uint8", "hook_name=blocks.0.hook_mlp_out", "n_windows=", "train.source=live"):
        assert choice in done.stderr


def test_the_command_prints_json_of_a_refused_run_too(tiny_preset: Path, tmp_path: Path):
    arguments = ("plan", str(tiny_preset), "--json", "--memory-gib", "0.1", "--set", "harvest.n_windows=2")
    done = sparsemill(*arguments, home=tmp_path / "store")
    assert done.returncode == 1
    assert "harvest does not fit the memory" in done.stderr
    planned = Plan.model_validate(json.loads(done.stdout))
    assert (planned.run.stores[0].windows, planned.machine.room_bytes) == (2, 0)
