"""Pushes, pulls and reading over a real S3 server that is too busy, fails, breaks off or is killed."""

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from storage import remote_chunks
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.borrowing import Borrowing
from storage.chunk_cache import ChunkCache
from storage.errors import ArtifactNotFound, CorruptArtifact, RemoteConflict, RemoteError
from storage.order import BatchOrder
from storage.reader import ShardReader
from storage.remote import RemoteStore, file_key
from storage.shared import read_pointer
from storage.transfers import fetch, missing_files, plan_push, push
from tests.integration.faulty_server import Fault, Proxy, faulty, no_fault
from tests.integration.s3 import BUCKET, S3Server
from tests.unit.storage.stores import write_store

BIG = np.random.default_rng(0).bytes(40_000_000)  # three parts, three ranges
ORDER = BatchOrder(seed=1, batch_rows=32, pool_rows=96, lanes=2)


def store_with(root: Path, *, note: bytes = b"", big: bytes = BIG) -> tuple[ArtifactStore, Artifact]:
    """A store with one artifact: a small activation store, a file of several parts, and a note."""

    def produce(staging: Staging) -> Result:
        write_store(staging.folder)
        staging.write_bytes("big", big)
        staging.write_bytes("note", note)
        return Result({"note": len(note)})

    store = ArtifactStore(root)
    return store, store.make(Spec("harvest", 1, {}), produce, provenance={}).artifact


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return store_with(tmp_path_factory.mktemp("ours") / "store")[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty(server.endpoint) as proxy:
        for name, value in (server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def remote(proxy: Proxy, tmp_path: Path) -> RemoteStore:
    return RemoteStore(f"s3://{BUCKET}/{tmp_path.name}")


def pull(artifact_id: str, remote: RemoteStore, store: ArtifactStore) -> Artifact:
    found = Borrowing(remote, store.root).find(artifact_id)
    assert found is not None
    with store.lock(artifact_id):
        fetch(found, missing_files(found), remote)
        store.adopt(found)
    return store.open(artifact_id)


def assert_same(pulled: Artifact, ours: Artifact) -> None:
    assert pulled.manifest_sha256 == ours.manifest_sha256
    assert ArtifactStore(pulled.folder.parents[1]).verify(pulled) == []


def push_at_once(ours: Artifact, others: Artifact, remote: RemoteStore) -> Artifact:
    """Pushes two artifacts of one id, both planned before either goes up; which one it was, the other being refused."""
    both_looked = threading.Barrier(2)

    def go(artifact: Artifact) -> RemoteConflict | None:
        plan = plan_push(artifact, remote)
        both_looked.wait()
        try:
            push(plan, remote)
        except RemoteConflict as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(go, [ours, others])
    assert (first is None) != (second is None)
    assert ours.id in str(first or second)
    return ours if first is None else others


def data_requests(proxy: Proxy, method: str) -> set[str]:
    """What was asked for, of files: without parts' numbers and other queries."""
    return {path.partition("?")[0] for kind, path, _ in proxy.log if kind == method and "/store.zarr/" in path}


@pytest.mark.parametrize("fault", [503, 500, 429, "cut"])
def test_a_server_that_fails_every_request_once_loses_nothing(
    fault: Fault, ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path
):
    def once(method: str, path: str, before: int) -> Fault:
        return fault if before == 0 and (fault != "cut" or (method == "GET" and "big" not in path)) else None

    proxy.choose = once
    push(plan_push(ours, remote), remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)
    assert sum(met is not None for _, _, met in proxy.log) > 20


def test_a_push_that_a_server_refuses_is_invisible_and_goes_on_with_what_is_missing(
    ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    hasty = RemoteStore(f"s3://{BUCKET}/{tmp_path.name}")

    def refuse_one(method: str, path: str, before: int) -> Fault:
        return 503 if method == "PUT" and path.endswith("activations/c/11/0") else None

    proxy.choose = refuse_one
    with pytest.raises(RemoteError) as caught:
        push(plan_push(ours, hasty), hasty)
    assert caught.value.transient
    assert read_pointer(remote, ours.id) is None
    with pytest.raises(ArtifactNotFound):
        ArtifactStore(tmp_path / "theirs", remote=remote).open(ours.id)
    sent, proxy.choose = len(data_requests(proxy, "PUT")), no_fault
    plan = plan_push(ours, remote)
    assert 0 < len(plan.missing) < len(ours.manifest.files)
    assert sent >= len(ours.manifest.files) - len(plan.missing) - 2
    push(plan, remote)
    proxy.log.clear()
    assert plan_push(ours, remote).there
    assert [method for method, _, _ in proxy.log] == ["GET"]  # of the pointer: nothing moves
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)


def test_a_large_file_that_changes_while_it_is_pushed_never_appears(proxy: Proxy, remote: RemoteStore, tmp_path: Path):
    store, artifact = store_with(tmp_path / "store")
    a_part_came, sent = threading.Event(), 0

    def see(method: str, path: str, before: int) -> Fault:
        if method == "PUT" and "/big?" in path:
            a_part_came.set()
        return None

    def flip(n_bytes: int) -> None:
        nonlocal sent
        before, sent = sent, sent + n_bytes
        if before <= 20_000_000 < sent:  # the first part is out, and the last not read yet
            assert a_part_came.wait(60)
            with (artifact.folder / "big").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(bytes([BIG[-1] ^ 1]))

    proxy.choose = see
    with pytest.raises(CorruptArtifact, match=r"big of harvest-\w+ is not as it was committed, and was not pushed"):
        push(plan_push(artifact, remote), remote, flip)
    there = remote.sizes("harvest")
    assert not [key for key in there if key.endswith(("/big", "/pointer.json", "/manifest.json"))], there
    (artifact.folder / "big").write_bytes(BIG)
    push(plan_push(artifact, remote), remote)
    assert store.verify(pull(artifact.id, remote, ArtifactStore(tmp_path / "theirs"))) == []


def test_a_server_killed_in_a_push_and_in_a_pull_loses_nothing(
    ours: Artifact, server: S3Server, proxy: Proxy, remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    monkeypatch.setattr("storage.remote._ATTEMPTS", 1)
    hasty = RemoteStore(f"s3://{BUCKET}/{tmp_path.name}")
    seen = itertools.count()

    def kill_at_the_tenth(method: str, path: str, before: int) -> Fault:
        if "/store.zarr/" in path and next(seen) == 10:
            server.kill()
        return None

    proxy.choose = kill_at_the_tenth
    with pytest.raises(RemoteError):
        push(plan_push(ours, hasty), hasty)
    proxy.choose = no_fault
    server.start()
    assert read_pointer(remote, ours.id) is None
    push(plan_push(ours, remote), remote)

    theirs, seen = ArtifactStore(tmp_path / "theirs"), itertools.count()
    proxy.choose = kill_at_the_tenth
    with pytest.raises(RemoteError):
        pull(ours.id, hasty, theirs)
    assert theirs.list() == []
    proxy.choose = no_fault
    server.start()
    proxy.log.clear()
    assert_same(pull(ours.id, remote, theirs), ours)
    assert 0 < len(data_requests(proxy, "GET")) < sum(name.startswith("store.zarr") for name in ours.manifest.files)
    assert list((theirs.root / ".pulled").iterdir()) == []


def test_of_two_pushes_at_once_equal_bytes_are_one_artifact(ours: Artifact, remote: RemoteStore, tmp_path: Path):
    start = threading.Barrier(2)

    def go(_: int) -> None:
        start.wait()
        push(plan_push(ours, remote), remote)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go, range(2)))
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)


def test_of_two_pushes_at_once_different_bytes_are_reported_to_the_second_and_never_mix(
    ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path
):
    others = store_with(tmp_path / "other", note=b"other numerics")[1]
    assert others.id == ours.id
    winner = push_at_once(ours, others, remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), winner)
    store = ArtifactStore(tmp_path / "other")
    loser = Borrowing(remote, store.root).find(ours.id)
    if winner is ours and loser is not None:  # the loser's machine has its own still, and is told so
        with pytest.raises(CorruptArtifact, match="another harvest"):
            store.has(loser)


def reader_of(url: str, root: Path) -> ShardReader:
    return ShardReader.of(ArtifactStore(root).resolve(url))


def test_batches_read_straight_from_the_remote_are_those_of_the_files(
    ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path
):
    push(plan_push(ours, remote), remote)

    def busy_at_first(method: str, path: str, before: int) -> Fault:
        return 503 if "activations/c/" in path and before == 0 else None

    proxy.choose = busy_at_first
    url = f"s3://{BUCKET}/{tmp_path.name}/harvest/{ours.id}"
    here, there = ShardReader.of(ours), reader_of(url, tmp_path / "theirs")
    with here.epoch(ORDER) as expected, there.epoch(ORDER) as found:
        for one, other in zip(expected, found, strict=True):
            assert (one.rows == other.rows).all()
            assert (one.prompt == other.prompt).all()
            assert (one.position == other.position).all()
    assert (there.read(100, 300).rows == here.read(100, 300).rows).all()
    with there.sequential(50) as batches:
        assert (np.concatenate([batch.rows for batch in batches]) == here.read(0, here.n_rows).rows).all()
    assert not list((tmp_path / "theirs").rglob("activations/c/*"))  # no shard was fetched
    proxy.log.clear()
    again = reader_of(url, tmp_path / "theirs")
    assert (again.read(0, 480).rows == here.read(0, 480).rows).all()
    assert not data_requests(proxy, "GET")  # all of it is in the cache


def test_the_cache_of_chunks_is_bounded_and_neighbours_are_one_request(
    ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    push(plan_push(ours, remote), remote)
    monkeypatch.setattr(remote_chunks, "cache_limit", lambda: 10 * 4096)  # a chunk of 96 bytes takes a page
    reader = reader_of(f"s3://{BUCKET}/{tmp_path.name}/harvest/{ours.id}", tmp_path / "theirs")
    reader.read(0, 32)
    proxy.log.clear()
    rows = reader.read(0, 480).rows
    assert (rows == ShardReader.of(ours).read(0, 480).rows).all()
    kept = [path for path in (tmp_path / "theirs" / ".chunks").rglob("*") if path.is_file()]
    assert sum(path.stat().st_blocks * 512 for path in kept) == 10 * 4096
    ranges = [path for method, path, _ in proxy.log if method == "GET" and "activations/c/" in path]
    assert len(ranges) == 480 // 32 - 1  # a request a shard, and none for the first, which is kept


def test_chunks_that_changed_in_the_remote_or_in_the_cache_are_never_served(
    ours: Artifact, server: S3Server, remote: RemoteStore, tmp_path: Path
):
    push(plan_push(ours, remote), remote)
    url, root = f"s3://{BUCKET}/{tmp_path.name}/harvest/{ours.id}", tmp_path / "theirs"
    expected = ShardReader.of(ours).read(0, 480).rows
    reader_of(url, root).read(0, 480)
    kept = sorted(path for path in (root / ".chunks").rglob("*") if path.is_file())
    kept[0].write_bytes(kept[1].read_bytes())
    kept[2].write_bytes(bytes([kept[2].read_bytes()[0] ^ 1]) + kept[2].read_bytes()[1:])
    kept[3].write_bytes(kept[3].read_bytes()[:50])
    assert (reader_of(url, root).read(0, 480).rows == expected).all()
    first, second = (file_key(ours, f"store.zarr/activations/c/{shard}/0") for shard in (0, 1))
    swapped = remote.read(second, at_most=1 << 20)
    assert swapped is not None
    remote.put(first, swapped)
    with pytest.raises(CorruptArtifact, match="activations/c/0/0"):
        reader_of(url, tmp_path / "others").read(0, 480)


def cache_of(root: Path, name: str, places: int) -> ChunkCache:
    return ChunkCache(root, name, places * 4096, chunk_bytes=96, chunks_per_file=4)


def kept(cache: ChunkCache, chunk: int) -> bytes | None:
    out = np.empty(96, np.uint8)
    return out.tobytes() if cache.read_into(chunk, out) else None


def test_a_cache_makes_room_by_other_artifacts_chunks(tmp_path: Path):
    old = cache_of(tmp_path, "old", 3)
    for chunk in range(3):
        old.put(chunk, memoryview(bytes([9]) * 100))
    new = cache_of(tmp_path, "new", 3)
    for chunk in (6, 1, 2, 3, 4):
        new.put(chunk, memoryview(bytes([chunk]) * 100))
    assert not (tmp_path / "old").exists()
    assert [chunk for chunk in range(8) if new.has(chunk)] == [1, 2, 6]
    assert [kept(new, chunk) for chunk in (1, 2, 6)] == [bytes([chunk]) * 96 for chunk in (1, 2, 6)]
    assert kept(new, 7) is None
    again = cache_of(tmp_path, "new", 3)
    again.put(7, memoryview(bytes([7]) * 100))  # what is there already counts
    assert [chunk for chunk in range(8) if again.has(chunk)] == [1, 2, 6]
    assert not cache_of(tmp_path / "none", "x", 0).has(0)
