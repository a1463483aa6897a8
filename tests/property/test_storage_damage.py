"""No damage to any file of an activation store is ever read silently."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import Artifact, ArtifactStore, Result, Spec, Staging
from storage.errors import CorruptArtifact, UnsupportedFormat
from storage.reader import Batch, BatchOrder, ShardReader
from storage.shards import Layout
from tests.unit.storage.stores import write_store

LAYOUT = Layout(
    n_windows=2, window_prompts=8, positions=3, d_in=4, chunk_rows=4, encoding="uint8", seed=2, n_prompts=20
)
ORDER = BatchOrder(seed=0, batch_rows=8, pool_rows=48, lanes=4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    def produce(staging: Staging) -> Result:
        staging.finish("all", write_store(staging.folder, LAYOUT))
        return Result({})

    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    return store.make(Spec("harvest", 1, {}), produce, provenance={}).artifact


def read(artifact: Artifact) -> list[Batch]:
    return list(ShardReader.of(artifact).epoch(ORDER, prefetch=0))


def damaged(data: bytes, kind: str, offset: int, other: bytes) -> bytes | None:
    match kind:
        case "flip":
            return data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :]
        case "zero":
            return bytes(len(data))
        case "truncate":
            return data[:offset]
        case "extend":
            return data + b"\0"
        case "swap":
            return other
        case _:
            return None


def place_of(name: str, offset: int) -> str:
    """What a flipped byte of a shard damages: each chunk is followed by four bytes of checksum, all by the index."""
    columns = {"activations": 4, "prompt": 4, "position": 2, "scale": 8, "checksum": 6 * 4 * 4}  # bytes a row
    rows, chunks = {"activations": (4, 2), "checksum": (1, 1)}.get(name.split("/")[1], (4, 6))
    chunk = offset // (rows * columns[name.split("/")[1]] + 4)
    return f"chunk {chunk} of {chunks} damaged" if chunk < chunks else "index damaged"


@settings(max_examples=120, deadline=None)
@given(
    choice=st.data(),
    kind=st.sampled_from(["flip", "flip", "flip", "zero", "truncate", "extend", "swap", "remove"]),
)
def test_damage_of_any_file_is_seen_by_the_reader_and_by_verify(artifact: Artifact, choice: st.DataObject, kind: str):
    shards = sorted(name for name in artifact.manifest.files if not name.endswith("zarr.json"))
    name = choice.draw(st.sampled_from(shards))
    path = artifact.folder / name
    data = path.read_bytes()
    same_array = [other for other in shards if other.split("/")[1] == name.split("/")[1] and other != name]
    other = (artifact.folder / choice.draw(st.sampled_from(same_array))).read_bytes()
    offset = choice.draw(st.integers(0, len(data) - 1))
    wrong = damaged(data, kind, offset, other)
    if wrong == data:
        return
    try:
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        (problem,) = ArtifactStore(artifact.folder.parents[1]).verify(artifact)
        assert problem.name == name
        if kind == "flip":
            assert problem.detail == place_of(name, offset)
        with pytest.raises(CorruptArtifact, match=f"{name.split('/')[1]}.* of {artifact.id}|{artifact.id}.*{name}"):
            read(artifact)
    finally:
        path.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(choice=st.data())
def test_damaged_metadata_is_an_error_or_changes_nothing(artifact: Artifact, choice: st.DataObject):
    name = choice.draw(st.sampled_from(sorted(n for n in artifact.manifest.files if n.endswith("zarr.json"))))
    path = artifact.folder / name
    data = path.read_bytes()
    expected = read(artifact)
    try:
        path.write_bytes(damaged(data, "flip", choice.draw(st.integers(0, len(data) - 1)), b"") or b"")
        try:
            found = read(artifact)
        except (CorruptArtifact, UnsupportedFormat):
            return
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.prompt, other.prompt)
    finally:
        path.write_bytes(data)


def test_the_store_is_whole_again_after_all_this(artifact: Artifact):
    assert len(read(artifact)) == 6
    assert ArtifactStore(Path(artifact.folder).parents[1]).verify(artifact) == []
