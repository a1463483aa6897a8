"""Handing out without a cluster: a client whose workers answer, die and refuse as a test says."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import cluster as module
from pipeline import text_encoding
from pipeline.cluster import Cluster, open_cluster
from pipeline.cluster_worker import Job, Reference, Terms, WorkerRefused, code_digest, difference
from pipeline.cluster_worker import _root as root_of  # pyright: ignore[reportPrivateUsage]
from pipeline.config import Runtime
from pipeline.interruption import Interruption
from pipeline.memory import encoder_needs
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from sae.kernels.encoder import SparseEncoder
from sae.kernels.screen import Screen
from storage.artifacts import ArtifactStore, Result, Spec
from storage.errors import ArtifactNotFound, ConfigError, RemoteError, WorkersLost

JOB: Job[int, int] = Job("", Terms(Path("/"), "", "cpu", {}, ""), lambda _: abs)


class Future:
    def __init__(self, address: str, piece: int):
        self.address, self.piece = address, piece
        self.status = "pending"
        self.answer: Any = None

    def done(self) -> bool:
        return self.status != "pending"

    def result(self, _timeout: float | None = None) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Client:
    """Workers by address; ``step`` is called whenever the coordinator waits."""

    def __init__(self, *addresses: str):
        self.addresses = list(addresses)
        self.handed: list[tuple[str, int]] = []
        self.futures: list[Future] = []
        self.cancelled: list[Future] = []
        self.step: Callable[[Client], None] = Client.answer_all

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(self.addresses, 1)

    def submit(self, _work: object, _job: object, piece: int, *, workers: list[str], **_: object) -> Future:
        self.handed.append((workers[0], piece))
        self.futures.append(Future(workers[0], piece))
        return self.futures[-1]

    def cancel(self, futures: list[Future], **_: object) -> None:
        self.cancelled += futures

    def run(self, *_: object, **__: object) -> None:
        pass

    @contextmanager
    def as_current(self) -> Iterator[None]:
        self.step(self)
        yield

    def answer_all(self) -> None:
        for future in self.futures:
            if not future.done() and future.address in self.addresses:
                future.status, future.answer = "finished", 10 * future.piece


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.wait", lambda *_: None)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


def cluster_of(client: Client, lines: list[str] | None = None) -> Cluster:
    return Cluster(client, "tcp://scheduler", ([] if lines is None else lines).append)  # type: ignore[arg-type]


def test_each_piece_is_done_once_and_a_worker_has_one_at_a_time():
    client = Client("a", "b")
    found = dict(cluster_of(client).completed(JOB, range(5), Interruption()))
    assert found == {piece: 10 * piece for piece in range(5)}
    assert client.handed == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]


def test_a_dead_workers_piece_goes_to_another_and_its_late_answer_is_not_taken():
    client = Client("a", "b")

    def b_dies(client: Client) -> None:
        client.addresses = ["a"]
        client.step = late
        client.answer_all()

    def late(client: Client) -> None:
        client.futures[1].status, client.futures[1].answer = "finished", "late"
        client.answer_all()

    client.step = b_dies
    lines: list[str] = []
    found = list(cluster_of(client, lines).completed(JOB, range(3), Interruption()))
    assert lines == ["  worker b has gone; what it had goes to another"]
    assert sorted(found) == [(0, 0), (1, 10), (2, 20)]
    assert client.handed == [("a", 0), ("b", 1), ("a", 1), ("a", 2)]
    assert client.futures[1] in client.cancelled


def test_an_answer_that_died_with_its_worker_is_asked_for_again():
    client = Client("a")

    def lose(client: Client) -> None:
        client.futures[0].status, client.futures[0].answer = "cancelled", CancelledError()
        client.step = Client.answer_all

    client.step = lose
    assert list(cluster_of(client).completed(JOB, [7], Interruption())) == [(7, 70)]
    assert client.handed == [("a", 7), ("a", 7)]


def test_a_piece_that_kills_worker_after_worker_is_given_up_and_named():
    client = Client("worker-0")

    def die(client: Client) -> None:
        client.addresses = [f"worker-{len(client.handed)}"]

    client.step = die
    with pytest.raises(WorkersLost, match="3 workers died over one piece of the work; where: 7"):
        list(cluster_of(client).completed(JOB, [7], Interruption()))
    assert [address for address, _ in client.handed] == ["worker-0", "worker-1", "worker-2"]


def test_a_worker_that_refuses_is_left_out_and_its_piece_done_elsewhere():
    client, lines = Client("a", "b"), list[str]()

    def a_refuses(client: Client) -> None:
        client.futures[0].status, client.futures[0].answer = "error", WorkerRefused("torch 1 (here 2)")
        client.step = Client.answer_all

    client.step = a_refuses
    cluster = cluster_of(client, lines)
    assert dict(cluster.completed(JOB, range(3), Interruption())) == {0: 0, 1: 10, 2: 20}
    assert [address for address, _ in client.handed] == ["a", "b", "b", "b"]
    assert lines == ["  worker a does not take part: torch 1 (here 2)"]
    assert cluster.n_workers == 1


def test_where_every_worker_refuses_the_reasons_are_told():
    client = Client("a")

    def refuse(client: Client) -> None:
        client.futures[0].status, client.futures[0].answer = "error", WorkerRefused("torch 1 (here 2)")

    client.step = refuse
    with pytest.raises(ConfigError, match=r"found a: torch 1 \(here 2\)"):
        list(cluster_of(client).completed(JOB, range(3), Interruption()))


def test_a_worker_that_comes_later_takes_part():
    client, lines = Client(), list[str]()
    cluster = cluster_of(client, lines)
    asked = client.nthreads
    client.nthreads = lambda: client.addresses.append("a") or asked() if lines else asked()  # type: ignore[method-assign]
    assert list(cluster.completed(JOB, [1], Interruption())) == [(1, 10)]
    assert lines == ["  waiting for workers at tcp://scheduler"]


def test_an_error_of_the_work_comes_through_and_the_rest_is_cancelled():
    client = Client("a", "b")

    def fail(client: Client) -> None:
        client.futures[0].status, client.futures[0].answer = "error", TimeoutError("the work's own")

    client.step = fail
    with pytest.raises(TimeoutError, match="own"):
        list(cluster_of(client).completed(JOB, range(9), Interruption()))
    assert [future.piece for future in client.cancelled] == [1]


def test_results_in_order_are_never_far_ahead_of_a_slow_one():
    client = Client("a", "b")

    def a_answers_late(client: Client) -> None:
        if len(client.handed) == 2 * 4:
            client.step = Client.answer_all
        for future in client.futures[1:]:
            if not future.done():
                future.status, future.answer = "finished", 10 * future.piece

    client.step = a_answers_late
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    stream = cluster_of(client).in_order(JOB, endless(), Interruption())
    assert next(stream) == 0
    assert len(taken) == 2 * 4
    assert list(islice(stream, 39)) == [10 * piece for piece in range(1, 40)]
    assert len(taken) <= 40 + 2 * 4


def test_small_pieces_are_done_by_all_threads_of_a_worker_and_one_more_waits():
    client = Client("a", "b")
    client.nthreads = lambda: {"a": 1, "b": 3}  # type: ignore[method-assign]
    pieces = cluster_of(client).in_order(replace(JOB, small=True), range(9), Interruption())
    assert list(pieces) == [10 * piece for piece in range(9)]
    assert client.handed[:6] == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("b", 4), ("b", 5)]


def test_all_that_a_dead_worker_had_goes_to_another():
    client, lines = Client("a", "b"), list[str]()

    def b_dies(client: Client) -> None:
        client.addresses = ["a"]
        client.step = Client.answer_all

    client.step = b_dies
    pieces = cluster_of(client, lines).in_order(replace(JOB, small=True), range(5), Interruption())
    assert list(pieces) == [10 * piece for piece in range(5)]
    assert lines == ["  worker b has gone; what it had goes to another"]
    assert client.handed == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 1), ("a", 3), ("a", 4)]


def test_asked_to_stop_hands_nothing_out_any_more_and_keeps_what_has_come():
    client, interruption = Client("a"), Interruption()

    def stop(client: Client) -> None:
        client.answer_all()
        interruption.note(signal.SIGTERM, None)

    client.step = stop
    assert list(cluster_of(client).completed(JOB, range(9), interruption)) == [(0, 0)]
    assert client.handed == [("a", 0)]


def test_an_abandoned_stream_cancels_what_is_under_way():
    client = Client("a", "b")
    stream = cluster_of(client).completed(JOB, range(9), Interruption())
    assert list(islice(stream, 1)) == [(0, 0)]
    stream.close()
    assert {future.piece for future in client.cancelled} == {2, 3}


def test_no_scheduler_is_an_error_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    workspace = Workspace.open(Runtime(root=tmp_path, dask="tcp://127.0.0.1:9"))
    with (
        pytest.raises(RemoteError, match=r"no Dask scheduler answers; where: tcp://127") as refused,
        open_cluster(workspace),
    ):
        pass
    assert refused.value.transient


def test_an_address_without_a_port_is_refused_for_good(tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path, dask="nowhere"))
    with (
        pytest.raises(RemoteError, match="where: nowhere; found missing port number") as refused,
        open_cluster(workspace),
    ):
        pass
    assert not refused.value.transient


def test_numerics_and_sources_that_differ_are_named(tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path, threads=1))
    here = workspace.provenance(threads=7)
    terms = Terms(tmp_path, "", "cpu", here, code_digest())
    assert difference(terms, workspace) == ""
    other = Terms(tmp_path, "", "cpu", here | {"torch": "1.0"}, "0" * 64)
    assert difference(other, workspace) == (
        f"torch {here['torch']} (here 1.0), sparsemill's sources {code_digest()[:12]} (here {'0' * 12})"
    )


def test_a_worker_with_another_version_of_the_tokenizers_is_refused(tmp_path: Path):
    workspace, here = Workspace.open(Runtime(root=tmp_path, threads=1)), text_encoding.provenance()
    terms = Terms(tmp_path, "", "cpu", here, code_digest())
    assert difference(terms, workspace) == ""
    other = replace(terms, provenance=here | {"tokenizers": "0.1"})
    assert difference(other, workspace) == f"tokenizers {here['tokenizers']} (here 0.1)"


def test_the_root_is_the_coordinators_or_else_the_workers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    terms = Terms(theirs, ".staging/x", "cpu", {}, "")
    monkeypatch.setenv("SPARSEMILL_HOME", str(own))
    with pytest.raises(WorkerRefused, match="does not see the artifact root"):
        root_of(terms)
    (own / ".staging" / "x").mkdir(parents=True)
    assert root_of(terms) == own
    (theirs / ".staging" / "x").mkdir(parents=True)
    assert root_of(terms) == theirs


def test_an_artifact_is_found_below_another_root_and_only_if_it_is_the_same(tmp_path: Path):
    def make(root: Path, text: bytes) -> Any:
        store = ArtifactStore(root)

        def produce(staging: Any) -> Result:
            staging.write_bytes("data", text)
            return Result({})

        return store.make(Spec("tokenize", 1, {}), produce, provenance={}).artifact

    artifact = make(tmp_path / "one", b"same")
    make(tmp_path / "two", b"same")
    make(tmp_path / "three", b"other")
    reference = Reference.to(artifact, tmp_path / "one")
    assert reference.open(tmp_path / "two").read_bytes("data") == b"same"
    with pytest.raises(ArtifactNotFound, match="does not see"):
        reference.open(tmp_path / "three")
    with pytest.raises(ArtifactNotFound):
        reference.open(tmp_path / "four")
    elsewhere = Reference.to(artifact, tmp_path / "two")  # not below that root: by its whole path
    assert elsewhere.open(tmp_path / "two").folder == artifact.folder


def test_an_encoder_holds_no_more_than_a_worker_counts():
    sae = Autoencoder(torch.ones(8, 512), torch.ones(512), torch.ones(512, 8), torch.zeros(8), subtract_b_dec=True)
    encoder = SparseEncoder(sae, threads=1)
    needs = encoder_needs(d_in=8, d_sae=512, threads=1, batch_rows=100)
    assert encoder._enc.nbytes + encoder._view.rounded.nbytes <= needs["its encoder"]
    screen = Screen(8, 512, bfloat16=False)
    assert screen._approx.nbytes + screen.found.nbytes <= 1.1 * needs["screens"]
    assert (
        sum(tensor.nbytes for tensor in (sae.W_enc, sae.W_dec)) * 2
        <= needs["the autoencoder, and its file as it is read"]
    )
