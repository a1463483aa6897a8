"""Ctrl-C and SIGTERM at a point of the program's choosing: a loop finishes its step, saves, and then stops."""

import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

EXIT_TERMINATED = 143
"""Exit code after SIGTERM; after Ctrl-C it is 130 (``cli.EXIT_INTERRUPTED``)."""


Handlers: TypeAlias = Mapping[signal.Signals, Callable[[int, FrameType | None], Any] | int | None]


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
