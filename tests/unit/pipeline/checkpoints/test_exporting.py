"""An export's folder is there whole, or not at all."""

from collections.abc import Generator
from pathlib import Path

import pytest

from pipeline.checkpoints.exporting import require_empty, write_folder
from storage import atomic
from storage.errors import InputError

FILES = {"config.json": b"{}", "weights/a": b"w" * 100, "weights/b": b""}


class Killed(BaseException):
    """Nothing after it happens."""


@pytest.fixture(autouse=True)
def no_hook() -> Generator[None]:
    yield
    atomic.set_fault_hook(None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("empty_folder", [False, True])
def test_killed_before_any_change_it_left_no_folder_and_the_next_one_is_whole(empty_folder: bool, tmp_path: Path):
    def run(place: Path, last: int) -> None:
        changes = 0

        def count(_operation: str, _path: Path) -> None:
            nonlocal changes
            changes += 1
            if changes > last:
                raise Killed

        atomic.set_fault_hook(count)
        write_folder(place, FILES)

    killed, last = True, 0
    while killed:
        place = tmp_path / str(last) / "sae"
        (place if empty_folder else place.parent).mkdir(parents=True)
        try:
            run(place, last)
            killed = False
        except Killed:
            assert not place.exists() or contents(place) in ({}, FILES)
        atomic.set_fault_hook(None)
        if not place.exists() or not contents(place):
            require_empty(place)
            write_folder(place, FILES)
        assert contents(place.parent) == {f"sae/{name}": data for name, data in FILES.items()}
        last += 1
    assert last > 10


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path):
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(InputError, match="not empty"):
        require_empty(tmp_path)
