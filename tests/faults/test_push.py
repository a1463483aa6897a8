"""A push that breaks off anywhere, in a service or in a folder: a reader sees nothing or all, and the next one ends it.

SIGKILL before each change of a folder is test_kills.py's; here are requests to a service, power cuts and full disks.
"""

import errno
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import obstore
import pytest

from storage import transfers
from storage.artifact import Artifact
from storage.borrowing import Borrowing
from storage.errors import RemoteError, StorageFull
from storage.remote import RemoteStore
from storage.transfers import plan_push, push, verify_remote
from tests.faults.crash_disk import CrashDisk, Stopped
from tests.faults.lengths import LONG
from tests.faults.test_disk_full import failing_at
from tests.faults.workload import make


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_SETTLING_SECONDS", 0)
    monkeypatch.setattr(transfers, "FILES_AT_ONCE", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make(tmp_path_factory.mktemp("ours"))


def opened(folder: Path, *, service: bool = False) -> RemoteStore:
    """A folder; or, as obstore alone writes to it, one that is written to as a service is."""
    remote = RemoteStore(str(folder))
    if service:
        remote._folder = None  # pyright: ignore[reportPrivateUsage]
    return remote


def pushed(made: Artifact, remote: RemoteStore) -> None:
    push(plan_push(made, remote), remote)


def seen(made: Artifact, folder: Path) -> bool:
    """Whether a reader finds the artifact in a remote, which then must be whole."""
    remote = opened(folder)
    found = Borrowing(remote, folder / "nobody").find(made.id)
    assert found is None or verify_remote(found, remote) == []
    return found is not None


def test_a_service_that_is_lost_at_any_request_shows_nothing_or_all(
    made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put: Callable[..., Any] = obstore.put
    left: list[float] = []

    def put_while_it_lasts(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return put(*arguments, **more)

    monkeypatch.setattr(obstore, "put", put_while_it_lasts)
    visible: list[bool] = []
    n_requests = len(made.manifest.files) + 2  # its manifest, and its pointer
    for number in range(n_requests + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        left[:] = [number]
        with suppress(Stopped):
            pushed(made, opened(folder, service=True))
        visible.append(seen(made, folder))
        left[:] = [float("inf")]
        pushed(made, opened(folder, service=True))
        assert seen(made, folder)
    assert visible == [False] * n_requests + [True]


def changes_of(made: Artifact, root: Path) -> int:
    """How many changes of the disk a push to a folder is."""
    root.mkdir()
    disk = CrashDisk(root)
    with disk.behind_os():
        pushed(made, opened(root))
    return disk.changes


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0] if LONG else [0.0, 0.5])
def test_after_a_power_cut_between_any_two_changes_a_folder_shows_nothing_or_all(
    kept: float, made: Artifact, tmp_path: Path
):
    n_changes = changes_of(made, tmp_path / "whole")
    assert n_changes > 30
    for number in range(n_changes + 1):
        (tmp_path / str(number)).mkdir()
        disk = CrashDisk(tmp_path / str(number))
        disk.stop_after(number)
        with disk.behind_os(), suppress(Stopped):
            pushed(made, opened(disk.root))
        after = disk.cut_power(tmp_path / f"{number}-after", random.Random(number), kept).root
        assert seen(made, after) or number < n_changes
        pushed(made, opened(after))
        assert seen(made, after)
    print(f"power cuts of a push {n_changes + 1}")


def test_killed_at_any_change_of_a_folder_then_pushed_then_out_of_power_all_of_it_stays(made: Artifact, tmp_path: Path):
    for number in range(changes_of(made, tmp_path / "whole")):
        (tmp_path / str(number)).mkdir()
        disk = CrashDisk(tmp_path / str(number))
        disk.stop_after(number)
        with disk.behind_os(), suppress(Stopped):
            pushed(made, opened(disk.root))
        disk.stop_after(None)
        with disk.behind_os():
            pushed(made, opened(disk.root))
        assert seen(made, disk.cut_power(tmp_path / f"{number}-after", random.Random(0), 0.0).root)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, StorageFull), (errno.EIO, RemoteError)])
def test_a_folder_that_is_full_or_fails_at_any_change_says_so_and_shows_nothing_half(
    number: int, error: type[StorageFull | RemoteError], made: Artifact, tmp_path: Path
):
    with mock.patch("os.fsync"):
        (tmp_path / "whole").mkdir()
        steps = failing_at(lambda: pushed(made, opened(tmp_path / "whole")), None, number)
        assert steps > 30
        for step in range(steps):
            folder = tmp_path / str(step)
            folder.mkdir()
            with pytest.raises(error) as caught:
                failing_at(lambda folder=folder: pushed(made, opened(folder)), step, number)
            assert caught.value.where is not None
            assert str(folder) in caught.value.where
            seen(made, folder)
            pushed(made, opened(folder))
            assert seen(made, folder)
