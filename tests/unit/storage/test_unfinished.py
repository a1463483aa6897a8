import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage import atomic, unfinished
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import ArtifactNotFound, InputError
from storage.fingerprint import Json, seal_json
from storage.housekeeping import usage
from storage.unfinished import Unfinished
from tests.unit.storage.processes import SPEC as KILLED

TRAINING = Spec("train", 1, {"seed": 1})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def can_tell(tmp_path: Path) -> None:
    """Skips where the system does not tell who holds a lock."""
    with atomic.exclusive_lock(tmp_path / "asked"):
        if atomic.is_locked(tmp_path / "asked") is None:
            pytest.skip("the system does not tell")


def begin(store: ArtifactStore, spec: Spec = TRAINING, units: tuple[str, ...] = ("w0", "w1")) -> Path:
    """Leaves a staging folder behind, as an interrupted stage does."""

    def produce(staging: Staging) -> Result:
        for unit in units:
            staging.write_bytes(unit, b"x" * 5000)
            staging.finish(unit, [unit])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(spec, produce, provenance={})
    return store.root / ".staging" / spec.id


def commit(store: ArtifactStore, spec: Spec) -> Artifact:
    def produce(_: Staging) -> Result:
        return Result({})

    return store.make(spec, produce, provenance={}).artifact


def found(store: ArtifactStore, stage: str | None = None) -> list[Unfinished]:
    """What is unfinished, seen without changing anything: names, contents and times of all files stay."""

    def all_of_it() -> list[tuple[Path, float, bytes]]:
        paths = sorted(store.root.rglob("*"))
        return [(path, path.lstat().st_mtime, path.read_bytes() if path.is_file() else b"") for path in paths]

    before = all_of_it()
    answer = unfinished.unfinished(store.root, stage)
    assert all_of_it() == before
    return answer


@pytest.mark.usefixtures("can_tell")
def test_what_was_interrupted_is_told_with_its_units_and_bytes(store: ArtifactStore):
    assert found(store) == []
    assert not store.root.exists()
    folder = begin(store)
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    own = sum(stat.st_blocks * 512 for stat in files)
    (work,) = found(store)
    assert work == Unfinished(TRAINING.id, folder, TRAINING, ("w0", "w1"), own, working=False, committed=False)
    assert work.stage == "train"
    commit(store, TRAINING)
    assert found(store) == []


def test_of_one_stage(store: ArtifactStore):
    begin(store)
    begin(store, Spec("harvest", 1, {}))
    assert [work.stage for work in found(store)] == ["harvest", "train"]
    assert [work.id for work in found(store, "train")] == [TRAINING.id]
    assert found(store, "tokenize") == []


def test_a_unit_that_was_dropped_does_not_count(store: ArtifactStore):
    folder = begin(store)
    Staging(folder, TRAINING, {}).discard("w0")
    assert found(store)[0].units == ("w1",)


def test_a_file_that_an_artifact_has_too_takes_nothing(store: ArtifactStore, tmp_path: Path):
    folder = begin(store, units=("w0",))
    (before,) = found(store)
    (tmp_path / "elsewhere").hardlink_to(folder / "files/w0")
    assert found(store)[0].disk_bytes == before.disk_bytes - (folder / "files/w0").stat().st_blocks * 512


def test_what_is_left_behind_a_commit_is_not_unfinished(store: ArtifactStore):
    artifact = commit(store, TRAINING)
    left = store.root / ".staging" / artifact.id
    left.mkdir()
    (left / "journal.jsonl").write_bytes(b"{}\n")
    assert found(store) == []
    (left / "files").mkdir()  # it is made again
    assert [(work.id, work.committed) for work in found(store)] == [(artifact.id, True)]


def header(**fields: Json) -> bytes:
    return seal_json({"format_version": 0, "spec": TRAINING.to_json(), "provenance": {}, **fields}) + b"\n"


UNIT = seal_json({"unit": "w0", "files": {}, "data": {}}) + b"\n"


@pytest.mark.parametrize(
    "journal",
    [
        b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\x00\n", b"{" * 100_000 + b"\n", b"[" * 100_000 + b"\n",
        header()[:-1], header(format_version=1), header(spec=Spec("train", 2, {}).to_json()), header(spec={"stage": 3}),
        header(spec=TRAINING.to_json() | {"parents": {"a": {"id": 1, "manifest_sha256": 2}}}),
        b'{"spec":"\\ud800"}\n',
    ],
)  # fmt: skip
def test_a_journal_that_nothing_goes_on_from_tells_nothing(store: ArtifactStore, journal: bytes):
    folder = begin(store)
    (folder / "journal.jsonl").write_bytes(journal)
    (work,) = found(store)
    assert (work.id, work.spec, work.units) == (TRAINING.id, None, ())


@pytest.mark.parametrize(
    "line",
    [
        UNIT[:-1], UNIT[:30] + b"\n", b"3\n", b'{"unit":[1]}\n', b'{"dropped":[1]}\n', b'{"unit":null}\n',
        b"[" * 100_000 + b"\n",
    ],
)  # fmt: skip
def test_a_journal_counts_up_to_a_line_that_is_none(store: ArtifactStore, line: bytes):
    folder = begin(store)
    (folder / "journal.jsonl").write_bytes(header() + UNIT + line)
    (work,) = found(store)
    assert (work.spec, work.units) == (TRAINING, ("w0",))


def test_garbage_among_unfinished_work_is_passed_over(store: ArtifactStore):
    folder = begin(store)
    staging = store.root / ".staging"
    (staging / "notes.txt").write_text("mine")
    (staging / "train-000000000000").write_text("no folder")
    (staging / "Train-0123456789ab").mkdir()
    (staging / os.fsdecode(b"train-\xff")).mkdir()
    (staging / "train-111111111111").symlink_to(staging / "nowhere")
    (staging / "train-222222222222").mkdir()
    (folder / "journal.jsonl").unlink()
    os.mkfifo(folder / "journal.jsonl")  # whoever opened it would wait
    (folder / "files" / "loop").symlink_to(folder / "files")
    seen = {work.id: work.units for work in unfinished.unfinished(store.root)}
    assert seen == {TRAINING.id: (), "train-222222222222": ()}


def test_a_file_instead_of_the_folders_is_nothing_unfinished(store: ArtifactStore):
    commit(store, TRAINING)
    (store.root / ".staging").rmdir()
    (store.root / ".staging").write_text("")
    assert found(store) == []


def test_folders_may_come_and_go_while_they_are_looked_at(store: ArtifactStore):
    specs = [Spec("train", 1, {"seed": seed}) for seed in range(8)]
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                for spec in specs:
                    begin(store, spec)
                    atomic.remove_tree(store.root / ".staging" / spec.id)
        except BaseException as error:  # noqa: BLE001 - of the thread; told below
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        deadline, most = time.monotonic() + 1, 0
        while time.monotonic() < deadline:
            most = max(most, len(unfinished.unfinished(store.root)), len(usage(store)))
    finally:
        stop.set()
        worker.join()
    assert not failed
    assert most > 0


@contextmanager
def asked_all_the_time(store: ArtifactStore) -> Generator[None]:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            unfinished.unfinished(store.root)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        stop.set()
        asker.join()


@pytest.mark.usefixtures("can_tell")
def test_who_starts_does_not_notice_that_somebody_looks(store: ArtifactStore):
    begin(store)
    with asked_all_the_time(store):
        for _ in range(300):
            with store.lock(TRAINING.id, on_wait=lambda: pytest.fail("nobody works on it")):
                assert unfinished.is_worked_on(store.root, TRAINING.id)


@pytest.mark.usefixtures("can_tell")
def test_a_killed_process_worked_on_it_until_then(store: ArtifactStore, tmp_path: Path):
    command = [sys.executable, "-m", "tests.unit.storage.processes", str(store.root), "0.2", str(tmp_path / "done")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as process:
        deadline = time.monotonic() + 60
        while not (seen := unfinished.unfinished(store.root)) or len(seen[0].units) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert [(work.id, work.working) for work in seen] == [(KILLED.id, True)]
    (work,) = found(store)
    assert (work.id, work.working, work.spec) == (KILLED.id, False, KILLED)
    assert set(work.units) >= {"window-0", "window-1"}
    with pytest.raises(ArtifactNotFound, match=rf"no harvest yet.*{KILLED.id} \(interrupted\); the command that began"):
        store.resolve("latest", stage="harvest")


@pytest.mark.usefixtures("can_tell")
def test_what_is_not_there_but_begun_is_named(store: ArtifactStore):
    begin(store)
    for reference in ("latest", TRAINING.id, TRAINING.id[:9], TRAINING.id[6:12]):
        with pytest.raises(ArtifactNotFound, match=rf"not finished yet: {TRAINING.id} \(interrupted\)"):
            store.resolve(reference, stage=("train", "import"))
    with store.lock(TRAINING.id), pytest.raises(ArtifactNotFound, match=rf"{TRAINING.id} \(being made\)"):
        store.resolve("latest")
    for reference, stage in (("latest", "harvest"), ("harvest", None), ("train-ffffffffffff", None), ("", None)):
        with pytest.raises(ArtifactNotFound) as caught:
            store.resolve(reference, stage=stage)
        assert "not finished yet" not in str(caught.value)


def test_of_much_that_is_begun_three_are_named(store: ArtifactStore):
    for seed in range(5):
        begin(store, Spec("train", 1, {"seed": seed}))
    with pytest.raises(ArtifactNotFound, match=r"(train-\w+ \(\w+\)(, )?){3} and 2 more; "):
        store.resolve("latest", stage="train")


@pytest.mark.parametrize("answer", [True, False, None])
def test_each_state_has_words(answer: bool | None):
    assert unfinished.state(answer) in {"being made", "interrupted", "unfinished"}


def test_the_error_that_ended_work_is_told_until_the_next_run(store: ArtifactStore):
    begin(store)
    unfinished.note_failure(store.root, TRAINING.id, InputError("no text", where="a.jsonl"))
    (work,) = found(store)
    assert (work.failure, work.units) == ("no text; where: a.jsonl", ("w0", "w1"))
    unfinished.note_failure(store.root, TRAINING.id, ValueError("odd"))
    assert found(store)[0].failure == "ValueError: odd"
    unfinished.note_failure(store.root, TRAINING.id, None)
    assert found(store)[0].failure is None
    unfinished.note_failure(store.root, TRAINING.id, None)


def test_a_note_changes_nothing_that_goes_on(store: ArtifactStore):
    begin(store)
    unfinished.note_failure(store.root, TRAINING.id, ValueError("odd"))

    def produce(staging: Staging) -> Result:
        assert list(staging.finished) == ["w0", "w1"]
        return Result({})

    made = store.make(TRAINING, produce, provenance={})
    assert made.status == "resumed"
    assert set(made.artifact.manifest.files) == {"w0", "w1"}
    assert store.verify(made.artifact) == []
    assert found(store) == []


def test_where_no_note_can_be_left_the_work_is_told_as_interrupted(store: ArtifactStore):
    folder = begin(store)
    (folder / "failure.txt").mkdir()
    unfinished.note_failure(store.root, TRAINING.id, ValueError("odd"))
    assert found(store)[0].failure is None
    (folder / "failure.txt").rmdir()
    os.mkfifo(folder / "failure.txt")  # whoever opened it would wait
    assert found(store)[0].failure is None
    unfinished.note_failure(store.root, "train-ffffffffffff", ValueError("nothing was begun"))
    assert not (store.root / ".staging/train-ffffffffffff").exists()


@pytest.mark.parametrize("text", ["\x1b[2J\x1b[31mred\n\nnext\ud800 ", "x" * 5000, "", "\N{RIGHT-TO-LEFT OVERRIDE}txt"])
def test_a_note_is_one_short_line_that_a_terminal_shows_as_it_is(store: ArtifactStore, text: str):
    folder = begin(store)
    unfinished.note_failure(store.root, TRAINING.id, InputError(text))
    for _ in range(2):
        failure = found(store)[0].failure or ""
        assert len(failure) <= 2000
        assert failure.isprintable()
        assert ("red next" in failure) == ("red" in text)
        (folder / "failure.txt").write_bytes(text.encode(errors="replace") + b"\xff")  # anybody's
