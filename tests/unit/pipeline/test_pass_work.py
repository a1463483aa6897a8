"""Passes on a cluster, without one: its pieces are computed as soon as they are asked for."""

import pickle
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import pass_work as module
from pipeline.analysis import Context
from pipeline.analysis.passes import Here, Pass
from pipeline.cluster_worker import Job, Site
from pipeline.config import Runtime
from pipeline.interruption import Interruption
from pipeline.memory import resident_bytes
from pipeline.pass_work import PassWork, open_pass_work
from pipeline.progress import Advance, Quiet
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import MemoryBudgetExceeded, RemoteError

CONTEXT = Context(
    sae=Autoencoder(torch.ones(2, 3), torch.ones(3), torch.ones(3, 2), torch.zeros(2), subtract_b_dec=True),
    hook_name="blocks.0.mlp.hook_post",
)


def squares(context: Context) -> Callable[[Sequence[Sequence[int]]], Iterator[tuple[int, int]]]:
    """Of a batch the sum of squares, and the threads that torch computed with."""
    opened_with = torch.get_num_threads()

    def parts(batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        for batch in batches:
            assert torch.get_num_threads() == opened_with
            yield sum(number**2 for number in batch), opened_with

    assert context.sae.d_sae == 3
    return parts


BATCHES = [range(start, min(start + 7, 100)) for start in range(0, 100, 7)]
WORK: Pass[Sequence[int], tuple[int, int]] = Pass(
    "squares", "numbers", BATCHES, frozenset(), {"numbers": 2**28}, squares
)


def on_site(site: Site, reads: frozenset[Any]) -> Context:
    assert site.name == "tcp://worker:1"
    assert not reads
    return CONTEXT


class Pool:
    """In place of a cluster; pieces are sent to it, and answers back, as bytes."""

    n_workers = 2

    def __init__(self, workspace: Workspace, budget_bytes: int | None = None):
        self.site = Site(workspace, budget_bytes, "tcp://worker:1")
        self.pieces: list[Any] = []
        self.before_each: Callable[[Interruption], None] = lambda _: None

    def __str__(self) -> str:
        return "2 workers"

    def in_order(self, job: Job[Any, Any], pieces: Iterable[Any], interruption: Interruption) -> Generator[Any]:
        compute = pickle.loads(pickle.dumps(job.opening))(self.site)
        for piece in pieces:
            self.before_each(interruption)
            if interruption.signal is not None:
                return
            self.pieces.append(piece)
            yield pickle.loads(pickle.dumps(compute(pickle.loads(pickle.dumps(piece)))))


class Watched(Quiet):
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, str]] = []

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:
        assert (label, total, unit, start) == ("squares", 100, "numbers", 0)
        yield lambda done=1, *, note="": self.shown.append((done, note))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    before = torch.get_num_threads()
    yield Workspace.open(Runtime(root=tmp_path, threads=3, workers=2), Watched())
    torch.set_num_threads(before)


def run(workspace: Workspace, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The pass, computed for an artifact that is being made."""
    found: list[tuple[int, int]] = []

    @contextmanager
    def opened(_: Workspace) -> Iterator[Pool]:
        yield pool

    monkeypatch.setattr(module, "open_cluster", opened)

    def produce(staging: Staging) -> Result:
        with open_pass_work(workspace) as work:
            found.extend(work.passes(staging, on_site).in_order(WORK, CONTEXT))
        return Result({})

    ArtifactStore(workspace.store.root).make(Spec("analyze", 1, {}), produce, provenance={})
    return found


def test_parts_come_in_the_order_of_the_batches_and_progress_is_shown(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    pool = Pool(workspace)
    found = run(workspace, pool, monkeypatch)
    assert [part for part, _ in found] == [sum(number**2 for number in batch) for batch in BATCHES]
    assert [len(piece.batches) for piece in pool.pieces] == [4, 4, 4, 3]
    assert len({*pool.pieces}) == 4
    reporter: Any = workspace.reporter
    assert reporter.shown == [(7, "2 workers")] * 14 + [(2, "2 workers")]


def test_a_worker_computes_with_the_threads_on_record_whatever_it_was_given(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)
    assert {threads for _, threads in run(workspace, Pool(workspace), monkeypatch)} == {workspace.threads} == {3}
    assert torch.get_num_threads() == 1


def test_a_pass_beyond_a_workers_memory_is_refused_naming_both(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    assert run(workspace, Pool(workspace, resident_bytes() + 2**29), monkeypatch)
    pool = Pool(workspace, resident_bytes() + 2**20)
    other = Workspace.open(workspace.runtime.model_copy(update={"root": workspace.store.root / "other"}), Watched())
    with pytest.raises(MemoryBudgetExceeded, match=r"squares does not fit .*tcp://worker:1.*256.0 MiB \(numbers"):
        run(other, pool, monkeypatch)
    assert pool.pieces == []


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_asked_to_stop_no_part_of_the_pass_passes_for_the_whole(
    number: signal.Signals, stop: type[BaseException], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    pool = Pool(workspace)
    pool.before_each = lambda _: signal.raise_signal(number) if pool.pieces else None
    with pytest.raises(stop):
        run(workspace, pool, monkeypatch)
    assert len(pool.pieces) == 1
    assert not [*workspace.store.root.glob("analyze/*")]


def test_no_cluster_is_asked_before_a_pass_begins_and_one_serves_all(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[Pool] = []

    @contextmanager
    def open_pool(_: Workspace) -> Iterator[Pool]:
        opened.append(Pool(workspace))
        yield opened[0]

    monkeypatch.setattr(module, "open_cluster", open_pool)

    def produce(staging: Staging) -> Result:
        with open_pass_work(workspace) as work:
            passes = [work.passes(staging, on_site) for _ in range(3)]
            assert not opened
            for one in passes:
                assert len([*one.in_order(WORK, CONTEXT)]) == len(BATCHES)
        return Result({})

    ArtifactStore(tmp_path).make(Spec("analyze", 1, {}), produce, provenance={})
    assert len(opened) == 1


def test_a_cluster_that_has_gone_is_opened_anew_where_the_stage_is_tried_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[Pool] = []
    ended: list[Pool] = []

    @contextmanager
    def open_pool(_: Workspace) -> Iterator[Pool]:
        opened.append(Pool(workspace))
        yield opened[-1]
        ended.append(opened[-1])

    def gone(_: Interruption) -> None:
        raise RemoteError("the Dask scheduler does not answer any more", transient=True)

    monkeypatch.setattr(module, "open_cluster", open_pool)

    def produce(staging: Staging) -> Result:
        with open_pass_work(workspace) as work:
            passes = work.passes(staging, on_site)
            stream = passes.in_order(WORK, CONTEXT)
            next(stream)
            opened[0].before_each = gone
            with pytest.raises(RemoteError, match="does not answer any more"):
                list(stream)
            assert ended == opened
            assert len([*passes.in_order(WORK, CONTEXT)]) == len(BATCHES)
        return Result({})

    ArtifactStore(tmp_path).make(Spec("analyze", 1, {}), produce, provenance={})
    assert len(opened) == len(ended) == 2


def test_without_a_cluster_passes_are_computed_here(tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path), Watched())
    with ExitStack() as stack:
        passes = PassWork(workspace, stack).passes(None, on_site)  # type: ignore[arg-type]
    assert passes == Here(workspace.reporter)
    assert len([*passes.in_order(WORK, CONTEXT)]) == len(BATCHES)
