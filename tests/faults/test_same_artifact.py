"""Processes that ask for one artifact at once: it is computed once, and no lock is stolen or waited for in vain."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from storage.artifacts import ArtifactStore
from tests.faults.lengths import times
from tests.faults.workload import make_slowly
from tests.unit.storage.processes import SPEC, make_and_report

ROOT = Path(__file__).parents[2]
HOLD = """
import subprocess, sys
from pathlib import Path
from storage.artifacts import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).lock(sys.argv[2]):
    sleep = {"args": ["sleep", "60"], "stdout": subprocess.DEVNULL, "close_fds": False}  # has all that may be inherited
    child = subprocess.Popen(**sleep) if len(sys.argv) > 3 else None
    print(child.pid if child else 0, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.storage.processes"])
    return context


def holder(root: Path, *more: str) -> "tuple[subprocess.Popen[str], int]":
    """A process that holds the artifact's lock, and the process id that it told."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), SPEC.id, *more], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_eight_processes_at_once_get_one_artifact_computed_once(tmp_path: Path, context: ForkServerContext):
    for number in range(times(4, 50)):
        root, computed = tmp_path / f"store-{number}", tmp_path / f"computed-{number}"
        reports = context.SimpleQueue()
        children = [context.Process(target=make_and_report, args=(root, computed, reports)) for _ in range(8)]
        for child in children:
            child.start()
        found = [reports.get() for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        assert sorted(status for status, _ in found) == ["cached"] * 7 + ["made"]
        assert len({manifest for _, manifest in found}) == 1
        assert [line.split()[1] for line in computed.read_text().splitlines()] == ["w0", "w1"]


def test_of_eight_processes_the_makers_killed_one_after_the_other_the_rest_still_get_it(
    tmp_path: Path, context: ForkServerContext
):
    for number in range(times(2, 20)):
        root, computed = tmp_path / f"store-{number}", tmp_path / f"computed-{number}"
        children = {}
        for _ in range(8):
            child = context.Process(target=make_slowly, args=(root, computed))
            child.start()
            children[child.pid] = child
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < 3 and time.monotonic() < deadline and not list(root.glob("harvest/*/manifest.json")):
            working = [int(line.split()[0]) for line in computed.read_text().splitlines()] if computed.exists() else []
            if working and working[-1] not in killed and working[-1] in children:
                killed.add(working[-1])
                os.kill(working[-1], signal.SIGKILL)
            time.sleep(0.001)
        for child in children.values():
            child.join(60)
        dead = sum(child.exitcode == -signal.SIGKILL for child in children.values())
        assert dead >= 1
        assert sum(child.exitcode == 0 for child in children.values()) == 8 - dead
        assert len(computed.read_text().splitlines()) <= 2 + dead  # a unit is lost with who computed it, at most
        assert ArtifactStore(root).verify(ArtifactStore(root).open(SPEC.id)) == []


@pytest.mark.parametrize(
    "left",
    [b"", b"garbage \xff\x00", lambda: b"999999999\n", lambda: f"{os.getpid()}\n".encode(), lambda: b"1\n"],
    ids=["empty", "garbage", "a dead process's", "a reused id: our own", "a reused id: a living one's"],
)  # fmt: skip
def test_a_lock_file_that_someone_left_holds_nobody_up(left: bytes | Callable[[], bytes], tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    with store.lock(SPEC.id):
        pass
    lock = tmp_path / "store" / ".locks" / SPEC.id
    lock.write_bytes(left if isinstance(left, bytes) else left())
    os.utime(lock, (0, 0))  # very old
    with store.lock(SPEC.id, lambda: pytest.fail("waited for nobody")):
        pass


def test_a_stopped_holder_keeps_its_lock_until_it_goes_on(tmp_path: Path, context: ForkServerContext):
    process, _ = holder(tmp_path)
    try:
        process.send_signal(signal.SIGSTOP)
        lock = tmp_path / ".locks" / SPEC.id
        os.utime(lock, (0, 0))  # as if nobody had touched it for fifty years
        reports = context.SimpleQueue()
        child = context.Process(target=make_and_report, args=(tmp_path, tmp_path / "computed", reports))
        child.start()
        child.join(1.0)
        assert child.is_alive()
        assert not (tmp_path / "computed").exists()
        process.send_signal(signal.SIGCONT)
        process.communicate("", timeout=60)
        assert process.returncode == 0
        child.join(60)
        assert child.exitcode == 0
        assert reports.get()[0] == "made"
    finally:
        process.send_signal(signal.SIGCONT)
        end(process)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_dead_holders_lock_is_free_at_once_also_where_its_children_live_on(how: signal.Signals, tmp_path: Path):
    process, child = holder(tmp_path, "with a child")
    try:
        if how is signal.SIGSTOP:  # a stopped process that is then killed
            process.send_signal(how)
            process.kill()
        else:
            process.send_signal(how)
        process.communicate(timeout=60)
        os.kill(child, 0)  # it lives
        with ArtifactStore(tmp_path).lock(SPEC.id, lambda: pytest.fail("waited for the dead")):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
