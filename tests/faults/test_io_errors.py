"""A disk that fails to read, write or sync: errors name the file, nothing is committed, a failed fsync never counts."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import ArtifactStore
from tests.faults.lengths import LONG
from tests.faults.operations import operations, possible_in
from tests.faults.system_calls import calls_of, files_of_injected, run_under
from tests.faults.workload import everything, make, make_longer, outcome

CHANGES = "write,fsync,rename,mkdir,unlink,rmdir,ftruncate,link,utimensat"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(os, "fsync", int)
    yield
    atomic.set_fault_hook(None)


@pytest.mark.system
@pytest.mark.parametrize("call", CHANGES.split(","))
def test_an_io_error_of_the_kernel_names_the_file_and_commits_nothing(call: str, tmp_path: Path):
    root = tmp_path / "clean"
    root.mkdir()
    log = tmp_path / "log"
    assert run_under(f"--trace={call}", root=root, log=log).returncode == 0
    clean, count = outcome(root), calls_of(log)[call]
    if call == "ftruncate" and "truncate" not in possible_in(tmp_path):
        pytest.skip("the file system takes no writes past the page cache, which alone are cut to their length")
    assert count > 0
    failed = 0
    last = max(1, count - 2)  # of the last, of write, prints what was made
    for number in range(1, last + 1) if LONG else sorted({1, max(1, last // 2), last}):
        root = tmp_path / f"{number}"
        root.mkdir()
        done = run_under(f"--inject={call}:error=EIO:when={number}", root=root, log=log)
        assert done.returncode == 1 or outcome(root) == clean, (call, number, done.stdout, done.stderr)
        if done.returncode:
            failed += 1
            assert "Traceback" not in done.stderr
            assert "Input/output error" in done.stderr
            concerned = {path for path in files_of_injected(log) if Path(path).is_relative_to(root)}
            assert any(path in done.stderr for path in concerned), (concerned, done.stderr)
        for name in ("mine", "theirs"):
            store = ArtifactStore(root / name)
            assert all(store.verify(artifact) == [] for artifact in store.list())
        everything(root)
        assert outcome(root) == clean, (call, number)
    assert failed > 0
    print(f"{call}: {failed} errors ended the command")


@pytest.mark.parametrize("operation", sorted(operations() - {"unlink"}))  # unlink is a push's: test_push.py
def test_an_io_error_at_any_change_names_the_file_and_commits_nothing(operation: str, tmp_path: Path):
    steps, clean = counted_steps(tmp_path / "clean")
    if operation not in possible_in(tmp_path):
        pytest.skip(f"the file system has no {operation}")
    assert steps[operation] > 0
    for number in range(steps[operation]):
        root, seen = tmp_path / str(number), list[tuple[Path, list[Path]]]()
        atomic.set_fault_hook(failing_at(operation, number, root, seen))
        with pytest.raises(OSError, match="Input/output error") as caught:
            make_both(root)
        atomic.set_fault_hook(None)
        ((file, before),) = seen
        assert caught.value.filename == str(file)
        assert committed(root) == before
        make_both(root)
        assert outcome(root) == clean


def failing_at(
    operation: str, number: int, root: Path, seen: list[tuple[Path, list[Path]]]
) -> Callable[[str, Path], None]:
    """A hook that fails once, at the ``number``-th of an operation, and tells at which file and what was there then."""
    left = [number]

    def hook(current: str, path: Path) -> None:
        left[0] -= current == operation
        if left[0] < 0 and not seen:
            seen.append((path, committed(root)))
            raise OSError(errno.EIO, "Input/output error")

    return hook


def make_both(root: Path) -> None:
    make(root)
    make_longer(root)


def counted_steps(root: Path) -> tuple[Counter[str], dict[str, str]]:
    """How often each operation is met where all goes well, and what comes of it."""
    steps: Counter[str] = Counter()
    previous = atomic.set_fault_hook(lambda current, _: steps.update([current]))
    try:
        make_both(root)
    finally:
        atomic.set_fault_hook(previous)
    return steps, outcome(root)


def committed(root: Path) -> list[Path]:
    return sorted(root.glob("[a-z]*/*/manifest.json"))


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
