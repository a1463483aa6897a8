"""Pieces of a stage's work on a Dask cluster: handed out here, done there, as many at a time as a worker should hold.

The process that runs the stage is the coordinator: it holds the artifact's lock, journals and commits. It hands each
piece to one worker by name, and the next when that one answers. So a worker's memory is that of one piece (or, of small
ones, of as many as it has threads and one that waits), a worker that differs (``pipeline.cluster_worker``) can be left
out, and a killed one costs the pieces that it had: when the scheduler no longer knows it, they go to another. An error
that a piece raises there is raised here, unchanged.

Cost: a round trip of some milliseconds a piece. Rejected: Prefect's DaskTaskRunner (a task run and its states a piece,
at a server that every worker must reach; docs/cluster.md), and leaving the choice of worker to Dask's scheduler (a
worker with eight threads is given eight windows, and one that was refused is given more).
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast
from uuid import uuid4

from pipeline.cluster_worker import Job, Site, Terms, WorkerRefused, code_digest, forget, perform
from pipeline.interruption import Interruption
from pipeline.memory import available_bytes, size
from pipeline.workspace import Workspace
from storage.artifacts import Staging
from storage.errors import ConfigError, RemoteError, WorkersLost
from storage.fingerprint import Json

if TYPE_CHECKING:
    from distributed import Client, Future

P = TypeVar("P")
R = TypeVar("R")

_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 30
_ANSWER_SECONDS = 60  # a worker that has its answer ready sends it within these, or has died
_MOST_LOSSES = 3
_AHEAD = 4  # pieces a worker, at least, that are begun while an earlier one is not done
LOCAL_SETTINGS: dict[str, Any] = {
    # Dask would pause, or end, a worker well below its budget. What a piece takes is known before, and refused then.
    **{f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause", "terminate")},
    # Its profiler looks a hundred times a second, and a worker that gives freed memory back at once (the list here is
    # Dask's, less MALLOC_TRIM_THRESHOLD_) faults it in again: each takes a hundredth or two of a core. A worker's
    # arithmetic may have more threads than its share of the cores: one that waits must not keep a core busy.
    "distributed.worker.profile.enabled": False,
    "distributed.nanny.pre-spawn-environ": {
        "OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1, "OMP_WAIT_POLICY": "passive",
    },
    "distributed.deploy.lost-worker-timeout": "1h",  # on a busy machine one that comes again takes long to import
}  # fmt: skip
"""Dask's configuration for workers of this machine."""


class Cluster:
    """The workers of a scheduler, for one stage.

    Args:
        client: of the scheduler.
        where: its address, for messages.
        say: prints a line.
    """

    def __init__(self, client: "Client", where: str, say: Callable[[str], None]):
        self._client = client
        self._where = where
        self._say = say
        self._refused: dict[str, str] = {}
        self._known: dict[str, int] = {}

    @property
    def n_workers(self) -> int:
        """Workers that take part."""
        return len(self._known)

    def __str__(self) -> str:
        return f"{self.n_workers} worker{'' if self.n_workers == 1 else 's'}"

    def workers(self) -> Mapping[str, int]:
        """Asks for the workers that may take part: the threads of each by its address.

        Raises:
            RemoteError: the scheduler does not answer.
            ConfigError: there are workers, and each was refused.
        """
        try:
            found = dict(cast("Mapping[str, int]", self._client.nthreads()))
        except (OSError, TimeoutError) as error:
            raise RemoteError(
                "the Dask scheduler does not answer any more", where=self._where, found=str(error), transient=True,
                remedy="the same command continues where it stopped, with --dask or without",
            ) from error  # fmt: skip
        self._known = {address: threads for address, threads in found.items() if address not in self._refused}
        if found and not self._known:
            raise ConfigError(
                "none of the cluster's workers can take part", where=self._where,
                found="; ".join(f"{address}: {self._refused[address]}" for address in [*found][:3]),
                remedy="start workers on machines like this one, with the same package and artifact root",
            )  # fmt: skip
        return self._known

    def completed(
        self, job: Job[P, R], pieces: Iterable[P], interruption: Interruption, room: Callable[[], bool] = lambda: True
    ) -> Generator[tuple[P, R]]:
        """Does pieces of a job, in the order in which they come back.

        Args:
            job: the work.
            pieces: taken when a worker is free.
            interruption: once a stop is asked for, no further piece comes.
            room: whether a further piece may be begun.

        Raises:
            WorkersLost: one piece cost several workers.
        """
        handing_out = _HandingOut(self._client, job, iter(pieces), room)
        results: list[tuple[P, R]] = []
        try:
            while interruption.signal is None:
                workers = self.workers()
                for lost in handing_out.take_back(workers):
                    self._say(f"  worker {lost} has gone; what it had goes to another")
                handing_out.hand_out(self._places(job))
                yield from results
                if handing_out.is_done:
                    self._client.run(forget, workers=list(workers), on_error="ignore")
                    return
                if not workers:
                    self._wait_for_workers(interruption)
                results = list(self._answers(handing_out))
            yield from results
        finally:
            handing_out.cancel()

    def in_order(self, job: Job[P, R], pieces: Iterable[P], interruption: Interruption) -> Generator[R]:
        """Does pieces of a job, no two alike, and gives the results in the order of the pieces.

        For arguments see :meth:`completed`. Pieces are taken no further ahead of the results than the workers need.
        """
        begun: deque[P] = deque()
        waiting: dict[P, R] = {}

        def taken() -> Iterator[P]:
            for piece in pieces:
                begun.append(piece)
                yield piece

        def room() -> bool:
            return len(begun) < max(_AHEAD * self.n_workers, 2 * sum(self._places(job).values()), 1)

        with closing(self.completed(job, taken(), interruption, room)) as stream:
            for piece, result in stream:
                waiting[piece] = result
                while begun and begun[0] in waiting:
                    yield waiting.pop(begun.popleft())

    def _places(self, job: Job[P, R]) -> Mapping[str, int]:
        """How many pieces each worker may hold."""
        return {address: threads + 1 if job.small else 1 for address, threads in self._known.items()}

    def _answers(self, handing_out: "_HandingOut[P, R]") -> Generator[tuple[P, R]]:
        for address, piece, future in handing_out.answered():
            try:
                yield piece, future.result(_ANSWER_SECONDS if future.status == "finished" else None)
            except WorkerRefused as refusal:
                self._refused[address] = str(refusal)
                self._say(f"  worker {address} does not take part: {refusal}")
                handing_out.again.append(piece)
            except (CancelledError, TimeoutError) as error:
                if future.status == "error" and not isinstance(error, CancelledError):
                    raise
                handing_out.lose(piece)  # it died with its answer

    def _wait_for_workers(self, interruption: Interruption) -> None:
        self._say(f"  waiting for workers at {self._where}")
        while interruption.signal is None and not self.workers():
            time.sleep(_POLL_SECONDS)


class _Handed(NamedTuple, Generic[P]):
    """A piece that a worker has."""

    address: str
    piece: P
    future: "Future[Any]"


class _HandingOut(Generic[P, R]):
    """Which worker has which pieces.

    Attributes:
        again: pieces to be handed out before any other.
    """

    def __init__(self, client: "Client", job: Job[P, R], fresh: Iterator[P], room: Callable[[], bool]):
        self.again: deque[P] = deque()
        self._client = client
        self._job = job
        self._fresh = fresh
        self._room = room
        self._running: list[_Handed[P]] = []
        self._losses: Counter[P] = Counter()
        self._dry = False

    @property
    def is_done(self) -> bool:
        """Whether every piece was answered."""
        return self._dry and not self.again and not self._running

    def hand_out(self, places: Mapping[str, int]) -> None:
        """Gives workers pieces, as many as each has places for: a first to all that have none, then a second."""
        held = Counter(one.address for one in self._running)
        for place in range(max(places.values(), default=0)):
            for address, n_places in places.items():
                if held[address] <= place < n_places and (piece := self._next()) is not None:
                    future = self._client.submit(
                        perform, self._job, piece, workers=[address], allow_other_workers=False, pure=False,
                        key=f"sparsemill-{uuid4().hex}",
                    )  # fmt: skip
                    self._running.append(_Handed(address, piece, future))

    def take_back(self, workers: Container[str]) -> list[str]:
        """Takes back the pieces of workers that have gone; their addresses."""
        gone = [one for one in self._running if one.address not in workers]
        self._running = [one for one in self._running if one.address in workers]
        for one in gone:
            self._client.cancel([one.future], force=True)
            self.lose(one.piece)
        return sorted({one.address for one in gone})

    def lose(self, piece: P) -> None:
        """Hands a piece out again whose worker died.

        Raises:
            WorkersLost: it cost several workers.
        """
        self._losses[piece] += 1
        if self._losses[piece] >= _MOST_LOSSES:
            raise WorkersLost(
                f"{_MOST_LOSSES} workers died over one piece of the work", where=str(piece),
                remedy="look at the workers' logs: a machine may be out of memory; the same command continues",
            )  # fmt: skip
        self.again.append(piece)

    def answered(self) -> list[_Handed[P]]:
        """Waits for a while; the pieces that were answered."""
        from distributed import wait

        with suppress(TimeoutError, CancelledError), self._client.as_current():  # cancelled: the scheduler has gone
            wait([one.future for one in self._running], _POLL_SECONDS, "FIRST_COMPLETED")
        done = [one for one in self._running if one.future.done()]
        self._running = [one for one in self._running if one not in done]
        return done

    def cancel(self) -> None:
        """Nobody waits for the answers that are still to come."""
        with suppress(OSError, TimeoutError, CancelledError):
            self._client.cancel([one.future for one in self._running], force=True)

    def _next(self) -> P | None:
        if self.again:
            return self.again.popleft()
        if self._dry or not self._room():
            return None
        piece = next(self._fresh, None)
        self._dry = piece is None
        return piece


@contextmanager
def open_cluster(workspace: Workspace) -> Generator[Cluster]:
    """The cluster that the runtime settings ask for: the given scheduler's, or local workers for the ``with`` block.

    Local workers share the machine's threads and memory evenly, speak TLS among themselves with keys of their own, and
    end with this process, however it ends.

    Raises:
        RemoteError: no scheduler answers.
    """
    from distributed import Client

    address = workspace.runtime.dask
    with ExitStack() as stack:
        target = stack.enter_context(_local_cluster(workspace)) if address is None else address
        try:
            client = stack.enter_context(Client(target, timeout=_CONNECT_SECONDS, set_as_default=False))
        except (OSError, ValueError) as error:
            raise RemoteError(
                "no Dask scheduler answers", where=address, found=str(error), transient=isinstance(error, OSError),
                remedy="start one with 'dask scheduler', or use local workers (--workers N)",
            ) from error  # fmt: skip
        yield Cluster(client, address or "this machine", workspace.reporter.say)


def job_for(
    staging: Staging,
    workspace: Workspace,
    provenance: Mapping[str, Json],
    opening: Callable[[Site], Callable[[P], R]],
    *,
    small: bool = False,
) -> Job[P, R]:
    """A job whose workers compute for a staging folder.

    Args:
        staging: of the artifact.
        workspace: of the coordinator.
        provenance: as the artifact has it on record.
        opening: see :class:`Job`; it must be possible to pickle it.
        small: see :class:`Job`.
    """
    root = workspace.store.root.absolute()
    mark = staging.folder.absolute().relative_to(root).as_posix()
    terms = Terms(root, mark, workspace.runtime.device, provenance, code_digest())
    return Job(uuid4().hex, terms, opening, small)


@contextmanager
def _local_cluster(workspace: Workspace) -> Generator[Any]:
    from dask import config as dask_config
    from distributed import LocalCluster

    n_workers = workspace.runtime.workers or 1
    budget = available_bytes() // n_workers
    preload = [*dask_config.get("distributed.worker.preload"), "pipeline.cluster_worker"]
    with (
        dask_config.set(LOCAL_SETTINGS | {"distributed.worker.preload": preload}),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=max(1, workspace.threads // n_workers),
            memory_limit=budget,
            processes=True,
            silence_logs=logging.ERROR,  # what matters is said here
            security=True,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):
        workspace.reporter.say(f"  {n_workers} local workers, each within {size(budget)}")
        yield cluster
