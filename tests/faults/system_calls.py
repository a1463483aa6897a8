"""strace, which makes a system call of another process fail, or the process die at it."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKLOAD = ("-m", "tests.faults.workload")


def strace() -> str:
    """The program; skips the test where there is none, or where processes may not be traced."""
    program = shutil.which("strace")
    missing = None if program else "no strace (Debian's package strace)"
    if program and subprocess.run([program, "true"], capture_output=True, check=False).returncode:
        missing = "strace may not trace processes here (it needs CAP_SYS_PTRACE)"
    if missing:
        if os.environ.get("SPARSEMILL_REQUIRE_SYSTEM") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return str(program)


def run_under(*options: str, root: Path, log: Path) -> "subprocess.CompletedProcess[str]":
    """Runs the workload in ``root`` under strace with options, its record going to ``log``."""
    command = [strace(), "-f", "-qq", "-y", "-o", str(log), *options, sys.executable, *WORKLOAD, str(root)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def calls_of(log: Path) -> Counter[str]:
    """By system call, how often the thread that made it most often made it: strace counts by thread."""
    by_thread: Counter[tuple[str, str]] = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    most: Counter[str] = Counter()
    for (_, call), count in by_thread.items():
        most[call] = max(most[call], count)
    return most


def files_of_injected(log: Path) -> set[str]:
    """Paths that the calls were about that strace had fail, as its ``-y`` shows them."""
    found: set[str] = set()
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        process = line.split()[0]
        call = begun.pop(process, "") + line if " resumed>" in line else line
        if line.endswith("<unfinished ...>"):
            begun[process] = line
        elif line.endswith("(INJECTED)"):
            found |= set(re.findall(r'[<"](/[^<>"]+)[>"]', call))
    return found
