"""One lane's chunks in memory: loaded ahead of their stage by an executor, gathered from in the lane's order.

Where chunks come from is the source's affair: shard files, or a model that computes them.

Memory is a ring of chunk slots: chunks come and go in the order of the lane's list, so the chunk at place i lies in
slot i mod slots, written there by the read itself. A batch's rows are gathered from the ring by one ``numpy.take`` an
array, so each row is copied once between the page cache's copy and the batch. When a stage begins, the chunks of the
next are asked for, into the slots that have become free, a few a task: a disk is kept busier by several requests at a
time than by one a thread. Rejected: a pool of rows whose slots are refilled row by row
(half the memory, but every row copied once more).
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from storage.order import LaneOrder

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


class LanePool:
    """Hands out the rows of a lane in its order.

    Attributes:
        ring: memory of chunks by array name, (slots, chunk_rows, *row_shape).

    Args:
        source: where the chunks come from.
        lane: the order.
        names: of the arrays wanted.
        executor: loads chunks.
        reuse: a pool that is used up, of the same lane in the epoch before: its memory, where that is as large, is
            used again, since the kernel takes its time to provide more.
    """

    def __init__(
        self,
        source: ChunkSource,
        lane: LaneOrder,
        names: Sequence[str],
        executor: Executor,
        reuse: "LanePool | None" = None,
    ):
        self._source = source
        self._foreseeing = source if isinstance(source, ForeseeingSource) else None
        self._lane = lane
        self._executor = executor
        self._slots = lane.held_chunks()
        used = {} if reuse is None else reuse.ring
        self.ring = {name: self._memory(source.arrays[name], used.get(name)) for name in names}
        self._stage = -1
        self._asked = 0  # chunks before this place were asked for, or are not needed any more
        self._pending: deque[tuple[int, Future[None]]] = deque()  # (first place, read)
        self._order = np.empty(0, np.int64)  # of the stage: rows of the ring

    def _memory(self, array: RowFormat, used: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic]:
        shape = (self._slots, self._lane.chunk_rows, *array.row_shape)
        return np.empty(shape, array.dtype) if used is None or used.shape != shape else used

    def begin(self, row: int) -> None:
        """Asks for the chunks that the ``row``-th row of the lane's order needs, without waiting."""
        first, end = self._lane.stage_chunks(self._lane.stage_of(row))
        self._ask(first, end)

    def take(self, start: int, end: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Copies rows of the lane's order; each call starts where the last one ended, or later.

        Args:
            start: first row.
            end: after the last row.
            out: by array name, (end - start, *row_shape), overwritten.
        """
        done = 0
        while start + done < end:
            stage = self._lane.stage_of(start + done)
            self._enter(stage)
            first = start + done - self._lane.stage_start(stage)
            picked = self._order[first : first + end - start - done]
            for name, ring in self.ring.items():
                rows = ring.reshape(-1, *ring.shape[2:])
                # mode "clip": with the default numpy would gather into a buffer of its own first.
                np.take(rows, picked, axis=0, out=out[name][done : done + len(picked)], mode="clip")
            done += len(picked)

    def _enter(self, stage: int) -> None:
        if stage == self._stage:
            return
        first, end = self._lane.stage_chunks(stage)
        self._ask(first, end)
        places, rows = self._lane.locate(self._lane.stage_order(stage))
        self._order = places % self._slots * self._lane.chunk_rows + rows
        while self._pending and self._pending[0][0] < end:
            self._pending.popleft()[1].result()
        if stage < self._lane.last_stage:
            self._ask(first, min(first + self._slots, self._lane.stage_chunks(stage + 1)[1]))
        self._stage = stage

    def _ask(self, first: int, end: int) -> None:
        for place in range(max(self._asked, first), end, _CHUNKS_A_TASK):
            stop = min(place + _CHUNKS_A_TASK, end)
            self._pending.append((place, self._executor.submit(self._load, place, stop)))
        self._asked = max(self._asked, end)

    def _load(self, place: int, stop: int) -> None:
        chunks: list[int] = self._lane.chunks[place:stop].tolist()
        if self._foreseeing is not None:
            self._foreseeing.expect(chunks, self.ring)
        for i, chunk in enumerate(chunks, place):
            self._source.load(chunk, {name: ring[i % self._slots] for name, ring in self.ring.items()})
