import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest

from storage import atomic
from storage.errors import StorageFull


@pytest.fixture
def steps() -> Generator[list[tuple[str, str]]]:
    """The (operation, file name) of every change of the disk during the test."""
    seen: list[tuple[str, str]] = []
    previous = atomic.set_fault_hook(lambda operation, path: seen.append((operation, path.name)))
    yield seen
    atomic.set_fault_hook(previous)


def failing_at(operation: str, number: int = 0) -> Callable[[str, Path], None]:
    """A hook that raises ENOSPC at one step."""
    left = [number]

    def hook(current: str, path: Path) -> None:
        if current == operation:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    return hook


@pytest.fixture
def hook_reset() -> Generator[None]:
    yield
    atomic.set_fault_hook(None)


def test_replace_writes_syncs_renames_and_syncs_the_folder_in_this_order(tmp_path: Path, steps: list[tuple[str, str]]):
    atomic.replace_file(tmp_path / "f", b"new")
    assert [operation for operation, _ in steps] == ["open", "write", "close", "fsync", "rename", "fsync-folder"]
    assert steps[-1][1] == tmp_path.name
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("operation", ["open", "write", "close", "fsync", "rename"])
def test_a_failed_replace_leaves_the_old_bytes(tmp_path: Path, operation: str, hook_reset: None):
    atomic.replace_file(tmp_path / "f", b"old")
    atomic.set_fault_hook(failing_at(operation))
    with pytest.raises(StorageFull):
        atomic.replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_pieces_are_written_in_order_arrays_as_their_bytes(tmp_path: Path):
    array = np.arange(6, dtype="<u2").reshape(2, 3)
    atomic.write_file(tmp_path / "f", [b"ab", array, b"", np.empty(0, np.float32), memoryview(b"cd")])
    assert (tmp_path / "f").read_bytes() == b"ab" + array.tobytes() + b"cd"


def test_write_replaces_a_longer_file(tmp_path: Path):
    atomic.write_file(tmp_path / "f", [b"long contents"])
    atomic.write_file(tmp_path / "f", [b"short"])
    assert (tmp_path / "f").read_bytes() == b"short"


def test_append_makes_the_file_and_its_name_durable_and_adds_to_it(tmp_path: Path, steps: list[tuple[str, str]]):
    atomic.append_durably(tmp_path / "f", b"one\n")
    assert [operation for operation, _ in steps] == ["append", "write", "fsync", "close", "fsync-folder"]
    atomic.append_durably(tmp_path / "f", b"two\n")
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"


def test_new_folders_are_durable_from_the_top_down(tmp_path: Path, steps: list[tuple[str, str]]):
    atomic.make_folder(tmp_path / "a" / "b")
    assert steps == [("mkdir", "a"), ("fsync-folder", tmp_path.name), ("mkdir", "b"), ("fsync-folder", "a")]
    atomic.make_folder(tmp_path / "a" / "b")
    assert len(steps) == 4


def test_sync_files_reaches_every_folder_up_to_the_top_once(tmp_path: Path, steps: list[tuple[str, str]]):
    (tmp_path / "top/x/y").mkdir(parents=True)
    for name in ("top/x/y/1", "top/x/y/2", "top/x/3"):
        (tmp_path / name).write_bytes(b"")
    steps.clear()
    atomic.sync_files([tmp_path / "top/x/y/1", tmp_path / "top/x/y/2", tmp_path / "top/x/3"], top=tmp_path / "top")
    assert [name for operation, name in steps if operation == "fsync"] == ["1", "2", "3"]
    assert [name for operation, name in steps if operation == "fsync-folder"] == ["top", "x", "y"]


def test_rename_between_folders_syncs_both(tmp_path: Path, steps: list[tuple[str, str]]):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/f").write_bytes(b"x")
    atomic.rename(tmp_path / "a/f", tmp_path / "b/g")
    assert steps == [("rename", "f"), ("fsync-folder", "b"), ("fsync-folder", "a")]
    assert (tmp_path / "b/g").read_bytes() == b"x"


def test_link_shares_the_bytes_until_one_name_is_written_again(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x")
    atomic.link_or_copy(tmp_path / "f", tmp_path / "g")
    assert (tmp_path / "f").samefile(tmp_path / "g")
    atomic.write_file(tmp_path / "g", [b"y"])
    assert (tmp_path / "f").read_bytes() == b"x"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_there_are_no_links_the_bytes_are_copied(tmp_path: Path, number: int):
    (tmp_path / "f").write_bytes(b"x" * 10)

    def refuse(operation: str, path: Path) -> None:
        if operation == "link":
            raise OSError(number, os.strerror(number), str(path))

    previous = atomic.set_fault_hook(refuse)
    try:
        atomic.link_or_copy(tmp_path / "f", tmp_path / "g")
    finally:
        atomic.set_fault_hook(previous)
    assert (tmp_path / "g").read_bytes() == b"x" * 10
    assert not (tmp_path / "f").samefile(tmp_path / "g")


def test_removing_what_is_not_there_is_no_error(tmp_path: Path):
    atomic.remove_file(tmp_path / "none")
    atomic.remove_tree(tmp_path / "none")


def test_remove_tree_removes_a_link_not_what_it_points_to(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/f").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    atomic.remove_tree(tmp_path / "link")
    assert (tmp_path / "kept/f").read_bytes() == b"x"


def test_require_free_tells_what_is_needed_and_free(tmp_path: Path):
    atomic.require_free(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(StorageFull) as caught:
        atomic.require_free(tmp_path, 2**62)
    assert caught.value.needed_bytes == 2**62
    assert 0 < caught.value.free_bytes < 2**62


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_typed_error(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int, data: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StorageFull) as caught:
        atomic.write_file(tmp_path / "f", [b"x"])
    assert str(tmp_path / "f") in str(caught.value)


def test_an_input_output_error_passes_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        atomic.replace_file(tmp_path / "f", b"x")
    assert not isinstance(caught.value, StorageFull)
    assert not (tmp_path / "f").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:3]))
    atomic.write_file(tmp_path / "f", [b"0123456789"])
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_lock_excludes_other_threads_and_tells_that_it_waits(tmp_path: Path):
    waiting = threading.Event()
    order: list[str] = []

    def second() -> None:
        with atomic.exclusive_lock(tmp_path / "lock", on_wait=waiting.set):
            order.append("second")

    with atomic.exclusive_lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_who_asks_learns_whether_a_lock_is_held_and_never_holds_it(tmp_path: Path):
    lock = tmp_path / "lock"
    assert atomic.is_locked(lock) in {False, None}
    assert not lock.exists()
    with atomic.exclusive_lock(lock):
        if atomic.is_locked(lock) is None:
            pytest.skip("the system does not tell")
        assert atomic.is_locked(lock)
    assert atomic.is_locked(lock) is False


def test_where_the_system_does_not_tell_locks_work_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with atomic.exclusive_lock(tmp_path / "lock"):
        assert atomic.is_locked(tmp_path / "lock") is None


@pytest.mark.parametrize("contents", [b"", b"garbage", b"12345"])
def test_what_a_lock_file_holds_does_not_matter(tmp_path: Path, contents: bytes):
    (tmp_path / "lock").write_bytes(contents)
    with atomic.exclusive_lock(tmp_path / "lock", on_wait=lambda: pytest.fail("waited for nobody")):
        pass


def test_set_fault_hook_returns_the_one_before(hook_reset: None):
    def hook(operation: str, path: Path) -> None: ...

    assert atomic.set_fault_hook(hook) is None
    assert atomic.set_fault_hook(None) is hook


def test_a_stream_that_fails_at_its_end_leaves_the_old_bytes(tmp_path: Path):
    def refused() -> Generator[bytes]:
        yield b"new"
        raise ValueError("not what was wanted")

    atomic.stream_file(tmp_path / "f", iter([b"old", b" bytes"]))
    with pytest.raises(ValueError, match="not what was wanted"):
        atomic.stream_file(tmp_path / "f", refused())
    assert (tmp_path / "f").read_bytes() == b"old bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory.write(data)
    return memoryview(memory)


@pytest.mark.parametrize("size", [1, 4096, 10_000, 3_000_001])
def test_an_aligned_write_gives_just_the_files_bytes(tmp_path: Path, size: int, steps: list[tuple[str, str]]):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(b"old" * size)
    (tmp_path / "link").hardlink_to(tmp_path / "f")
    atomic.write_aligned(tmp_path / "f", aligned(data), size)
    assert (tmp_path / "f").read_bytes() == data
    assert (tmp_path / "link").read_bytes() == b"old" * size
    assert [operation for operation, _ in steps] == ["open", "write", "truncate", "close"]


@pytest.mark.parametrize("operation", ["open", "write"])
def test_where_the_file_system_knows_no_direct_writes_it_writes_the_usual_way(
    tmp_path: Path, operation: str, hook_reset: None
):
    refused: list[str] = []

    def refuse_once(current: str, path: Path) -> None:
        if current == operation and not refused:
            refused.append(current)
            raise OSError(errno.EINVAL, "Invalid argument", str(path))

    atomic.set_fault_hook(refuse_once)
    data = os.urandom(10_000)
    atomic.write_aligned(tmp_path / "f", aligned(data), len(data))
    assert refused == [operation]
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("operation", ["open", "write", "truncate", "close"])
def test_an_aligned_write_that_fails_says_so(tmp_path: Path, operation: str, hook_reset: None):
    atomic.set_fault_hook(failing_at(operation))
    with pytest.raises(StorageFull):
        atomic.write_aligned(tmp_path / "f", aligned(b"x" * 5000), 5000)


def test_a_file_is_created_once_whole_and_durable(tmp_path: Path, steps: list[tuple[str, str]]):
    assert atomic.create_file(tmp_path / "f", b"first")
    names = ["open", "write", "close", "fsync", "link", "unlink", "fsync-folder"]
    assert [operation for operation, _ in steps] == names
    assert not atomic.create_file(tmp_path / "f", b"second")
    assert [operation for operation, _ in steps] == names * 2  # the folder too: the first may have been killed before
    assert (tmp_path / "f").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("operation", ["open", "write", "close", "fsync", "link"])
def test_a_failed_creation_leaves_nothing(tmp_path: Path, operation: str, hook_reset: None):
    atomic.set_fault_hook(failing_at(operation))
    with pytest.raises(StorageFull):
        atomic.create_file(tmp_path / "f", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_put_file_is_durable_before_it_has_its_name(tmp_path: Path, steps: list[tuple[str, str]]):
    (tmp_path / "top/x").mkdir(parents=True)
    atomic.put_file(tmp_path / "top/x/f", [b"a", b"b"])
    assert [operation for operation, _ in steps] == ["open", "write", "write", "close", "fsync", "rename"]
    assert (tmp_path / "top/x/f").read_bytes() == b"ab"
    atomic.sync_names([tmp_path / "top/x/f"], top=tmp_path / "top")
    assert steps[-2:] == [("fsync-folder", "top"), ("fsync-folder", "x")]
