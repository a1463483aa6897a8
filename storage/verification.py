"""Verification: every file of an artifact against its manifest, and every chunk of an activation store.

A file is read once. Its size and sha256 are compared with the manifest's; where it is a shard, so are, from the same
read, the crc32c of each chunk with the one stored behind it and with the one that the ``checksum`` array has for that
place, and the shard's index. sha256 decides whether a file is as committed; the chunks tell where it is not, and catch
a shard that contradicted itself when it was committed. A few threads each take a file at a time (hashing leaves the
interpreter's lock alone); problems come in the manifest's order however they were found. Cost: one read of all files,
at sha256's speed a thread; a few MiB a thread, and the checksum tables, 12 to 16 bytes a chunk.
Rejected: threads on one file (sha256 is sequential), and chunks' own checksums instead of sha256 (swapped files have
good ones, and files that are no shards have none).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from storage.artifact import Artifact, Problem, open_folder, size_problem
from storage.errors import SparsemillError
from storage.fingerprint import Json
from storage.manifest import MANIFEST_NAME, RESERVED_NAMES
from storage.shards import GROUP_NAME, Layout
from storage.zarr_files import CRC_BYTES, METADATA_NAME, ShardedArray, crc32c

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_READ_BYTES = 1 << 22
_THREADS = min(4, os.cpu_count() or 1)

_Table: TypeAlias = npt.NDArray[np.uint32]


def verify(artifact: Artifact, on_progress: OnProgress | None = None, *, threads: int = _THREADS) -> list[Problem]:
    """Compares every file of an artifact with its manifest; reads all of them once.

    Args:
        artifact: what to check.
        on_progress: called as it goes, by one thread at a time.
        threads: that hash files.

    Returns:
        All differences: damaged manifest first, then files in the manifest's order, then files it does not name.
    """
    files = artifact.manifest.files
    check = _FileCheck(artifact, _Progress(artifact.manifest.total_bytes, on_progress))
    problems = list(_manifest_problems(artifact))
    with ThreadPoolExecutor(threads, "sparsemill-verify") as pool:
        problems += [problem for problem in pool.map(check, files) if problem is not None]
    return problems + [Problem(name, "extra", found, "none of this name") for name, found in _extra(artifact)]


class _Progress:
    """Adds up what threads have read and passes it on."""

    def __init__(self, total: int, report: OnProgress | None):
        self._total = total
        self._report = report
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._report is not None:
                self._report(self._done, self._total)


class _FileCheck:
    """Checks one file after another; threads share it."""

    def __init__(self, artifact: Artifact, progress: _Progress):
        self._artifact = artifact
        self._progress = progress
        self._arrays = _store_arrays(artifact)
        self._tables: dict[int, _Table | None] = {}

    def __call__(self, name: str) -> Problem | None:
        record, path = self._artifact.manifest.files[name], self._artifact.folder / name
        problem = size_problem(name, path, record)
        if problem is not None:
            self._progress.advance(record.bytes)
            return problem
        digest, chunks = hashlib.sha256(), self._chunks(name, record.bytes)
        try:
            for piece in _pieces(path, _READ_BYTES if chunks is None else chunks.read_bytes):
                digest.update(piece)
                if chunks is not None:
                    chunks.take(piece)
                self._progress.advance(len(piece))
        except OSError as error:
            return Problem(name, "unreadable", str(error), record.sha256)
        found, detail = digest.hexdigest(), "" if chunks is None else chunks.detail()
        if found != record.sha256:
            return Problem(name, "sha256", found, record.sha256, detail)
        return Problem(name, "crc32c", "bytes as committed", "chunks of their checksums", detail) if detail else None

    def _chunks(self, name: str, size: int) -> "_ChunkCheck | None":
        """For a shard of the activation store, what checks its chunks."""
        group, _, rest = name.partition("/")
        array_name, _, tail = rest.partition("/c/")
        array, shard = self._arrays.get(array_name), tail.split("/")[0]
        if group != GROUP_NAME or array is None or not shard.isdecimal():
            return None
        if rest != array.shard_name(int(shard)) or size != array.shard_bytes:
            return None
        return _ChunkCheck(array, self._expected(array, int(shard)))

    def _expected(self, array: ShardedArray, shard: int) -> Sequence[int] | None:
        """The crc32c of a shard's chunks, from the ``checksum`` array; None where that cannot tell."""
        columns = [name for name in self._arrays if name != "checksum"]
        if array.name not in columns:
            return None
        window, first = divmod(shard * array.chunks_per_shard, self._arrays["checksum"].shard_rows)
        table = self._table(window)
        if table is None:
            return None
        return cast("list[int]", table[first : first + array.chunks_per_shard, columns.index(array.name)].tolist())

    def _table(self, window: int) -> _Table | None:
        if window not in self._tables:  # two threads may both read it: the same table
            array = self._arrays["checksum"]
            try:
                data = self._artifact.read_bytes(f"{GROUP_NAME}/{array.shard_name(window)}")
                table = np.frombuffer(data, "<u4", array.shard_rows * (array.columns or 1))
                self._tables[window] = table.reshape(array.shard_rows, -1)
            except (SparsemillError, OSError, ValueError):
                self._tables[window] = None  # damaged itself, which is reported in its own place
        return self._tables[window]


class _ChunkCheck:
    """Takes a shard's bytes in order, cut anywhere between chunks, and remembers which chunks are wrong.

    Args:
        array: which the shard is part of.
        expected: crc32c of each chunk that belongs there, or None if not known.
    """

    def __init__(self, array: ShardedArray, expected: Sequence[int] | None):
        self._array = array
        self._expected = expected
        self._seen = 0
        self._damaged: list[int] = []
        self._foreign: list[int] = []
        self._index = b""
        self._stride = array.chunk_bytes + CRC_BYTES
        self.read_bytes = max(1, _READ_BYTES // self._stride) * self._stride

    def take(self, piece: memoryview) -> None:
        """Checks the chunks that a piece consists of, and keeps what follows the last chunk."""
        for start in range(0, len(piece), self._stride):
            if self._seen == self._array.chunks_per_shard:
                self._index += piece[start:]
                return
            self._check(piece[start : start + self._array.chunk_bytes], piece[start + self._array.chunk_bytes :])
            self._seen += 1

    def detail(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        of_all = f"of {self._array.chunks_per_shard}"
        parts = [
            f"{_chunk_list(self._damaged)} {of_all} damaged" if self._damaged else "",
            f"{_chunk_list(self._foreign)} {of_all} whole, but not the ones written there" if self._foreign else "",
            "index damaged" if self._index != self._array.index else "",
        ]
        return ", ".join(filter(None, parts))

    def _check(self, chunk: memoryview, rest: memoryview) -> None:
        found = crc32c(np.frombuffer(chunk, np.uint8))
        if found != int.from_bytes(rest[:CRC_BYTES], "little"):
            self._damaged.append(self._seen)
        elif self._expected is not None and found != self._expected[self._seen]:
            self._foreign.append(self._seen)


def _chunk_list(numbers: Sequence[int]) -> str:
    """``chunk 3``, ``chunks 3, 9``, ``chunks 0-31``: runs of three and more are drawn together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"chunk{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def _pieces(path: Path, size: int) -> Generator[memoryview]:
    """A file's bytes in pieces of ``size``, the last one shorter; each is valid until the next is asked for."""
    buffer = memoryview(bytearray(size))
    with path.open("rb", buffering=0) as file:
        filled = 1
        while filled:
            filled = 0
            while filled < size and (count := file.readinto(buffer[filled:])):
                filled += count
            if filled:
                yield buffer[:filled]


def _extra(artifact: Artifact) -> list[tuple[str, str]]:
    """What lies in the folder and is not the artifact's: files, and empty folders, which a reader lists too."""
    files = artifact.manifest.files.keys() | RESERVED_NAMES
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    found: list[tuple[str, str]] = []
    for path in artifact.folder.rglob("*"):
        name = path.relative_to(artifact.folder).as_posix()
        if path.is_symlink() or not path.is_dir():
            found += [(name, "a file")] if name not in files else []
        elif name not in files and name not in folders and not any(path.iterdir()):
            found.append((name, "an empty folder"))
    return sorted(found)


def _store_arrays(artifact: Artifact) -> Mapping[str, ShardedArray]:
    """Arrays of its activation store by name; none where it has no store, or one whose metadata is damaged."""
    try:
        value = cast("Mapping[str, Mapping[str, Json]]", artifact.read_json(f"{GROUP_NAME}/{METADATA_NAME}"))
        attributes = cast("Mapping[str, Mapping[str, Json]]", value["attributes"]["sparsemill"])
        return Layout.from_json(attributes["layout"]).arrays()
    except (SparsemillError, OSError, KeyError, TypeError):
        return {}


def _manifest_problems(artifact: Artifact) -> Iterator[Problem]:
    try:
        found = open_folder(artifact.folder).manifest_sha256
    except (SparsemillError, OSError) as error:
        found = str(error)
    if found != artifact.manifest_sha256:
        yield Problem(MANIFEST_NAME, "manifest", found, artifact.manifest_sha256)
    if artifact.folder.name != artifact.id:
        yield Problem(MANIFEST_NAME, "manifest", f"folder {artifact.folder.name}", artifact.id)
