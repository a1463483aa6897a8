import builtins
from pathlib import Path

import pytest

from pipeline.scalars import scalar_writer
from storage.errors import ConfigError


def test_every_finite_number_of_a_row_is_there_to_read(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = scalar_writer(tmp_path, "train-0123456789ab")
    write({"step": 20, "l0": 31.5, "loss_recovered": None, "engine": "sparse", "fve": float("nan")})
    write({"step": 40, "l0": 30.0, "loss_recovered": 0.9, "engine": "sparse", "fve": 0.8})
    events = EventAccumulator(str(tmp_path / "train-0123456789ab"))
    events.Reload()
    found = {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/l0": [(20, 31.5), (40, 30.0)],
        "train/loss_recovered": [(40, 0.9)],
        "train/fve": [(40, 0.8)],
    }


def test_no_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scalar_writer(None, "train-0123456789ab")({"step": 1, "l0": 2.0})
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"sparsemill\[tensorboard\]"):
        scalar_writer(tmp_path, "run")
