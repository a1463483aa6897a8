"""Progress of long work: live bars on a terminal, a plain line now and then elsewhere.

Logs and progress go to stderr; results go to stdout and are none of this module's business.
"""

import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Reports that work went on."""

    def __call__(self, done: int = 1, *, note: str = "") -> None:
        """Adds ``done`` units; ``note`` is shown beside the bar."""
        ...


class Reporter(Protocol):
    """Shows what a stage is doing."""

    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Advance]:
        """A context in which the value is called to advance from ``start`` towards ``total`` units.

        The unit ``bytes`` is shown as MB and GB, with the speed.
        """
        ...

    def say(self, message: str) -> None:
        """Prints one line."""
        ...


class Quiet:
    """Says nothing: for libraries and tests."""

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:  # noqa: ARG002
        """See ``Reporter``."""

        def advance(done: int = 1, *, note: str = "") -> None:
            pass

        yield advance

    def say(self, message: str) -> None:
        """See ``Reporter``."""


class Plain:
    """A line at the start, one every ten seconds, one at the end: for logs."""

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:
        """See ``Reporter``."""
        began = last = time.monotonic()
        done_units = start

        def advance(done: int = 1, *, note: str = "") -> None:
            nonlocal done_units, last
            done_units += done
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                rest = _time_left(done_units - start, total - done_units, now - began)
                counted = f"{_amount(done_units, unit)} of {_amount(total, unit)}"
                self.say(f"  {label}: {counted}, {now - began:.0f} s{rest}  {note}".rstrip())

        yield advance
        of_all = "" if done_units >= total else f" of {_amount(total, unit)}"
        self.say(f"  {label}: {_amount(done_units, unit)}{of_all} in {time.monotonic() - began:.1f} s")

    def say(self, message: str) -> None:
        """See ``Reporter``."""
        print(message, file=sys.stderr, flush=True)


class Live:
    """Bars that redraw themselves: for a terminal."""

    def __init__(self, console: Console):
        self._console = console

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:
        """See ``Reporter``."""
        amount: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn(unit))
        columns = (
            TextColumn("  {task.description}"), BarColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else amount),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(label, total=total, completed=start, note="")

            def advance(done: int = 1, *, note: str = "") -> None:
                progress.update(task, advance=done, note=note)

            yield advance

    def say(self, message: str) -> None:
        """See ``Reporter``."""
        self._console.print(message, highlight=False, markup=False)


def _amount(units: int, unit: str) -> str:
    return decimal(units) if unit == "bytes" else f"{units:,} {unit}"


def _time_left(done: int, left: int, seconds: float) -> str:
    # Not before a hundredth is done: the first units wait for compilers and for fresh memory.
    return f", about {seconds / done * left:.0f} s left" if 100 * done >= done + left > done else ""


def for_stderr() -> Reporter:
    """Live bars where stderr is a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return Live(console) if console.is_terminal else Plain()
