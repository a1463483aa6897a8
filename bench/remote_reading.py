"""Reading straight from a remote, beside obstore's own parallel reads: ``python -m bench.remote_reading``.

A store of about 250 MB in a real S3 server on loopback (OpenStack Swift, which shares the machine's cores with what is
measured), of gelu-1l's width and of the demo's.

- *files*: obstore reads all shards of activations whole, sixteen at a time: what the server and obstore can do.
- *chunks*: obstore reads the ranges of all chunks, in random order, thirty-two at a time: what they can do if rows are
  to come shuffled, chunk by chunk.
- *in order*: our reader, all rows in the order of the store; to be compared with *files*.
- *shuffled*: our reader, one epoch of shuffled batches; to be compared with *chunks*.
- *kept*: as *shuffled*, a second time, from the chunks that were kept on this disk.

Ours check each chunk's crc32c twice over, shuffle, and cast to float32. The reader's cache is empty before each run and
takes all; the small arrays (1 % of the bytes) count to ours. Writes ``bench/results/remote_reading.json``; needs the
extra ``dev`` and 2 GB of free disk.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import obstore

from bench.machine import interleave, say, write_results
from bench.tables import markdown
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.order import BatchOrder
from storage.reader import ShardReader
from storage.remote import RemoteStore, file_key
from storage.shards import Layout, WindowBuffer, create_group
from storage.transfers import plan_push, push
from tests.integration.s3 import BUCKET, S3Server

GELU_1L = Layout(
    n_windows=1, window_prompts=1024, positions=60, d_in=2048, chunk_rows=256, encoding="float16", seed=0,
    n_prompts=4096,
)  # fmt: skip
LAYOUTS = {"d_in 2048": GELU_1L, "d_in 512": replace(GELU_1L, d_in=512, window_prompts=2048, positions=120)}
ORDER = BatchOrder(seed=0, batch_rows=4096, pool_rows=16_384)
READERS = ("files", "chunks", "in order", "shuffled", "kept")


def make_store(root: Path, layout: Layout) -> Artifact:
    def produce(staging: Staging) -> Result:
        create_group(staging.folder, layout)
        buffer = WindowBuffer(layout, 0)
        rng = np.random.default_rng(0)
        for first in range(0, layout.window_prompts, 64):
            buffer.add(first, rng.standard_normal((64, layout.positions, layout.d_in), np.float32))
        buffer.write(staging.folder)
        return Result({})

    return ArtifactStore(root).make(Spec("harvest", 1, {"d_in": layout.d_in}), produce, provenance={}).artifact


class Case:
    """A store in the server, and the ways to read all of its activations."""

    def __init__(self, artifact: Artifact, layout: Layout, server: S3Server, folder: Path):
        self._artifact = artifact
        self._client = server.client()
        self._array = layout.arrays()["activations"]
        self._reference = f"s3://{BUCKET}/bench/harvest/{artifact.id}"
        self._root = folder / "reader"
        self.bytes = self._array.n_shards * self._array.shard_bytes

    def runs(self) -> dict[str, Callable[[], object]]:
        return dict(zip(READERS, (self.files, self.chunks, self.in_order, self.shuffled, self.kept), strict=True))

    def files(self) -> None:
        keys = [self._key(shard) for shard in range(self._array.n_shards)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: len(obstore.get(self._client, key).bytes()), keys))

    def chunks(self) -> None:
        stride = self._array.chunk_bytes + 4
        wanted = [(s, c * stride) for s in range(self._array.n_shards) for c in range(self._array.chunks_per_shard)]
        random.Random(0).shuffle(wanted)
        with ThreadPoolExecutor(32) as pool:
            read = partial(obstore.get_range, self._client, length=stride)
            list(pool.map(lambda one: read(self._key(one[0]), start=one[1]), wanted))

    def in_order(self) -> None:
        with self._fresh().sequential(4096) as batches:
            for _ in batches:
                pass

    def shuffled(self) -> None:
        self._epoch(self._fresh())

    def kept(self) -> None:
        self._epoch(self._reader())

    def _epoch(self, reader: ShardReader) -> None:
        with reader.epoch(ORDER) as batches:
            for _ in batches:
                pass

    def _fresh(self) -> ShardReader:
        shutil.rmtree(self._root, ignore_errors=True)
        return self._reader()

    def _reader(self) -> ShardReader:
        return ShardReader.of(ArtifactStore(self._root).resolve(self._reference))

    def _key(self, shard: int) -> str:
        return "bench/" + file_key(self._artifact, f"store.zarr/{self._array.shard_name(shard)}")


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The blocks of docs/sharing.md."""

    def rate(case: dict[str, Any], name: str) -> str:
        found = case["mb_per_second"][name]
        return f"{found['median']:.0f} ({found['low']:.0f}-{found['high']:.0f})"

    def share(case: dict[str, Any], ours: str, theirs: str) -> str:
        rates = case["mb_per_second"]
        return f"{rates[ours]['median'] / rates[theirs]['median']:.0%}"

    machine, cases = figures["machine"], figures["cases"]
    loads = [load for case in cases for load in case["load"]]
    return {
        "rates": markdown(
            ["MB/s", *READERS, "in order / files", "shuffled / chunks"],
            ([case["name"], *(rate(case, name) for name in READERS), share(case, "in order", "files"),
              share(case, "shuffled", "chunks")] for case in cases),
        ),
        "machine": (
            f"{machine['cpu']}, {machine['cores']} cores shared with the server; medians (least and greatest) of "
            f"{cases[0]['rounds']} rounds; load average {min(loads):.1f} to {max(loads):.1f}."
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store and the server's files go for the time being")
    parser.add_argument("--dry", action="store_true", help="measure, and write no results")
    options = parser.parse_args()
    figures: dict[str, Any] = {"seed": 0, "cases": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        server = S3Server(Path(name) / "s3")
        os.environ |= server.environment
        server.start()
        try:
            for label, layout in LAYOUTS.items():
                artifact = make_store(Path(name) / "store", layout)
                remote = RemoteStore(f"s3://{BUCKET}/bench")
                push(plan_push(artifact, remote), remote)
                case = Case(artifact, layout, server, Path(name))
                case.shuffled()  # loads compiled code
                rounds = interleave(case.runs(), options.rounds)
                rates = {reader: rounds.runs[reader].rates(case.bytes / 1e6) for reader in READERS}
                figures["cases"].append(
                    {"name": label, "bytes": case.bytes, "rounds": options.rounds, "load": rounds.load,
                     "mb_per_second": rates}
                )  # fmt: skip
                say(f"{label}: " + ", ".join(f"{reader} {rates[reader]['median']:.0f} MB/s" for reader in READERS))
        finally:
            server.kill()
    if not options.dry:
        say(str(write_results("remote_reading", figures)))


if __name__ == "__main__":
    main()
