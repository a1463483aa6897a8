import os
from pathlib import Path

import pytest

from bench.machine import Runs, drop_from_cache, interleave, resident_pages


def resident(path: Path) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return resident_pages(descriptor).mean()
    finally:
        os.close(descriptor)


def test_a_file_just_written_is_in_memory_until_it_is_dropped(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert resident(path) == 1
    drop_from_cache([path])
    assert resident(path) == 0


def test_a_file_that_stays_in_memory_is_no_cold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    monkeypatch.setattr("os.posix_fadvise", lambda *_: None)
    with pytest.raises(RuntimeError, match="256 of 256 pages stayed"):
        drop_from_cache([path])


def test_every_thing_runs_once_a_round_each_time_prepared():
    calls: list[str] = []
    things = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = interleave(things, 3, lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-c" + "-b-c-a" + "-c-a-b"
    assert {name: len(runs.seconds) for name, runs in found.runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_rates_and_ratios_are_medians_over_the_rounds():
    found = interleave({"a": lambda: None, "b": lambda: None}, 1)
    found.runs = {"a": Runs([1, 2, 4], [2, 2, 8]), "b": Runs([2, 2, 12], [1, 1, 1])}
    assert found.runs["a"].rates(8) == {"median": 4, "low": 2, "high": 8, "per_cpu_second": 4}
    assert found.ratio("a", "b") == 2
