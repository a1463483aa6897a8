"""Shards -> shuffled batches: prefetched, resumable, checked; also in order, and by (prompt, position).

Chunks are read straight from the shard files and always checked (storage.chunks); how they become batches, and what
memory that takes, storage.batches says. zarr-python, zarrs and tensorstore read the same files, more slowly;
docs/performance.md compares them.
"""

import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from storage.artifact import Artifact
from storage.batches import BEGINNING, KEPT_BATCHES, Batch, ShuffledBatches, empty_columns, row_names, to_batch
from storage.chunks import ChunkFiles
from storage.encoding import Floats
from storage.errors import ConfigError, CorruptArtifact, InputError, UnsupportedFormat, repair_remedy
from storage.fingerprint import Json
from storage.lookup import RowLookup
from storage.manifest import FORMAT_VERSION, FileRecord
from storage.order import BatchOrder, ReadState
from storage.prefetch import Prefetched
from storage.recycling import Recycled
from storage.remote_chunks import RemoteChunks
from storage.shards import GROUP_NAME, Layout
from storage.zarr_files import METADATA_NAME

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["Batch", "BatchOrder", "ReadState", "ShardReader"]

_REMOTE_THREADS = 4  # each has the requests of one task of a pool under way
_AHEAD_BYTES = 1 << 26  # asked for, of a remote, from the batch on that is read in order


class ShardReader:
    """Reads an activation store; cheap to pickle, so that workers can open it too.

    Args:
        folder: of the artifact.
        artifact_id: named in errors.
        group: folder of the Zarr group within it.
        records: the files of the artifact by name, from its manifest, to check the small files against.
        threads: that read chunks.
        lent: the artifact itself, where its chunks are read from a remote; its metadata files are in ``folder``.

    Raises:
        CorruptArtifact: metadata is damaged, or a shard is missing or one too many.
        UnsupportedFormat: a store of another format version.
    """

    def __init__(
        self,
        folder: Path,
        artifact_id: str,
        *,
        group: str = GROUP_NAME,
        records: Mapping[str, FileRecord] | None = None,
        threads: int = 2,
        lent: Artifact | None = None,
    ):
        self.folder = folder
        self.artifact_id = artifact_id
        self.group = group
        self.threads = threads
        self._records = records
        self.layout = self._read_layout()
        self._lent = lent
        self._files = self._chunks()
        self._shuffled = ShuffledBatches(
            self._files,
            n_chunks=self.layout.n_chunks,
            chunk_rows=self.layout.chunk_rows,
            positions=self.layout.positions,
            encoding=self.layout.encoding,
            threads=threads,
        )
        self._lookup = RowLookup(self.layout)
        self._check_arrays()
        self._files.check_listing()

    @classmethod
    def of(cls, artifact: Artifact, *, group: str = GROUP_NAME, threads: int = 2) -> "ShardReader":
        """A reader of a committed artifact, checked against its manifest; of one in a remote, read where it is.

        Of a remote that does not stream, all shards are fetched first.
        """
        names, streams = [name for name in artifact.manifest.files if name.startswith(f"{group}/")], False
        if artifact.origin is not None:
            streams = artifact.origin.streams
            artifact.fetch([name for name in names if not streams or name.endswith(f"/{METADATA_NAME}")])
        records, threads = artifact.manifest.files, max(threads, _REMOTE_THREADS) if streams else threads
        lent = artifact if streams else None
        return cls(artifact.folder, artifact.id, group=group, records=records, threads=threads, lent=lent)

    def __reduce__(self) -> tuple[object, ...]:
        if self._lent is not None:
            return (_reopen_lent, (self._lent, self.group, self.threads))
        return (_reopen, (self.folder, self.artifact_id, self.group, self._records, self.threads))

    @property
    def n_rows(self) -> int:
        """Rows of the store."""
        return self.layout.n_rows

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.layout.d_in

    @property
    def positions(self) -> int:
        """Harvested positions a prompt."""
        return self.layout.positions

    def batches_per_epoch(self, order: BatchOrder) -> int:
        """Batches of one epoch, the last, short one included."""
        return self._shuffled.batches_per_epoch(order)

    def pool_bytes(self, order: BatchOrder, *, world: int = 1) -> int:
        """Memory that a rank's pools take, prefetched batches aside."""
        return self._shuffled.pool_bytes(order, world=world)

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

        Raises:
            ConfigError: the pools are smaller than 20 chunks, or ``world`` does not divide the lanes.
            CorruptArtifact: while iterating: a chunk is not as it was written, or another one lies in its place.
        """
        return self._shuffled.batches(order, start=start, rank=rank, world=world, prefetch=prefetch)

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
        return self._shuffled.epoch(order, start=start, rank=rank, world=world, prefetch=prefetch)

    def prompts(self, order: BatchOrder, *, start: ReadState = BEGINNING) -> Generator[npt.NDArray[np.int32]]:
        """The prompt numbers alone of the batches of one epoch: the same order, without reading activations."""
        return self._shuffled.prompts(order, start=start)

    def sequential(self, batch_rows: int, *, start: int = 0, prefetch: int = 2) -> Prefetched[Batch]:
        """All rows once, in the order of the store (itself shuffled), for statistics.

        Args:
            batch_rows: rows a batch; the last has what is left.
            start: the first batch.
            prefetch: batches made ahead in a thread.
        """
        if batch_rows < 1:
            raise ConfigError("batch_rows must be positive", found=batch_rows)

        def generate() -> Generator[Batch]:
            memory = Recycled(KEPT_BATCHES)
            stored = {name: Recycled(1) for name in row_names(self._files)}
            for number in range(start, -(-self.n_rows // batch_rows)):
                first = number * batch_rows
                self._expect_rows(first, batch_rows)
                batch = self._gather(np.arange(first, min(first + batch_rows, self.n_rows)), stored, memory)
                yield Batch(batch.rows, batch.prompt, batch.position, ReadState(0, number + 1))

        return Prefetched(generate(), prefetch)

    def read(self, start: int, stop: int) -> Batch:
        """The rows ``start`` to ``stop`` in the order of the store, which is itself shuffled.

        Raises:
            InputError: there are no such rows.
            CorruptArtifact: a chunk is not as it was written.
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise InputError("rows outside the store", found=f"{start}:{stop}", expected=f"within 0:{self.n_rows}")
        return self.rows_of(np.arange(start, stop))

    def _expect_rows(self, start: int, batch_rows: int) -> None:
        """Has a remote begin to send rows; a disk that is read in order looks ahead by itself."""
        if isinstance(self._files, RemoteChunks):
            chunk_rows = self.layout.chunk_rows
            ahead = max(2 * batch_rows, _AHEAD_BYTES // self._files.arrays["activations"].chunk_bytes * chunk_rows)
            stop = min(start + ahead, self.n_rows)
            self._files.expect(range(start // chunk_rows, -(-stop // chunk_rows)), ["activations"])

    def rows_of(self, indices: npt.NDArray[np.integer]) -> Batch:
        """Rows by their index in the store.

        Args:
            indices: int (n,), in any order.

        Raises:
            InputError: there are no such rows.
            CorruptArtifact: a chunk is not as it was written.
        """
        return self._gather(indices)

    def _gather(
        self,
        indices: npt.NDArray[np.integer],
        stored: Mapping[str, Recycled] | None = None,
        decoded: Recycled | None = None,
    ) -> Batch:
        """Rows by their index, in memory to use again for what is stored, and for what is decoded."""
        indices = indices.astype(np.int64)
        outside = indices[(indices < 0) | (indices >= self.n_rows)]
        if outside.size:
            raise InputError("rows outside the store", found=int(outside[0]), expected=f"0 to {self.n_rows - 1}")
        names = row_names(self._files)
        columns = empty_columns(self._files, names, len(indices), stored)
        by_chunk = np.argsort(indices // self.layout.chunk_rows, kind="stable")
        chunks, starts = np.unique(indices[by_chunk] // self.layout.chunk_rows, return_index=True)
        if isinstance(self._files, RemoteChunks):
            self._files.expect(chunks.tolist(), names)
        for chunk, wanted in zip(chunks.tolist(), np.split(by_chunk, starts[1:]), strict=False):
            rows = indices[wanted] % self.layout.chunk_rows
            whole = len(rows) == self.layout.chunk_rows and _counts_up(rows) and _counts_up(wanted)
            for name in names:
                if whole:  # straight to its place
                    self._files.read_into(name, chunk, columns[name][wanted[0] : wanted[-1] + 1])
                else:
                    columns[name][wanted] = self._files.read(name, chunk)[rows]
        return to_batch(columns, self.layout.encoding, BEGINNING, decoded)

    def rows_at(self, prompt: npt.ArrayLike, position: npt.ArrayLike) -> Floats:
        """Activations of given tokens.

        Args:
            prompt: prompt numbers in the tokens artifact, int (n,).
            position: positions in these prompts, int (n,).

        Returns:
            float32 (n, d_in).

        Raises:
            InputError: a token whose activation was not harvested.
        """
        prompts, positions = (np.atleast_1d(np.asarray(x, np.int64)) for x in (prompt, position))
        prompts, positions = np.broadcast_arrays(prompts, positions)
        found = self.rows_of(self._lookup.rows(prompts, positions))
        if (found.prompt != prompts).any() or (found.position != positions).any():
            raise CorruptArtifact(
                "the store's rows are not where its layout says",
                where=self.artifact_id,
                remedy=repair_remedy(self.artifact_id),
            )
        return found.rows

    def dask(self, block_rows: int | None = None) -> "da.Array":
        """The activations as a lazy Dask array, float32 (n_rows, d_in).

        Args:
            block_rows: rows a block; a shard's by default.
        """
        import dask.array as da  # here, as it takes half a second and only notebooks want it

        blocks = (block_rows or self.layout.window_prompts, self.d_in)
        name = f"{self.artifact_id}-{self.group}-{blocks[0]}"
        # Dask declares "chunks" as a string, for its default "auto".
        return da.from_array(_RowsView(self), blocks, name=name, asarray=False)  # pyright: ignore[reportArgumentType]

    def _chunks(self) -> ChunkFiles | RemoteChunks:
        if self._lent is not None and self._lent.origin is not None:
            return RemoteChunks(self._lent, self._lent.origin, self.layout, self.group)
        records = self._records
        own = None if records is None else {name.removeprefix(f"{self.group}/"): r for name, r in records.items()}
        return ChunkFiles(self.folder / self.group, self.layout.arrays(), self.artifact_id, own)

    def _read_layout(self) -> Layout:
        value = self._read_metadata(METADATA_NAME)
        try:
            attributes = cast("Mapping[str, Mapping[str, Json]]", value["attributes"])["sparsemill"]
            format_version = attributes["format_version"]
            if format_version == FORMAT_VERSION:
                return Layout.from_json(cast("Mapping[str, Json]", attributes["layout"]))
        except (KeyError, TypeError, ConfigError) as error:
            raise self._damaged(METADATA_NAME, error) from error
        raise UnsupportedFormat(
            "activation store of another format",
            where=self.folder / self.group,
            found=f"version {format_version}",
            expected=FORMAT_VERSION,
        )

    def _check_arrays(self) -> None:
        for name, array in self._files.arrays.items():
            file = f"{name}/{METADATA_NAME}"
            if self._read_metadata(file) != json.loads(array.metadata()):
                raise self._damaged(file, "it contradicts the group's attributes")

    def _read_metadata(self, name: str) -> Mapping[str, Json]:
        record = None if self._records is None else self._records.get(f"{self.group}/{name}")
        try:
            data = (self.folder / self.group / name).read_bytes()
            value = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(name, error) from error
        if record is not None and hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._damaged(name, "another sha256 than the manifest's")
        if not isinstance(value, dict):
            raise self._damaged(name, "not an object")
        return cast("Mapping[str, Json]", value)

    def _damaged(self, name: str, found: object) -> CorruptArtifact:
        return CorruptArtifact(
            f"metadata {self.group}/{name} of {self.artifact_id} is damaged",
            where=self.folder / self.group,
            found=found,
            remedy=repair_remedy(self.artifact_id),
        )


def _counts_up(numbers: npt.NDArray[np.integer]) -> bool:
    return bool((np.diff(numbers) == 1).all())


class _RowsView:
    """What Dask needs of an array: shape, dtype, and slices of rows and columns."""

    def __init__(self, reader: ShardReader):
        self._reader = reader
        self.shape = (reader.n_rows, reader.d_in)
        self.dtype = np.dtype(np.float32)
        self.ndim = 2

    def __getitem__(self, key: tuple[slice, slice]) -> Floats:
        rows, columns = key
        start, stop, step = rows.indices(self.shape[0])
        return self._reader.read(start, max(start, stop)).rows[::step, columns]


def _reopen_lent(lent: Artifact, group: str, threads: int) -> ShardReader:
    return ShardReader.of(lent, group=group, threads=threads)


def _reopen(
    folder: Path, artifact_id: str, group: str, records: Mapping[str, FileRecord] | None, threads: int
) -> ShardReader:
    return ShardReader(folder, artifact_id, group=group, records=records, threads=threads)
