"""Ctrl-C and SIGTERM at a point of the program's choosing: a loop finishes its step, saves, and then stops."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

from storage.errors import SparsemillError

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143
"""Exit codes after an error of the work, after Ctrl-C and after SIGTERM."""


_SECONDS_TO_THE_NEXT_TRY = 0.02

Handlers: TypeAlias = Mapping[signal.Signals, Callable[[int, FrameType | None], Any] | int | None]


@contextmanager
def ending_in_a_line() -> Generator[None]:
    """A program's whole work: an error, Ctrl-C or SIGTERM ends it with one line on stderr and an exit code.

    Where a signal comes while a library's compiled code calls Python, the stop may be lost in it: then it comes again.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    hook, sys.unraisablehook = sys.unraisablehook, _stop_again
    try:
        yield
    except SparsemillError as error:
        print(f"sparsemill: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"sparsemill: {error.strerror}; where: {error.filename}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("sparsemill: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as stop:
        if stop.code == EXIT_TERMINATED:
            print("sparsemill: terminated; the same command continues where it stopped", file=sys.stderr)
        raise
    finally:
        sys.unraisablehook = hook


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(EXIT_TERMINATED)


def _stop_again(lost: Any) -> None:
    """What becomes of an exception that nobody can catch: a stop's signal comes once more, from another thread."""
    stop = lost.exc_value
    if isinstance(stop, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(stop, SystemExit) and stop.code == EXIT_TERMINATED:
        number = signal.SIGTERM
    else:
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(_SECONDS_TO_THE_NEXT_TRY, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


class Interruption:
    """Remembers that a stop was asked for.

    Args:
        handlers: of the program, by signal: what would have been called.

    Attributes:
        signal: the signal that asked, or None.
    """

    def __init__(self, handlers: Handlers | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._handlers = handlers or {}

    def note(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.signal = signal.Signals(number)

    def stop_if_asked(self) -> None:
        """Raises what the signal would have raised: an orchestrator's handler tells its own stop from a crash.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with ``EXIT_TERMINATED``, unless the program's handler raised something else.
        """
        handler = self._handlers.get(self.signal) if self.signal is not None else None
        if self.signal is not None and callable(handler):
            handler(self.signal, None)
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(EXIT_TERMINATED)


@contextmanager
def deferred_interruption() -> Generator[Interruption]:
    """Within it the first SIGINT or SIGTERM is only noted; a second one acts at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interruption = Interruption(previous)

    def note_once(number: int, frame: FrameType | None) -> None:
        interruption.note(number, frame)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note_once)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
