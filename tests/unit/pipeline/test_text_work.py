"""Texts on a cluster, without one: a cluster that a test makes."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import text_encoding, text_work
from pipeline.cluster_worker import Job, Site
from pipeline.config import Runtime, Source, TokenizeConfig, load_preset
from pipeline.interruption import Interruption
from pipeline.model_files import find_files
from pipeline.progress import Quiet
from pipeline.text_encoding import TextEncoder, Texts, ThreadWork
from pipeline.text_work import ClusterWork, EncodedTexts, encoder_for
from pipeline.workspace import Workspace
from storage.errors import ConfigError
from tests.unit.pipeline.test_text_encoding import row, text


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv(text_encoding.SWITCH, "false")  # which opening sets: put back behind the test
    return Site(Workspace.open(Runtime(root=tmp_path), Quiet()), None, "tcp://worker:1")


class Cluster:
    """A worker in this process, which a stop is asked of after so many batches."""

    def __init__(self, work: Callable[[Texts], EncodedTexts], interruption: Interruption, last: int | None = None):
        self._work, self._interruption, self._last = work, interruption, last

    def in_order(self, _job: object, batches: Iterable[Texts], _interruption: object) -> Iterator[EncodedTexts]:
        for number, batch in enumerate(batches):
            if number == self._last:
                self._interruption.note(signal.SIGINT, None)
                return
            yield self._work(batch)

    def __str__(self) -> str:
        return "3 workers"


def opening() -> text_work._Opening:
    return text_work._Opening("demo", find_files("demo").tokenizer_sha256)


def cluster_work(cluster: Cluster, interruption: Interruption) -> ClusterWork:
    job: Job[Any, Any] = Job("", None, opening(), small=True)  # type: ignore[arg-type]
    return ClusterWork(cluster, job, interruption, ExitStack())  # type: ignore[arg-type]


def test_a_workers_ids_are_those_of_threads(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_encoding, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(ClusterWork, "batch_characters", 3000)
    tokenizer, interruption = find_files("demo").read_tokenizer(), Interruption()
    rows = [row(i, text(1 + 37 * i % 700, seed=i)) for i in range(50)]
    rows.append(row(50, text(40, seed=3)))
    known = rows[7].content.digest  # type: ignore[union-attr]
    work = cluster_work(Cluster(opening()(site), interruption), interruption)
    encoder = TextEncoder(tokenizer, work)
    found = list(encoder.encode(rows, {known}.__contains__))
    with ThreadWork(tokenizer, 1) as threads:
        expected = list(TextEncoder(tokenizer, threads).encode(rows, {known}.__contains__))
    assert [one.row for one in found] == [one.row for one in expected]
    assert found[7].ids is None
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(one.ids or [[]]), np.concatenate(other.ids or [[]]))
    assert encoder.note == "3 workers"
    assert os.environ[text_encoding.SWITCH] == "false"


def test_a_stop_is_not_taken_for_the_end_of_a_source(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ClusterWork, "batch_characters", 100)
    interruption = Interruption()
    work = cluster_work(Cluster(opening()(site), interruption, last=2), interruption)
    encoded = TextEncoder(find_files("demo").read_tokenizer(), work).encode(
        [row(i, text(20, seed=i)) for i in range(9)], frozenset[int]().__contains__
    )
    next(encoded)
    next(encoded)
    with pytest.raises(KeyboardInterrupt):
        next(encoded)


def test_a_worker_with_another_tokenizer_is_named(site: Site):
    with pytest.raises(ConfigError, match=r"another tokenizer of demo than the coordinator; where: tcp://worker:1"):
        text_work._Opening("demo", "0" * 64)(site)


def test_no_cluster_is_asked_for_rows_of_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    @contextmanager
    def refused(_: Workspace) -> Iterator[None]:
        raise ConfigError("a cluster")
        yield

    monkeypatch.setattr(text_work, "open_cluster", refused)
    files = find_files("demo")
    workspace = Workspace.open(Runtime(root=tmp_path, workers=2), Quiet())

    def enter(config: TokenizeConfig) -> str:
        with encoder_for(config, files, files.read_tokenizer(), workspace, None) as encoder:  # type: ignore[arg-type]
            return encoder.note

    texts = load_preset("demo").tokenize
    with pytest.raises(ConfigError, match="a cluster"):
        enter(texts)
    rows = Source(name="ids", kind="tokenized", files=("ids.jsonl",))
    assert enter(texts.model_copy(update={"sources": (rows,)})) == ""
