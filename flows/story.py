"""What a run tells in Prefect's UI: how far its stages are, and at its end its figures, its artifacts and its report.

Everything here is an artifact of Prefect's, in the run's own tab and, by its key, beside those of earlier runs. What
stages say goes to the run's log where a worker runs it, and to the terminal where a person does. A server that does not
answer costs a run its story, never its work: Prefect's client asks a silent one again and again, for a minute and more,
so it is told things from another thread. Rejected: Prefect's assets (its open-source server has no page for them; an
artifact's lineage is in its manifest).
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from logging import LogRecord
from threading import Thread
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import CancelledRun
from prefect.logging import get_logger
from prefect.runtime import deployment

from pipeline.progress import Advance, Plain, Reporter, for_stderr
from pipeline.reporting import headline_markdown
from pipeline.stages import Chain
from pipeline.summary import figures
from storage.errors import SparsemillError

_SECONDS_BETWEEN_UPDATES = 5.0
_PATIENCE_SECONDS = 10.0
T = TypeVar("T")


class Listener:
    """Prefect's server, as a run tells it things: one after the other, each from a thread of its own.

    The work waits for an answer only where the server had one the last time. What comes while something is still
    without an answer stays untold.

    Args:
        patience: seconds that a server which answers is waited for.
    """

    def __init__(self, patience: float = _PATIENCE_SECONDS):
        self._patience = patience
        self._last: Future[Any] | None = None

    def tell(self, say: Callable[[], T]) -> "Future[T] | None":
        """Makes a call of Prefect's client; what becomes of it, or None where it stays untold."""
        last = self._last
        if last is not None and not last.done():
            return None
        call: Future[T] = Future()
        self._last = call

        def make() -> None:
            try:
                call.set_result(say())
            except Exception as error:  # noqa: BLE001 - raised where the answer is wanted
                call.set_exception(error)

        context = copy_context()  # which names the run that an artifact belongs to
        Thread(target=context.run, args=(make,), daemon=True, name="sparsemill-story").start()
        wait([call], 0 if last is not None and _is_silent(last) else self._patience)
        return call

    def ask(self, question: Callable[[], T]) -> T | None:
        """As :meth:`tell`; the answer, or None where there is none yet."""
        return answer_of(self.tell(question))


def answer_of(call: "Future[T] | None") -> T | None:
    """What the server answered; None where it has not, or refused."""
    if call is None or not call.done() or isinstance(call.exception(), httpx.HTTPError):
        return None
    return call.result()


def _is_silent(call: "Future[Any]") -> bool:
    error = call.exception()
    return isinstance(error, httpx.HTTPError) and not isinstance(error, httpx.HTTPStatusError)


LISTENER = Listener()
"""The server of this process."""


class InLog(Plain):
    """A line now and then in the run's log."""

    def __init__(self) -> None:
        self._logger = get_run_logger()

    def say(self, message: str) -> None:
        """See ``Reporter``."""
        self._logger.info(message)


class InUI:
    """A reporter that says everything to another one, and keeps a progress artifact of each stage's work."""

    def __init__(self, inner: Reporter):
        self._inner = inner

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:
        """See ``Reporter``."""
        at, told, last_note = start, time.monotonic(), ""
        said = f"{label}: {at:,} of {total:,} {unit}"
        bar = LISTENER.tell(partial(create_progress_artifact, _percent(at, total), description=said))

        def tell() -> None:
            place = cast("UUID | None", answer_of(bar))
            if place is not None:
                said = f"{label}: {at:,} of {total:,} {unit}  {last_note}".rstrip()
                LISTENER.tell(partial(update_progress_artifact, place, _percent(at, total), description=said))

        with self._inner.track(label, total, unit, start=start) as advance:

            def advance_both(done: int = 1, *, note: str = "") -> None:
                nonlocal at, told, last_note
                at, last_note = at + done, note
                advance(done, note=note)
                if time.monotonic() - told >= _SECONDS_BETWEEN_UPDATES:
                    told = time.monotonic()
                    tell()

            yield advance_both
        tell()

    def say(self, message: str) -> None:
        """See ``Reporter``."""
        self._inner.say(message)


def reporter() -> Reporter:
    """Of a flow run: within it only. Prefect's log is rid of the tracebacks of what the run's state says in words."""
    get_logger("prefect.flow_runs").addFilter(_says_more)
    return InUI(for_stderr() if deployment.id is None else InLog())


def tell_outcome(chain: Chain) -> None:
    """A run's stages and key figures; and where it made a report, the headline table and a link to the page."""
    stages = [
        {
            "stage": run.name,
            "artifact": run.made.artifact.id,
            "state": run.made.status,
            "seconds": round(run.seconds, 1),
            "folder": str(run.made.artifact.folder.absolute()),
        }
        for run in chain.runs
    ]
    LISTENER.ask(lambda: create_table_artifact(stages, key="stages", description="What was made or found"))
    rows = [{"quantity": label, "value": value} for label, value in figures(chain).items()]
    LISTENER.ask(lambda: create_table_artifact(rows, key="figures", description="Key figures"))
    last = chain.runs[-1].made.artifact
    if last.stage != "report":
        return
    headline, page = headline_markdown(last, chain.workspace), (last.folder / "index.html").absolute()
    LISTENER.ask(lambda: create_markdown_artifact(headline, key="headline", description="Beside the post's numbers"))
    said = f"The report: {page}"
    LISTENER.ask(lambda: create_link_artifact(page.as_uri(), link_text=last.id, key="report", description=said))


def _says_more(record: LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, SparsemillError | CancelledRun)


def _percent(done: int, total: int) -> float:
    return min(100.0, 100 * done / total) if total else 100.0
