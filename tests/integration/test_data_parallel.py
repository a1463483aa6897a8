"""Two processes that train together do what one does with the same global batches; by torch.distributed over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RUN = """
import json, os, sys
import torch, torch.distributed
from safetensors.torch import load_file, save_file
from sae.collective import Group
from sae.config import TrainerConfig
from sae.trainer import Trainer

torch.set_num_threads(1)
config, out, first, last, start = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
rank, world = int(sys.argv[6]), int(sys.argv[7])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meeting", rank=rank, world_size=world)
group = Group()
config = TrainerConfig.model_validate(config)

def rows(step):
    batch = torch.randn(64 if step % 7 else 3, 12, generator=torch.Generator().manual_seed(step))
    parts = batch.tensor_split(group.world) if step % 14 else [batch[:0]] * (group.world - 1) + [batch]
    return parts[group.rank]

sample = torch.randn(256, 12, generator=torch.Generator().manual_seed(10**6))
if start == "-":
    trainer = Trainer.start(config, 12, sample, sample.mean(0), threads=1, collective=group)
else:
    state = json.load(open(start + ".json"))
    trainer = Trainer.restore(config, load_file(start + ".safetensors"), state, threads=1, collective=group)
log = []
for step in range(first, last + 1):
    metrics = trainer.step(rows(step))
    log.append([metrics.rows, metrics.loss, metrics.l0, metrics.fve, metrics.grad_norm,
                list(metrics.resampled.features) if metrics.resampled else []])
name = f"{out}-{group.rank}"
save_file(trainer.state_tensors(), name + ".safetensors")
json.dump(trainer.state_json(), open(name + ".json", "w"))
json.dump(log, open(name + ".log", "w"))
torch.distributed.destroy_process_group()
"""
ANTHROPIC = {"scheme": "anthropic", "interval_steps": 15, "window_rows": 64, "sample_rows": 320}
REINIT = {"scheme": "reinit", "interval_steps": 15, "window_rows": 320, "threshold": 0.5}


def train(world: int, config: str, out: Path, first: int, last: int, start: str = "-") -> None:
    script = out.with_name("run.py")
    script.write_text(RUN)
    command = [sys.executable, str(script), config, str(out), str(first), str(last), start]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=180)
        assert rank.returncode == 0, said


@pytest.mark.parametrize(("engine", "resampling"), [("sparse", ANTHROPIC), ("dense", REINIT)])
def test_two_ranks_train_as_one_and_checkpoints_move_between_them(
    engine: str, resampling: dict[str, object], tmp_path: Path
):
    import json

    config = json.dumps(
        {
            "d_sae": 40, "l1_coeff": 1.0, "steps": 41, "batch_rows": 64, "learning_rate": 1e-2, "engine": engine,
            "density_window_rows": 256, "b_enc_init": "calibrated", "target_l0": 0.5,
            "init": "tied", "resampling": resampling,
        }
    )  # fmt: skip
    train(1, config, tmp_path / "one", 1, 40)
    train(2, config, tmp_path / "half", 1, 22)
    train(2, config, tmp_path / "two", 23, 40, str(tmp_path / "half-1"))
    train(1, config, tmp_path / "moved", 23, 40, str(tmp_path / "half-0"))
    train(1, config, tmp_path / "alone", 1, 22)
    train(2, config, tmp_path / "joined", 23, 40, str(tmp_path / "alone-0"))
    one = load_file(tmp_path / "one-0.safetensors")
    ranks = [load_file(tmp_path / f"two-{rank}.safetensors") for rank in range(2)]
    for name, tensor in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        for other in (ranks[0], *(load_file(tmp_path / f"{name}-0.safetensors") for name in ("moved", "joined"))):
            torch.testing.assert_close(tensor.double(), other[name].double(), rtol=1e-3, atol=2e-4, msg=name)
    names = ("one-0", "half-0", "two-0", "two-1", "joined-0", "joined-1")
    logs = {name: json.loads((tmp_path / f"{name}.log").read_text()) for name in names}
    assert logs["two-0"] == logs["two-1"]
    assert logs["joined-0"] == logs["joined-1"]
    assert [line[5] for line in logs["joined-0"]] == [line[5] for line in logs["two-0"]]
    together = logs["half-0"] + logs["two-0"]
    assert [line[0] for line in together] == [line[0] for line in logs["one-0"]]
    assert [line[5] for line in together] == [line[5] for line in logs["one-0"]]
    assert any(line[5] for line in together)
    for line, expected in zip(together, logs["one-0"], strict=True):
        assert line[1:5] == pytest.approx(expected[1:5], rel=1e-3)
