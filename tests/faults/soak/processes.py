"""Commands in processes forked from this one, which has imported all they need and computed nothing.

A command then takes tenths of a second, not the seconds that importing torch and the language model's library takes.
"""

import importlib
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline import cli

SLOWEST_SECONDS = 120.0
_NEEDED = (
    "numba", "plotly.graph_objects", "torch._dynamo", "transformer_lens.model_bridge.sources.native",
    "pipeline.checkpoints.bundle", "pipeline.hub", "pipeline.planning.plan", "pipeline.planning.table",
    "pipeline.report.rendering", "pipeline.summary", "pipeline.verifying",
)  # fmt: skip
"""Modules that commands import when they come to need them."""


class Broken(AssertionError):  # noqa: N818 - says what is wrong
    """Something that must hold does not."""


def import_all() -> None:
    """Imports what commands need, once for all of them."""
    for name in _NEEDED:
        importlib.import_module(name)


@dataclass(frozen=True)
class Fault:
    """What happens to a command.

    Attributes:
        kind: ``none``, or what it is counted as.
        seconds: after which the signal comes.
        number: of the signal.
        fsize: the largest file that it may write, in bytes.
    """

    kind: str = "none"
    seconds: float = 0.0
    number: int | None = None
    fsize: int | None = None


NONE = Fault()


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; of a signal, the number below zero.
        stdout: what it said.
        stderr: what it said of progress and errors.
        faulty: whether a signal was sent, or the disk was full.
    """

    code: int
    stdout: str
    stderr: str
    faulty: bool


@dataclass
class Command:
    """A command under way, in a process group of its own.

    Attributes:
        arguments: of ``sparsemill``.
        fault: what happens to it.
        remote: ``SPARSEMILL_REMOTE``, where it has one.
    """

    arguments: Sequence[str]
    fault: Fault = NONE
    remote: str | None = None
    pid: int = field(init=False)
    _said: dict[int, bytearray] = field(init=False)
    _began: float = field(init=False)
    _sent: bool = False

    def __post_init__(self) -> None:
        pipes = [os.pipe(), os.pipe()]
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 128 + signal.SIGINT  # which may come before the command has begun to listen
            try:
                os.setsid()
                for number, (read, write) in enumerate(pipes, start=1):
                    os.dup2(write, number)
                    os.close(read)
                code = _command(self.arguments, self.fault, self.remote)
            finally:
                os._exit(code)  # whatever happens: what follows is the parent's
        for _, write in pipes:
            os.close(write)
        self._said = {read: bytearray() for read, _ in pipes}

    def wait(self, until: Callable[[str], bool] = lambda _: False) -> None:
        """Reads what it says till its end, or till ``until`` is true of what it printed; sends the signal in time."""
        with selectors.DefaultSelector() as selector:
            for pipe in self._said:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                due = SLOWEST_SECONDS if self._sent or self.fault.number is None else self.fault.seconds
                ready = selector.select(max(0.0, self._began + due - time.monotonic()))
                if not ready:
                    self._overdue()
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    self._said[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                if until(self.printed):
                    return

    def _overdue(self) -> None:
        if self._sent or self.fault.number is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise Broken(f"still running after {SLOWEST_SECONDS} s: {self.arguments}")
        os.kill(self.pid, self.fault.number)
        self._sent = True

    @property
    def name(self) -> str:
        """Of the command, such as ``artifacts ls``."""
        first, second = (*self.arguments, "")[:2]
        return f"{first} {second}" if first in {"artifacts", "report", "study"} else first

    @property
    def printed(self) -> str:
        """What it printed so far."""
        return next(iter(self._said.values())).decode(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    def finish(self) -> Outcome:
        """Its end."""
        self.wait()
        for pipe in self._said:
            os.close(pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        stdout, stderr = (said.decode(errors="replace") for said in self._said.values())
        return Outcome(code, stdout, stderr, self._sent or self.fault.fsize is not None)


def _command(arguments: Sequence[str], fault: Fault, remote: str | None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if fault.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.fsize, fault.fsize))
    os.environ |= {"BROWSER": "true"}  # the program of that name: it opens nothing
    os.environ.pop("SPARSEMILL_REMOTE", None)
    if remote is not None:
        os.environ["SPARSEMILL_REMOTE"] = remote
    sys.argv = ["sparsemill", *arguments]
    code: object = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - what a user would see
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
