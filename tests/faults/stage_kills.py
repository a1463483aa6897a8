"""Stops each stage's command at random times, finishes it, and compares with a run that nothing disturbed.

``python -m tests.faults.stage_kills PRESET FOLDER ROUNDS [NAME=VALUE...]``: in a round a stage gets a SIGKILL, a
SIGTERM and a Ctrl-C, each while it works on what the one before left, and then ends. Prints by stage what it survived.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from storage.artifacts import ArtifactStore
from tests.faults.children import commands, finish, start
from tests.faults.trees import tree

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
PRIVATE = ("/.locks/", "/.staging/", "/.pulled/", "run.json", ".tmp", "#")


def outcome(folder: Path) -> dict[str, str]:
    """sha256 of all files of stores and of a remote that must be alike after any history."""
    for home in ("home", "theirs"):
        store = ArtifactStore(folder / home)
        assert all(store.verify(artifact) == [] for artifact in store.list())
    return {name: digest for name, digest in tree(folder).items() if not any(part in name for part in PRIVATE)}


def stopped(arguments: list[str], how: signal.Signals, seconds: float, log: Path) -> bool:
    """Starts a command and sends its process group a signal; whether it was still running then."""
    pid = start(arguments, log)
    time.sleep(seconds)
    os.killpg(pid, how)
    code = finish(pid)
    said = log.read_text()
    assert code in {0, CODES[how]}, (how, code, said)
    assert "Traceback" not in said, (how, said)
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return code != 0
    raise AssertionError(f"{arguments} left orphans after {how}")


def sweep(stage: str, preset: str, settings: list[str], before: Path, scratch: Path, rounds: int) -> Path:
    """Stops one stage so often in each way; returns the folder of the undisturbed run, where the next goes on."""

    def command(folder: Path) -> list[str]:
        found = commands(preset, settings, folder / "home", folder / "remote", folder / "theirs")[stage]
        return [report_of(folder) if word == "latest" else word for word in found]

    def ended(folder: Path) -> float:
        began = time.monotonic()
        code = finish(start(command(folder), scratch / "log"))
        assert code == 0, (stage, code, (scratch / "log").read_text())
        return time.monotonic() - began

    whole, folder = scratch / f"{stage}-whole", scratch / "stopped"
    shutil.copytree(before, whole)
    seconds = ended(whole)
    expected = outcome(whole)
    rng, survived = random.Random(stage), Counter[str]()
    while min(survived[how.name] for how in CODES) < rounds:
        shutil.copytree(before, folder)
        for how in CODES:
            if survived[how.name] < rounds:
                survived[how.name] += stopped(command(folder), how, rng.uniform(0.05, 0.7) * seconds, scratch / "log")
        ended(folder)
        found = outcome(folder)
        assert found == expected, (stage, sorted(set(found.items()) ^ set(expected.items())))
        shutil.rmtree(folder)
    print(stage, *(survived[how.name] for how in CODES), f"{seconds:.1f}", flush=True)
    return whole


def report_of(folder: Path) -> str:
    """The id of the one report."""
    (report,) = (path.name for path in (folder / "home" / "report").iterdir())
    return report


def main() -> None:
    preset, scratch, rounds, *settings = sys.argv[1:]
    before = Path(scratch) / "empty"
    for name in ("home", "remote", "theirs"):
        (before / name).mkdir(parents=True)
    for stage in commands(preset, settings, before, before, before):
        before = sweep(stage, preset, settings, before, Path(scratch), int(rounds))


if __name__ == "__main__":
    main()
