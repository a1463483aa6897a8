"""Chunks of any source -> shuffled batches: prefetched, resumable, shared out to ranks.

The order is a pure function (storage.order). A few threads load chunks and put each row in its place in the batches
ahead, as it is stored (storage.pool); one more casts whole batches to float32, ahead of their use (storage.prefetch).
Memory: two to two and a half times the pool's rows in the stored dtype, a W-th of it on each of W ranks, and the cast
batches, which is used again (storage.recycling).
"""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import numpy.typing as npt

from storage.encoding import Codes, Encoding, Floats, decode
from storage.errors import ConfigError
from storage.order import BatchOrder, EpochOrder, LaneOrder, ReadState
from storage.pool import BatchMemory, ChunkSource, Columns, LanePool, Share
from storage.prefetch import Prefetched
from storage.recycling import Recycled

BEGINNING = ReadState(0, 0)

KEPT_BATCHES = 4  # as many as are on their way at once: two waiting, one being made, one with the consumer


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of activations.

    Attributes:
        rows: activations, float32 (b, d_in).
        prompt: prompt number in the tokens artifact of each row, int32 (b,).
        position: position in its prompt of each row, int32 (b,).
        state: where the reader is after this batch.
    """

    rows: Floats
    prompt: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    state: ReadState


class ShuffledBatches:
    """The batches of a source of chunks.

    Args:
        source: has the arrays ``activations``, ``prompt`` and ``position``, for uint8 also ``scale``.
        n_chunks: how many chunks it has.
        chunk_rows: rows a chunk.
        positions: rows a prompt.
        encoding: of ``activations``.
        threads: that load chunks.
    """

    def __init__(
        self,
        source: ChunkSource,
        *,
        n_chunks: int,
        chunk_rows: int,
        positions: int,
        encoding: Encoding,
        threads: int = 2,
    ):
        self.source = source
        self.n_chunks = n_chunks
        self.chunk_rows = chunk_rows
        self.positions = positions
        self.encoding: Encoding = encoding
        self.threads = threads

    @property
    def n_rows(self) -> int:
        """Rows an epoch."""
        return self.n_chunks * self.chunk_rows

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.source.arrays["activations"].row_shape[0]

    def batches_per_epoch(self, order: BatchOrder) -> int:
        """Batches of one epoch, the last, short one included."""
        return self._epoch_order(order, 0).n_batches

    def pool_bytes(self, order: BatchOrder, *, world: int = 1) -> int:
        """Memory that a rank's pools take, prefetched batches aside."""
        formats = [self.source.arrays[name] for name in row_names(self.source)]
        row_bytes = sum(prod(array.row_shape) * array.dtype.itemsize for array in formats)
        epoch = self._epoch_order(order, 0)
        lanes = epoch.lanes(0, world)
        batches = epoch.held_batches(lanes) * order.batch_rows // world
        return row_bytes * (batches + self.chunk_rows * (len(lanes) + self.threads))

    def batches(
        self,
        order: BatchOrder,
        *,
        start: ReadState = BEGINNING,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
    ) -> Prefetched[Batch]:
        """Shuffled batches, epoch after epoch without end.

        Each row comes once an epoch. All batches of an epoch but the last have ``order.batch_rows`` rows, over all
        ranks together; the last has what is left, split evenly to within a row a lane, so that a rank's part may be
        empty.

        Args:
            order: what the order depends on.
            start: the state of the batch before the first wanted.
            rank: of this process among those that share the batches.
            world: how many share them; divides ``order.lanes``.
            prefetch: batches made ahead in a thread; 0 makes each when asked for. Never changes a batch.

        Returns:
            An iterator; close it, or use it in a ``with`` block, to stop its threads at once.
        """
        self._check_start(order, start, rank, world)
        return Prefetched(self._generate(order, start, rank, world, None), prefetch)

    def epoch(
        self,
        order: BatchOrder,
        *,
        start: ReadState = BEGINNING,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
    ) -> Prefetched[Batch]:
        """As :meth:`batches`, ending with the epoch of ``start``."""
        self._check_start(order, start, rank, world)
        return Prefetched(self._generate(order, start, rank, world, start.epoch), prefetch)

    def prompts(self, order: BatchOrder, *, start: ReadState = BEGINNING) -> Generator[npt.NDArray[np.int32]]:
        """The prompt numbers alone of the batches of one epoch: the same order, without loading activations."""
        self._check_start(order, start, 0, 1)
        for columns, _ in self._columns(order, start, 0, 1, start.epoch, ["prompt"]):
            yield columns["prompt"].astype(np.int32)

    def _generate(
        self, order: BatchOrder, start: ReadState, rank: int, world: int, last_epoch: int | None
    ) -> Generator[Batch]:
        memory = Recycled(KEPT_BATCHES)
        for columns, state in self._columns(order, start, rank, world, last_epoch, row_names(self.source)):
            yield to_batch(columns, self.encoding, state, memory)

    def _columns(
        self,
        order: BatchOrder,
        start: ReadState,
        rank: int,
        world: int,
        last_epoch: int | None,
        names: Sequence[str],
    ) -> Generator[tuple[Columns, ReadState]]:
        """Batches as they are stored, each in memory that is used again when the next one is asked for."""
        executor = ThreadPoolExecutor(self.threads, thread_name_prefix="sparsemill-read")
        try:
            epoch, first, memory = start.epoch, start.batch, None
            while last_epoch is None or epoch <= last_epoch:
                epoch_order = self._epoch_order(order, epoch)
                lanes = epoch_order.lanes(rank, world)
                memory = memory or BatchMemory(self.source, names, epoch_order, lanes)
                yield from self._epoch_columns(epoch_order, first, lanes, memory, executor)
                epoch, first = epoch + 1, 0
        finally:
            executor.shutdown(cancel_futures=True)

    def _epoch_columns(
        self, epoch: EpochOrder, first: int, lanes: Sequence[LaneOrder], memory: BatchMemory, executor: Executor
    ) -> Generator[tuple[Columns, ReadState]]:
        last = epoch.n_batches - 1
        size, before, pools = epoch.order.batch_rows // epoch.order.lanes, 0, list[LanePool]()
        for number, lane in enumerate(lanes):
            share = Share(size, number * size, before)
            start, _ = epoch.lane_span(lane, first)
            pools.append(LanePool(self.source, lane, share, memory, executor, start))
            before += lane.n_rows - last * size
        for number in range(first, last + 1):
            spans = [epoch.lane_span(lane, number) for lane in lanes]
            for pool, (start, end) in zip(pools, spans, strict=True):
                pool.complete(start, end)
            columns = memory.batch(number, sum(end - start for start, end in spans))
            yield columns, ReadState(epoch.epoch + 1, 0) if number == last else ReadState(epoch.epoch, number + 1)

    def _epoch_order(self, order: BatchOrder, epoch: int) -> EpochOrder:
        return EpochOrder(order, self.n_chunks, self.chunk_rows, epoch)

    def _check_start(self, order: BatchOrder, start: ReadState, rank: int, world: int) -> None:
        epoch = self._epoch_order(order, start.epoch)
        epoch.lanes(rank, world)
        if start.epoch < 0 or not 0 <= start.batch < epoch.n_batches:
            raise ConfigError("no such batch", found=start, expected=f"batch below {epoch.n_batches}")


def row_names(source: ChunkSource) -> list[str]:
    """The arrays that make up a row."""
    return ["activations", "prompt", "position"] + (["scale"] if "scale" in source.arrays else [])


def empty_columns(
    source: ChunkSource, names: Sequence[str], rows: int, memory: Mapping[str, Recycled] | None = None
) -> Columns:
    """Room for rows of some arrays, in memory of each one's own that is used again if some is given."""
    arrays = source.arrays
    shapes = {name: (rows, *arrays[name].row_shape) for name in names}
    if memory is None:
        return {name: np.empty(shape, arrays[name].dtype) for name, shape in shapes.items()}
    return {name: memory[name].empty(shape, arrays[name].dtype) for name, shape in shapes.items()}


def to_batch(columns: Columns, encoding: Encoding, state: ReadState, memory: Recycled | None = None) -> Batch:
    """Decodes stored rows, into memory that is used again if some is given."""
    codes, scale = cast("Codes", columns["activations"]), cast("Floats | None", columns.get("scale"))
    out = None if memory is None else cast("Floats", memory.empty(codes.shape, np.dtype(np.float32)))
    return Batch(
        rows=decode(codes, encoding, scale, out),
        prompt=columns["prompt"].astype(np.int32),
        position=columns["position"].astype(np.int32),
        state=state,
    )
