"""A clock that jumps: what is made, found, resumed and called the latest does not depend on it."""

import ast
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest

from storage import artifacts
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.housekeeping import plan_pruning
from tests.faults.workload import everything, make, outcome

ROOT = Path(__file__).parents[2]
CENTURY = 100 * 365 * 86400
READS_THE_CLOCK = {
    ("storage/artifacts.py", "_stage_and_commit"): "run.json, which nothing reads back",
    ("storage/artifacts.py", "adopt"): "run.json, which nothing reads back",
    ("storage/references.py", "committed"): "the order of commits, which _publish keeps whatever the clock says",
    ("storage/artifacts.py", "_publish"): "keeps that order",
    ("storage/chunk_cache.py", "_make_room"): "which cached chunks go first; any may",
    ("storage/housekeeping.py", "_age_days"): "ages in days, which is what was asked for; shown before anything goes",
    ("flows/local.py", "running"): "which process a number is; stop() finds them by a mark in their environment too",
    ("flows/local.py", "start"): "puts that on record",
}
"""Where wall clock or a file's time is read, and why nothing else hangs on it."""


def jumping(monkeypatch: pytest.MonkeyPatch, by: Callable[[int], float]) -> None:
    """Lets each look at the clock, and each file's time, be that far from the truth."""
    looks, real = [0], time.time

    def now() -> float:
        looks[0] += 1
        return max(0.0, real() + by(looks[0]))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # noqa: ARG003 - its name there
            return datetime.fromtimestamp(now(), UTC)

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(artifacts, "datetime", Clock)
    write = artifacts.atomic.replace_file

    def replace_file(path: Path, data: artifacts.atomic.Data) -> None:
        write(path, data)
        os.utime(path, (now(), now()))

    monkeypatch.setattr(artifacts.atomic, "replace_file", replace_file)


JUMPS = [
    pytest.param(lambda look: CENTURY if look % 2 else 0, id="there and back"),
    pytest.param(lambda look: -3600 * look, id="back and back"),
    pytest.param(lambda _: -2 * CENTURY, id="at the beginning of time"),
    pytest.param(lambda _: CENTURY, id="ahead"),
]


@pytest.mark.parametrize("by", JUMPS)
def test_the_same_is_made_found_pushed_and_pulled_whatever_the_clock_says(
    by: Callable[[int], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    everything(tmp_path / "clean")
    jumping(monkeypatch, by)
    everything(tmp_path / "jumping")
    assert outcome(tmp_path / "jumping") == outcome(tmp_path / "clean")
    everything(tmp_path / "jumping")
    assert outcome(tmp_path / "jumping") == outcome(tmp_path / "clean")


def one(seed: int, store: ArtifactStore) -> str:
    def produce(staging: Staging) -> Result:
        staging.write_bytes("data", b"x")
        return Result({})

    return store.make(Spec("harvest", 1, {"seed": seed}), produce, provenance={}).artifact.id


@pytest.mark.parametrize("by", JUMPS)
def test_the_latest_is_the_one_committed_last(
    by: Callable[[int], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    jumping(monkeypatch, by)
    store = ArtifactStore(tmp_path)
    ids = []
    for seed in range(6):
        ids.append(one(seed, store))
        assert store.resolve("latest").id == ids[-1]
    assert store.ids() == ids[::-1]


def test_an_interrupted_run_is_continued_whatever_its_files_times_say(tmp_path: Path):
    clean = make(tmp_path / "clean")
    stop = mock.patch.object(Staging, "write_json", side_effect=KeyboardInterrupt)
    for when in (0, time.time() + CENTURY):
        root = tmp_path / str(when)
        with stop, pytest.raises(KeyboardInterrupt):
            make(root)
        for path in root.rglob("*"):
            os.utime(path, (when, when))
        written = [path.stat().st_ino for path in sorted(root.rglob("w?/*"))]
        made = make(root)
        assert made.manifest_sha256 == clean.manifest_sha256
        assert [path.stat().st_ino for path in sorted(root.rglob("w?/*"))] == written  # nothing was made again


def test_what_is_worked_on_or_tagged_is_never_pruned_however_far_the_clock_has_jumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = ArtifactStore(tmp_path)
    kept = store.resolve(one(0, store))
    store.tag("good", kept)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + CENTURY)
    assert plan_pruning(store, older_than_days=30) == []
    monkeypatch.setattr(time, "time", lambda: real() - CENTURY)
    one(1, store)
    assert plan_pruning(store, older_than_days=30) == []  # from the future is young


CLOCKS = {
    *(f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime")),
    *(f"time.clock_gettime{ending}" for ending in ("", "_ns")),
    *(f"datetime.{name}" for name in ("datetime.now", "datetime.today", "datetime.utcnow", "date.today")),
    *(f"os.path.get{kind}time" for kind in "mca"),
}
TIMES = re.compile("(st_([mca]|birth)time.*|create_time)")
"""Of files, and of processes."""


def test_no_other_place_reads_the_wall_clock_or_a_files_time():
    found: set[tuple[str, str]] = set()
    for folder in ("storage", "pipeline", "sae", "flows"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found |= {(path.relative_to(ROOT).as_posix(), place) for place in reads_of_time(path.read_text())}
    assert found == READS_THE_CLOCK.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import time\nSTART = time.time()",
        "from time import time\nSTART = time()",
        "from time import time_ns as now\nSTART = now()",
        "import time as t\nclock = t.time",
        "import os\nSTART = os.path.getmtime('.')",
        "from os.path import getmtime\nSTART = getmtime('.')",
        "from os import path\nSTART = path.getmtime('.')",
        "import os.path as p\nSTART = p.getmtime('.')",
        "import datetime\nSTART = datetime.datetime.now()",
        "from datetime import datetime as dt\nSTART = dt.now()",
        "from datetime import date\nSTART = date.today()",
        "import os\nclass A:\n    start = os.stat('.').st_mtime_ns",
    ],
)
def test_a_read_of_the_clock_is_seen_however_it_is_written(source: str):
    assert reads_of_time(source) == {"<module>"}
    within = "\n".join(f"    {line}" for line in source.splitlines())
    assert reads_of_time(f"def one():\n{within}") == {"one"}


def reads_of_time(source: str) -> set[str]:
    """Names of the functions that read a wall clock or a file's time; ``<module>`` for what stands in none."""
    tree = ast.parse(source)
    meant: dict[str, str] = {}  # by a name in the module, what was imported as it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                top = one.name.partition(".")[0]
                meant[one.asname or top] = one.name if one.asname else top
        elif isinstance(node, ast.ImportFrom):
            meant |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}

    def is_read(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and TIMES.fullmatch(node.attr):
            return True
        if not isinstance(node, ast.Attribute | ast.Name):
            return False
        first, dot, rest = ast.unparse(node).partition(".")
        return meant.get(first, "") + dot + rest in CLOCKS

    def places(node: ast.AST, place: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = node.name
        if is_read(node):
            yield place
        for child in ast.iter_child_nodes(node):
            yield from places(child, place)

    return set(places(tree, "<module>"))
