"""SIGKILL at every change of the disk, at any system call, and at random times in whole stages: nothing is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import ArtifactStore
from storage.borrowing import Borrowing
from storage.remote import RemoteStore
from tests.faults.lengths import LONG, times
from tests.faults.operations import possible_in
from tests.faults.system_calls import ROOT, calls_of, run_under
from tests.faults.workload import SPEC, everything, everything_and_die, outcome

CHANGES = "write,fsync,rename,renameat,renameat2,link,linkat,mkdir,unlink,unlinkat,rmdir,ftruncate,flock,pwrite64"


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.workload"])
    return context


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", int)


def assert_nothing_half_made_shows(root: Path) -> None:
    for name in ("mine", "theirs"):
        store = ArtifactStore(root / name)
        assert all(store.verify(artifact) == [] for artifact in store.list())
    if (root / "remote").is_dir():
        shared = Borrowing(RemoteStore((root / "remote").as_uri()), root / "nobody").find(SPEC.id)
        assert shared is None or ArtifactStore(root / "nobody").verify(shared) == []


def test_killed_before_any_change_of_making_tagging_pushing_and_pulling_it_ends_the_same(
    tmp_path: Path, context: ForkServerContext
):
    steps: list[str] = []
    (tmp_path / "clean").mkdir()
    previous = atomic.set_fault_hook(lambda operation, _: steps.append(operation))
    try:
        everything(tmp_path / "clean")
    finally:
        atomic.set_fault_hook(previous)
    clean = outcome(tmp_path / "clean")
    assert set(steps) == possible_in(tmp_path)
    for number in range(len(steps)):
        root = tmp_path / str(number)
        root.mkdir()
        child = context.Process(target=everything_and_die, args=(root, number))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert_nothing_half_made_shows(root)
        everything(root)
        assert outcome(root) == clean
    print(f"kills at changes of the disk {len(steps)}")


@pytest.mark.system
def test_killed_at_any_system_call_that_changes_the_disk_it_ends_the_same(tmp_path: Path):
    root = tmp_path / "clean"
    root.mkdir()
    done = run_under(f"--trace={CHANGES}", root=root, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    clean, calls = outcome(root), calls_of(tmp_path / "log")
    assert min(calls["fsync"], calls["rename"], calls["write"]) >= 10
    moments = [(call, number) for call, count in sorted(calls.items()) for number in range(1, count + 1)]
    tried = moments if LONG else moments[3 :: len(moments) // 12]
    kills = 0
    for call, number in tried:
        root = tmp_path / f"{call}-{number}"
        root.mkdir()
        killed = run_under(f"--inject={call}:signal=SIGKILL:when={number}", root=root, log=tmp_path / "log")
        assert killed.returncode in {0, -signal.SIGKILL}, (call, number, killed.stderr)
        kills += killed.returncode != 0  # threads share the calls out otherwise each time: none may get so far
        assert_nothing_half_made_shows(root)
        everything(root)
        assert outcome(root) == clean, (call, number)
    assert kills >= 0.8 * len(tried)
    print(f"kills at system calls {kills}")


def test_stopped_at_random_times_in_whole_stages_by_kill_sigterm_and_ctrl_c_it_ends_the_same(
    tiny_preset: Path, tmp_path: Path
):
    short = ["train.autoencoder.steps=30", 'analyze.analyses=["density"]', "tokenize.train_tokens=20000"]
    rounds = times(1, 20)
    arguments = [str(tiny_preset), str(tmp_path), str(rounds), *([] if LONG else short)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.stage_kills", *arguments], cwd=ROOT, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=times(300, 4 * 3600), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    survived = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in survived] == ["tokenize", "harvest", "train", "analyze", "push", "pull"]
    assert all(int(count) >= rounds for line in survived for count in line[1:4])
    print(f"stage, SIGKILL, SIGTERM, SIGINT survived, seconds of an undisturbed run:\n{done.stdout}")


def test_what_is_made_is_what_was_asked_for(tmp_path: Path):
    everything(tmp_path)
    assert ArtifactStore(tmp_path / "theirs").open(SPEC.id).spec == SPEC
    assert ArtifactStore(tmp_path / "mine").resolve("good").id == SPEC.id
