"""What child processes run in tests; imports neither pytest nor torch, so that children start at once."""

import os
import signal
import time
from pathlib import Path
from typing import Protocol

from storage import atomic
from storage.artifacts import ArtifactStore, Made, Result, Spec, Staging
from storage.shards import GROUP_NAME, Layout, WindowBuffer, create_group
from tests.unit.storage.stores import activations

SPEC = Spec("harvest", 1, {"seed": 1})
LAYOUT = Layout(
    n_windows=4, window_prompts=8, positions=3, d_in=4, chunk_rows=4, encoding="float16", seed=2, n_prompts=40
)


class Reports(Protocol):
    """The end of a pipe or queue that a child tells its result to."""

    def put(self, item: tuple[str, str]) -> None: ...


def make_simple(root: Path, computed: Path | None = None) -> Made:
    """An artifact of two units; each computation of a unit appends a line to ``computed``."""

    def produce(staging: Staging) -> Result:
        for unit in ("w0", "w1"):
            if unit not in staging.finished:
                if computed is not None:
                    atomic.append_durably(computed, f"{os.getpid()} {unit}\n".encode())
                names = [f"{unit}/data", f"{unit}/more"]
                for name in names:
                    staging.write_bytes(name, name.encode() * 50)
                staging.finish(unit, names, {"rows": 5})
        staging.write_bytes("scratch", b"x")
        staging.discard("scratch")
        staging.write_json("summary.json", {"units": len(staging.finished)})
        return Result({"units": len(staging.finished)})

    return ArtifactStore(root).make(SPEC, produce, provenance={"device": "cpu"})


def make_and_report(root: Path, computed: Path, reports: Reports) -> None:
    """Makes the simple artifact slowly enough for others to arrive, and reports status and manifest."""

    def slow(operation: str, path: Path) -> None:
        time.sleep(0.002)

    atomic.set_fault_hook(slow)
    try:
        made = make_simple(root, computed)
        reports.put((made.status, made.artifact.manifest_sha256))
    except Exception as error:  # noqa: BLE001  (the parent waits for a report)
        reports.put(("error", repr(error)))


def make_and_die(root: Path, number: int) -> None:
    """Makes the simple artifact, and is killed just before the ``number``-th change of the disk."""
    os.fsync = int  # costs nothing: a killed process loses nothing that it wrote
    left = [number]

    def hook(operation: str, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.set_fault_hook(hook)
    make_simple(root)


def harvest(root: Path, seconds_a_window: float = 0.0, windows_done: Path | None = None) -> Made:
    """An activation store of four windows, a unit each; each finished window appends a line to ``windows_done``."""

    def produce(staging: Staging) -> Result:
        values = activations(LAYOUT)[:, 1:]
        for window in range(LAYOUT.n_windows):
            unit = f"window-{window}"
            if unit in staging.finished:
                continue
            buffer = WindowBuffer(LAYOUT, window)
            buffer.add(0, values[buffer.prompts])
            names = buffer.write(staging.folder)
            time.sleep(seconds_a_window)
            staging.finish(unit, names, {"rows": LAYOUT.window_rows})
            if windows_done is not None:
                atomic.append_durably(windows_done, f"{unit}\n".encode())
        create_group(staging.folder, LAYOUT)
        return Result({"rows": LAYOUT.n_rows, "group": GROUP_NAME})

    return ArtifactStore(root).make(SPEC, produce, provenance={"device": "cpu"})


if __name__ == "__main__":
    import sys

    harvest(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
