from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.torch_batches import TorchBatch, TorchBatches, as_tensors, to_device
from storage.batches import Batch
from storage.errors import ConfigError
from storage.order import BatchOrder, ReadState
from storage.reader import ShardReader
from tests.unit.storage.stores import ID, SMALL, write_store

ORDER = BatchOrder(seed=3, batch_rows=40, pool_rows=96, lanes=8)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    write_store(tmp_path, SMALL)
    return ShardReader(tmp_path, ID)


def assert_same(found: Iterable[TorchBatch], expected: Iterable[Batch]) -> None:
    for tensors, batch in zip(found, expected, strict=True):
        assert tensors.rows.dtype == torch.float32
        assert tensors.prompt.dtype == tensors.position.dtype == torch.int32
        torch.testing.assert_close(tensors.rows.cpu(), torch.from_numpy(batch.rows), rtol=0, atol=0)
        assert tensors.prompt.tolist() == batch.prompt.tolist()
        assert tensors.position.tolist() == batch.position.tolist()
        assert tensors.state == batch.state


# Newer Pythons warn that a process with threads is forked, which is what a DataLoader does by default.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_out_the_readers_own_batches(reader: ShardReader, workers: int):
    dataset = TorchBatches(reader, ORDER, endless=False)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert_same(loader, reader.epoch(ORDER))


def test_it_goes_on_after_the_last_batch_used_whatever_was_read_ahead(reader: ShardReader):
    expected = list(islice(reader.batches(ORDER), 30))  # two epochs and a half
    dataset = TorchBatches(reader, ORDER, prefetch=3)
    used = list(islice(iter(DataLoader(dataset, batch_size=None)), 7))
    dataset.start = used[-1].state
    assert_same([*used, *islice(iter(dataset), 23)], expected)


def test_iterating_again_gives_the_same_epoch_until_start_is_moved(reader: ShardReader):
    dataset = TorchBatches(reader, ORDER, endless=False)
    first = list(dataset)
    assert_same(dataset, reader.epoch(ORDER))
    dataset.start = first[-1].state
    assert dataset.start == ReadState(1, 0)
    assert_same(dataset, reader.epoch(ORDER, start=ReadState(1, 0)))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_each_batch(reader: ShardReader, world: int):
    ranks = [TorchBatches(reader, ORDER, rank=rank, world=world, endless=False) for rank in range(world)]
    for parts, whole in zip(zip(*ranks, strict=True), reader.epoch(ORDER), strict=True):
        tokens = [(p, t) for part in parts for p, t in zip(part.prompt.tolist(), part.position.tolist(), strict=True)]
        assert sorted(tokens) == sorted(zip(whole.prompt.tolist(), whole.position.tolist(), strict=True))


def test_rank_and_world_are_those_of_the_process_group(reader: ShardReader, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert_same(TorchBatches(reader, ORDER, endless=False), reader.epoch(ORDER, rank=1, world=2))


def test_rank_without_world_is_refused(reader: ShardReader):
    with pytest.raises(ConfigError, match="belong together"):
        TorchBatches(reader, ORDER, rank=1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_several_workers_are_refused(reader: ShardReader):
    loader = DataLoader(TorchBatches(reader, ORDER), batch_size=None, num_workers=2)
    with pytest.raises(ConfigError, match="num_workers=2"):
        next(iter(loader))


def test_on_the_cpu_to_device_changes_nothing_and_copies_nothing(reader: ShardReader):
    batches = list(reader.epoch(ORDER))
    moved = list(to_device(batches, "cpu"))
    assert_same(moved, batches)
    assert [batch.rows.data_ptr() for batch in moved] == [batch.rows.ctypes.data for batch in batches]
    assert_same(to_device(map(as_tensors, batches), torch.device("cpu")), batches)


def test_on_the_cpu_no_batch_is_taken_before_it_is_asked_for(reader: ShardReader):
    with reader.batches(ORDER) as batches:
        assert_same(islice(to_device(batches, "cpu"), 2), islice(reader.batches(ORDER), 2))
        assert next(batches).state == ReadState(0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_are_the_same_though_copied_ahead(reader: ShardReader):
    expected = list(islice(reader.batches(ORDER), 40))
    taken: list[TorchBatch] = []
    for batch in to_device(iter(expected), "cuda"):
        torch.cuda._sleep(1_000_000)  # work still under way when the next batch is asked for
        taken.append(TorchBatch(batch.rows * 1, batch.prompt, batch.position, batch.state))
        del batch
    assert all(batch.rows.device.type == "cuda" for batch in taken)
    assert_same(taken, expected)
