"""What all benchmarks share: the machine, files dropped from the page cache, interleaved rounds, results as JSON.

Things to compare are run in turn, round after round, so that whatever else the machine does meets them all; a figure is
the median of its rounds, and stands with the least and the greatest and with the load average before and after. Wall
time is what one waits; the processor time of the whole process, kernel included, is what is taken from a trainer beside
it, and changes less when the machine is busy.
"""

import json
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from ctypes import CDLL, c_size_t, c_void_p, get_errno
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "numba", "torch", "google-crc32c", "zarr", "zarrs", "tensorstore", "transformer_lens")


def describe() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    return {
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_set": np.show_config(mode="dicts")["SIMD Extensions"]["found"],  # pyright: ignore[reportArgumentType, reportCallIssue, reportOptionalSubscript]
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


@dataclass
class Runs:
    """What the runs of one thing took.

    Attributes:
        seconds: wall time of each.
        cpu_seconds: processor time of the process, all its threads and the kernel's work for it.
    """

    seconds: list[float]
    cpu_seconds: list[float]

    def rates(self, amount: float) -> dict[str, float]:
        """Amount a second: median, least and greatest; and the median amount a second of processor time."""
        rates = [amount / seconds for seconds in self.seconds]
        return {
            "median": statistics.median(rates),
            "low": min(rates),
            "high": max(rates),
            "per_cpu_second": amount / statistics.median(self.cpu_seconds),
        }


@dataclass
class Rounds:
    """Rounds of several things in turn.

    Attributes:
        runs: of each thing, by name.
        load: the load average over a minute, before the first round and after the last.
    """

    runs: dict[str, Runs]
    load: tuple[float, float]

    def ratio(self, one: str, other: str) -> float:
        """Median over the rounds of how many times as fast as ``other`` the thing ``one`` was."""
        pairs = zip(self.runs[one].seconds, self.runs[other].seconds, strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)


def interleave(
    things: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> Rounds:
    """Runs each thing once a round.

    Args:
        things: by name.
        rounds: how many are counted.
        before: called before each run and not counted: drops caches, or warms them.
    """
    runs = {name: Runs([], []) for name in things}
    load = os.getloadavg()[0]
    for number in range(rounds):
        names = list(things)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before()
            wall, cpu = time.perf_counter(), time.process_time()
            things[name]()
            runs[name].seconds.append(time.perf_counter() - wall)
            runs[name].cpu_seconds.append(time.process_time() - cpu)
    return Rounds(runs, (load, os.getloadavg()[0]))


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Makes files cold: durable, then out of the page cache.

    Raises:
        RuntimeError: more than a hundredth of their pages stayed, so that a "cold" figure would be none. (What the disk
            or a hypervisor keeps in memory of its own cannot be seen from here.)
    """
    kept, pages = 0, 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            resident = resident_pages(descriptor)
            kept, pages = kept + int(resident.sum()), pages + len(resident)
        finally:
            os.close(descriptor)
    if kept > pages / 100:
        raise RuntimeError(f"{kept} of {pages} pages stayed in the page cache")


def resident_pages(descriptor: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pages of an open file are in the page cache, by ``mincore``."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return np.empty(0, np.bool_)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        state = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        mincore = CDLL(None, use_errno=True).mincore
        mincore.argtypes = [c_void_p, c_size_t, c_void_p]
        failed = mincore(view.ctypes.data, size, state.ctypes.data)
        del view  # or the mapping could not be closed
    if failed:
        raise OSError(get_errno(), "mincore")
    return (state & 1).astype(np.bool_)


def write_results(name: str, figures: Mapping[str, object]) -> Path:
    """Writes ``bench/results/<name>.json``, the machine first."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    return path


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
