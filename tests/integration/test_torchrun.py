"""``torchrun ... -m pipeline.cli train``: two ranks make one artifact, as one process would up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from pipeline import training
from pipeline.config import Runtime
from pipeline.progress import Quiet
from pipeline.workspace import Workspace, facts

ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "train.autoencoder.steps=30", "--set", "train.evaluate_every_steps=30")


def train(root: Path, preset: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "pipeline.cli", "train", "--preset", str(preset), "--home", str(root), "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *SETTINGS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_two_ranks_make_what_one_makes_and_find_what_is_there(tiny_preset: Path, tmp_path: Path):
    made = {}
    for ranks in (1, 2):
        done = train(tmp_path / str(ranks), tiny_preset, ranks)
        assert done.returncode == 0, done.stderr
        assert len(set(done.stdout.split())) == 1
        store = Workspace.open(Runtime(root=tmp_path / str(ranks)), Quiet()).store
        made[ranks] = store.resolve(done.stdout.split()[0])
    assert made[1].id == made[2].id
    assert [facts(made[ranks])["ranks"] for ranks in (1, 2)] == [[1], [2]]
    one, two = (load(made[ranks].read_bytes(training.WEIGHTS)) for ranks in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=2e-3, atol=2e-3, msg=name)
    log = training.training_log(made[2])
    assert log["rows"].to_pylist() == training.training_log(made[1])["rows"].to_pylist()
    assert facts(made[2])["loss_recovered"] == pytest.approx(facts(made[1])["loss_recovered"], abs=0.01)
    again = train(tmp_path / "2", tiny_preset, 2)
    assert again.returncode == 0, again.stderr
    assert "cached" in again.stderr
