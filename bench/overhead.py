"""What finding everything costs: ``python -m bench.overhead``.

A replication that has been made is asked for again, in processes of their own, from their start to their end:

- *torch*: a process that imports torch and ends: what every one of them pays.
- *command*: ``sparsemill replicate``, without Prefect.
- *flow*: ``python -m flows.replicate``: the same as Prefect's flow and tasks, with Prefect's own server in the process.

The replication is made first where it is missing: the demo with 60 training steps, which takes minutes. Writes
``bench/results/overhead.json``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.machine import interleave, say, write_results
from bench.tables import markdown

ROOT = Path(__file__).parents[1]
ASKED = ["--preset", "demo", "--set", "train.autoencoder.steps=60"]
COMMANDS = {
    "torch": ["-c", "import torch"],
    "command": ["-m", "pipeline.cli", "replicate", *ASKED],
    "flow": ["-m", "flows.replicate", *ASKED],
}
SHOWN = {"torch": "`import torch` alone", "command": "`sparsemill replicate`", "flow": "`python -m flows.replicate`"}


def run(name: str, home: Path) -> str:
    environment = os.environ | {
        "SPARSEMILL_HOME": str(home / "artifacts"), "PREFECT_HOME": str(home / "prefect"), "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, *COMMANDS[name]]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--home", type=Path, help="where the replication is, or is made; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = (arguments.home or Path(folder)).absolute()
        run("command", home)
        if " made " in run("flow", home):
            sys.exit("the flow made something that the command had made")
        rounds = interleave({name: partial(run, name, home) for name in COMMANDS}, arguments.rounds)
    seconds = {name: sorted(runs.seconds) for name, runs in rounds.runs.items()}
    path = write_results("overhead", {"rounds": arguments.rounds, "load": rounds.load, "seconds": seconds})
    say(str(path))


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The blocks of docs/prefect.md."""
    machine, (before, after) = figures["machine"], figures["load"]

    def shown(seconds: list[float]) -> str:
        return f"{seconds[len(seconds) // 2]:.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f})"

    return {
        "seconds": markdown(
            ["everything found", "seconds"], ([SHOWN[name], shown(runs)] for name, runs in figures["seconds"].items())
        ),
        "machine": (
            f"{machine['cpu']}, {machine['cores']} cores; medians (least and greatest) of {figures['rounds']} rounds; "
            f"load average {min(before, after):.1f} to {max(before, after):.1f}."
        ),
    }


if __name__ == "__main__":
    main()
