"""Stages on a Dask cluster of separate processes: the bytes of a single process, whatever happens to the workers."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from safetensors.torch import load_file, save_file

import sparsemill
from pipeline import sharing, surveying, text_encoding, text_work, tokenizing, window_work
from pipeline.cli.options import workspace_at
from pipeline.cluster_worker import Reference, Site
from pipeline.config import Runtime, SurveyConfig, load_preset
from pipeline.harvest import recorded_config, recorded_layout
from pipeline.memory import resident_bytes
from pipeline.progress import Advance, Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.errors import ConfigError, MemoryBudgetExceeded, NumericsError
from storage.remote import RemoteStore

ROOT = Path(__file__).parents[2]
BOTH = 'harvest.also_hook_names=["blocks.0.hook_mlp_out"]'
SURVEY = SurveyConfig(rows=34_000, top_firings=4, sample_firings=8, kept_firings=16)
WINDOWS = range(9)
ANALYSES = ("loss_recovered", "rare_direction", "case_studies")
PASSES = {"loss_recovered", "gradients", "projections", "example"}
ANALYSED = (
    BOTH,
    "analyze.survey.rows=34000",
    'analyze.options.loss_recovered={"micro_batch_prompts": 1}',
    'analyze.options.rare_direction={"ultra_low_below": 0.9, "gradient_prompts": 29, "micro_batch_prompts": 3}',
    'analyze.options.case_studies={"micro_batch_prompts": 16}',
)
# Runs in each worker: says which windows it computes, how they end, which batches of texts it encodes, and which pieces
# of which analysis' passes it computes; each takes as many seconds more as a file says.
PRELOAD = """
import os, time
from pathlib import Path
from pipeline import pass_work, text_work, windows
folder = Path(os.environ["SPARSEMILL_TEST_LOG"])
def say(*words):
    with (folder / "log").open("a") as log:
        print(*words, os.getpid(), file=log)
def slow(self, window, hook_names, advance):
    say("begun", window)
    time.sleep(float((folder / "slow").read_text()))
    try:
        return compute(self, window, hook_names, advance)
    except Exception as error:
        say(type(error).__name__, window)
        raise
if windows.WindowHarvester.compute.__name__ == "compute":  # Dask runs this file twice
    compute, windows.WindowHarvester.compute = windows.WindowHarvester.compute, slow
def slowly(self, site):
    encode = opened(self, site)
    def encode_slowly(batch):
        say("texts", batch.number)
        time.sleep(float((folder / "slow").read_text()))
        return encode(batch)
    return encode_slowly
if text_work._Opening.__call__.__name__ == "__call__":
    opened, text_work._Opening.__call__ = text_work._Opening.__call__, slowly
def haltingly(self, site):
    compute = prepared(self, site)
    def compute_haltingly(piece):
        say(self.label.split()[0], piece.first)
        time.sleep(float((folder / "slow").read_text()))
        return compute(piece)
    return compute_haltingly
if pass_work._Opening.__call__.__name__ == "__call__":
    prepared, pass_work._Opening.__call__ = pass_work._Opening.__call__, haltingly
"""
# The command line, whose rounds and batches are as small as those of the fixture ``small_rounds``.
SMALL = """
from pipeline import cli, text_work, tokenizing
tokenizing.PROMPTS_PER_ROUND, text_work.ClusterWork.batch_characters = 400, 8000
cli.main()
"""


class Watched(Quiet):
    """Remembers the notes beside a bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    @contextmanager
    def track(self, *_: object, **__: object) -> Generator[Advance]:
        def advance(done: int = 1, *, note: str = "") -> None:
            self.notes.append(note)

        yield advance

    def say(self, message: str) -> None:
        self.lines.append(message)


class Log:
    """What the workers of a test said."""

    def __init__(self, folder: Path):
        self._folder = folder
        (folder / "log").write_text("")
        self.sleep(0.4)

    def sleep(self, seconds: float) -> None:
        """How long a window takes from now on."""
        (self._folder / "slow").write_text(str(seconds))

    def said(self) -> list[tuple[str, int, int]]:
        """(what, window, pid) in order."""
        lines = [line.split() for line in (self._folder / "log").read_text().splitlines()]
        return [(what, int(window), int(pid)) for what, window, pid in lines]

    def begun(self) -> Counter[int]:
        return Counter(window for what, window, _ in self.said() if what == "begun")

    def wait(self, wanted: Callable[[list[tuple[str, int, int]]], bool]) -> None:
        deadline = time.monotonic() + 300
        while not wanted(self.said()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("log")
    (folder / "preload.py").write_text(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEMILL_TEST_LOG", str(folder))
        yield folder


@pytest.fixture
def log(log_folder: Path) -> Log:
    return Log(log_folder)


@pytest.fixture(scope="module")
def cluster(log_folder: Path) -> Iterator[LocalCluster]:
    preload = [str(log_folder / "preload.py")]
    with (
        dask.config.set({"distributed.worker.preload": preload, "distributed.deploy.lost-worker-timeout": "1h"}),
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0") as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def single(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of everything."""
    root = tmp_path_factory.mktemp("single") / "store"
    sae = chain(root, tiny_preset, BOTH).train()
    surveying.survey(SURVEY, sae, workspace_in(root))
    return root


@pytest.fixture
def root(single: Path, tmp_path: Path) -> Path:
    """A store that has the prompts alone."""
    shutil.copytree(single / "tokenize", tmp_path / "store" / "tokenize")
    shutil.copy(single / "sparsemill-store.json", tmp_path / "store")
    return tmp_path / "store"


def workspace_in(root: Path, cluster: LocalCluster | None = None, reporter: Quiet | None = None) -> Workspace:
    address = None if cluster is None else cluster.scheduler_address
    return Workspace.open(Runtime(root=root, threads=1, dask=address), reporter)


def chain(root: Path, preset: Path, *overrides: str, **place: object) -> Chain:
    return Chain(load_preset(str(preset), overrides), workspace_in(root, **place), run_directly)  # type: ignore[arg-type]


def manifests(root: Path, stage: str) -> dict[str, bytes]:
    """Manifests hold every file's sha256."""
    return {path.parent.name: path.read_bytes() for path in root.glob(f"{stage}/*/manifest.json")}


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny corpus seven rounds, and some tens of batches."""
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 400)
    monkeypatch.setattr(text_work.ClusterWork, "batch_characters", 8000)


@pytest.fixture(scope="module")
def mixture(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources of one text: what one has of the other's is left out; and bad lines, rows of ids, and a long text."""
    folder = tmp_path_factory.mktemp("mixture")
    lines = tiny_corpus.read_text().splitlines()
    long = " ".join(json.loads(line)["text"] for line in lines[1000:1300])
    other = [*lines[:40], "{", json.dumps({"text": long}), json.dumps({"text": " "}), *reversed(lines[900:])]
    (folder / "other.jsonl").write_text("\n".join(other))
    (folder / "ids.jsonl").write_text("".join(json.dumps({"tokens": [i % 60] * 64}) + "\n" for i in range(200)))
    sources = [
        {"name": "words", "kind": "files", "files": [str(tiny_corpus)], "share": 0.5},
        {"name": "other", "kind": "files", "files": [str(folder / "other.jsonl")], "share": 0.4},
        {"name": "ids", "kind": "tokenized", "files": [str(folder / "ids.jsonl")], "share": 0.1},
    ]
    return f"tokenize.sources={json.dumps(sources)}"


@pytest.mark.usefixtures("small_rounds")
def test_prompts_have_the_hashes_of_a_single_process(
    cluster: LocalCluster, tiny_preset: Path, mixture: str, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_encoding, "PIECE_CHARACTERS", 5000)
    log.sleep(0)
    settings, watched = (mixture, "tokenize.on_bad_document=skip"), Watched()
    one = chain(tmp_path / "one", tiny_preset, *settings).tokenize()
    chain(tmp_path / "many", tiny_preset, *settings, cluster=cluster, reporter=watched).tokenize()
    assert manifests(tmp_path / "many", "tokenize") == manifests(tmp_path / "one", "tokenize")
    assert {name for name in one.manifest.files if name.startswith("train")} == {
        f"train-{number:05d}.arrow" for number in range(7)
    }
    assert facts(one)["train"]["sources"]["other"]["duplicates_left_out"] >= 40
    assert facts(one)["bad_documents"] == {"malformed line": 1, "empty text": 1}
    assert len({pid for what, _, pid in log.said() if what == "texts"}) == 2
    assert "2 workers" in watched.notes


@pytest.mark.usefixtures("small_rounds")
def test_a_worker_that_is_killed_costs_the_batches_that_it_had(
    cluster: LocalCluster, tiny_preset: Path, mixture: str, tmp_path: Path, log: Log
):
    settings = (mixture, "tokenize.on_bad_document=skip")
    chain(tmp_path / "one", tiny_preset, *settings).tokenize()
    with Client(cluster, set_as_default=False) as client, ThreadPoolExecutor(1) as pool:
        client.wait_for_workers(2, timeout=300)
        made = pool.submit(chain(tmp_path / "many", tiny_preset, *settings, cluster=cluster).tokenize)
        log.wait(lambda said: len({pid for _, _, pid in said}) == 2 and len(said) >= 6)
        log.sleep(5)
        before = len(log.said())
        log.wait(lambda said: len(said) >= before + 2)
        _, batch, pid = log.said()[-1]
        os.kill(pid, signal.SIGKILL)
        log.sleep(0)
        killed = len(log.said())
        made.result(timeout=300)
    assert batch in {number for _, number, other in log.said()[killed:] if other != pid}
    assert manifests(tmp_path / "many", "tokenize") == manifests(tmp_path / "one", "tokenize")


@pytest.mark.usefixtures("small_rounds")
def test_tokenizing_that_was_stopped_goes_on_with_a_cluster_or_without(
    cluster: LocalCluster, tiny_preset: Path, tmp_path: Path, log: Log, log_folder: Path
):
    chain(tmp_path / "one", tiny_preset).tokenize()
    root = tmp_path / "many"
    command = [sys.executable, "-c", SMALL, "tokenize", "--preset", str(tiny_preset), "--home", str(root)]
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__PRELOAD": f"['{log_folder / 'preload.py'}']"}
    places = {signal.SIGKILL: ("--workers", "1"), signal.SIGINT: ("--dask", cluster.scheduler_address)}
    rounds: list[int] = []
    for number, place in places.items():
        before = len(log.said())
        process = subprocess.Popen(
            [*command, *place], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log.wait(lambda said, before=before: len(said) >= before + 12)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(timeout=300)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
        assert not psutil.wait_procs(children, timeout=60)[1]
        assert not manifests(root, "tokenize")
        rounds.append(len(list(root.glob(".staging/tokenize-*/files/train-*.arrow"))))
    assert 1 <= rounds[0] < rounds[1] < 7
    chain(root, tiny_preset).tokenize()  # without a cluster, behind those rounds
    assert manifests(root, "tokenize") == manifests(tmp_path / "one", "tokenize")


@pytest.mark.usefixtures("small_rounds")
def test_a_cluster_goes_on_with_what_one_process_tokenized(
    cluster: LocalCluster, tiny_preset: Path, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
):
    log.sleep(0)
    chain(tmp_path / "one", tiny_preset).tokenize()
    finish = tokenizing.Tokenizing._finish_round

    def stop(self: tokenizing.Tokenizing, *arguments: object) -> None:
        finish(self, *arguments)  # type: ignore[arg-type]
        if len(self.staging.finished) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing.Tokenizing, "_finish_round", stop)
        with pytest.raises(KeyboardInterrupt):
            chain(tmp_path / "many", tiny_preset).tokenize()
    rest = chain(tmp_path / "many", tiny_preset, cluster=cluster)
    rest.tokenize()
    assert rest.runs[0].made.status == "resumed"
    assert manifests(tmp_path / "many", "tokenize") == manifests(tmp_path / "one", "tokenize")


def test_a_harvest_of_two_sites_has_the_hashes_of_a_single_process(
    cluster: LocalCluster, single: Path, root: Path, tiny_preset: Path, log: Log
):
    watched = Watched()
    chain(root, tiny_preset, BOTH, cluster=cluster, reporter=watched).harvest()
    assert manifests(root, "harvest") == manifests(single, "harvest")
    assert len(manifests(root, "harvest")) == 2
    assert log.begun() == Counter(WINDOWS)
    assert len({pid for _, _, pid in log.said()}) == 2
    assert "2 workers" in watched.notes
    assert list((root / ".staging").iterdir()) == []


def test_a_survey_has_the_hashes_of_a_single_process(
    cluster: LocalCluster, single: Path, root: Path, tiny_preset: Path
):
    for stage in ("harvest", "train"):
        shutil.copytree(single / stage, root / stage)
    watched = Watched()
    sae = chain(root, tiny_preset, BOTH).train()
    surveying.survey(SURVEY, sae, workspace_in(root, cluster, watched))
    assert manifests(root, "survey") == manifests(single, "survey")
    assert "2 workers" in watched.notes


@pytest.mark.parametrize("streams", [False, True], ids=["fetched", "read where it is"])
def test_workers_read_a_surveys_parents_from_a_remote(
    streams: bool, cluster: LocalCluster, single: Path, tiny_preset: Path, tmp_path: Path
):
    url, watched = (tmp_path / "remote").as_uri(), Watched()
    (tmp_path / "remote").mkdir()
    sae = chain(single, tiny_preset, BOTH).train()
    sharing.push(sae, RemoteStore(url), workspace_in(single), with_parents=True)
    runtime = Runtime(
        root=tmp_path / "store", threads=1, dask=cluster.scheduler_address, remote=None if streams else url
    )
    workspace = Workspace.open(runtime, watched)
    lent = workspace.store.resolve(f"{url}/train/{sae.id}" if streams else sae.id)
    surveying.survey(SURVEY, lent, workspace)
    assert manifests(tmp_path / "store", "survey") == manifests(single, "survey")
    assert "2 workers" in watched.notes
    assert [path.name for path in (tmp_path / "store").glob("[a-z]*/")] == ["survey"]
    assert bool(list((tmp_path / "store" / ".pulled").rglob("activations/c/*"))) != streams


@pytest.fixture(scope="module")
def analysed(single: Path, tiny_preset: Path) -> Path:
    """What one process makes of everything, and finds in it."""
    chain(single, tiny_preset, *ANALYSED).analyze(only=ANALYSES)
    return single


@pytest.fixture
def trained(analysed: Path, tmp_path: Path) -> Path:
    """A store whose autoencoder is yet to be analysed."""
    for stage in ("tokenize", "harvest", "train", "survey"):
        shutil.copytree(analysed / stage, tmp_path / "store" / stage)
    shutil.copy(analysed / "sparsemill-store.json", tmp_path / "store")
    return tmp_path / "store"


def test_analyses_have_the_hashes_of_a_single_process(
    cluster: LocalCluster, analysed: Path, trained: Path, tiny_preset: Path, log: Log
):
    log.sleep(0.05)
    watched = Watched()
    chain(trained, tiny_preset, *ANALYSED, cluster=cluster, reporter=watched).analyze(only=ANALYSES)
    assert manifests(trained, "analyze") == manifests(analysed, "analyze")
    assert len(manifests(trained, "analyze")) == 4
    assert {what for what, _, _ in log.said()} == PASSES
    assert len({pid for _, _, pid in log.said()}) == 2
    assert "2 workers" in watched.notes


def test_a_worker_that_is_killed_costs_a_piece_of_a_pass_alone(
    cluster: LocalCluster, analysed: Path, trained: Path, tiny_preset: Path, log: Log
):
    with Client(cluster, set_as_default=False) as client, ThreadPoolExecutor(1) as pool:
        client.wait_for_workers(2, timeout=300)  # the one that another test killed is back
        log.sleep(0.5)
        made = pool.submit(chain(trained, tiny_preset, *ANALYSED, cluster=cluster).analyze, only=ANALYSES)
        log.wait(lambda said: len(said) >= 4)
        log.sleep(4)
        before = len(log.said())
        log.wait(lambda said: len(said) >= before + 2)
        what, piece, pid = log.said()[-1]
        os.kill(pid, signal.SIGKILL)
        log.sleep(0)
        made.result(timeout=300)
    computed = Counter((what, piece) for what, piece, _ in log.said())
    assert {one: times for one, times in computed.items() if times > 1} == {(what, piece): 2}
    assert manifests(trained, "analyze") == manifests(analysed, "analyze")


def test_a_pass_that_is_stopped_ends_within_a_piece_and_the_same_command_makes_the_analysis(
    cluster: LocalCluster, analysed: Path, trained: Path, tiny_preset: Path, log: Log
):
    log.sleep(3)
    command = [sys.executable, "-m", "pipeline.cli", "analyze", "--preset", str(tiny_preset), "--home", str(trained)]
    command += [argument for setting in ANALYSED for argument in ("--set", setting)]
    command += ["--only", "loss_recovered", "--threads", "1", "--dask", cluster.scheduler_address]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log.wait(lambda said: len(said) >= 4)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=300)
    assert process.returncode == 130
    pieces = len(log.said())
    assert pieces < 7
    assert len(manifests(trained, "analyze")) == 1  # the densities
    log.sleep(0)
    chain(trained, tiny_preset, *ANALYSED, cluster=cluster).analyze(only=["loss_recovered"])
    assert manifests(trained, "analyze").items() <= manifests(analysed, "analyze").items()
    assert len(log.said()) == pieces + 10


def test_analyses_that_are_there_ask_for_no_cluster(analysed: Path, tiny_preset: Path):
    nobody = Workspace.open(Runtime(root=analysed, threads=1, dask="tcp://127.0.0.1:9"))
    again = Chain(load_preset(str(tiny_preset), ANALYSED), nobody, run_directly)
    again.analyze(only=ANALYSES)
    assert {run.made.status for run in again.runs} == {"cached"}


@pytest.mark.parametrize("streams", [False, True], ids=["its parents", "all of it, where it is"])
def test_workers_read_what_an_analysis_reads_from_a_remote(
    streams: bool, cluster: LocalCluster, analysed: Path, tiny_preset: Path, tmp_path: Path, log: Log
):
    url, root = (tmp_path / "remote").as_uri(), tmp_path / "store"
    (tmp_path / "remote").mkdir()
    one = workspace_in(analysed)
    sae = one.store.resolve("latest", stage="train")
    sharing.push(sae, RemoteStore(url), one, with_parents=True)
    runtime = Runtime(root=root, threads=1, dask=cluster.scheduler_address, remote=None if streams else url)
    many = Workspace.open(runtime)
    if not streams:
        shutil.copytree(analysed / "train", root / "train")
        shutil.copy(analysed / "sparsemill-store.json", root)
    log.sleep(0)
    analyzed = Chain(load_preset(str(tiny_preset), ANALYSED), many, run_directly)
    analyzed.analyze(many.store.resolve(f"{url}/train/{sae.id}" if streams else sae.id), ANALYSES)
    assert manifests(root, "analyze") == manifests(analysed, "analyze")
    assert {what for what, _, _ in log.said()} == PASSES


def test_a_worker_that_is_killed_costs_its_window_alone(
    cluster: LocalCluster, single: Path, root: Path, tiny_preset: Path, log: Log
):
    with ThreadPoolExecutor(1) as pool:
        log.sleep(2)
        made = pool.submit(chain(root, tiny_preset, BOTH, cluster=cluster).harvest)
        log.wait(lambda said: len(said) >= 2)
        _, window, pid = log.said()[-1]
        os.kill(pid, signal.SIGKILL)
        log.sleep(0.1)
        made.result(timeout=300)
    assert manifests(root, "harvest") == manifests(single, "harvest")
    assert log.begun() == Counter(WINDOWS) + Counter([window])


def test_what_a_lost_worker_finds_late_is_discarded(
    cluster: LocalCluster, single: Path, root: Path, tiny_preset: Path, log: Log
):
    with Client(cluster, set_as_default=False) as client, ThreadPoolExecutor(1) as pool:
        client.wait_for_workers(2, timeout=300)  # the one that another test killed is back
        addresses = {pid: address for address, pid in client.run(os.getpid).items()}
        log.sleep(2)
        made = pool.submit(chain(root, tiny_preset, BOTH, cluster=cluster).harvest)
        log.wait(lambda said: len(said) >= 2)
        _, window, pid = log.said()[-1]
        os.kill(pid, signal.SIGSTOP)
        log.sleep(0.1)
        try:
            cluster.sync(cluster.scheduler.remove_worker, addresses[pid], stimulus_id="test", close=False)
            made.result(timeout=300)
            assert log.begun() == Counter(WINDOWS) + Counter([window])
        finally:
            os.kill(pid, signal.SIGCONT)
        log.wait(lambda said: ("AttemptAbandoned", window, pid) in said)
    assert manifests(root, "harvest") == manifests(single, "harvest")
    assert list(root.glob(".staging/*/attempts/*/*")) == []


def test_a_coordinator_that_is_stopped_leaves_no_process_and_what_another_goes_on_with(
    cluster: LocalCluster, single: Path, root: Path, tiny_preset: Path, log: Log, log_folder: Path
):
    command = [sys.executable, "-m", "pipeline.cli", "harvest", "--preset", str(tiny_preset), "--set", BOTH]
    command += ["--home", str(root), "--threads", "1"]
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__PRELOAD": f"['{log_folder / 'preload.py'}']"}
    places = {signal.SIGKILL: ("--workers", "1"), signal.SIGTERM: ("--dask", cluster.scheduler_address)}
    for number, place in places.items():
        before = len(log.said())
        process = subprocess.Popen(
            [*command, *place], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log.wait(lambda said, before=before: len(said) >= before + 3)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(timeout=300)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert (number == signal.SIGKILL) == bool(children)
        assert not manifests(root, "harvest")
    journalled = [
        {window for window in WINDOWS if f"window-{window:05d}" in journal.read_text()}
        for journal in root.glob(".staging/harvest-*/journal.jsonl")
    ]
    assert len(journalled) == 2
    assert 1 <= len(set.intersection(*journalled)) < len(WINDOWS)
    chain(root, tiny_preset, BOTH).harvest()  # without a cluster
    assert manifests(root, "harvest") == manifests(single, "harvest")


def test_the_example_computes_the_covariance_on_the_cluster(
    cluster: LocalCluster,
    single: Path,
    root: Path,
    tiny_preset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    store = chain(root, tiny_preset, "harvest.second_moment_stride=1").harvest()  # over all rows, as the example
    monkeypatch.setenv("SPARSEMILL_HOME", str(root))
    example = runpy.run_path(str(ROOT / "examples" / "covariance_on_a_cluster.py"))
    found = example["main"]([store.id, "--dask", cluster.scheduler_address])
    rows = sparsemill.open_activations(store.id).read(0, 34_560).rows
    np.testing.assert_allclose(found, np.cov(rows.T.astype(np.float64)), rtol=1e-9, atol=1e-12)
    moments = sparsemill.open_statistics(store.id)
    theirs = moments.second_moment / moments.rows - np.outer(moments.mean, moments.mean)
    np.testing.assert_allclose(found * (len(rows) - 1) / len(rows), theirs, rtol=1e-4, atol=1e-5)
    assert "34,560 rows of 24 neurons on" in capsys.readouterr().out


def test_an_error_comes_back_as_it_is_raised_in_one_process(
    cluster: LocalCluster, tiny_model: Path, tiny_preset: Path, tmp_path: Path, log: Log
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["blocks.0.mlp.W_in"] *= 1e6
    save_file(weights, model / "model.safetensors")
    overrides = [f"{stage}.language_model={model}" for stage in ("tokenize", "harvest")]
    overrides += ["harvest.encoding=float16", "harvest.n_windows=1"]
    messages: list[str] = []
    for place in (None, cluster):
        with pytest.raises(NumericsError) as refused:
            chain(tmp_path / "store", tiny_preset, *overrides, cluster=place).harvest()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert "prompt" in messages[0]


def test_workers_that_compute_otherwise_are_refused(
    cluster: LocalCluster, root: Path, tiny_preset: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    with pytest.raises(ConfigError, match=r"instruction_set \w+ \(here AVX1024\)"):
        chain(root, tiny_preset, cluster=cluster).harvest()
    assert not manifests(root, "harvest")


def test_a_window_beyond_a_workers_memory_is_refused_naming_the_worker_and_the_window_that_fits(
    single: Path, tiny_preset: Path
):
    workspace = workspace_in(single)
    artifact = workspace.store.resolve("latest", stage="harvest")
    opening = window_work._WindowOpening(
        recorded_config(artifact),
        Reference.to(workspace.store.parent(artifact, "tokens"), single),
        artifact.config["model"],  # type: ignore[arg-type]
        {"blocks.0.mlp.hook_post": recorded_layout(artifact)},
    )
    opening(Site(workspace, resident_bytes() + 2**28, "tcp://worker:1"))
    with pytest.raises(MemoryBudgetExceeded, match=r"where: worker tcp://worker:1; .*one window") as refused:
        opening(Site(workspace, resident_bytes() + 2**20, "tcp://worker:1"))
    assert "choose one of" in str(refused.value)


def test_an_encoder_beyond_a_workers_memory_is_refused_naming_the_worker(single: Path):
    workspace = workspace_in(single)
    sae = workspace.store.resolve("latest", stage="train")
    activations = workspace.store.parent(sae, "activations")
    opening = surveying._Opening(Reference.to(sae, single), Reference.to(activations, single))
    assert len(opening(Site(workspace, None, "tcp://worker:1"))(range(5000))) == 2  # batches of 4,096
    with pytest.raises(MemoryBudgetExceeded, match=r"the encoder does not fit .*worker tcp://worker:1"):
        opening(Site(workspace, resident_bytes() + 2**20, "tcp://worker:1"))


def test_a_cluster_is_given_or_started_not_both(tmp_path: Path):
    with pytest.raises(ConfigError, match="give one of them"):
        workspace_at(1, tmp_path, dask="tcp://127.0.0.1:1", workers=2)
