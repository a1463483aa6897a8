"""Real processes, real signals: a killed stage continues and ends with the bytes of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Runtime
from pipeline.workspace import Workspace

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
from pipeline.config import Runtime, load_preset
from pipeline.progress import Plain
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
preset, root, checkpoint_seconds = sys.argv[1:4]
runtime = Runtime(root=Path(root), threads=1, checkpoint_seconds=float(checkpoint_seconds))
chain = Chain(load_preset(preset, sys.argv[4:]), Workspace.open(runtime, Plain()), run_directly)
print("ready", flush=True)
artifact = chain.train()
print(artifact.id, artifact.manifest_sha256, [run.made.status for run in chain.runs])
"""
LONG = ("train.autoencoder.steps=250", "train.autoencoder.density_window_rows=8192")
LIVE = (*LONG, "harvest.n_windows=2", "harvest.model_batch_prompts=8", "train.source=live", "train.pool_rows=2400")


def start(preset: Path, root: Path, *overrides: str, checkpoint_seconds: float = 0.01) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(preset), str(root), str(checkpoint_seconds), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Artifact id and manifest hash of a process that runs to its end."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    words = out.splitlines()[-1].split()
    return words[0], words[1]


def wait_for_checkpoint(root: Path, *, beyond: str = "") -> str:
    """Name of a checkpoint of a later step than another's; the newest there is once the training ended."""
    deadline = time.monotonic() + 60
    newest = ""
    while time.monotonic() < deadline and not list(root.glob("train/*/manifest.json")):
        newest = max((path.name for path in root.glob(".staging/train-*/files/checkpoint-*.json")), default="")
        if newest > beyond:
            return newest
        time.sleep(0.005)
    return newest


def whole(preset: Path, tmp_path_factory: pytest.TempPathFactory, overrides: tuple[str, ...]) -> tuple[str, str]:
    """Artifact id and manifest hash of a run that nothing interrupts."""
    return finish(start(preset, tmp_path_factory.mktemp("whole") / "store", *overrides, checkpoint_seconds=1000))


@pytest.fixture(scope="module")
def uninterrupted(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return whole(tiny_preset, tmp_path_factory, LONG)


@pytest.fixture(scope="module")
def uninterrupted_live(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return whole(tiny_preset, tmp_path_factory, LIVE)


@pytest.mark.parametrize(("expected", "overrides"), [("uninterrupted", LONG), ("uninterrupted_live", LIVE)])
def test_killed_again_and_again_ends_with_the_same_bytes(
    expected: str, overrides: tuple[str, ...], request: pytest.FixtureRequest, tiny_preset: Path, tmp_path: Path
):
    uninterrupted: tuple[str, str] = request.getfixturevalue(expected)
    root = tmp_path / "store"
    rng = random.Random(0)
    kills = 0
    newest = ""
    for _ in range(4):
        process = start(tiny_preset, root, *overrides)
        newest = wait_for_checkpoint(root, beyond=newest)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    assert finish(start(tiny_preset, root, *overrides)) == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_saves_a_checkpoint_and_loses_no_step(
    number: signal.Signals, code: int, uninterrupted: tuple[str, str], tiny_preset: Path, tmp_path: Path
):
    root = tmp_path / "store"
    process = start(tiny_preset, root, *LONG, checkpoint_seconds=1000)
    deadline = time.monotonic() + 60
    while not list(root.glob(".staging/train-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in {code, -number}
    (staging,) = root.glob(".staging/train-*")
    checkpoints = list(staging.rglob("checkpoint-*.safetensors"))
    assert len(checkpoints) == 1
    assert finish(start(tiny_preset, root, *LONG)) == uninterrupted


def test_the_newest_checkpoint_damaged_falls_back_to_the_one_before(
    uninterrupted: tuple[str, str], tiny_preset: Path, tmp_path: Path
):
    root = tmp_path / "store"
    process = start(tiny_preset, root, *LONG)
    deadline = time.monotonic() + 60
    while len(list(root.glob(".staging/train-*/files/checkpoint-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (journal,) = root.glob(".staging/train-*/journal.jsonl")
    written = sorted(root.glob(".staging/train-*/files/checkpoint-*.safetensors"))
    newest = max(path for path in written if path.name in journal.read_text())
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    process = start(tiny_preset, root, *LONG)
    out, err = process.communicate(timeout=120)
    assert tuple(out.splitlines()[-1].split()[:2]) == uninterrupted
    assert f"warning: {newest.stem} of the interrupted run is damaged" in err


def test_two_processes_asking_for_one_artifact_make_it_once(tiny_preset: Path, tmp_path: Path):
    root = tmp_path / "store"
    processes = [start(tiny_preset, root) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    statuses = [out.splitlines()[-1].split(maxsplit=2)[2] for out, _ in outputs]
    made = [status.count("made") + status.count("resumed") for status in statuses]
    assert sum(made) == 3
    assert len(Workspace.open(Runtime(root=root)).store.list()) == 3
