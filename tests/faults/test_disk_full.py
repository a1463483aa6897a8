"""A full disk: a typed error with needed and free bytes, nothing committed, and the same command finishes later."""

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import ArtifactStore
from storage.errors import StorageFull
from tests.faults.workload import SPEC, everything, make, outcome

ROOT = Path(__file__).parents[2]
FILE_BYTES = 300_000
MESSAGE = re.compile(
    r"StorageFull: writing failed: .*; found ([\d,]+) bytes free; expected ([\d,]+) bytes; free some space"
)


@contextmanager
def mounted(folder: Path, n_bytes: int) -> Generator[Path]:
    """A file system of that size in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        missing = f"no file system may be mounted here: {done.stderr.strip()}"
        if os.environ.get("SPARSEMILL_REQUIRE_SYSTEM") == "1" and os.geteuid() == 0:  # nobody else may ever
            pytest.fail(missing)
        pytest.skip(f"{missing}; a limit of files' size stands in for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run(root: Path, limit: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.faults.workload", str(root), str(FILE_BYTES)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False)


def assert_refused_and_nothing_committed(done: "subprocess.CompletedProcess[str]", root: Path) -> tuple[int, int]:
    """Free and needed bytes of the message."""
    assert done.returncode == 1, done.stderr
    found = MESSAGE.search(done.stderr)
    assert found is not None, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(root.rglob("harvest/*/manifest.json"))
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


@pytest.mark.system
def test_on_a_full_disk_it_says_what_is_needed_and_free_and_finishes_once_there_is_room(tmp_path: Path):
    everything(tmp_path / "clean", FILE_BYTES)
    with mounted(tmp_path / "disk", 8_000_000) as disk:
        (disk / "ballast").write_bytes(bytes(8_000_000 - 3 * FILE_BYTES))
        free, needed = assert_refused_and_nothing_committed(run(disk), disk)
        assert 0 <= free < needed <= FILE_BYTES
        again, _ = assert_refused_and_nothing_committed(run(disk), disk)
        assert again == free  # trying again fills nothing more
        (disk / "ballast").unlink()
        done = run(disk)
        assert done.returncode == 0, done.stderr
        assert outcome(disk) == outcome(tmp_path / "clean")


def test_at_the_limit_of_a_files_size_it_says_so_and_finishes_once_it_is_raised(tmp_path: Path):
    everything(tmp_path / "clean", FILE_BYTES)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, FILE_BYTES // 2))

    _, needed = assert_refused_and_nothing_committed(run(tmp_path / "store", limit), tmp_path / "store")
    assert needed == FILE_BYTES
    done = run(tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "store") == outcome(tmp_path / "clean")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_at_any_change_of_the_disk_commits_nothing_and_loses_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", int)
    made = make(tmp_path / "clean")
    steps = failing_at(lambda: make(tmp_path / "counted"), None, number)
    assert steps > 40
    for step in range(steps):
        root = tmp_path / str(step)
        with pytest.raises(StorageFull) as caught:
            failing_at(lambda root=root: make(root), step, number)
        assert caught.value.free_bytes > 0
        assert caught.value.where is not None
        assert Path(caught.value.where).is_relative_to(tmp_path)
        found = ArtifactStore(root).find(SPEC) if root.exists() else None
        assert found is None or found.manifest_sha256 == made.manifest_sha256  # failed after the commit's rename
        assert make(root).manifest_sha256 == made.manifest_sha256


def failing_at(act: Callable[[], object], step: int | None, number: int) -> int:
    """Acts, the disk being full from a change on; returns how many changes there were."""
    changes = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal changes
        changes += 1
        if step is not None and changes > step:
            raise OSError(number, os.strerror(number))

    previous = atomic.set_fault_hook(hook)
    try:
        act()
    finally:
        atomic.set_fault_hook(previous)
    return changes
