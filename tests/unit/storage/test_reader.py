import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import numpy.typing as npt
import pytest
import zarr

from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.chunks import ChunkFiles
from storage.encoding import ENCODINGS, Encoding, decode, encode
from storage.errors import ConfigError, CorruptArtifact, InputError, UnsupportedFormat
from storage.order import EpochOrder
from storage.reader import Batch, BatchOrder, ReadState, ShardReader
from storage.shards import GROUP_NAME
from tests.unit.storage.stores import ID, SMALL, activations, encoded_as, write_store

ORDER = BatchOrder(seed=3, batch_rows=40, pool_rows=96, lanes=8)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    write_store(tmp_path)
    return ShardReader(tmp_path, ID)


def tokens(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(int(p), int(t)) for batch in batches for p, t in zip(batch.prompt, batch.position, strict=True)]


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.prompt, expected.prompt)
    np.testing.assert_array_equal(found.position, expected.position)
    assert found.state == expected.state


def test_rows_are_the_activations_of_their_tokens_each_once_an_epoch(reader: ShardReader):
    values = activations(SMALL)
    batches = list(reader.epoch(ORDER))
    for batch in batches:
        assert batch.rows.dtype == np.float32
        assert batch.prompt.dtype == batch.position.dtype == np.int32
        np.testing.assert_array_equal(batch.rows, values[batch.prompt, batch.position])
    assert [len(batch.rows) for batch in batches] == [40] * 12
    assert len(set(tokens(batches))) == reader.n_rows == 480


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_batches_follow_the_order_computed_from_the_sizes_alone(reader: ShardReader, tmp_path: Path, lanes: int):
    order = replace(ORDER, lanes=lanes)
    group = zarr.open_group(tmp_path / GROUP_NAME, mode="r")
    stored = np.asarray(group["activations"][:])  # pyright: ignore[reportIndexIssue]
    epoch = EpochOrder(order, SMALL.n_chunks, SMALL.chunk_rows, 0)
    expected: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(epoch.n_batches)]
    for lane in epoch.lanes():
        places, rows = lane.locate(np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)]))
        lane_rows = stored[lane.chunks[places] * SMALL.chunk_rows + rows]
        for number in range(epoch.n_batches):
            start, end = epoch.lane_span(lane, number)
            expected[number].append(lane_rows[start:end])
    for batch, parts in zip(reader.epoch(order), expected, strict=True):
        np.testing.assert_array_equal(batch.rows, np.concatenate(parts))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_is_decoded(tmp_path: Path, encoding: Encoding):
    layout = encoded_as(encoding)
    write_store(tmp_path, layout)
    values = activations(layout)
    for batch in ShardReader(tmp_path, ID).epoch(ORDER):
        codes, scale = encode(values[batch.prompt, batch.position], encoding)
        np.testing.assert_array_equal(batch.rows, decode(codes, encoding, scale))


@pytest.mark.parametrize("batch_rows", [8, 16, 56, 104, 480, 4800])
def test_batches_of_any_size_keep_the_last_rows(reader: ShardReader, batch_rows: int):
    order = replace(ORDER, batch_rows=batch_rows)
    batches = list(reader.epoch(order))
    assert len(batches) == reader.batches_per_epoch(order) == -(-480 // batch_rows)
    assert len(batches[-1].rows) == 480 - (len(batches) - 1) * batch_rows
    assert len(set(tokens(batches))) == 480


@pytest.mark.parametrize("start", range(12))
def test_resumed_after_any_batch_it_continues_with_the_same_batches(reader: ShardReader, start: int):
    whole = list(reader.epoch(ORDER))
    resumed = list(reader.epoch(ORDER, start=ReadState(0, start), prefetch=0))
    assert len(resumed) == 12 - start
    for found, expected in zip(resumed, whole[start:], strict=True):
        assert_same(found, expected)


def test_states_lead_over_the_end_of_an_epoch_and_resume_there(reader: ShardReader):
    with reader.batches(ORDER) as batches:
        whole = [next(batches) for _ in range(30)]
    assert [batch.state for batch in whole[10:13]] == [ReadState(0, 11), ReadState(1, 0), ReadState(1, 1)]
    assert set(tokens(whole[12:24])) == set(tokens(whole[:12]))
    assert tokens(whole[12:24]) != tokens(whole[:12])
    with reader.batches(ORDER, start=whole[13].state) as batches:
        for expected in whole[14:]:
            assert_same(next(batches), expected)


@pytest.mark.parametrize("prefetch", [0, 1, 7])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_and_prefetching_change_nothing(tmp_path: Path, prefetch: int, threads: int, reader: ShardReader):
    other = ShardReader(tmp_path, ID, threads=threads)
    for found, expected in zip(other.epoch(ORDER, prefetch=prefetch), reader.epoch(ORDER), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("batch_rows", [40, 56])
def test_ranks_share_the_same_batches(reader: ShardReader, world: int, batch_rows: int):
    order = replace(ORDER, batch_rows=batch_rows)
    ranks = [list(reader.epoch(order, rank=rank, world=world)) for rank in range(world)]
    for number, whole in enumerate(reader.epoch(order)):
        parts = [rank[number] for rank in ranks]
        assert sorted(tokens(parts)) == sorted(tokens([whole]))
        assert {part.state for part in parts} == {whole.state}
        sizes = [len(part.rows) for part in parts]
        assert max(sizes) - min(sizes) <= 8 // world


class Counting:
    """Counts chunks of activations read, by chunk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.chunks: list[int] = []
        read_into = ChunkFiles.read_into

        def counted(files: ChunkFiles, name: str, chunk: int, out: npt.NDArray[np.generic]) -> None:
            if name == "activations":
                self.chunks.append(chunk)
            read_into(files, name, chunk, out)

        monkeypatch.setattr(ChunkFiles, "read_into", counted)


def test_each_rank_reads_its_share_of_the_chunks_once(reader: ShardReader, monkeypatch: pytest.MonkeyPatch):
    for rank in range(4):
        counting = Counting(monkeypatch)
        list(reader.epoch(ORDER, rank=rank, world=4))
        assert len(counting.chunks) == len(set(counting.chunks)) == SMALL.n_chunks // 4


def test_resuming_late_reads_only_what_is_still_to_come(reader: ShardReader, monkeypatch: pytest.MonkeyPatch):
    counting = Counting(monkeypatch)
    list(reader.epoch(ORDER, start=ReadState(0, 11), prefetch=0))
    assert len(counting.chunks) <= 2 * ORDER.pool_rows // SMALL.chunk_rows + 8


def test_prompts_alone_are_those_of_the_batches_and_read_no_activations(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
):
    expected = [batch.prompt for batch in reader.epoch(ORDER)]
    counting = Counting(monkeypatch)
    for found, prompt in zip(reader.prompts(ORDER), expected, strict=True):
        np.testing.assert_array_equal(found, prompt)
    assert counting.chunks == []


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 480, 1000])
def test_sequential_reads_all_rows_in_the_order_of_the_store(reader: ShardReader, tmp_path: Path, batch_rows: int):
    group = zarr.open_group(tmp_path / GROUP_NAME, mode="r")
    batches = list(reader.sequential(batch_rows))
    for name in ("activations", "prompt", "position"):
        stored = np.asarray(group[name][:])  # pyright: ignore[reportIndexIssue]
        field = "rows" if name == "activations" else name
        np.testing.assert_array_equal(np.concatenate([getattr(batch, field) for batch in batches]), stored)
    middle = len(batches) // 2
    assert_same(next(reader.sequential(batch_rows, start=middle)), batches[middle])


def test_rows_by_index_come_in_the_order_asked_repeated_ones_too(reader: ShardReader):
    rows = reader.read(0, 480)
    wanted = np.array([479, 0, 3, 3, 100, 0])
    found = reader.rows_of(wanted)
    np.testing.assert_array_equal(found.rows, rows.rows[wanted])
    np.testing.assert_array_equal(found.prompt, rows.prompt[wanted])
    assert reader.rows_of(np.array([], np.int64)).rows.shape == (0, 6)


@pytest.mark.parametrize("indices", [[480], [-1], [0, 500]])
def test_rows_outside_the_store_are_refused(reader: ShardReader, indices: list[int]):
    with pytest.raises(InputError):
        reader.rows_of(np.array(indices))
    with pytest.raises(InputError):
        reader.read(470, 481)


def test_rows_at_tokens(reader: ShardReader):
    values = activations(SMALL)
    known = reader.read(0, 480)
    picked = np.random.default_rng(0).permutation(480)[:50]
    prompt, position = known.prompt[picked], known.position[picked]
    np.testing.assert_array_equal(reader.rows_at(prompt, position), values[prompt, position])
    one = int(prompt[0])
    np.testing.assert_array_equal(reader.rows_at(one, [1, 2, 3]), values[one, [1, 2, 3]])


def test_tokens_that_were_not_harvested_are_refused(reader: ShardReader):
    harvested = set(reader.read(0, 480).prompt.tolist())
    left_out = next(prompt for prompt in range(100) if prompt not in harvested)
    inside = next(iter(harvested))
    for prompt, position in ((left_out, 1), (inside, 0), (inside, 6), (100, 1), (-1, 1)):
        with pytest.raises(InputError, match=f"prompt {prompt}, position {position}"):
            reader.rows_at([inside, prompt], [1, position])


def test_dask_sees_the_same_values(reader: ShardReader):
    rows = reader.read(0, 480).rows
    array = reader.dask()
    assert array.shape == (480, 6)
    assert array.chunksize == (32, 6)
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_array_equal(array.compute(), rows)
        np.testing.assert_array_equal(reader.dask(100)[5:333:7, 1:4].compute(), rows[5:333:7, 1:4])
        np.testing.assert_allclose(array.mean(axis=0).compute(), rows.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_reader_pickles(reader: ShardReader):
    copy = pickle.loads(pickle.dumps(reader))
    assert_same(next(copy.epoch(ORDER)), next(reader.epoch(ORDER)))


def test_memory_is_known_beforehand(reader: ShardReader):
    row_bytes = 6 * 4 + 4 + 2
    batches = 2.5 * ORDER.pool_rows + 2 * ORDER.batch_rows
    assert reader.pool_bytes(ORDER) <= row_bytes * (batches + (8 + 2) * 4)  # and a chunk a lane, and a thread
    assert reader.pool_bytes(ORDER, world=8) <= row_bytes * (batches / 8 + (1 + 2) * 4)


@pytest.mark.parametrize("start", [ReadState(0, 12), ReadState(0, -1), ReadState(-1, 0)])
def test_no_such_batch(reader: ShardReader, start: ReadState):
    with pytest.raises(ConfigError):
        reader.batches(ORDER, start=start)


def test_bad_orders_are_refused_at_once(reader: ShardReader):
    with pytest.raises(ConfigError, match="pool"):
        reader.batches(replace(ORDER, pool_rows=79))
    with pytest.raises(ConfigError, match="ranks"):
        reader.batches(ORDER, rank=0, world=3)
    with pytest.raises(ConfigError):
        reader.sequential(0)


def test_closing_stops_all_threads(reader: ShardReader):
    before = set(threading.enumerate())
    batches = reader.batches(ORDER)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before


def test_a_damaged_shard_stops_the_batches_with_its_name(reader: ShardReader, tmp_path: Path):
    path = tmp_path / GROUP_NAME / "activations/c/7/0"
    data = bytearray(path.read_bytes())
    data[11] ^= 4
    path.write_bytes(data)
    for batches in (reader.epoch(ORDER), reader.epoch(ORDER, prefetch=0), reader.sequential(50)):
        with batches, pytest.raises(CorruptArtifact, match=f"shard activations/c/7/0 of {ID}"):
            list(batches)


@pytest.mark.parametrize("name", ["zarr.json", "activations/zarr.json", "checksum/zarr.json"])
@pytest.mark.parametrize("contents", [None, b"", b"[]", b"{}", b'{"attributes": {"sparsemill": {}}}'])
def test_damaged_metadata_is_named(tmp_path: Path, reader: ShardReader, name: str, contents: bytes | None):
    path = tmp_path / GROUP_NAME / name
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(CorruptArtifact, match=f"{GROUP_NAME}/{name} of {ID}"):
        ShardReader(tmp_path, ID)


def test_metadata_that_contradicts_the_layout_is_refused(tmp_path: Path, reader: ShardReader):
    path = tmp_path / GROUP_NAME / "zarr.json"
    group = json.loads(path.read_bytes())
    group["attributes"]["sparsemill"]["layout"]["d_in"] = 12
    path.write_text(json.dumps(group))
    with pytest.raises(CorruptArtifact, match="activations"):
        ShardReader(tmp_path, ID)


def test_another_format_is_refused_as_such(tmp_path: Path, reader: ShardReader):
    path = tmp_path / GROUP_NAME / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 0', b'"format_version": 3'))
    with pytest.raises(UnsupportedFormat):
        ShardReader(tmp_path, ID)


def test_missing_and_extra_shards_are_seen_when_opening(tmp_path: Path, reader: ShardReader):
    extra = tmp_path / GROUP_NAME / "activations/c/15"
    extra.mkdir()
    with pytest.raises(CorruptArtifact, match="too many"):
        ShardReader(tmp_path, ID)
    extra.rmdir()
    (tmp_path / GROUP_NAME / "prompt/c/2").unlink()
    with pytest.raises(CorruptArtifact, match="prompt/c/2"):
        ShardReader(tmp_path, ID)


def test_windows_swapped_whole_are_seen_against_the_manifest(tmp_path: Path):
    def produce(staging: Staging) -> Result:
        staging.finish("all", write_store(staging.folder))
        return Result({})

    artifact = ArtifactStore(tmp_path).make(Spec("harvest", 1, {}), produce, provenance={}).artifact
    assert len(list(ShardReader.of(artifact).epoch(ORDER))) == 12
    group = artifact.folder / GROUP_NAME
    pairs = [(f"activations/c/{i}/0", f"activations/c/{i + 5}/0") for i in range(5)]
    pairs += [("prompt/c/0", "prompt/c/1"), ("position/c/0", "position/c/1"), ("checksum/c/0/0", "checksum/c/1/0")]
    for a, b in pairs:
        first, second = (group / a).read_bytes(), (group / b).read_bytes()
        (group / a).write_bytes(second)
        (group / b).write_bytes(first)
    with pytest.raises(CorruptArtifact, match="sha256"):
        list(ShardReader.of(artifact).epoch(ORDER))
