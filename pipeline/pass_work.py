"""Where the passes of analyses are computed: in this process, or by the workers of a cluster.

Here as there the analysis takes the parts in, in the order of the batches, so its result does not depend on where a
batch was computed. A worker opens what a pass reads by the artifacts' names, as the coordinator did, and computes some
batches at a time; their parts come by wire. Some of torch's sums depend on how many threads share them, so a worker's
arithmetic has as many as the artifact has on record, whatever Dask gave it.

The cluster is connected to, or started, when the first pass begins that is not found made, and serves all analyses of a
run. Rejected: one for each analysis (starting workers takes longer than many a pass).
"""

from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from pipeline.analysis.context import Context, Need
from pipeline.analysis.passes import Here, Parts, Pass, Passes
from pipeline.cluster import Cluster, job_for, open_cluster
from pipeline.cluster_worker import Site
from pipeline.interruption import deferred_interruption
from pipeline.memory import require_pass_memory
from pipeline.workspace import Workspace
from storage.artifacts import Staging
from storage.errors import RemoteError

B = TypeVar("B", bound=Sized)
T = TypeVar("T")

BATCHES_A_PIECE = 4


class OnSite(Protocol):
    """Reads on a worker what the coordinator's context has; it can be pickled."""

    def __call__(self, site: Site, reads: frozenset[Need]) -> Context:
        """The autoencoder, and what is asked for."""
        ...


class PassWork:
    """Where the analyses of a run have their passes computed.

    Args:
        workspace: of this process.
        stack: closes what is opened.
    """

    def __init__(self, workspace: Workspace, stack: ExitStack):
        self._workspace = workspace
        self._stack = stack
        self._cluster: Cluster | None = None

    @contextmanager
    def cluster(self) -> Generator[Cluster]:
        """The cluster that the runtime settings ask for; one that does not answer any more is opened anew next time."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(open_cluster(self._workspace))
        try:
            yield self._cluster
        except RemoteError:
            self._cluster = None
            self._stack.close()
            raise

    def passes(self, staging: Staging, on_site: OnSite) -> Passes:
        """Passes of one analysis.

        Args:
            staging: of its artifact.
            on_site: reads on a worker what the analysis' context has.
        """
        if not self._workspace.runtime.on_cluster:
            return Here(self._workspace.reporter)
        return _OnCluster(self, self._workspace, staging, on_site)


@contextmanager
def open_pass_work(workspace: Workspace) -> Generator[PassWork]:
    """For the ``with`` block."""
    with ExitStack() as stack:
        yield PassWork(workspace, stack)


@dataclass(frozen=True)
class _OnCluster:
    work: PassWork
    workspace: Workspace
    staging: Staging
    on_site: OnSite

    def in_order(self, work: Pass[B, T], context: Context) -> Generator[T]:  # noqa: ARG002 - workers read it themselves
        """See ``Passes``.

        Raises:
            KeyboardInterrupt, SystemExit: a stop was asked for.
            MemoryBudgetExceeded: a batch does not fit a worker's memory.
            WorkersLost: one piece cost several workers.
        """
        workspace = self.workspace
        opening = _Opening(work.opening, work.reads, work.needs, work.label, self.on_site, workspace.threads)
        job = job_for(self.staging, workspace, workspace.provenance(), opening)
        starts = range(0, len(work.batches), BATCHES_A_PIECE)
        pieces = [_Piece(start, work.batches[start : start + BATCHES_A_PIECE]) for start in starts]
        with (
            self.work.cluster() as cluster,
            deferred_interruption() as interruption,
            workspace.reporter.track(work.label, work.n_units, work.unit) as advance,
            closing(cluster.in_order(job, pieces, interruption)) as answers,
        ):
            for piece, parts in zip(pieces, answers, strict=False):  # fewer, where a stop was asked for
                for batch, part in zip(piece.batches, parts, strict=True):
                    yield part
                    advance(len(batch), note=str(cluster))
        interruption.stop_if_asked()


@dataclass(frozen=True)
class _Piece(Generic[B]):
    """Batches that follow each other, known by the number of the first."""

    first: int
    batches: Sequence[B] = field(compare=False)

    def __str__(self) -> str:
        return f"batches from {self.first} on"


@dataclass(frozen=True)
class _Opening(Generic[B, T]):
    """Opens, on a worker, what a pass reads; see ``Pass``.

    Attributes:
        threads: of the arithmetic.
    """

    opening: Callable[[Context], Parts[B, T]]
    reads: frozenset[Need]
    needs: Mapping[str, int]
    label: str
    on_site: OnSite
    threads: int

    def __call__(self, site: Site) -> Callable[[_Piece[B]], list[T]]:
        with _arithmetic_threads(self.threads):
            context = self.on_site(site, self.reads)
            where = f"worker {site.name}"
            require_pass_memory(self.label, self.needs, budget_bytes=site.budget_bytes, where=where)
            parts = self.opening(context)

        def compute(piece: _Piece[B]) -> list[T]:
            with _arithmetic_threads(self.threads):
                return list(parts(piece.batches))

        return compute


@contextmanager
def _arithmetic_threads(number: int) -> Generator[None]:
    """Within it torch's operations use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
