"""What a run tells in Prefect's UI: how far its stages are, and at its end its figures, its artifacts and its report.

Everything here is an artifact of Prefect's, in the run's own tab and, by its key, beside those of earlier runs. What
stages say goes to the run's log where a worker runs it, and to the terminal where a person does. A server that does not
answer costs a run its story, never its work. Rejected: Prefect's assets (its open-source server has no page for them;
an artifact's lineage is in its manifest).
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from logging import LogRecord
from typing import TypeVar, cast
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
from prefect.exceptions import CancelledRun, PrefectHTTPStatusError
from prefect.logging import get_logger
from prefect.runtime import deployment

from pipeline.progress import Advance, Plain, Reporter, for_stderr
from pipeline.reporting import headline_markdown
from pipeline.stages import Chain
from pipeline.summary import figures
from storage.errors import SparsemillError

_SECONDS_BETWEEN_UPDATES = 5.0
_UNTOLD = (httpx.HTTPError, PrefectHTTPStatusError)
T = TypeVar("T")


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
        place = cast("UUID | None", _told(lambda: create_progress_artifact(_percent(at, total), description=said)))

        def tell() -> None:
            if place is not None:
                said = f"{label}: {at:,} of {total:,} {unit}  {last_note}".rstrip()
                _told(partial(update_progress_artifact, place, _percent(at, total), description=said))

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
    _told(lambda: create_table_artifact(stages, key="stages", description="What was made or found"))
    rows = [{"quantity": label, "value": value} for label, value in figures(chain).items()]
    _told(lambda: create_table_artifact(rows, key="figures", description="Key figures"))
    last = chain.runs[-1].made.artifact
    if last.stage != "report":
        return
    headline, page = headline_markdown(last, chain.workspace), (last.folder / "index.html").absolute()
    _told(lambda: create_markdown_artifact(headline, key="headline", description="Beside the post's numbers"))
    _told(
        lambda: create_link_artifact(page.as_uri(), link_text=last.id, key="report", description=f"The report: {page}")
    )


def _says_more(record: LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, SparsemillError | CancelledRun)


def _told(tell: Callable[[], T]) -> T | None:
    try:
        return tell()
    except _UNTOLD:
        return None


def _percent(done: int, total: int) -> float:
    return min(100.0, 100 * done / total) if total else 100.0
