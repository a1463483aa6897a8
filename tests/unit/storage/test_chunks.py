import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.chunks import ChunkFiles
from storage.errors import CorruptArtifact
from storage.shards import GROUP_NAME
from storage.zarr_files import crc32c
from tests.unit.storage.stores import ID, SMALL, activations, write_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_store(tmp_path)
    return tmp_path / GROUP_NAME


def open_files(folder: Path) -> ChunkFiles:
    return ChunkFiles(folder, SMALL.arrays(), ID)


def read_all(files: ChunkFiles) -> None:
    for name, array in files.arrays.items():
        for chunk in range(array.n_rows // array.chunk_rows):
            files.read(name, chunk)


def test_chunks_hold_the_rows_of_their_tokens(folder: Path):
    files = open_files(folder)
    values = activations(SMALL)
    for chunk in range(SMALL.n_chunks):
        prompt, position = files.read("prompt", chunk), files.read("position", chunk)
        np.testing.assert_array_equal(files.read("activations", chunk), values[prompt, position])


@pytest.mark.parametrize(
    ("shard", "damage"),
    [
        ("activations/c/4/0", "missing"),
        ("activations/c/4/0", "empty"),
        ("activations/c/4/0", "short"),
        ("activations/c/4/0", "long"),
        ("prompt/c/1", "missing"),
        ("position/c/2", "short"),
        ("checksum/c/0/0", "missing"),
        ("checksum/c/0/0", "short"),
        ("activations/c/4/0", "folder"),
    ],
)
def test_a_shard_that_is_not_whole_is_named_with_its_artifact(folder: Path, shard: str, damage: str):
    path = folder / shard
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"x"}[damage])
    with pytest.raises(CorruptArtifact, match=f"shard {shard} of {ID}") as caught:
        read_all(open_files(folder))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("array", ["activations", "prompt", "position", "checksum"])
def test_swapped_shards_are_seen(folder: Path, array: str):
    suffix = "/0" if SMALL.arrays()[array].columns else ""
    first, second = (folder / f"{array}/c/{shard}{suffix}" for shard in (0, 1))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(CorruptArtifact, match="shard"):
        read_all(open_files(folder))


def test_a_shard_cut_while_it_is_open_is_seen(folder: Path):
    files = open_files(folder)
    files.read("activations", 0)
    path = folder / "activations/c/0/0"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptArtifact, match="ends early"):
        files.read("activations", 7)


def test_many_shards_are_read_with_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("storage.chunks._open_limit", lambda: 2)
    files = open_files(folder)
    read_all(files)
    read_all(files)
    assert len(files._open) == 2


def test_reading_continues_after_a_short_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = os.preadv

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        return whole(descriptor, [memoryview(views[0]).cast("B")[:7]], offset)

    expected = open_files(folder).read("activations", 2)
    monkeypatch.setattr("os.preadv", short)
    files = open_files(folder)
    read_all(files)
    np.testing.assert_array_equal(files.read("activations", 2), expected)


def test_what_is_expected_is_exactly_the_chunks_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[bytes] = []
    monkeypatch.setattr(ChunkFiles, "_in_memory", lambda *_: False)

    def fetch(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(descriptor, length, offset))

    monkeypatch.setattr("os.posix_fadvise", fetch)
    files = open_files(folder)
    files.expect([3, 11], ["activations", "prompt"])
    assert asked == []  # small arrays are left to the system
    monkeypatch.setattr("storage.chunks._WORTH_FETCHING_BYTES", 0)
    files.expect([3, 11], ["activations", "prompt"])
    chunks = [files.read(name, chunk) for name in ("activations", "prompt") for chunk in (3, 11)]
    assert asked == [chunk.tobytes() + crc32c(chunk).to_bytes(4, "little") for chunk in chunks]


def test_what_is_in_memory_is_not_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr("storage.chunks._WORTH_FETCHING_BYTES", 0)
    monkeypatch.setattr("os.posix_fadvise", lambda *place: asked.append(place[1]))
    files, whole = open_files(folder), os.preadv

    def cold(descriptor: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError
        return whole(descriptor, buffers, offset)

    read_all(files)
    files.expect([3, 4], ["activations"])
    assert asked == []
    monkeypatch.setattr("os.preadv", cold)
    files.expect([3, 4], ["activations"])
    assert len(asked) == 2


def test_a_system_that_takes_no_advice_reads_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.posix_fadvise")
    files = open_files(folder)
    files.expect([3], ["activations"])
    read_all(files)


def test_a_missing_shard_is_named_when_it_is_expected(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("storage.chunks._WORTH_FETCHING_BYTES", 0)
    (folder / "activations/c/4/0").unlink()
    with pytest.raises(CorruptArtifact, match=f"shard activations/c/4/0 of {ID}"):
        open_files(folder).expect([4 * SMALL.window_prompts // SMALL.chunk_rows], ["activations"])


def test_files_pickle_without_their_descriptors(folder: Path):
    files = open_files(folder)
    read_all(files)
    copy = pickle.loads(pickle.dumps(files))
    np.testing.assert_array_equal(copy.read("activations", 3), files.read("activations", 3))


@pytest.mark.parametrize("array", ["activations", "prompt", "checksum"])
def test_a_listing_shows_missing_and_extra_shards(folder: Path, array: str):
    open_files(folder).check_listing()
    (folder / array / "c/99").mkdir()
    with pytest.raises(CorruptArtifact, match="too many"):
        open_files(folder).check_listing()
    (folder / array / "c/99").rename(folder / "moved")
    (folder / array / "c/1").rename(folder / "gone")
    with pytest.raises(CorruptArtifact, match=f"shard {array}/c/1.* of {ID}: it is missing"):
        open_files(folder).check_listing()
