"""Shuffled reading from other programs' files: ``python -m bench.formats``.

The rows of ``bench.reading``'s store (float16, chunks of 256), once more as Hugging Face ``datasets`` keeps them, in
Arrow files, and in safetensors files; read once in random order, in batches of 4,096, on the same number of threads:

- *ours*: batches as stored, handed to another thread, with checksums, prompts and positions; as in ``bench.reading``;
- *pread*, *numpy*: our files by ``bench.reading``'s plain ways: the chunks alone into one buffer, without batches; and
  the least that gives checked and shuffled batches;
- *safetensors*: 256 rows a slice of a file of 4,096, through the plain shuffling pool of ``bench.reading``;
- *Arrow, 256 rows an example*: the same loop around ``dataset[i]``;
- *Arrow, a row an example*: ``dataset[indices]`` of 4,096 random rows: no pool, an exact shuffle. On one thread, as
  ``datasets`` has it.

Ours and *numpy* check what they read, the others do not. Arrow and safetensors files are mapped into memory: a page is
read when a row of it is touched. Writes ``bench/results/formats.json``.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Array2D, Dataset, Features, concatenate_datasets
from safetensors import safe_open
from safetensors.numpy import save_file

from bench.machine import drop_from_cache, interleave, say, write_results
from bench.reading import (
    BATCH_ROWS,
    D_IN,
    Case,
    check_equal,
    read_pooled,
    stored_batches,
    with_numpy,
    with_ours,
    with_ours_float32,
    with_pread,
    write_store,
)
from bench.tables import markdown

OURS, PREAD, NUMPY = "ours", "pread", "numpy"
TENSORS, CHUNKS, SINGLE = "safetensors", "Arrow, 256 rows an example", "Arrow, a row an example"
CHUNK_ROWS = 256


def write_others(case: Case, folder: Path) -> dict[str, list[Path]]:
    """Files of the store's rows, by reader: safetensors of 4,096 rows, Arrow of chunks, Arrow of rows."""

    def by_chunk() -> Iterator[dict[str, npt.NDArray[np.generic]]]:
        for batch in stored_batches(case):
            for chunk in batch.reshape(-1, CHUNK_ROWS, D_IN):
                yield {"rows": chunk}

    say("writing Arrow and safetensors files")
    features = Features({"rows": Array2D((CHUNK_ROWS, D_IN), "float16")})
    chunks = Dataset.from_generator(by_chunk, features=features, cache_dir=str(folder / "chunks"))
    kind = pa.list_(pa.float16(), D_IN)
    tensors: list[Path] = []
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"rows": kind})) as out:
        for number, batch in enumerate(stored_batches(case)):
            rows = pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), D_IN)
            out.write_batch(pa.record_batch({"rows": rows}))
            tensors.append(folder / f"{number}.safetensors")
            save_file({"rows": batch}, tensors[-1])
    return {
        TENSORS: tensors,
        CHUNKS: [Path(one["filename"]) for one in chunks.cache_files],
        SINGLE: [folder / "rows.arrow"],
    }


def readers(case: Case, files: Mapping[str, list[Path]]) -> dict[str, Callable[[], None]]:
    """Each opens its files anew: what is mapped cannot leave the page cache."""

    def arrow(name: str) -> Dataset:
        return concatenate_datasets([Dataset.from_file(str(path)) for path in files[name]]).with_format("numpy")

    def from_tensors() -> None:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, framework="numpy")) for path in files[TENSORS]]

            def read(chunk: int, out: npt.NDArray[np.generic]) -> None:
                file, inner = divmod(chunk, BATCH_ROWS // CHUNK_ROWS)
                out[:] = opened[file].get_slice("rows")[inner * CHUNK_ROWS : (inner + 1) * CHUNK_ROWS]

            read_pooled(case, read)

    def from_chunks() -> None:
        data = arrow(CHUNKS)

        def read(chunk: int, out: npt.NDArray[np.generic]) -> None:
            out[:] = data[chunk]["rows"]

        read_pooled(case, read)

    def from_rows() -> None:
        data, order = arrow(SINGLE), np.random.default_rng(1).permutation(case.layout.n_rows)
        for first in range(0, len(order), BATCH_ROWS):
            if data[order[first : first + BATCH_ROWS]]["rows"].shape != (BATCH_ROWS, D_IN):
                raise RuntimeError("not a batch of rows")

    return {
        OURS: lambda: with_ours(case), PREAD: lambda: with_pread(case), NUMPY: lambda: with_numpy(case),
        TENSORS: from_tensors, CHUNKS: from_chunks, SINGLE: from_rows,
    }  # fmt: skip


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    case = Case(folder, write_store(folder, "float16", CHUNK_ROWS), threads)
    check_equal(case)
    with_ours_float32(case)  # loads compiled code
    others = write_others(case, folder)
    things = readers(case, others)
    files = [*case.files, *(path for paths in others.values() for path in paths)]
    found: dict[str, Any] = {}
    for state, before in (("cold", lambda: drop_from_cache(files)), ("warm", lambda: None)):
        if state == "warm":
            for read in things.values():
                read()
        say(state)
        timed = interleave(things, rounds, before)
        found[state] = {
            "rows_per_second": {name: runs.rates(case.layout.n_rows) for name, runs in timed.runs.items()},
            "ratios": {name: timed.ratio(OURS, name) for name in things if name != OURS}, "load": timed.load,
        }  # fmt: skip
    return found


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    rows = [
        [name]
        + [
            text
            for state in ("cold", "warm")
            for rates in [figures["states"][state]["rows_per_second"][name]]
            for text in (
                f"{rates['median'] / 1e3:,.0f} ({rates['low'] / 1e3:,.0f}-{rates['high'] / 1e3:,.0f})",
                "" if name == OURS else f"{figures['states'][state]['ratios'][name]:.1f} x",
            )
        ]
        for name in figures["states"]["cold"]["rows_per_second"]
    ]
    machine = figures["machine"]
    loads = [load for state in figures["states"].values() for load in state["load"]]
    return {
        "rates": markdown(["thousand rows a second", "cold", "ours is faster by", "warm", "ours is faster by"], rows),
        "machine": (
            f"{machine['cpu']}, {figures['threads']} threads; "
            + ", ".join(f"{name} {version}" for name, version in figures["libraries"].items())
            + f". Medians of {figures['rounds']} rounds; load average {min(loads):.1f} to {max(loads):.1f}."
        ),
    }


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files go for the time being (9 GB free)")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        states = measure(Path(folder), options.threads, options.rounds)
    figures = {
        "threads": options.threads, "rounds": options.rounds, "seed": 1, "states": states,
        "libraries": {name: version(name) for name in ("datasets", "pyarrow", "safetensors")},
    }  # fmt: skip
    print(json.dumps(figures) if options.no_write else write_results("formats", figures))


if __name__ == "__main__":
    main()
