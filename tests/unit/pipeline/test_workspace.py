from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.config import Runtime
from pipeline.progress import Advance, Quiet
from pipeline.workspace import Workspace
from storage.artifacts import Result, Spec, Staging
from storage.errors import InputError
from storage.unfinished import unfinished

HARVEST = Spec("harvest", 1, {"n_windows": 40})


class Listening:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Advance]:
        return Quiet().track(label, total, unit, start=start)

    def say(self, message: str) -> None:
        self.said.append(message.strip())


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(Runtime(root=tmp_path / "store", threads=1), Listening())


def said(workspace: Workspace) -> list[str]:
    assert isinstance(workspace.reporter, Listening)
    return workspace.reporter.said


def ended_by(workspace: Workspace, error: BaseException, units: int) -> None:
    """A run that finishes so many more windows, and ends."""

    def produce(staging: Staging) -> Result:
        for number in range(len(staging.finished), len(staging.finished) + units):
            staging.write_bytes(f"w{number}", b"x")
            staging.finish(f"window-{number:05d}", [f"w{number}"])
        raise error

    with pytest.raises(type(error)):
        workspace.make(HARVEST, produce, provenance={})


def failure(workspace: Workspace) -> str | None:
    return unfinished(workspace.store.root)[0].failure


def test_an_error_is_noted_and_a_stop_is_none(workspace: Workspace):
    ended_by(workspace, InputError("not JSON", where="documents.jsonl:7"), 1)
    assert failure(workspace) == "not JSON; where: documents.jsonl:7"
    ended_by(workspace, KeyboardInterrupt(), 1)
    assert failure(workspace) is None
    ended_by(workspace, SystemExit(143), 1)
    assert failure(workspace) is None


def test_a_run_says_at_its_start_what_it_goes_on_from(workspace: Workspace):
    ended_by(workspace, KeyboardInterrupt(), 12)
    assert said(workspace) == []
    ended_by(workspace, KeyboardInterrupt(), 0)
    assert said(workspace) == [f"resuming {HARVEST.id}: 12 of 40 windows are there from the run before"]
