"""Files that claim a thousand million entries, rows or chunks: refused, or read as far as they go, in little memory."""

import json
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.documents import Flaw
from pipeline.corpus.readers import format_of
from pipeline.tokens import OUTPUT_VERSION, TokenTable
from storage.artifact import open_folder
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import CorruptArtifact, RemoteError
from storage.reader import ShardReader
from storage.remote import RemoteStore
from storage.shared import Pointer, read_manifest, read_pointer
from storage.transfers import plan_push, push
from tests.unit.storage.stores import SMALL, write_store

SPEC = Spec("train", 1, {"seed": 1})
MANY = 10**9
LITTLE = 2**30
"""Bytes of address space, beside what is in use, in which each must be refused: a list of so many takes more."""


@contextmanager
def little_memory() -> Generator[None]:
    """A limit on what this process may take, so that what would take it all fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_manifest_of_a_thousand_million_files_is_refused_before_it_is_read(tmp_path: Path):
    """As large as it would be: a hole in the file system."""
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 100 * MANY)
    with little_memory(), pytest.raises(CorruptArtifact, match=r"too large for a manifest.*manifest\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("part", [b"[],", b"{},", b'{"":0},', b"0,"])
def test_a_manifest_of_more_values_than_it_may_have_is_refused_before_they_are_made(part: bytes, tmp_path: Path):
    flood = part * (60_000_000 // len(part))
    (tmp_path / "manifest.json").write_bytes(b'{"checksum":"","stats":[' + flood + b"0]}")
    with little_memory(), pytest.raises(CorruptArtifact, match=r"too large for a manifest.*manifest\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("size", [100 * MANY, 10_000])
def test_what_a_remote_has_for_a_pointer_or_a_manifest_is_read_no_further_than_one_can_be(size: int, tmp_path: Path):
    pointer = Pointer(SPEC.id, "0" * 64, 1, 1)
    for key in (pointer.key, f"train/{SPEC.id}/{pointer.manifest_sha256}/manifest.json"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).touch()
        os.truncate(tmp_path / key, size)
    remote = RemoteStore(str(tmp_path))
    with little_memory(), pytest.raises(RemoteError, match="too large for what it is"):
        read_pointer(remote, SPEC.id)
    with little_memory(), pytest.raises((RemoteError, CorruptArtifact), match=r"manifest\.json"):
        read_manifest(remote, SPEC.id, pointer.manifest_sha256)


@pytest.mark.parametrize("counts", [(MANY, 1), (1, 10**18), (2**63, 1)])
def test_a_pointer_that_counts_more_files_or_bytes_than_there_may_be_is_refused(
    counts: tuple[int, int], tmp_path: Path
):
    pointer = Pointer(SPEC.id, "0" * 64, *counts)
    (tmp_path / pointer.key).parent.mkdir(parents=True)
    (tmp_path / pointer.key).write_bytes(pointer.to_bytes())
    with pytest.raises(CorruptArtifact, match=r"pointer\.json"):
        read_pointer(RemoteStore(str(tmp_path)), SPEC.id)


CLAIMS = {
    "windows": {"n_windows": MANY, "window_prompts": 1, "chunk_rows": 1, "n_prompts": 2**31 - 1},
    "rows a shard": {"window_prompts": MANY, "chunk_rows": MANY, "n_prompts": MANY},
    "chunks a shard": {"window_prompts": MANY, "chunk_rows": 1, "n_prompts": MANY},
    "columns": {"d_in": MANY},
    "shards a window": {"positions": 65_000, "n_windows": 20_000, "n_prompts": 10**6},
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_store_that_claims_more_than_it_has_is_refused_though_its_manifest_agrees(
    claim: str, streams: bool, tmp_path: Path
):
    layout = replace(SMALL, n_windows=1)

    def produce(staging: Staging) -> Result:
        write_store(staging.folder, layout)
        path = staging.folder / "store.zarr" / "zarr.json"
        for name, array in replace(layout, **CLAIMS[claim]).arrays().items():
            (path.parent / name / "zarr.json").write_bytes(array.metadata())
        group = json.loads(path.read_bytes())
        group["attributes"]["sparsemill"]["layout"] |= CLAIMS[claim]
        path.write_text(json.dumps(group))
        return Result({"rows": MANY})

    artifact = ArtifactStore(tmp_path / "s").make(Spec("harvest", 1, {}), produce, provenance={}).artifact
    found = artifact
    if streams:
        (tmp_path / "remote").mkdir()
        remote = RemoteStore(str(tmp_path / "remote"))
        push(plan_push(artifact, remote), remote)
        found = ArtifactStore(tmp_path / "theirs").open_remote(remote.shown, artifact.id)
    with little_memory(), pytest.raises(CorruptArtifact, match=artifact.id):
        ShardReader.of(found)
    with little_memory(), pytest.raises(CorruptArtifact, match="harvest-0123456789ab"):
        ShardReader(artifact.folder, "harvest-0123456789ab")  # without its manifest


def many_for(n: int, huge: int) -> dict[str, tuple[bytes, bytes]]:
    """By kind of file, how it says n, and a larger number."""

    def varint(number: int) -> bytes:
        found, number = b"", 2 * number
        while number > 127:
            found, number = found + bytes([number & 127 | 128]), number >> 7
        return found + bytes([number])

    return {".parquet": (varint(n), varint(huge)), ".arrow": (n.to_bytes(8, "little"), huge.to_bytes(8, "little"))}


@pytest.mark.parametrize("huge", [MANY, 2**62])
@pytest.mark.parametrize("first", [0, 7_000])
@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["strings", "tokens", "words"])
def test_a_corpus_file_that_claims_more_rows_than_it_has_gives_those_or_is_broken(
    column: str, kind: str, first: int, huge: int, tmp_path: Path
):
    n = 7777
    texts = [f"text {number}" for number in range(n)]
    values = {
        "strings": pa.array(texts), "tokens": pa.array([[number] for number in range(n)]),
        "words": pa.array(texts).dictionary_encode(),
    }[column]  # fmt: skip
    table, path = pa.table({"x": values}), tmp_path / f"lies{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
        data = path.read_bytes()
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        body, footer = data[:start], data[start:-8]
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        body, footer = b"", path.read_bytes()
    assert [row for row, _ in format_of(path.name).read(path, "x", first)] == list(range(first + 1, n + 1))
    before, after = many_for(n, huge)[kind]
    assert footer.count(before) >= 2
    footer = footer.replace(before, after)
    path.write_bytes(body + footer + (len(footer).to_bytes(4, "little") + b"PAR1" if body else b""))
    with little_memory():
        found = list(format_of(path.name).read(path, "x", first))
    rows = [(row, value) for row, value in found if not isinstance(value, Flaw)]
    assert [row for row, _ in rows] == list(range(first + 1, n + 1)) or not rows
    assert rows or first or isinstance(found[0][1], Flaw)
    for row, value in rows:
        text = value.tolist() if column == "tokens" else value if isinstance(value, str) else value.decode()
        assert text == ([row - 1] if column == "tokens" else texts[row - 1])


@pytest.mark.parametrize("huge", [MANY, 2000])
def test_a_tokens_artifact_that_claims_more_prompts_than_it_has_is_refused_though_its_manifest_agrees(
    huge: int, tmp_path: Path
):
    n = 777
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * n, np.int32)), 4)
    table = pa.table({"tokens": tokens, "source": np.zeros(n, np.int16), "document": np.zeros(n, np.int32)})

    def produce(staging: Staging) -> Result:
        path = staging.path("train-00000.arrow")
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        path.write_bytes(path.read_bytes().replace(n.to_bytes(8, "little"), huge.to_bytes(8, "little")))
        return Result({"prompt_tokens": 4, "bos_id": None, "train": {"prompts": huge}})

    artifact = ArtifactStore(tmp_path).make(Spec("tokenize", OUTPUT_VERSION, {}), produce, provenance={}).artifact
    for read in (lambda: TokenTable(artifact).prompts("train"), lambda: TokenTable(artifact).column("train", "source")):
        with little_memory(), pytest.raises(CorruptArtifact, match=f"train-00000.arrow of {artifact.id} contradicts"):
            read()
