from pathlib import Path

import pytest

from storage.attempts import Attempt, AttemptAbandoned, Attempts, accept
from storage.errors import InputError
from storage.fingerprint import sha256_file
from storage.manifest import FileRecord, Spec
from storage.staging import Staging


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "place", Spec("harvest", 1, {"seed": 1}), {"device": "cpu"})


def write(attempt: Attempt, name: str, data: bytes) -> dict[str, FileRecord]:
    path = attempt.folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return {name: FileRecord(len(data), sha256_file(path))}


def test_an_attempts_files_become_a_unit_that_survives_a_restart(staging: Staging, tmp_path: Path):
    with Attempts(staging) as attempts:
        unit = attempts.begin("window-0")
        attempt = Attempt(unit)
        records = write(attempt, "shards/0", b"rows")
        attempt.keep(records)
        assert accept(staging, "window-0", attempt.folder, records, {"rows": 3})
        attempts.end(unit)
    again = Staging(tmp_path / "place", staging.spec, {"device": "cpu"})
    assert dict(again.finished) == {"window-0": {"rows": 3}}
    assert (again.folder / "shards/0").read_bytes() == b"rows"
    assert list((tmp_path / "place" / "attempts").iterdir()) == []


def test_two_attempts_at_a_unit_never_share_a_file_and_the_second_answer_is_not_taken(staging: Staging):
    with Attempts(staging) as attempts:
        unit = attempts.begin("window-0")
        first, second = Attempt(unit), Attempt(unit)
        records, late = write(first, "shard", b"first"), write(second, "shard", b"other bytes")
        assert accept(staging, "window-0", first.folder, records)
        assert not accept(staging, "window-0", second.folder, late)
        assert (staging.folder / "shard").read_bytes() == b"first"


def test_an_attempt_whose_unit_is_finished_ends_and_leaves_nothing(staging: Staging):
    attempts = Attempts(staging)
    unit = attempts.begin("window-0")
    attempt = Attempt(unit)
    attempt.go_on()
    attempts.end(unit)
    with pytest.raises(AttemptAbandoned):
        attempt.go_on()
    records = write(attempt, "shard", b"too late")  # it was writing just then
    with pytest.raises(AttemptAbandoned):
        attempt.keep(records)
    assert not unit.exists()


def test_what_an_interrupted_coordinator_left_is_cleared(staging: Staging, tmp_path: Path):
    write(Attempt(Attempts(staging).begin("window-0")), "shard", b"half")
    with Attempts(staging):
        assert not (tmp_path / "place" / "attempts").exists()


def test_a_file_that_is_not_here_as_it_was_written_is_refused_and_named(staging: Staging):
    with Attempts(staging) as attempts:
        attempt = Attempt(attempts.begin("window-0"))
        records = write(attempt, "shard", b"rows")
        (attempt.folder / "shard").write_bytes(b"ro")
        with pytest.raises(InputError, match=r"shard; found 2 bytes; expected 4 bytes; .* share the artifact root"):
            accept(staging, "window-0", attempt.folder, records)
    assert not staging.finished
