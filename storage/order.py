"""The order in which a store's rows reach training: a pure function of (store's size, BatchOrder, epoch).

Chunks are permuted and dealt to V lanes; the chunks that do not go round (fewer than V) are laid end to end and cut
in V equal parts, so lanes differ by one row at most. A batch takes B/V rows of each lane; the last one takes what is
left. A rank reads the lanes r, r + W, ..., so it reads only its share, and any W gives the same batches.

Within a lane rows pass through a pool of m rows, in *stages*. Before each stage the pool holds exactly m rows; a
stage hands out G = m/2 of them, shuffled, and G new ones come in. A *segment*, what comes in together, is handed out
in equal random parts by the three stages that follow; the first segment, which fills the pool, by 3/6, 2/6 and 1/6 of
itself. The last stage hands out all that remains. So the rows of a c-row chunk leave over three stages, and two rows
of a batch share a chunk with chance c / (1.5 m), at the start of an epoch and at its end about c / m: never above
that of a pool shuffled whole. Which rows a part holds follows from the segment's own permutation, so any stage can be
computed alone: resuming at batch k costs a few sorts of G numbers and the chunks that the pool holds then, whatever k
is.

Bias: two rows far apart in a lane's order never meet in a batch. It does not matter, as the chunks are permuted anew
each epoch, and their rows were shuffled among the whole window before they were written.

Rejected: a pool whose every draw depends on the one before (exact too, but resuming replays the epoch's draws), and a
pool handed out whole before it is filled again (twice the reading in bursts, and a third more same-chunk pairs).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.errors import ConfigError
from storage.shuffle import Indices, permutations

READER_VERSION = 1
"""Raised when the same arguments would give another order; an identity field of training."""

MIN_POOL_CHUNKS = 20
STAGES = 3
"""Stages over which a segment is handed out."""
_UNITS = STAGES * (STAGES + 1) // 2  # units of rows in a pool; a segment has STAGES units


@dataclass(frozen=True)
class BatchOrder:
    """What the order of training rows depends on, beside the store; all of it is identity.

    Attributes:
        seed: of the order.
        batch_rows: B, rows a global batch; a multiple of ``lanes``.
        pool_rows: rows in the shuffling pools of all lanes together, at least 20 chunks' where the store has them.
        lanes: V, independent streams that ranks share out; a multiple of the number of ranks.
    """

    seed: int
    batch_rows: int
    pool_rows: int
    lanes: int = 8

    def __post_init__(self) -> None:
        if min(self.batch_rows, self.pool_rows, self.lanes) < 1 or self.batch_rows % self.lanes:
            raise ConfigError(
                "batch_rows must be a positive multiple of lanes", found=f"{self.batch_rows} and {self.lanes}"
            )


@dataclass(frozen=True, order=True)
class ReadState:
    """Where a reader is: the next batch to come is number ``batch`` (from 0) of ``epoch`` (from 0)."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over a store of ``n_chunks`` chunks of ``chunk_rows`` rows."""

    order: BatchOrder
    n_chunks: int
    chunk_rows: int
    epoch: int

    def __post_init__(self) -> None:
        least = min(MIN_POOL_CHUNKS, self.n_chunks) * self.chunk_rows
        if self.n_chunks >= MIN_POOL_CHUNKS and self.order.pool_rows < least:
            raise ConfigError(
                "the shuffling pool is too small to mix prompts",
                found=f"pool_rows {self.order.pool_rows}",
                expected=f"at least {least} ({MIN_POOL_CHUNKS} chunks of {self.chunk_rows} rows)",
            )

    @property
    def n_batches(self) -> int:
        """Batches an epoch, the last short one included."""
        return -(-self.n_chunks * self.chunk_rows // self.order.batch_rows)

    @property
    def _unit(self) -> int:
        return -(-self.order.pool_rows // (self.order.lanes * _UNITS))

    def lanes(self, rank: int = 0, world: int = 1) -> "list[LaneOrder]":
        """The orders of the lanes that a rank reads."""
        if not 0 <= rank < world or self.order.lanes % world:
            raise ConfigError(
                "the number of ranks must divide the number of lanes",
                found=f"rank {rank} of {world}, {self.order.lanes} lanes",
            )
        chunks = permutations((self.n_chunks,), self.order.seed, "chunks", self.epoch)
        return [self._lane(lane, chunks) for lane in range(rank, self.order.lanes, world)]

    def lane_span(self, lane: "LaneOrder", batch: int) -> tuple[int, int]:
        """First row and end, in a lane's order, of what the lane gives to a batch."""
        size = self.order.batch_rows // self.order.lanes
        start = batch * size
        return start, lane.n_rows if batch == self.n_batches - 1 else start + size

    def held_batches(self, lanes: Sequence["LaneOrder"]) -> int:
        """The most batches that rows of some lanes may be in memory for at once."""
        size = self.order.batch_rows // self.order.lanes
        held = max(lane.held_rows for lane in lanes)
        return min(self.n_batches, (held + size - 2) // size + 1)

    def _lane(self, lane: int, chunks: Indices) -> "LaneOrder":
        lanes, c = self.order.lanes, self.chunk_rows
        whole = self.n_chunks // lanes
        left_over = chunks[whole * lanes :]
        start, end = (i * len(left_over) * c // lanes for i in (lane, lane + 1))
        own = np.concatenate([chunks[: whole * lanes][lane::lanes], left_over[start // c : -(-end // c)]])
        return LaneOrder(
            seed=self.order.seed,
            epoch=self.epoch,
            lane=lane,
            chunks=own,
            chunk_rows=c,
            whole_chunks=whole,
            skipped_rows=start % c,
            n_rows=whole * c + end - start,
            unit=self._unit,
        )


@dataclass(frozen=True, eq=False)
class LaneOrder:
    """One lane's order in one epoch.

    Attributes:
        chunks: the store's chunks that the lane reads, in order of reading; int64.
        whole_chunks: how many of them are the lane's alone; of the rest it has a part.
        skipped_rows: rows of the first shared chunk that are another lane's.
        n_rows: the lane's rows.
        unit: rows in a sixth of the pool.
    """

    seed: int
    epoch: int
    lane: int
    chunks: Indices
    chunk_rows: int
    whole_chunks: int
    skipped_rows: int
    n_rows: int
    unit: int
    _permutations: dict[int, Indices] = field(default_factory=dict[int, Indices], init=False, repr=False)

    @property
    def pool_rows(self) -> int:
        """m, rows of the pool, if the lane has so many."""
        return _UNITS * self.unit

    @property
    def segment_rows(self) -> int:
        """G, rows that come in, and go out, at each stage."""
        return STAGES * self.unit

    @property
    def last_stage(self) -> int:
        """Number of the stage that hands out the rest."""
        return max(0, (self.n_rows - self.pool_rows) // self.segment_rows)

    def stage_of(self, row: int) -> int:
        """The stage that hands out the ``row``-th row of the lane's order."""
        return min(row // self.segment_rows, self.last_stage)

    def stage_start(self, stage: int) -> int:
        """Where a stage begins in the lane's order."""
        return stage * self.segment_rows

    @property
    def held_rows(self) -> int:
        """Rows of the lane's order for which there must be memory at once: those of the last three stages.

        What the first of them needs goes to any place of the last one. As that is as large as two others at least, this
        is enough for four of the others: the one that is handed out, and those for which the next one's rows come in.
        """
        return self.n_rows - self.stage_start(max(0, self.last_stage - STAGES + 1))

    def reach(self, stage: int) -> int:
        """End, in the lane's order, of where rows may go that come in for a stage."""
        return self.n_rows if stage + STAGES > self.last_stage else self.stage_start(stage + STAGES)

    def stage_rows(self, stage: int) -> tuple[int, int]:
        """First and end of the lane's rows, as they lie in its chunks, that a stage needs in memory."""
        first = self._segment_start(max(0, stage - STAGES + 1))
        return first, self.n_rows if stage == self.last_stage else self._segment_start(stage + 1)

    def locate(self, rows: Indices) -> tuple[Indices, Indices]:
        """Where the lane's rows lie: their chunk's place in ``chunks``, and the row in the chunk."""
        offsets = self.offsets(rows)
        return offsets // self.chunk_rows, offsets % self.chunk_rows

    def offsets(self, rows: Indices) -> Indices:
        """Where the lane's rows lie when all rows of ``chunks`` are laid end to end."""
        if self.skipped_rows == 0:
            return rows
        return rows + np.where(rows >= self.whole_chunks * self.chunk_rows, self.skipped_rows, 0)

    def offset(self, row: int) -> int:
        """Where one of the lane's rows lies; see :meth:`offsets`."""
        return row + (self.skipped_rows if row >= self.whole_chunks * self.chunk_rows else 0)

    def stage_order(self, stage: int) -> Indices:
        """The lane's rows that a stage hands out, in order; int64."""
        parts = [self._part(segment, stage) for segment in range(max(0, stage - STAGES + 1), stage + 1)]
        if stage == self.last_stage:
            parts.append(np.arange(self._segment_start(stage + 1), self.n_rows))
        rows = np.concatenate(parts)
        return rows[permutations((len(rows),), self.seed, "stage", self.epoch, self.lane, stage)]

    def _segment_start(self, segment: int) -> int:
        start = 0 if segment == 0 else self.pool_rows + (segment - 1) * self.segment_rows
        return min(start, self.n_rows)

    def _part(self, segment: int, stage: int) -> Indices:
        # The first segment came in as if in STAGES portions before the epoch, so its parts shrink: 3, 2, 1 units.
        start, end = self._segment_start(segment), self._segment_start(segment + 1)
        age = stage - segment
        taken = age * STAGES - age * (age - 1) // 2 if segment == 0 else age
        size = STAGES - age if segment == 0 else 1
        first = taken * self.unit
        last = end - start if stage == self.last_stage else first + size * self.unit
        return start + self._shuffled(segment, end - start)[first:last]

    def _shuffled(self, segment: int, n_rows: int) -> Indices:
        # Three stages in turn ask for a segment's permutation: the newest few are kept.
        if segment not in self._permutations:
            for old in [kept for kept in self._permutations if not segment - STAGES < kept < segment]:
                del self._permutations[old]
            self._permutations[segment] = permutations((n_rows,), self.seed, "segment", self.epoch, self.lane, segment)
        return self._permutations[segment]
