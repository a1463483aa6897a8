"""The whole command line under random faults: some seconds here, an hour in the long form, or as long as is asked for.

``SPARSEMILL_SOAK_SECONDS`` is how long, ``SPARSEMILL_SOAK_SEED`` which; tests/faults/soak says what is done.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

from pipeline.cli import app
from tests.faults.lengths import LONG
from tests.faults.soak.actions import ACTIONS

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"report images"}
"""Draws in a browser, whose processes a killed command would leave."""


def test_random_commands_with_random_faults_lose_nothing_and_believe_nothing_wrong(tiny_preset: Path, tmp_path: Path):
    seconds = os.environ.get("SPARSEMILL_SOAK_SECONDS", "3600" if LONG else "12")
    seed = os.environ.get("SPARSEMILL_SOAK_SEED", "1")
    command = [sys.executable, "-m", "tests.faults.soak", str(tiny_preset), str(tmp_path / "soak")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", seconds, "--seed", seed], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    counts = Counter(json.loads(done.stdout.splitlines()[-1]))
    assert all(counts[action.__name__] > 0 for action in ACTIONS)
    assert counts["artifacts hashed"] > 20
    ways = ("ran",) if LONG else ("ran", "prepared")
    ran = {name for name in _commands(app) if any(counts[f"{way} {name}"] for way in ways)}
    assert set(_commands(app)) - ran == LEFT_OUT
    if LONG:
        kills, full = (sum(counts[f"fault {kind}"] for kind in kinds) for kinds in (["kill", "term", "int"], ["full"]))
        damaged, mended = sum(counts[name] for name in counts if name.startswith("damage ")), counts["repaired"]
        assert min(kills, full, damaged, mended) > 0, (kills, full, damaged, mended)


def _commands(of: App, above: str = "") -> Iterator[str]:
    """Names of all commands, those below others too."""
    for name in of:
        if not name.startswith("-"):
            below = list(_commands(of[name], f"{above}{name} "))
            yield from below or [f"{above}{name}"]
