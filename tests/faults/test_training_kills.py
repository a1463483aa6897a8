"""SIGKILL at every change of the disk that a checkpoint makes, and in the middle of a resampling."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWEEP = """
import os, signal, sys
from pathlib import Path
import torch
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from sae import resampling
from storage import atomic

preset, root = sys.argv[1], Path(sys.argv[2])
settings = [
    "train.autoencoder.steps=60", "train.autoencoder.density_window_rows=4096", "train.evaluate_every_steps=1000",
    'train.autoencoder.resampling={"scheme": "anthropic", "interval_steps": 20, '
    '"window_rows": 2560, "sample_rows": 2560}',
]

def chain(name, checkpoint_seconds):
    runtime = Runtime(root=root / name, threads=1, checkpoint_seconds=checkpoint_seconds)
    return Chain(load_preset(preset, settings), Workspace.open(runtime, Quiet()), run_directly)

def killed_at(moment):
    "Trains in a process of its own that kills itself; whether it did."
    pid = os.fork()
    if pid == 0:
        moment()
        chain("killed", 1e-6).train()
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

def at_operation(number):
    def arm():
        left = iter(range(number))
        def hook(operation, path):
            if "train-" in str(path) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        atomic.set_fault_hook(hook)
    return arm

def amid_resampling():
    restart = resampling.Resampler._restart_at_inputs
    def die(self, *rest):
        restart(self, *rest)
        os.kill(os.getpid(), signal.SIGKILL)
    resampling.Resampler._restart_at_inputs = die

for name in ("whole", "killed"):
    chain(name, 1000.0).harvest()
at_operations = sum(killed_at(at_operation(number)) for number in range(40))
resamplings = sum(killed_at(amid_resampling) for _ in range(2))
print(at_operations, resamplings)
print(chain("whole", 1000.0).train().manifest_sha256)
print(chain("killed", 1000.0).train().manifest_sha256)
"""


def test_killed_anywhere_in_a_checkpoint_or_a_resampling_ends_with_the_same_bytes(tiny_preset: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SWEEP, str(tiny_preset), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, whole, killed = done.stdout.splitlines()
    at_operations, resamplings = map(int, kills.split())
    assert at_operations == 40
    assert resamplings == 2
    assert whole == killed
