import hashlib
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest

from storage import verification
from storage.artifact import Problem
from storage.artifacts import Artifact, ArtifactStore, Result, Spec, Staging
from storage.shards import GROUP_NAME
from storage.verification import verify
from tests.unit.storage.stores import SMALL, write_store

# SMALL in float32: shards of 32 rows of 24 bytes in 8 chunks of 4 rows, each with 4 bytes of crc32c.
STRIDE = 4 * 6 * 4 + 4
SHARD = f"{GROUP_NAME}/activations/c/7/0"
OTHER = f"{GROUP_NAME}/activations/c/11/0"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return commit(tmp_path / "store")


def commit(root: Path, change: Callable[[Path], object] = Path.exists) -> Artifact:
    """A store, changed before it is committed."""

    def produce(staging: Staging) -> Result:
        write_store(staging.folder)
        change(staging.folder)
        staging.write_bytes("notes.txt", b"of no store")
        return Result({})

    return ArtifactStore(root).make(Spec("harvest", 1, {}), produce, provenance={}).artifact


def flip(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)


def listed(artifact: Artifact) -> list[tuple[str, str, str]]:
    return [(problem.name, problem.kind, problem.detail) for problem in verify(artifact)]


def test_a_whole_store_has_no_problems(artifact: Artifact):
    assert verify(artifact) == []


@pytest.mark.parametrize(
    ("offsets", "detail"),
    [
        ([3 * STRIDE], "chunk 3 of 8 damaged"),
        ([3 * STRIDE - 1], "chunk 2 of 8 damaged"),  # its stored crc32c
        ([0, STRIDE + 5], "chunks 0, 1 of 8 damaged"),
        ([chunk * STRIDE + 9 for chunk in (0, 2, 3, 4, 7)], "chunks 0, 2-4, 7 of 8 damaged"),
        ([8 * STRIDE], "index damaged"),
        ([5 * STRIDE, 8 * STRIDE + 16 * 8 + 3], "chunk 5 of 8 damaged, index damaged"),
    ],
)
def test_a_flipped_shard_is_named_with_its_damaged_chunks(artifact: Artifact, offsets: list[int], detail: str):
    flip(artifact.folder / SHARD, *offsets)
    assert listed(artifact) == [(SHARD, "sha256", detail)]
    (problem,) = verify(artifact)
    assert problem.found == hashlib.sha256((artifact.folder / SHARD).read_bytes()).hexdigest()
    assert str(problem).startswith(f"{SHARD}: sha256: {detail}; found {problem.found}, expected ")


def test_pieces_of_any_size_find_the_same_chunks(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    flip(artifact.folder / SHARD, 0, 5 * STRIDE, 8 * STRIDE + 20)
    for read_bytes in (1, STRIDE, 3 * STRIDE, 8 * STRIDE, 9 * STRIDE):
        monkeypatch.setattr(verification, "_READ_BYTES", read_bytes)
        assert listed(artifact) == [(SHARD, "sha256", "chunks 0, 5 of 8 damaged, index damaged")]


def test_swapped_shards_hold_whole_chunks_of_another_place(artifact: Artifact):
    one, other = artifact.folder / SHARD, artifact.folder / OTHER
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    detail = "chunks 0-7 of 8 whole, but not the ones written there"
    assert listed(artifact) == [(OTHER, "sha256", detail), (SHARD, "sha256", detail)]


def test_a_damaged_checksum_table_is_reported_alone_and_accuses_no_other_shard(artifact: Artifact):
    table = f"{GROUP_NAME}/checksum/c/1/0"
    flip(artifact.folder / table, 0)
    assert listed(artifact) == [(table, "sha256", "chunk 0 of 1 damaged")]


def test_damaged_metadata_hides_no_damage_of_shards(artifact: Artifact):
    metadata = f"{GROUP_NAME}/zarr.json"
    flip(artifact.folder / metadata, 40)
    flip(artifact.folder / SHARD, 0)
    assert listed(artifact) == [(SHARD, "sha256", ""), (metadata, "sha256", "")]


def test_a_shard_committed_with_a_wrong_checksum_is_found_though_its_sha256_is_the_manifests(tmp_path: Path):
    artifact = commit(tmp_path / "flipped", lambda folder: flip(folder / SHARD, 2 * STRIDE))
    assert listed(artifact) == [(SHARD, "crc32c", "chunk 2 of 8 damaged")]


def test_a_shard_committed_in_anothers_place_is_found(tmp_path: Path):
    artifact = commit(tmp_path / "copied", lambda folder: (folder / SHARD).write_bytes((folder / OTHER).read_bytes()))
    assert listed(artifact) == [(SHARD, "crc32c", "chunks 0-7 of 8 whole, but not the ones written there")]


def test_every_chunk_is_summed_exactly_once(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    summed: list[int] = []
    lock = threading.Lock()

    def counting(data: npt.NDArray[np.uint8]) -> int:
        with lock:
            summed.append(len(data))
        return google_crc32c.value(data.tobytes())

    monkeypatch.setattr(verification, "crc32c", counting)
    assert verify(artifact) == []
    arrays = SMALL.arrays().values()
    assert sorted(summed) == sorted(size for a in arrays for size in [a.chunk_bytes] * (a.n_rows // a.chunk_rows))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_problems_come_in_the_manifests_order_whatever_the_threads(artifact: Artifact, threads: int):
    for name in (OTHER, SHARD, "notes.txt", f"{GROUP_NAME}/prompt/c/1"):
        flip(artifact.folder / name, 1)
    (artifact.folder / f"{GROUP_NAME}/prompt/c/0").unlink()
    (artifact.folder / "aaa").write_bytes(b"")
    (artifact.folder / "zzz").symlink_to(artifact.folder / "aaa")
    found = [problem.name for problem in verify(artifact, threads=threads)]
    damaged = {OTHER, SHARD, "notes.txt", f"{GROUP_NAME}/prompt/c/0", f"{GROUP_NAME}/prompt/c/1"}
    assert found == [*(name for name in artifact.manifest.files if name in damaged), "aaa", "zzz"]


def test_progress_grows_to_all_bytes_even_where_files_are_missing(artifact: Artifact):
    (artifact.folder / SHARD).unlink()
    calls: list[tuple[int, int]] = []
    inside = threading.Lock()

    def report(done: int, total: int) -> None:
        assert inside.acquire(blocking=False), "called by two threads at once"
        time.sleep(0.001)
        calls.append((done, total))
        inside.release()

    verify(artifact, report, threads=3)
    assert calls == sorted(calls)
    assert calls[-1] == (artifact.manifest.total_bytes, artifact.manifest.total_bytes)


def test_a_file_that_cannot_be_read_is_a_problem_and_stops_nothing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    whole = verification._pieces

    def failing(path: Path, size: int) -> Generator[memoryview]:
        if path.name == "notes.txt":
            raise OSError(5, "Input/output error")
        return whole(path, size)

    monkeypatch.setattr(verification, "_pieces", failing)
    flip(artifact.folder / SHARD, 0)
    assert [(name, kind) for name, kind, _ in listed(artifact)] == [("notes.txt", "unreadable"), (SHARD, "sha256")]


def test_a_problem_without_detail_says_what_was_found_and_expected():
    assert str(Problem("a/b", "size", "1 bytes", "2 bytes")) == "a/b: size: found 1 bytes, expected 2 bytes"


def test_an_empty_folder_is_extra_where_no_file_belongs_in_it(artifact: Artifact):
    (artifact.folder / SHARD).unlink()  # its folder stays, as it is to be filled again
    (artifact.folder / f"{GROUP_NAME}/activations/c/99/deep").mkdir(parents=True)
    (artifact.folder / "notes.txt").unlink()
    (artifact.folder / "notes.txt").mkdir()
    assert [(name, kind) for name, kind, _ in listed(artifact)] == [
        ("notes.txt", "missing"), (SHARD, "missing"), (f"{GROUP_NAME}/activations/c/99/deep", "extra"),
    ]  # fmt: skip
