"""The stages of the tiny model, each interrupted: how far they are said to be is how far they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pipeline import tokenizing
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.unfinished import so_far
from pipeline.workspace import Workspace
from storage.artifacts import Staging
from storage.fingerprint import Json
from storage.manifest import FileRecord
from storage.unfinished import unfinished


def stop_after(number: int, patch: pytest.MonkeyPatch) -> None:
    """Has a stage interrupted once it has finished so many units, or, of 0, when all are."""
    whole, left = Staging.finish, [number]

    def finish(
        staging: Staging,
        unit: str,
        files: Sequence[str] | Mapping[str, FileRecord],
        data: Mapping[str, Json] | None = None,
    ) -> None:
        whole(staging, unit, files, data)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    def seal(_: Staging) -> dict[str, FileRecord]:
        raise KeyboardInterrupt

    patch.setattr(Staging, "finish", finish)
    patch.setattr(Staging, "seal", seal)


def test_how_far_a_stage_is_counts_in_its_own_units(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 1000)
    runtime = Runtime(root=tmp_path / "store", threads=1, checkpoint_seconds=1e-6)
    run = Chain(load_preset(str(tiny_preset)), Workspace.open(runtime, Quiet()), run_directly)
    stages = {
        "tokenize": (run.tokenize, "1 of 4 rounds", "4 of 4 rounds"),
        "harvest": (run.harvest, "1 of 9 windows", "9 of 9 windows"),
        "train": (run.train, "1 of 60 steps", "60 of 60 steps"),
    }
    for stage, (make, begun, done) in stages.items():
        for number, expected in ((1, begun), (0, done)):
            with monkeypatch.context() as patch:
                stop_after(number, patch)
                with pytest.raises(KeyboardInterrupt):
                    make()
            (work,) = unfinished(runtime.root)
            assert (work.stage, str(so_far(work))) == (stage, expected)
            assert work.working is not True
        make()
        assert unfinished(runtime.root) == []
