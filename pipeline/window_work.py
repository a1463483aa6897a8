"""Where the windows of a harvest are computed: in this process, or on the workers of a cluster.

Here, one writer thread writes, hashes and journals window k while the model computes window k + 1, so at most two are
in memory. On a cluster each worker computes a window, then writes and hashes it as an attempt (``storage.attempts``),
so it holds one; this process moves the files to their places and journals. A window's bytes depend neither on where it
is computed nor on threads, so both end with the same artifact.

Rejected: a window computed and another written by each worker (a killed one would cost two); two workers on a device
overlap as well.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import language_model
from pipeline.cluster import job_for, open_cluster
from pipeline.cluster_worker import Reference, Site
from pipeline.config import HarvestConfig
from pipeline.interruption import deferred_interruption
from pipeline.language_model import LanguageModel
from pipeline.memory import model_width, require_memory
from pipeline.progress import Advance
from pipeline.tokens import TokenTable
from pipeline.windows import Window, WindowHarvester, single_threaded, unit_name
from pipeline.workspace import Workspace
from storage.artifacts import Staging
from storage.attempts import Attempt, Attempts, accept
from storage.errors import ConfigError
from storage.manifest import FileRecord
from storage.shards import Layout

THREADS = 1
"""Of one batch's arithmetic: the bytes do not depend on how many threads share the batches."""


@dataclass(frozen=True)
class WindowWork:
    """Windows to be computed.

    Attributes:
        config: of the harvest.
        model: the language model.
        table: the prompts.
        sites: by hook name, where files are staged.
        layouts: by hook name.
        missing: by hook name, the windows wanted.
    """

    config: HarvestConfig
    model: LanguageModel
    table: TokenTable
    sites: Mapping[str, Staging]
    layouts: Mapping[str, Layout]
    missing: Mapping[str, Sequence[int]]

    def wanted(self) -> list[tuple[int, tuple[str, ...]]]:
        """The windows in order, with the hook names that each is wanted of."""
        windows = sorted(set[int]().union(*self.missing.values()))
        return [(window, tuple(name for name in self.sites if window in self.missing[name])) for window in windows]


def compute_here(work: WindowWork, workspace: Workspace, advance: Advance) -> None:
    """Computes windows in this process, writes and journals them."""
    with (
        harvester_of(work.config, work.model, work.table, work.layouts, workspace.threads) as harvester,
        _one_writer() as write,
    ):
        for window, names in work.wanted():
            write(partial(_write, work.sites, harvester.compute(window, names, advance), harvester))


def compute_on_cluster(work: WindowWork, workspace: Workspace, advance: Advance) -> None:
    """Has workers compute windows and write them, and journals them.

    Raises:
        WorkersLost: one window cost several workers.
        MemoryBudgetExceeded: a window does not fit a worker's memory.
    """
    wanted = work.wanted()
    if not wanted:
        return
    root = workspace.store.root.absolute()
    first, layout = next(iter(work.sites.values())), next(iter(work.layouts.values()))
    tokens = Reference.to(work.table.artifact, root)
    opening = _WindowOpening(work.config, tokens, work.model.identity, dict(work.layouts))
    job = job_for(first, workspace, workspace.provenance(threads=THREADS), opening)
    with deferred_interruption() as interruption, open_cluster(workspace) as cluster, Attempts(first) as attempts:
        pieces = (
            _Piece(window, names, attempts.begin(unit_name(window)).absolute().relative_to(root))
            for window, names in wanted
        )
        with closing(cluster.completed(job, pieces, interruption)) as answers:
            for piece, written in answers:
                for name, records in written.files.items():
                    folder = root / written.folder / _site_folder(piece, name)
                    accept(work.sites[name], unit_name(piece.window), folder, records)
                attempts.end(root / piece.folder)
                advance(layout.window_rows, note=str(cluster))
    interruption.stop_if_asked()


@contextmanager
def harvester_of(
    config: HarvestConfig, model: LanguageModel, table: TokenTable, layouts: Mapping[str, Layout], threads: int
) -> Generator[WindowHarvester]:
    """What computes windows, with one thread of arithmetic a batch."""
    with single_threaded(), _new_harvester(config, model, table, layouts, threads) as harvester:
        yield harvester


def _new_harvester(
    config: HarvestConfig, model: LanguageModel, table: TokenTable, layouts: Mapping[str, Layout], threads: int
) -> WindowHarvester:
    return WindowHarvester(
        model, table, layouts, threads=threads, model_batch_prompts=config.model_batch_prompts,
        second_moment_stride=config.second_moment_stride,
    )  # fmt: skip


class _WindowWriter:
    """Writes one window of every site behind the computation; its error surfaces at the next call."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._pending: Future[None] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        self.wait()
        self._pending = self._pool.submit(work)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


@contextmanager
def _one_writer() -> Generator[_WindowWriter]:
    with ThreadPoolExecutor(1, "sparsemill-writer") as pool:
        writer = _WindowWriter(pool)
        yield writer
        writer.wait()


def _write(sites: Mapping[str, Staging], windows: Mapping[str, Window], harvester: WindowHarvester) -> None:
    for name, window in windows.items():
        sites[name].finish(unit_name(window.buffer.window), window.write(sites[name].folder))
        harvester.recycle(name, window)


@dataclass(frozen=True)
class _Piece:
    """A window as a worker gets it; ``folder`` is that of attempts at it, below the artifact root."""

    window: int
    hook_names: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class _Written:
    """What a worker wrote: by hook name the files, in a folder each of ``folder``, below the artifact root."""

    folder: Path
    files: Mapping[str, Mapping[str, FileRecord]]


@dataclass(frozen=True)
class _WindowOpening:
    """Opens, on a worker, what windows need."""

    config: HarvestConfig
    tokens: Reference
    model_identity: Mapping[str, str]
    layouts: Mapping[str, Layout]

    def __call__(self, site: Site) -> "_WindowWorker":
        workspace, config = site.workspace, self.config
        model = language_model.load(config.language_model, device=workspace.runtime.device, dtype=config.forward_dtype)
        if model.identity != self.model_identity:
            raise ConfigError(
                f"a worker has another model {model.name} than the coordinator", where=site.name,
                found=model.identity, expected=self.model_identity, remedy="give all machines the same model files",
            )  # fmt: skip
        require_memory(
            list(self.layouts.values()),
            model_batch_prompts=config.model_batch_prompts,
            model_width=model_width(model),
            workers=workspace.threads,
            windows=1,
            budget_bytes=site.budget_bytes,
            where=f"worker {site.name}",
        )
        table = TokenTable(self.tokens.open(site.root))
        return _WindowWorker(site.root, _new_harvester(config, model, table, self.layouts, workspace.threads))


class _WindowWorker:
    """Computes and writes windows on a worker."""

    def __init__(self, root: Path, harvester: WindowHarvester):
        self._root = root
        self._harvester = harvester

    def __call__(self, piece: _Piece) -> _Written:
        attempt = Attempt(self._root / piece.folder)

        def advance(done: int = 1, *, note: str = "") -> None:  # noqa: ARG001
            attempt.go_on()

        with single_threaded():
            windows = self._harvester.compute(piece.window, piece.hook_names, advance)
        files: dict[str, dict[str, FileRecord]] = {}
        for name, window in windows.items():
            folder = attempt.folder / _site_folder(piece, name)
            files[name] = window.write(folder)
            self._harvester.recycle(name, window)
        attempt.keep([f"{_site_folder(piece, name)}/{file}" for name, records in files.items() for file in records])
        return _Written(piece.folder / attempt.folder.name, files)


def _site_folder(piece: _Piece, hook_name: str) -> str:
    return str(piece.hook_names.index(hook_name))
