"""Commands of ``sparsemill`` in forked processes of a program that has torch already, so that each starts at once."""

import os
import sys
import traceback
from pathlib import Path

from pipeline.cli import main


def start(arguments: list[str], log: Path) -> int:
    """Starts a command as leader of a session of its own, output to ``log``; returns its process id once it runs."""
    begun, begin = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        return pid
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv[1:] = arguments
    code = 0
    try:
        os.close(begin)
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(pid: int) -> int:
    """Waits; returns the exit code, or minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def commands(preset: str, settings: list[str], home: Path, remote: Path, theirs: Path) -> dict[str, list[str]]:
    """The arguments of each stage's command."""
    made = ["--preset", preset, "--home", str(home), "--threads", "1"]
    made += [word for setting in settings for word in ("--set", setting)]
    found = {stage: [stage, *made] for stage in ("tokenize", "harvest", "train", "analyze")}
    found["push"] = ["push", "latest", remote.as_uri(), "--with-parents", "--home", str(home)]
    found["pull"] = ["pull", remote.as_uri(), "latest", "--with-parents", "--home", str(theirs)]
    return found
