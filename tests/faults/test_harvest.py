"""Real processes, real signals: a killed harvest computes only what its journal lacks and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import sys, time
from pathlib import Path
from pipeline import windows
from pipeline.config import Runtime, load_preset
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
preset, root, *overrides = sys.argv[1:]
compute = windows.WindowHarvester.compute
def slow(self, window, hook_names, advance):
    print("window", window, *hook_names, flush=True)
    time.sleep(0.05)
    return compute(self, window, hook_names, advance)
windows.WindowHarvester.compute = slow
workspace = Workspace.open(Runtime(root=Path(root), threads=2))
artifact = Chain(load_preset(preset, overrides), workspace, run_directly).harvest()
print("done", artifact.id, artifact.manifest_sha256, flush=True)
"""
BOTH = 'harvest.also_hook_names=["blocks.0.hook_mlp_out"]'


def start(preset: Path, root: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(preset), str(root), *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[list[int], dict[str, str]]:
    """Windows computed, and every artifact's manifest bytes, of a process that runs to its end."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line.split() for line in out.splitlines()]
    return [int(line[1]) for line in lines if line[0] == "window"], {line[1]: line[2] for line in lines[-1:]}


def hashes(root: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in root.glob("harvest/*/manifest.json")}


def journalled(root: Path) -> dict[str, set[int]]:
    """By artifact in the making, the windows that its journal names."""
    found: dict[str, set[int]] = {}
    for path in root.glob(".staging/harvest-*/journal.jsonl"):
        text = path.read_text()
        found[path.parent.name] = {window for window in range(9) if f'"window-{window:05d}"' in text}
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole") / "store"
    windows, _ = finish(start(tiny_preset, root, BOTH))
    assert windows == list(range(9))
    return hashes(root)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_again_and_again_computes_the_rest_and_ends_with_the_same_bytes(
    number: signal.Signals, uninterrupted: dict[str, bytes], tiny_preset: Path, tmp_path: Path
):
    root = tmp_path / "store"
    rng = random.Random(number)
    stopped = 0
    while stopped < 3:
        process = start(tiny_preset, root, BOTH)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("window"):
                break
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(number)
        process.communicate(timeout=60)
        if process.returncode == 0:
            break
        stopped += 1
        assert not list(root.glob("harvest/*/manifest.json"))
    assert stopped >= 1
    before = journalled(root)
    everywhere = set.intersection(*before.values())
    windows, _ = finish(start(tiny_preset, root, BOTH))
    assert set(windows) == set(range(9)) - everywhere
    assert hashes(root) == uninterrupted
    assert len(uninterrupted) == 2


def test_killed_while_extending_leaves_the_shorter_harvest_whole(
    uninterrupted: dict[str, bytes], tiny_preset: Path, tmp_path: Path
):
    root = tmp_path / "store"
    finish(start(tiny_preset, root, BOTH, "harvest.n_windows=4"))
    shorter = hashes(root)
    process = start(tiny_preset, root, BOTH)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("window 5"):
            break
    process.kill()
    process.communicate()
    assert hashes(root) == shorter
    windows, _ = finish(start(tiny_preset, root, BOTH))
    assert set(windows) <= {4, 5, 6, 7, 8}
    assert hashes(root) == shorter | uninterrupted
    for artifact_id in shorter:
        check = [sys.executable, "-m", "pipeline.cli", "verify", artifact_id, "--home", str(root)]
        subprocess.run(check, cwd=ROOT, check=True, capture_output=True, env=os.environ)
