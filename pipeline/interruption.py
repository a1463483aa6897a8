"""Ctrl-C and SIGTERM at a point of the program's choosing: a loop finishes its step, saves, and then stops."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 143
"""Exit code after SIGTERM; after Ctrl-C it is 130 (``cli.EXIT_INTERRUPTED``)."""


class Interruption:
    """Remembers that a stop was asked for.

    Attributes:
        signal: the signal that asked, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.signal = signal.Signals(number)

    def stop_if_asked(self) -> None:
        """Raises what the signal would have raised.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with ``EXIT_TERMINATED``.
        """
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(EXIT_TERMINATED)


@contextmanager
def deferred_interruption() -> Generator[Interruption]:
    """Within it the first SIGINT or SIGTERM is only noted; a second one acts at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
