"""Shuffled reading, ours beside a plain pread, zarr-python, zarrs and tensorstore: ``python -m bench.reading``.

Stores of gelu-1l's width (2048) and shards of 8192 rows, 2 GB each, one at a time in a temporary folder. Everything
reads one epoch: all chunks, in random order, through a shuffling pool, in batches of 4096 rows.

- *pread*: the chunks alone, into one buffer a thread; no pool, no batches.
- *numpy*: pread, crc32c, rows gathered from the pool in the stored dtype; each thread has a pool, and nobody to hand
  its batches to.
- *zarr*, *zarrs*, *tensorstore*: the same loop with the library's own read of a chunk, which checks it too.
- *ours*: batches with each row's prompt and position; once as stored, where the reading threads put their rows, once
  cast to float32 by one more thread, as training receives them.

Cold is one epoch, the page cache emptied of the store before each run, which is checked; warm are three epochs in one
go, all of the store in the page cache. Writes ``bench/results/reading.json``; ``python -m bench.tables`` puts it into
docs/performance.md. Needs the extra ``bench``, 6 GB of free disk and as much memory.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.machine import Rounds, drop_from_cache, interleave, say, write_results
from bench.tables import markdown
from storage.batches import BEGINNING, row_names
from storage.encoding import Encoding, decode, encode
from storage.reader import BatchOrder, ShardReader
from storage.shards import GROUP_NAME, Layout, WindowBuffer, create_group
from storage.zarr_files import CRC_BYTES, crc32c

D_IN, PROMPTS, POSITIONS = 2048, 8192, 64  # half the positions of a window of gelu-1l: 2.1 GB in float16
BATCH_ROWS, POOL_ROWS = 4096, 65_536
SEED = 1  # of the order that chunks and rows come in
WARM_EPOCHS = 3  # read in one go, so that the pools' memory, provided once, does not count for much
ID = "harvest-000000000000"

ReadChunk = Callable[[int, npt.NDArray[np.generic]], None]
"""Reads the chunk of that number into (chunk_rows, d_in)."""


@dataclass(frozen=True)
class Case:
    """One store, read by so many threads."""

    folder: Path
    layout: Layout
    threads: int
    epochs: int = 1

    @property
    def order(self) -> BatchOrder:
        return BatchOrder(seed=SEED, batch_rows=BATCH_ROWS, pool_rows=POOL_ROWS)

    @property
    def group(self) -> Path:
        return self.folder / GROUP_NAME

    @property
    def files(self) -> list[Path]:
        return [path for path in self.group.rglob("*") if path.is_file()]

    def reader(self) -> ShardReader:
        return ShardReader(self.folder, ID, threads=self.threads)


def write_store(folder: Path, encoding: Encoding, chunk_rows: int) -> Layout:
    """A store of GELU of normal numbers; the same 32 prompts again and again, which no reader can tell."""
    layout = Layout(1, PROMPTS, POSITIONS, D_IN, chunk_rows, encoding, seed=0, n_prompts=PROMPTS)
    create_group(folder, layout)
    buffer = WindowBuffer(layout, 0)
    x = np.random.default_rng(0).standard_normal((32 * POSITIONS, D_IN), np.float32)
    codes = encode(x / (1 + np.exp(-1.702 * x)), encoding)
    for first in range(0, PROMPTS, 32):
        buffer.place(first, *codes)
    buffer.write(folder)
    return layout


def on_threads(case: Case, work: Callable[[npt.NDArray[np.int64]], None]) -> None:
    """Deals the chunks, shuffled, to the threads."""
    chunks = np.tile(np.random.default_rng(SEED).permutation(case.layout.n_chunks), case.epochs)
    threads = [threading.Thread(target=work, args=(chunks[i :: case.threads],)) for i in range(case.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pooled_batches(case: Case, chunks: npt.NDArray[np.int64], read: ReadChunk) -> Iterator[npt.NDArray[np.generic]]:
    """The plain loader: fills a pool with chunks, hands out its rows shuffled, and again."""
    array = case.layout.arrays()["activations"]
    pool = np.empty((POOL_ROWS // case.threads // array.chunk_rows, array.chunk_rows, D_IN), array.dtype)
    rng = np.random.default_rng(2)
    for first in range(0, len(chunks), len(pool)):
        part = chunks[first : first + len(pool)].tolist()
        for place, chunk in enumerate(part):
            read(chunk, pool[place])
        rows, order = pool.reshape(-1, D_IN), rng.permutation(len(part) * array.chunk_rows)
        for start in range(0, len(order), BATCH_ROWS):
            yield np.take(rows, order[start : start + BATCH_ROWS], axis=0)


def read_pooled(case: Case, read: ReadChunk) -> None:
    def work(chunks: npt.NDArray[np.int64]) -> None:
        for _ in pooled_batches(case, chunks, read):
            pass

    on_threads(case, work)


def opened(case: Case) -> list[int]:
    array = case.layout.arrays()["activations"]
    return [os.open(case.group / array.shard_name(shard), os.O_RDONLY) for shard in range(array.n_shards)]


def with_pread(case: Case) -> None:
    array, descriptors = case.layout.arrays()["activations"], opened(case)
    size = array.chunk_bytes + CRC_BYTES

    def work(chunks: npt.NDArray[np.int64]) -> None:
        buffer = bytearray(size)
        for chunk in chunks.tolist():
            shard, inner = divmod(chunk, array.chunks_per_shard)
            os.preadv(descriptors[shard], [buffer], inner * size)

    on_threads(case, work)
    for descriptor in descriptors:
        os.close(descriptor)


def with_numpy(case: Case) -> None:
    array, descriptors = case.layout.arrays()["activations"], opened(case)
    stride = array.chunk_bytes + CRC_BYTES

    def read(chunk: int, out: npt.NDArray[np.generic]) -> None:
        shard, inner = divmod(chunk, array.chunks_per_shard)
        stored = bytearray(CRC_BYTES)
        os.preadv(descriptors[shard], [memoryview(out).cast("B"), stored], inner * stride)  # pyright: ignore[reportArgumentType]
        if crc32c(out) != int.from_bytes(stored, "little"):
            raise RuntimeError(f"chunk {chunk} is damaged")

    read_pooled(case, read)
    for descriptor in descriptors:
        os.close(descriptor)


def with_zarr(case: Case, pipeline: str | None = None) -> None:
    import zarr

    settings: dict[str, Any] = {"threading.max_workers": case.threads}
    with zarr.config.set(settings | ({"codec_pipeline.path": pipeline} if pipeline else {})):
        array: Any = zarr.open_array(case.group / "activations", mode="r")
        rows = case.layout.chunk_rows

        def read(chunk: int, out: npt.NDArray[np.generic]) -> None:
            out[:] = array[chunk * rows : (chunk + 1) * rows]

        read_pooled(case, read)


def with_zarrs(case: Case) -> None:
    import zarrs  # noqa: F401  (registers its pipeline)  # pyright: ignore[reportUnusedImport]

    with_zarr(case, "zarrs.ZarrsCodecPipeline")


def with_tensorstore(case: Case) -> None:
    import tensorstore as ts

    limit = {"limit": case.threads}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{case.group}/activations/"},
        "context": {"data_copy_concurrency": limit, "file_io_concurrency": limit},
    }
    array: Any = ts.open(spec, read=True).result()
    rows = case.layout.chunk_rows

    def read(chunk: int, out: npt.NDArray[np.generic]) -> None:
        out[:] = array[chunk * rows : (chunk + 1) * rows].read().result()

    read_pooled(case, read)


def with_ours(case: Case) -> None:
    """Batches as stored: what :meth:`ShardReader.epoch` does, less the cast."""
    for _ in stored_batches(case):
        pass


def stored_batches(case: Case) -> Iterator[npt.NDArray[np.generic]]:
    batches = case.reader()._shuffled  # noqa: SLF001  (the product has no use for batches that are not decoded)
    columns = batches._columns(case.order, BEGINNING, 0, 1, case.epochs - 1, row_names(batches.source))  # noqa: SLF001
    for batch, _ in columns:
        yield batch["activations"]


def with_ours_float32(case: Case) -> None:
    reader = case.reader()
    with reader.batches(case.order) as batches:
        for _ in islice(batches, case.epochs * reader.batches_per_epoch(case.order)):
            pass


READERS: dict[str, Callable[[Case], None]] = {
    "pread": with_pread,
    "numpy": with_numpy,
    "ours": with_ours,
    "ours, float32": with_ours_float32,
    "tensorstore": with_tensorstore,
    "zarr": with_zarr,
    "zarrs": with_zarrs,
}
OURS = ("ours", "ours, float32")


def measure(case: Case, readers: list[str], state: str, rounds: int) -> dict[str, Any]:
    """Rows a second of some readers, and how they compare with *pread* and *numpy* round by round."""
    before = {"cold": lambda: drop_from_cache(case.files), "warm": lambda: with_pread(case)}[state]
    found = interleave({name: lambda name=name: READERS[name](case) for name in readers}, rounds, before)
    layout = case.layout
    figures = {
        "state": state, "encoding": layout.encoding, "chunk_rows": layout.chunk_rows, "threads": case.threads,
        "rounds": rounds, "load": found.load,
        "rows_per_second": {name: runs.rates(layout.n_rows * case.epochs) for name, runs in found.runs.items()},
        "ratios": ratios(found),
    }  # fmt: skip
    say(summary(figures))
    return figures


def ratios(found: Rounds) -> dict[str, float]:
    return {
        f"{one} / {other}": found.ratio(one, other)
        for one in found.runs
        for other in found.runs
        if one in OURS and other not in OURS
    }


def summary(figures: dict[str, Any]) -> str:
    where = " ".join(str(figures[key]) for key in ("state", "encoding", "chunk_rows", "threads"))
    rates = ", ".join(f"{name} {rates['median']:,.0f}" for name, rates in figures["rows_per_second"].items())
    shares = ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures["ratios"].items())
    return f"{where}: {shares}; rows/s: {rates}; load {figures['load'][0]:.1f} to {figures['load'][1]:.1f}"


def measure_parts(rounds: int = 15) -> dict[str, Any]:
    """What the steps of reading float16 take on one thread, data in memory: seconds a GB as stored."""
    pool = np.ones((POOL_ROWS // 4, D_IN), np.float16)
    order = np.random.default_rng(0).permutation(len(pool))[:BATCH_ROWS]
    codes, decoded = np.empty((BATCH_ROWS, D_IN), np.float16), np.empty((BATCH_ROWS, D_IN), np.float32)
    steps = {
        "crc32c": lambda: crc32c(codes),
        "gather": lambda: np.take(pool, order, axis=0, out=codes, mode="clip"),
        "cast": lambda: decode(codes, "float16", out=decoded),
        "cast into fresh memory": lambda: decode(codes, "float16"),
        "cast by numpy": lambda: np.copyto(decoded, codes),
    }
    decode(codes, "float16")  # compiles
    found = interleave(steps, rounds)
    return {
        "load": found.load,
        "seconds_per_gb": {
            name: statistics.median(runs.cpu_seconds) / codes.nbytes * 1e9 for name, runs in found.runs.items()
        },
    }


def measure_ranks(case: Case, world: int = 2) -> dict[str, Any]:
    """Bytes that each rank reads for its share of an epoch, counted by the kernel, beside the store's."""
    read: list[int] = []
    for rank in range(world):
        reader, before = case.reader(), bytes_read()
        with reader.epoch(case.order, rank=rank, world=world) as batches:
            rows = sum(len(batch.rows) for batch in batches)
        read.append(bytes_read() - before)
        say(f"rank {rank} of {world}: {rows} rows, {read[-1]:,} bytes")
    return {"world": world, "store_bytes": case.layout.bytes, "bytes_read": read}


def bytes_read() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def check_equal(case: Case) -> None:
    """That our batches hold what a plain read of the files holds."""
    totals = [0, 0]
    for batch in stored_batches(case):
        totals[0] += int(batch.view(np.uint8).sum(dtype=np.uint64))
    for shard in sorted((case.group / "activations").rglob("c/*/0")):
        array = case.layout.arrays()["activations"]
        chunks = np.fromfile(shard, np.uint8)[: -len(array.index)].reshape(array.chunks_per_shard, -1)
        totals[1] += int(chunks[:, :-CRC_BYTES].sum(dtype=np.uint64))
    if totals[0] != totals[1]:
        raise RuntimeError(f"the epoch's codes add up to {totals[0]}, the files' to {totals[1]}")


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    cases, machine = figures["cases"], figures["machine"]
    halves = [case for case in cases if case["encoding"] == "float16"]
    others = [name for name in READERS if name not in OURS]
    packed = [case for case in cases if case["chunk_rows"] == 256]
    store, ranks, parts = figures["ranks"]["store_bytes"], figures["ranks"]["bytes_read"], figures["parts"]
    loads = [load for case in cases for load in case["load"]]
    rounds = sorted({case["rounds"] for case in cases})
    return {
        "ratios": markdown(
            ["float16", *others],
            ([_where(case), *(_both(case, other) for other in others)] for case in halves),
        ),
        "rates": markdown(
            ["float16", *READERS], ([_where(case), *(_rate(case, name) for name in READERS)] for case in halves)
        ),
        "processor": markdown(
            ["float16", *READERS],
            ([_where(case), *(_per_cpu(case, name) for name in READERS)] for case in halves if case["state"] == "warm"),
        ),
        "encodings": markdown(
            ["256-row chunks", "pread", "numpy", *OURS],
            ([f"{case['encoding']}, {_where(case)}", *(_rate(case, name) for name in ("pread", "numpy", *OURS))]
             for case in packed),
        ),
        "parts": markdown(
            ["step", "s a GB"], ([name, f"{seconds:.3f}"] for name, seconds in parts["seconds_per_gb"].items())
        ),
        "ranks": markdown(
            ["rank", "bytes read", "of the store"],
            ([f"{rank} of {len(ranks)}", f"{count:,}", f"{count / store:.2%}"] for rank, count in enumerate(ranks)),
        ),
        "machine": (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['instruction_set'][-1]}, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; "
            + ", ".join(f"{name} {machine['versions'][name]}" for name in ("numpy", "zarr", "zarrs", "tensorstore"))
            + f". Medians of {' or '.join(map(str, rounds))} rounds; "
            f"load average {min(loads):.1f} to {max(loads):.1f}, where the benchmark alone makes 1 to 3."
        ),
    }  # fmt: skip


def _where(case: dict[str, Any]) -> str:
    return f"{case['state']}, chunks of {case['chunk_rows']}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def _both(case: dict[str, Any], other: str) -> str:
    stored, cast = (case["ratios"][f"{one} / {other}"] for one in OURS)
    return f"{stored:.2f} ({cast:.2f})"


def _rate(case: dict[str, Any], name: str) -> str:
    rates = case["rows_per_second"][name]
    return f"{rates['median'] / 1e3:.0f} ({rates['low'] / 1e3:.0f}-{rates['high'] / 1e3:.0f})"


def _per_cpu(case: dict[str, Any], name: str) -> str:
    return f"{case['rows_per_second'][name]['per_cpu_second'] / 1e3:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the stores go for the time being (4 GB free)")
    parser.add_argument("--only", help="a case alone, as in 'float16,256'; nothing is written")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "seed": SEED, "rows": PROMPTS * POSITIONS, "d_in": D_IN, "pool_rows": POOL_ROWS, "cases": [],
    }  # fmt: skip
    stores: list[tuple[Encoding, int]] = [
        ("float16", 256), ("bfloat16", 256), ("uint8", 256), ("float16", 512), ("float16", 1024),
    ]  # fmt: skip
    began = time.time()
    for encoding, chunk_rows in stores:
        if options.only in {None, f"{encoding},{chunk_rows}"}:
            run_store(encoding, chunk_rows, options.rounds, options.folder, figures)
            figures["seconds"] = time.time() - began
        if options.only is None:
            say(str(write_results("reading", figures)))


def run_store(encoding: Encoding, chunk_rows: int, rounds: int, folder: Path | None, figures: dict[str, Any]) -> None:
    """Writes one store, measures all that is to be measured on it, and removes it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        if shutil.disk_usage(name).free < 6 * 2**30:
            raise RuntimeError(f"less than 6 GiB are free in {name}")
        layout = write_store(Path(name), encoding, chunk_rows)
        check_equal(Case(Path(name), layout, 2))
        with_ours_float32(Case(Path(name), layout, 2))  # loads compiled code
        readers = list(READERS) if encoding == "float16" else ["pread", "numpy", *OURS]
        for threads in (1, 2):
            for state, epochs in (("cold", 1), ("warm", WARM_EPOCHS)):
                case = Case(Path(name), layout, threads, epochs)
                figures["cases"].append(measure(case, readers, state, rounds))
        if (encoding, chunk_rows) == ("float16", 256):
            figures["parts"] = measure_parts()
            figures["ranks"] = measure_ranks(Case(Path(name), layout, 2))
            figures["bytes_per_row"] = layout.bytes / layout.n_rows


if __name__ == "__main__":
    main()
