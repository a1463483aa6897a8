"""The artifact store among real processes: that wait for each other, and that are killed."""

import multiprocessing
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest

from storage import atomic
from storage.artifacts import ArtifactStore
from storage.reader import ShardReader
from tests.unit.storage.processes import (
    LAYOUT,
    SPEC,
    harvest,
    make_and_die,
    make_and_report,
    make_simple,
)
from tests.unit.storage.stores import activations


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    # A server forked before this process has threads, from which each child starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.storage.processes"])
    return context


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "run.json"}


def test_processes_that_ask_at_once_get_one_artifact_computed_once(tmp_path: Path, context: ForkServerContext):
    reports = context.SimpleQueue()
    arguments = (tmp_path / "store", tmp_path / "computed", reports)
    children = [context.Process(target=make_and_report, args=arguments) for _ in range(6)]
    for child in children:
        child.start()
    found = [reports.get() for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert sorted(status for status, _ in found) == ["cached"] * 5 + ["made"]
    assert len({manifest for _, manifest in found}) == 1
    lines = (tmp_path / "computed").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["w0", "w1"]


def steps_of_a_clean_run(root: Path) -> int:
    steps: list[str] = []
    atomic.set_fault_hook(lambda *step: steps.append(step[0]))
    try:
        make_simple(root)
    finally:
        atomic.set_fault_hook(None)
    return len(steps)


def killed_at(context: ForkServerContext, root: Path, number: int) -> None:
    child = context.Process(target=make_and_die, args=(root, number))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def test_killed_before_any_change_of_the_disk_it_resumes_to_the_same_bytes(tmp_path: Path, context: ForkServerContext):
    total = steps_of_a_clean_run(tmp_path / "clean")
    clean = files_of(ArtifactStore(tmp_path / "clean").open(SPEC.id).folder)
    assert total > 50
    statuses: list[str] = []
    for number in range(total):
        root = tmp_path / str(number)
        killed_at(context, root, number)
        store = ArtifactStore(root)
        found = store.find(SPEC)
        assert found is None or files_of(found.folder) == clean
        made = make_simple(root)
        statuses.append(made.status)
        assert files_of(made.artifact.folder) == clean
        assert store.verify(made.artifact) == []
    assert set(statuses) == {"made", "resumed", "cached"}


def test_killed_twice_it_still_ends_with_the_same_bytes(tmp_path: Path, context: ForkServerContext):
    total = steps_of_a_clean_run(tmp_path / "clean")
    clean = files_of(ArtifactStore(tmp_path / "clean").open(SPEC.id).folder)
    for first, second in ((20, 5), (30, 12), (45, 3), (45, 20), (total - 8, 4)):
        root = tmp_path / f"{first}-{second}"
        killed_at(context, root, first)
        killed_at(context, root, second)
        assert files_of(make_simple(root).artifact.folder) == clean


def test_a_harvest_killed_from_outside_computes_only_the_rest(tmp_path: Path):
    clean = harvest(tmp_path / "clean").artifact
    root, done = tmp_path / "store", tmp_path / "windows-done"
    command = [sys.executable, "-m", "tests.unit.storage.processes", str(root), "0.3", str(done)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as process:
        deadline = time.monotonic() + 60
        while not done.exists() or len(done.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert ArtifactStore(root).find(SPEC) is None
    finished_before = done.read_text().splitlines()
    made = harvest(root, windows_done=done)
    assert made.status == "resumed"
    computed_after = done.read_text().splitlines()[len(finished_before) :]
    assert finished_before + computed_after == [f"window-{i}" for i in range(4)]
    assert files_of(made.artifact.folder) == files_of(clean.folder)
    rows = ShardReader.of(made.artifact).read(0, LAYOUT.n_rows)
    expected = activations(LAYOUT)[rows.prompt, rows.position].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rows.rows, expected)


def test_a_killed_holders_lock_is_free_at_once(tmp_path: Path, context: ForkServerContext):
    killed_at(context, tmp_path, 30)
    assert (tmp_path / ".locks" / SPEC.id).exists()
    with atomic.exclusive_lock(tmp_path / ".locks" / SPEC.id, on_wait=lambda: pytest.fail("the dead hold no locks")):
        pass
