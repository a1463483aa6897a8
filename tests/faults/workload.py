"""What storage does in a team's day, in a process without torch: make, tag, extend, push to a folder, pull from there.

``python -m tests.faults.workload ROOT [BYTES]`` does it, whatever an earlier process left, and prints what it made. It
meets every operation of storage/atomic.py.
"""

import mmap
import os
import signal
import sys
import time
from pathlib import Path

from storage import atomic, transfers
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.borrowing import Borrowing
from storage.errors import SparsemillError, naming
from storage.manifest import MANIFEST_NAME
from storage.remote import RemoteStore
from storage.transfers import fetch, missing_files, plan_push, push
from tests.faults.trees import tree
from tests.unit.storage.processes import make_simple

SPEC = Spec("harvest", 1, {"seed": 1})
LONGER = Spec("train", 1, {"seed": 1})
FILE_BYTES = 1000
AHEAD_NS = 4_102_444_800 * 10**9
"""The beginning of the year 2100: where a clock was before it was set back."""


def make(root: Path, file_bytes: int = FILE_BYTES) -> Artifact:
    """Two units of two files each, and one file beside them."""

    def produce(staging: Staging) -> Result:
        for unit in ("w0", "w1"):
            if unit not in staging.finished:
                names = [f"{unit}/data", f"{unit}/more"]
                for name in names:
                    staging.write_bytes(name, (name.encode() * (file_bytes // len(name) + 1))[:file_bytes])
                staging.finish(unit, names, {"rows": 5})
        staging.write_json("summary.json", {"units": 2})
        return Result({"units": 2})

    return ArtifactStore(root).make(SPEC, produce, provenance={"device": "cpu"}).artifact


def make_longer(root: Path, file_bytes: int = FILE_BYTES) -> Artifact:
    """Another, which takes both units over from the first, and has one more, of a file past the page cache."""
    store = ArtifactStore(root)
    shorter = store.open(SPEC.id)
    with naming(shorter.folder / MANIFEST_NAME):
        os.utime(shorter.folder / MANIFEST_NAME, ns=(AHEAD_NS, AHEAD_NS))

    def produce(staging: Staging) -> Result:
        for unit in ("w0", "w1"):
            if unit not in staging.finished:
                assert staging.adopt(unit, [f"{unit}/data", f"{unit}/more"], shorter)
        if "w2" not in staging.finished:
            image = mmap.mmap(-1, -(-file_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            image.write((b"w2/data" * file_bytes)[:file_bytes])
            atomic.write_aligned(staging.path("w2/data"), memoryview(image), file_bytes)
            staging.finish("w2", ["w2/data"])
        return Result({"units": 3})

    return store.make(LONGER, produce, provenance={"device": "cpu"}).artifact


def pull(artifact_id: str, remote: RemoteStore, root: Path) -> Artifact:
    """An artifact of a remote, in a store here."""
    store = ArtifactStore(root)
    found = Borrowing(remote, root).find(artifact_id)
    assert found is not None
    with store.lock(found.id):
        if not store.has(found):
            fetch(found, missing_files(found), remote)
            store.adopt(found)
    return store.open(artifact_id)


def everything(root: Path, file_bytes: int = FILE_BYTES) -> str:
    """The whole day; returns the sha256 of the manifest that was made, pushed and pulled."""
    transfers._SETTLING_SECONDS = 0  # nobody else pushes  # pyright: ignore[reportPrivateUsage]
    transfers.FILES_AT_ONCE = 1  # so that the n-th change of the disk is the same in every run
    made = make(root / "mine", file_bytes)
    ArtifactStore(root / "mine").tag("good", made)
    make_longer(root / "mine", file_bytes)
    (root / "remote").mkdir(exist_ok=True)
    remote = RemoteStore((root / "remote").as_uri())
    push(plan_push(made, remote), remote)
    pulled = pull(made.id, remote, root / "theirs")
    assert pulled.manifest_sha256 == made.manifest_sha256
    return made.manifest_sha256


def outcome(root: Path) -> dict[str, str]:
    """sha256 of all files that must be alike after any history: not clocks, nor what a killed process was writing."""
    found = tree(root)
    left = ("run.json", ".tmp", ".staging/", ".pulled/", "#")
    return {name: digest for name, digest in found.items() if not any(part in name for part in left)}


def make_slowly(root: Path, computed: Path) -> None:
    """Makes an artifact, so slowly that others arrive meanwhile; each computing of a unit adds to ``computed``."""
    atomic.set_fault_hook(lambda *_: time.sleep(0.002))
    make_simple(root, computed)


def everything_and_die(root: Path, number: int) -> None:
    """As :func:`everything`, killed just before the ``number``-th change of the disk."""
    os.fsync = int  # costs nothing: a killed process loses nothing that it wrote
    left = [number]

    def hook(operation: str, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.set_fault_hook(hook)
    everything(root)


if __name__ == "__main__":
    try:
        print(everything(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else FILE_BYTES))
    except (SparsemillError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
