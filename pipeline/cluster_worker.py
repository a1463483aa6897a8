"""What runs on a worker of a cluster: a look at whether it may take part, and then its pieces of the work.

Equal bytes need equal numerics, so a worker whose device, instruction set, versions or sources of this package are not
the coordinator's refuses its piece, and says in what it differs; so does one that does not see the artifact root. What
a job needs for every piece (a model, open files) is opened once, and kept until another job comes.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline import text_encoding
from pipeline.config import Runtime
from pipeline.workspace import Workspace
from storage.artifact import Artifact, Origin, open_folder
from storage.errors import ArtifactNotFound
from storage.fingerprint import Json

P = TypeVar("P")
R = TypeVar("R")

_PACKAGES = ("pipeline", "sae", "storage")


class WorkerRefused(Exception):  # noqa: N818 - the coordinator goes on with the others; its argument is the reason
    """This worker cannot take part."""


@dataclass(frozen=True)
class Terms:
    """What a worker must be to take part in a job.

    Attributes:
        root: the artifact root, absolute, as the coordinator names it.
        mark: what lies below the root now, by which a worker knows a folder to be that root.
        device: where the language model runs.
        provenance: what the bytes depend on, as the artifact will have it on record.
        code: ``code_digest`` of the coordinator.
    """

    root: Path
    mark: str
    device: str
    provenance: Mapping[str, Json]
    code: str


@dataclass(frozen=True)
class Site:
    """A worker that may take part.

    Attributes:
        workspace: with the root as this machine has it, and as many threads as Dask gave the worker.
        budget_bytes: what its process may hold in all, or None where Dask sets no limit.
        name: of the worker.
    """

    workspace: Workspace
    budget_bytes: int | None
    name: str

    @property
    def root(self) -> Path:
        """The artifact root."""
        return self.workspace.store.root


@dataclass(frozen=True)
class Job(Generic[P, R]):
    """A stage's work as a worker gets it: sent with every piece, so it is small.

    Attributes:
        token: tells jobs apart.
        terms: what a worker must be.
        opening: opens what pieces need, and returns what does a piece.
        small: whether a worker may hold as many pieces as it has threads, each done by one, and one more that waits;
            else it has one piece at a time.
    """

    token: str
    terms: Terms = field(compare=False)
    opening: Callable[[Site], Callable[[P], R]] = field(compare=False)
    small: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Reference:
    """An artifact as it is named to a worker: without its manifest, which may be large.

    Attributes:
        folder: relative to the artifact root where it lies below it.
        artifact_id: of the artifact.
        manifest_sha256: of the manifest.
        origin: where its files come from, where they are not in the folder.
    """

    folder: Path
    artifact_id: str
    manifest_sha256: str
    origin: Origin | None

    @staticmethod
    def to(artifact: Artifact, root: Path) -> "Reference":
        """Names an artifact."""
        folder, root = artifact.folder.absolute(), root.absolute()
        folder = folder.relative_to(root) if folder.is_relative_to(root) else folder
        return Reference(folder, artifact.id, artifact.manifest_sha256, artifact.origin)

    def open(self, root: Path) -> Artifact:
        """The artifact, as seen from a root.

        Raises:
            ArtifactNotFound: it is not there, or another one is.
        """
        if self.origin is not None:
            found = self.origin.find(self.artifact_id, self.manifest_sha256)
        else:
            found = open_folder(root / self.folder)
        if found is None or found.manifest_sha256 != self.manifest_sha256:
            raise ArtifactNotFound(
                f"a worker does not see {self.artifact_id} as the coordinator does", where=root / self.folder,
                found=None if found is None else f"manifest {found.manifest_sha256}", expected=self.manifest_sha256,
            )  # fmt: skip
        return found


def perform(job: Job[P, R], piece: P) -> R:
    """Does a piece of a job.

    Raises:
        WorkerRefused: this worker is not what the job asks for.
    """
    return _opened(job)(piece)


def forget() -> None:
    """Lets go of what the last job opened."""
    _opened.cache_clear()


def dask_setup(worker: object) -> None:  # noqa: ARG001 - Dask calls it when a local worker starts
    """A worker leaves Ctrl-C, which reaches all processes of a terminal, to the coordinator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def code_digest() -> str:
    """sha256 over the sources of the packages that compute."""
    digest = hashlib.sha256()
    top = Path(__file__).parents[1]
    for path in sorted(path for package in _PACKAGES for path in (top / package).rglob("*.py")):
        digest.update(f"{path.relative_to(top).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _opened(job: Job[Any, Any]) -> Callable[[Any], Any]:
    return job.opening(_site(job.terms))


def _site(terms: Terms) -> Site:
    from distributed import get_worker

    worker = get_worker()
    runtime = Runtime(root=_root(terms), device=terms.device, threads=worker.state.nthreads)
    workspace = Workspace.open(runtime)
    differences = difference(terms, workspace)
    if differences:
        raise WorkerRefused(differences)
    return Site(workspace, worker.memory_manager.memory_limit, worker.address)


def _root(terms: Terms) -> Path:
    """The artifact root as this machine has it: by the coordinator's name, or else by its own SPARSEMILL_HOME."""
    own = os.environ.get("SPARSEMILL_HOME")
    for root in (terms.root, *([Path(own).absolute()] if own else [])):
        if (root / terms.mark).exists():
            return root
    raise WorkerRefused(f"does not see the artifact root {terms.root}, nor has it as SPARSEMILL_HOME")


def difference(terms: Terms, workspace: Workspace) -> str:
    """In what a worker's numerics, or its code, differ from a job's; empty where they do not."""
    threads = terms.provenance.get("threads")
    here = workspace.provenance(threads=threads if isinstance(threads, int) else None)
    here |= text_encoding.provenance()
    named = {key: (here[key], value) for key, value in terms.provenance.items() if key in here}
    named["sparsemill's sources"] = code_digest()[:12], terms.code[:12]
    return ", ".join(f"{key} {found} (here {wanted})" for key, (found, wanted) in named.items() if found != wanted)
