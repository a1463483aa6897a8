"""A disk that fails to read, write or sync: errors name the file, nothing is committed, a failed fsync never counts."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import ArtifactStore
from tests.faults.lengths import LONG
from tests.faults.system_calls import calls_of, run_under
from tests.faults.workload import SPEC, everything, make, outcome

CHANGES = "write,fsync,rename,mkdir,unlink,rmdir,ftruncate"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", int)


@pytest.mark.system
@pytest.mark.parametrize("call", CHANGES.split(","))
def test_an_io_error_of_the_kernel_names_the_file_and_commits_nothing(call: str, tmp_path: Path):
    root = tmp_path / "clean"
    root.mkdir()
    log = tmp_path / "log"
    assert run_under(f"--trace={call}", root=root, log=log).returncode == 0
    clean, count = outcome(root), calls_of(log)[call]
    last = max(1, count - 2)  # of the last, of write, prints what was made
    for number in range(1, last + 1) if LONG else sorted({1, max(1, last // 2), last}) if count else []:
        root = tmp_path / f"{number}"
        root.mkdir()
        done = run_under(f"--inject={call}:error=EIO:when={number}", root=root, log=log)
        assert done.returncode == 1 or outcome(root) == clean, (call, number, done.stdout, done.stderr)
        if done.returncode:
            assert "Traceback" not in done.stderr
            assert "Input/output error" in done.stderr
            assert str(root) in done.stderr
        for name in ("mine", "theirs"):
            store = ArtifactStore(root / name)
            assert all(store.verify(artifact) == [] for artifact in store.list())
        everything(root)
        assert outcome(root) == clean, (call, number)


@pytest.mark.parametrize("operation", ["open", "append", "write", "fsync", "fsync-folder", "rename", "mkdir"])
def test_an_io_error_at_any_change_names_the_file_and_commits_nothing(operation: str, tmp_path: Path):
    steps: Counter[str] = Counter()
    made = make(tmp_path / "clean")
    previous = atomic.set_fault_hook(lambda current, _: steps.update([current]))
    make(tmp_path / "counted")
    for number in range(steps[operation]):
        root, left = tmp_path / str(number), [number]

        def hook(current: str, path: Path, left: list[int] = left) -> None:
            left[0] -= current == operation
            if left[0] < 0 and current == operation:
                left[0] = 10**6
                raise OSError(errno.EIO, "Input/output error")

        atomic.set_fault_hook(hook)
        with pytest.raises(OSError, match="Input/output error") as caught:
            make(root)
        atomic.set_fault_hook(None)
        assert Path(str(caught.value.filename)).is_relative_to(root.parent)
        found = ArtifactStore(root).find(SPEC) if root.exists() else None
        assert found is None or operation == "fsync-folder"  # of the commit's own rename, which has happened
        assert make(root).manifest_sha256 == made.manifest_sha256
    atomic.set_fault_hook(previous)


def test_an_fsync_that_failed_is_never_asked_again_nor_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    failed: list[str] = []

    def fail_once(descriptor: int) -> None:
        inode, path = str(os.fstat(descriptor).st_ino), str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.endswith("w1/more") and not failed:
            failed.append(inode)
            os.link(path, tmp_path / "kept")  # so that no other file gets the number
            raise OSError(errno.EIO, "Input/output error")
        synced.append(inode)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="w1/more"):
        make(tmp_path / "store")
    (journal,) = tmp_path.glob("store/.staging/*/journal.jsonl")
    assert '"w0"' in journal.read_text()
    assert '"w1"' not in journal.read_text()
    (damaged,) = tmp_path.glob("store/.staging/*/files/w1/more")
    damaged.write_bytes(bytes(damaged.stat().st_size))  # what the kernel may make of pages that it could not write
    computed: list[str] = []
    previous = atomic.set_fault_hook(
        lambda operation, path: computed.append(path.name) if operation == "open" else None
    )
    made = make(tmp_path / "store")
    atomic.set_fault_hook(previous)
    assert computed.count("more") == 1  # w1's is written anew, w0's is not
    assert failed[0] not in synced
    assert ArtifactStore(tmp_path / "store").verify(made) == []


@pytest.mark.system
def test_a_file_that_cannot_be_read_is_named_and_nothing_comes_of_it(tmp_path: Path):
    root = tmp_path / "store"
    root.mkdir()
    everything(root)
    (data,) = (root / "mine").glob("harvest/*/w0/data")
    again = tmp_path / "remote-is-gone"
    again.mkdir()
    (root / "mine").rename(again / "mine")
    (data,) = (again / "mine").glob("harvest/*/w0/data")
    done = run_under(f"--trace-path={data}", "--inject=read,pread64:error=EIO", root=again, log=tmp_path / "log")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(data) in done.stderr
    assert "Input/output error" in done.stderr
    assert not list((again / "remote").rglob("pointer.json"))
    assert not list((again / "theirs").rglob("harvest/*/manifest.json"))
