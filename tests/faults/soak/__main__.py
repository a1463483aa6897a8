"""Soaks, and prints what was done."""

import argparse
import json
import random
import time
import warnings
from pathlib import Path

from tests.faults.soak.actions import ACTIONS, step
from tests.faults.soak.damaging import heal
from tests.faults.soak.making import begin, complete
from tests.faults.soak.model import Soak
from tests.faults.soak.processes import import_all
from tests.faults.soak.questions import prepare


def main() -> None:
    """Every action once, then as chance says until the time is over; in the end all must be makeable."""
    parser = argparse.ArgumentParser(description="random commands with random faults, against a model")
    parser.add_argument("preset", type=Path)
    parser.add_argument("folder", type=Path, help="empty; keeps what went wrong")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import_all()
    folder: Path = options.folder.resolve()
    golden = prepare(options.preset, folder / "reference")
    soak = Soak(golden, folder, random.Random(options.seed))
    began = time.monotonic()
    try:
        begin(soak)
        for action in ACTIONS:
            step(soak, action)
        while time.monotonic() - began < options.seconds:
            step(soak)
        heal(soak)
        complete(soak)
    finally:
        print(json.dumps(dict(sorted((golden.counts + soak.counts).items()))))


if __name__ == "__main__":
    main()
