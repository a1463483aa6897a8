"""One lane's chunks, loaded ahead of their stage by an executor, each row put at once where its batch will be.

Where chunks come from is the source's affair: shard files, or a model that computes them.

Memory holds the batches ahead, not the chunks: batch k in slot k mod slots. The order says to which batch, and where in
it, a row goes before the row is read. So a chunk is loaded into a small buffer, which stays in the processor's cache,
and from there its rows are written to their places; when all chunks of a stage are in, its batches are complete, and
are handed out as they lie. The chunks of the next stage are asked for as soon as there are slots for all batches that
its rows go to, which but for the end of an epoch is when a stage begins; a few a task, as a disk is kept busier by
several requests at a time than by one a thread. Of a chunk that two stages share, the later one's rows are kept aside
until that one is asked for. Cost: a row is written to main memory once, and not read from there again; memory for two
to two and a half times the pool's rows, by the size of the last stage.
Rejected: a ring of chunks from which batches are gathered (about as much memory; each row is read and written once
more, by one thread that the readers wait for), and rows refilled in place (half the memory, but the order of one refill
hangs on the one before, so that resuming replays the epoch).
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from storage.order import STAGES, EpochOrder, LaneOrder
from storage.shuffle import Indices

Columns = dict[str, npt.NDArray[np.generic]]
"""Rows as they are stored, array by array."""

_CHUNKS_A_TASK = 8


class RowFormat(Protocol):
    """What one row of an array is."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Its shape; ``()`` for a number."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Its stored dtype."""
        ...


class ChunkSource(Protocol):
    """Where chunks of rows come from."""

    @property
    def arrays(self) -> Mapping[str, RowFormat]:
        """What there is to load, by name."""
        ...

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Loads one chunk, all arrays wanted of it at once; called from several threads.

        Args:
            chunk: its number.
            out: by array name, (chunk_rows, *row_shape), C-contiguous, of the array's dtype; overwritten.
        """
        ...


@runtime_checkable
class ForeseeingSource(ChunkSource, Protocol):
    """A source that gains by knowing what will be loaded next."""

    def expect(self, chunks: Sequence[int], names: Iterable[str]) -> None:
        """Says, before the first is loaded, that chunks will be; must not wait for them.

        Args:
            chunks: their numbers.
            names: of the arrays wanted.
        """
        ...


class Share(NamedTuple):
    """What a lane gives to each batch.

    Attributes:
        rows: how many rows; to the last batch of an epoch it may be fewer.
        before: rows of other lanes before them.
        last_before: likewise in the last batch.
    """

    rows: int
    before: int
    last_before: int


class BatchMemory:
    """Room for the batches that rows are loaded for, and for chunks whose rows are on their way there.

    Attributes:
        names: of the arrays wanted.
        slots: batches that there is room for.
        nowhere: a place for rows that nobody wants.

    Args:
        source: whose rows they are.
        names: of the arrays wanted.
        epoch: an order; all epochs have the same sizes.
        lanes: those whose rows are wanted.
    """

    def __init__(self, source: ChunkSource, names: Sequence[str], epoch: EpochOrder, lanes: Sequence[LaneOrder]):
        self.names = names
        self._formats = {name: source.arrays[name] for name in names}
        self._chunk_rows = epoch.chunk_rows
        self._last = epoch.n_batches - 1
        self._batch_rows = epoch.order.batch_rows // epoch.order.lanes * len(lanes)
        self.slots = epoch.held_batches(lanes)
        self.nowhere = self.slots * self._batch_rows
        self._rows = self._empty(self.nowhere + 1)
        self._buffers: deque[Columns] = deque()

    def batch(self, number: int, rows: int) -> Columns:
        """The first rows of a batch, where they lie."""
        first = number % self.slots * self._batch_rows
        return {name: column[first : first + rows] for name, column in self._rows.items()}

    def places(self, share: Share, start: int, end: int) -> Indices:
        """Where the rows ``start`` to ``end`` of a lane's order go; int64 (end - start,)."""
        batches = np.arange(start // share.rows, -(-end // share.rows))
        before = np.where(batches == self._last, share.last_before, share.before)
        shift = batches % self.slots * self._batch_rows + before - batches * share.rows
        rows = np.arange(start, end)
        return rows + shift[rows // share.rows - start // share.rows]

    def put(self, places: Indices, rows: Mapping[str, npt.NDArray[np.generic]], first: int) -> None:
        """Copies rows of a chunk, from its ``first`` on, to their places."""
        for name, column in self._rows.items():
            column[places] = rows[name][first : first + len(places)]

    def take_buffer(self) -> Columns:
        """Room for a chunk, lately used if there is any."""
        try:
            return self._buffers.pop()
        except IndexError:
            return self._empty(self._chunk_rows)

    def give_back(self, buffer: Columns) -> None:
        """Takes room for a chunk that is not needed any more."""
        self._buffers.append(buffer)

    def _empty(self, rows: int) -> Columns:
        return {name: np.empty((rows, *array.row_shape), array.dtype) for name, array in self._formats.items()}


class LanePool:
    """Brings the rows of a lane to their batches.

    Args:
        source: where the chunks come from.
        lane: the order.
        share: what the lane gives to a batch.
        memory: of the batches of all lanes.
        executor: loads chunks.
        start: the first row wanted of the lane's order.
    """

    def __init__(
        self, source: ChunkSource, lane: LaneOrder, share: Share, memory: BatchMemory, executor: Executor, start: int
    ):
        self._source = source
        self._foreseeing = source if isinstance(source, ForeseeingSource) else None
        self._lane = lane
        self._share = share
        self._memory = memory
        self._executor = executor
        self._stage = self._next = self._ordered = lane.stage_of(start)  # to complete, to ask for, to give places to
        self._asked = lane.offset(lane.stage_rows(self._stage)[0])  # rows before it, end to end in chunks, are loaded
        # Places of rows yet to be loaded, by where they lie in the chunks, laid end to end, mod its length: of three
        # stages' rows. These come from five segments, the first of which is as long as two, and the epoch's rest.
        chunks = min(len(lane.chunks), -(-7 * lane.segment_rows // lane.chunk_rows) + 2)
        self._places = np.full(chunks * lane.chunk_rows, memory.nowhere)
        self._shared: dict[int, Columns] = {}  # by its place, a chunk of which a later stage has rows
        self._loading: deque[Future[None]] = deque()
        self._ask()

    def complete(self, start: int, end: int) -> None:
        """Waits until a batch has the lane's part, and has more loaded if there is room.

        Args:
            start: the part's first row in the lane's order; batches of rows before it are not in use any more.
            end: after its last row.
        """
        while self._stage <= self._lane.stage_of(end - 1):
            if self._next == self._stage:
                self._ask()
            while self._loading:
                self._loading.popleft().result()
            self._stage += 1
        if self._next == self._stage <= self._lane.last_stage and self._has_room(start):
            self._ask()

    def _has_room(self, start: int) -> bool:
        """Whether there are slots for what comes in next, beside the batch that ``start`` goes to."""
        batches = (self._lane.reach(self._next) - 1) // self._share.rows - start // self._share.rows + 1
        return batches <= self._memory.slots

    def _ask(self) -> None:
        """Asks for the rows that the next stage needs and that are not here yet; they go to it and the two after."""
        lane, rows = self._lane, self._lane.chunk_rows
        while self._ordered < min(self._next + STAGES, lane.last_stage + 1):
            self._give_places(self._ordered)
            self._ordered += 1
        end = lane.offset(lane.stage_rows(self._next)[1] - 1) + 1
        while self._asked < end:
            stop = min((self._asked // rows + _CHUNKS_A_TASK) * rows, end)
            self._loading.append(self._executor.submit(self._load, self._asked, stop))
            self._asked = stop
        self._next += 1

    def _give_places(self, stage: int) -> None:
        rows, start = self._lane.stage_order(stage), self._lane.stage_start(stage)
        offsets = self._lane.offsets(rows) % len(self._places)
        self._places[offsets] = self._memory.places(self._share, start, start + len(rows))

    def _load(self, start: int, end: int) -> None:
        """Brings the rows to their places that lie from ``start`` to ``end`` in the chunks, laid end to end."""
        rows, lane = self._lane.chunk_rows, self._lane
        wanted = range(start // rows, -(-end // rows))
        missing = [place for place in wanted if place not in self._shared]
        if missing and self._foreseeing is not None:
            self._foreseeing.expect(lane.chunks[missing].tolist(), self._memory.names)
        for place in wanted:
            buffer = self._shared.pop(place, None)
            if buffer is None:
                buffer = self._memory.take_buffer()
                self._source.load(int(lane.chunks[place]), buffer)
            first, stop = max(start, place * rows), min(end, (place + 1) * rows)
            places = self._places[first % len(self._places) :][: stop - first]
            self._memory.put(places, buffer, first - place * rows)
            places[:] = self._memory.nowhere  # as for rows of a shared chunk that are another lane's
            if stop < min((place + 1) * rows, lane.offset(lane.n_rows - 1) + 1):
                self._shared[place] = buffer
            else:
                self._memory.give_back(buffer)
