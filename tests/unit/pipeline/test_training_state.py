"""Checkpoints of a training: the newest two are kept, also where the process died while it wrote one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.training_state import Checkpoints, Progress
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage import atomic
from storage.manifest import Spec
from storage.reader import ReadState
from storage.staging import Staging

CONFIG = TrainerConfig(d_sae=8, l1_coeff=0.1, steps=8, batch_rows=4, engine="dense", density_window_rows=4)
ROWS = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))


class _Killed(BaseException):
    """The process ends here."""


def staging(place: Path) -> Staging:
    return Staging(place, Spec("train", 1, {}), {})


def train(staged: Staging, steps: int) -> None:
    """Goes on from the newest checkpoint, or from the start, writing one after each step."""
    checkpoints = Checkpoints(staged)
    found = checkpoints.newest()
    if found is None:
        trainer = Trainer.start(CONFIG, 3, ROWS, ROWS.mean(dim=0), threads=1)
    else:
        tensors, state = found
        own = {name.removeprefix("trainer."): tensor for name, tensor in tensors.items()}
        trainer = Trainer.restore(CONFIG, own, state["trainer"], threads=1)
    for _ in range(steps):
        trainer.step(ROWS)
        checkpoints.save(trainer, Progress(ReadState(0, trainer.steps_taken)))


def steps_on_disk(staged: Staging) -> list[int]:
    return sorted({int(path.stem.removeprefix("checkpoint-")) for path in staged.folder.glob("checkpoint-*")})


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path):
    staged = staging(tmp_path)
    train(staged, 4)
    assert list(staged.finished) == ["checkpoint-000000003", "checkpoint-000000004"]
    assert sorted(path.name for path in staged.folder.iterdir()) == [
        f"checkpoint-00000000{step}.{kind}" for step in (3, 4) for kind in ("json", "safetensors")
    ]
    found = Checkpoints(staging(tmp_path)).newest()
    assert found is not None
    assert found[1]["progress"]["reader"] == {"epoch": 0, "batch": 4}


def test_never_more_than_three_are_on_disk_wherever_a_process_dies_and_two_once_the_next_is_written(tmp_path: Path):
    for number in range(100):
        place = tmp_path / str(number)
        staged, left = staging(place), iter(range(number))
        train(staged, 2)

        def die(operation: str, path: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise _Killed

        atomic.set_fault_hook(die)
        try:
            train(staged, 1)
        except _Killed:
            pass
        else:
            break
        finally:
            atomic.set_fault_hook(None)
        assert set(steps_on_disk(staged)) <= {1, 2, 3}
        again = staging(place)
        assert list(again.finished)[-2:] in (
            [f"checkpoint-00000000{step}" for step in newest] for newest in ((1, 2), (2, 3))
        )
        train(again, 1)
        assert len(steps_on_disk(again)) == len(again.finished) == 2
    else:
        pytest.fail("a checkpoint of a hundred changes of the disk")
    assert number > 5
    assert steps_on_disk(staged) == [2, 3]
