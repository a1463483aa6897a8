"""The deployments as a team runs them: a server and workers by ``flows.local``, real runs, Prefect's own commands."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.local import MARK, Local, is_alive
from pipeline.analysis import ANALYSES
from pipeline.config import Runtime, load_preset
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.remote import RemoteStore

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
STAGES = ("tokenize", "harvest", "train", "analyze", "replicate")
ANALYSES_ASKED = 'only=["null_space", "density"]'
STUDIES = ("cross-seed", "orthogonal-rerun", "encoder-sparsity", "site-comparison")


TROUBLED = """
import json, sys
from pathlib import Path
from prefect import flow
from flows import harvest, runs
from pipeline.config import Runtime, load_preset
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifacts import Made
from storage.errors import RemoteError

preset, root = sys.argv[1:]
tokens = Chain(load_preset(preset), Workspace.open(Runtime(root=root)), run_directly).tokenize()
runs.stage = runs.stage.with_options(retry_delay_seconds=0)
tries = 0

def answers_at(n_tries):
    def work():
        global tries
        tries += 1
        if tries < n_tries:
            raise RemoteError("no answer", transient=n_tries < 9)
        return Made(tokens, "made")
    return work

@flow
def troubled(n_tries):
    return runs.run_chain(lambda chain: chain.stage("remote", answers_at(n_tries)), preset, (), root)

found = []
for n_tries in (3, 5, 9):
    tries = 0
    state = troubled(n_tries, return_state=True)
    found.append([tries, state.name, state.message])
for path in tokens.folder.glob("train*"):
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
state = harvest.harvest(preset, root=root, return_state=True)
found.append([1, state.name, state.message])
print(json.dumps(found))
"""

SLOW_WINDOWS = """
import itertools, time
from pipeline.windows import WindowHarvester
compute, n_computed = WindowHarvester.compute, itertools.count()
def slow(*arguments):
    time.sleep(8 if next(n_computed) else 0)
    return compute(*arguments)
WindowHarvester.compute = slow
"""
"""A ``sitecustomize.py`` for a flow run's process: all windows but the first take longer than a worker to hear of
a cancellation, and two of them less than it has patience."""

HELD_WINDOWS = """
import time
from pathlib import Path
from flows import gpu
from pipeline.windows import WindowHarvester
compute, go = WindowHarvester.compute, Path(__file__).with_name("go")
def held(*arguments):
    while not go.exists():
        time.sleep(0.1)
    return compute(*arguments)
WindowHarvester.compute = held
gpu.gpu_of = lambda device: "planted"
"""
"""Another: windows wait for a file, and what computes on the CPU is taken to do so on a GPU."""


class Team:
    """A server with its workers, and what a teammate's shell does with it."""

    def __init__(self, home: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.store = home / "store"
        program = home / "bin" / "nvidia-smi"  # one GPU, as far as anybody asks
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho 'GPU 0: planted'\n")
        program.chmod(0o755)
        self.environment = os.environ | {
            "PREFECT_HOME": str(home / "prefect"), "PREFECT_PORT": str(self.port), "PREFECT_API_URL": self.api,
            "SPARSEMILL_HOME": str(self.store), "OMP_NUM_THREADS": "1", "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_WORKER_QUERY_SECONDS": "1",  # ten otherwise, before each of ten runs
            "PATH": f"{program.parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.local = Local(home / "prefect", self.port)

    def do(self, action: str, fails: bool = False) -> str:
        return self._run([sys.executable, "-m", "flows.local", action], fails)

    def run(self, name: str, *parameters: str, fails: bool = False) -> dict[str, Any]:
        """``prefect deployment run NAME --watch`` to its end, which is a failure or not; the flow run."""
        flags = [flag for parameter in parameters for flag in ("-p", parameter)]
        output = self._run([PREFECT, "deployment", "run", name, *flags, "--watch"], fails)
        found = re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", output)
        assert found is not None, output
        return self.ask(f"flow_runs/{found[0]}")

    def submit(self, name: str, environment: dict[str, str] | None = None, **parameters: Any) -> str:
        deployment = self.ask(f"deployments/name/{name}")
        asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        asked |= {"job_variables": {"env": environment}} if environment else {}
        return self.ask(f"deployments/{deployment['id']}/create_flow_run", asked)["id"]

    def begun(
        self, name: str, environment: dict[str, str] | None = None, *, worker: str = "cpu", **parameters: Any
    ) -> tuple[str, list[psutil.Process]]:
        """A run whose stage of that name has begun, and its processes."""
        run_id = self.submit(f"{name}/{name}{'' if worker == 'cpu' else '-gpu'}", environment, **parameters)
        wait_until(lambda: name in self.artifacts(run_id))
        processes = self.local.running()[f"worker-{worker}"].children(recursive=True)
        assert processes
        return run_id, processes

    def cancel(self, run_id: str) -> None:
        """As the UI's button does; the run says so at its end."""
        self.ask(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
        assert self.ended(run_id)["state_name"] == "Cancelled"
        assert "Traceback" not in self.log(run_id)

    def ended(self, run_id: str) -> dict[str, Any]:
        return wait_until(lambda: (run := self.ask(f"flow_runs/{run_id}"))["end_time"] and run)

    def artifacts(self, run_id: str) -> dict[str, Any]:
        """Those of a flow run and of its tasks, by key; the progress ones by their stage."""
        found = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
        return {one["key"] or one["description"].partition(":")[0]: one for one in found}

    def log(self, run_id: str) -> str:
        lines = self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}})
        return "\n".join(line["message"] for line in lines)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.api}/{path}", data, {"content-type": "application/json"})
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:  # a busy server says: later
                    raise
            time.sleep(1)

    def processes(self) -> list[psutil.Process]:
        """Everything that ``up`` started, and what that started."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.environment["PREFECT_HOME"] and is_alive(process):
                    mine.append(process)
            except psutil.Error:
                continue
        return mine

    def _run(self, command: list[str], fails: bool) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + (done.stderr if fails else "")


def wait_until(ready: Any, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} s")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    team = Team(tmp_path_factory.mktemp("team"))
    try:
        assert f"export PREFECT_API_URL={team.api}" in team.do("up")
        yield team
    finally:
        team.do("down")
        assert team.processes() == []


def test_deployments_are_forms_in_two_pools(team: Team):
    found = {one["name"]: one for one in team.ask("deployments/filter", {})}
    on_gpu = {f"{name}-gpu" for name in (*STAGES, *STUDIES) if name not in ("tokenize", "analyze")}
    assert set(found) == {*STAGES, *STUDIES, *on_gpu}
    for name, deployment in found.items():
        gpu = name.endswith("-gpu")
        flow = team.ask(f"flows/{deployment['flow_id']}")
        assert flow["name"] == name.removesuffix("-gpu")
        assert deployment["work_pool_name"] == ("gpu" if gpu else "cpu")
        assert deployment["parameters"].get("device") == ("cuda" if gpu else None)
        assert ("gpu" in deployment["tags"]) == gpu
        assert "sparsemill" in deployment["tags"]
        assert deployment["schedules"] == []
        assert deployment["description"]
        for field, schema in deployment["parameter_openapi_schema"]["properties"].items():
            assert schema["description"], (name, field)
            assert "default" in schema, (name, field)
            assert all("type" in one for one in schema.get("anyOf", [schema])), (name, field)
    only = found["analyze"]["parameter_openapi_schema"]["properties"]["only"]
    assert only["items"]["enum"] == list(ANALYSES)
    with pytest.raises(urllib.error.HTTPError, match=r"409|422"):
        team.submit("analyze/analyze", only=["nul_space"])


def test_everything_stays_on_loopback_and_nothing_is_reported(team: Team):
    found = [one for process in team.processes() for one in process.net_connections("inet")]
    assert ("127.0.0.1", team.port) in {one.laddr for one in found if one.status == psutil.CONN_LISTEN}
    assert {one.laddr.ip for one in found} == {"127.0.0.1"}
    assert {one.raddr.ip for one in found if one.raddr} <= {"127.0.0.1"}
    assert team.ask("admin/settings")["server"]["analytics_enabled"] is False


@pytest.fixture(scope="module")
def harvested(team: Team, tiny_preset: Path) -> dict[str, Any]:
    """The flow run that harvested first."""
    return team.run("harvest/harvest", f"preset={tiny_preset}")


@pytest.fixture(scope="module")
def analysed(team: Team, harvested: dict[str, Any], tiny_preset: Path) -> dict[str, Any]:
    """The flow run that trained, and made two analyses."""
    return team.run("analyze/analyze", f"preset={tiny_preset}", ANALYSES_ASKED)


def test_a_harvest_alone_tells_its_story(team: Team, harvested: dict[str, Any]):
    assert harvested["state_name"] == "Completed"
    assert f"harvest: {harvested['state']['message']} made" in team.log(harvested["id"])
    told = team.artifacts(harvested["id"])
    assert told["harvest"]["data"] == 100
    assert {"tokenize train", "stages", "figures"} <= set(told)


def test_a_gpu_has_one_harvest_at_a_time(team: Team, harvested: dict[str, Any], tiny_preset: Path):
    two = [team.submit("harvest/harvest-gpu", preset=str(tiny_preset), device="cpu") for _ in range(2)]
    first, second = sorted((team.ended(run_id) for run_id in two), key=lambda run: run["start_time"])
    assert {first["state_name"], second["state_name"]} == {"Cached"}
    assert first["end_time"] <= second["start_time"]


def test_the_run_of_a_killed_worker_keeps_its_gpu_until_it_ends(
    team: Team, harvested: dict[str, Any], tiny_preset: Path, tmp_path: Path
):
    def asked(seed: int) -> dict[str, Any]:
        return {"preset": str(tiny_preset), "overrides": [f"harvest.seed={seed}"], "device": "cpu"}

    (tmp_path / "sitecustomize.py").write_text(HELD_WINDOWS)
    environment = {"PYTHONPATH": str(tmp_path)}
    first, processes = team.begun("harvest", environment, worker="gpu-0", **asked(2))
    team.local.running()["worker-gpu-0"].kill()
    team.do("up")
    assert set(processes).isdisjoint(team.local.running()["worker-gpu-0"].children(recursive=True))
    second = team.submit("harvest/harvest-gpu", environment, **asked(3))
    wait_until(lambda: "another run has the GPU: waiting for that one" in team.log(second))
    assert any(map(is_alive, processes))
    assert team.artifacts(second) == {}

    (tmp_path / "go").touch()
    ended = [team.ended(run_id)["state_name"] for run_id in (first, second)]
    assert ended == ["Crashed", "Completed"]  # nobody reads what the first one logs


def test_what_runs_in_the_pool_of_the_cpu_sees_no_gpu(team: Team):
    workers = {name: one.environ() for name, one in team.local.running().items() if name != "server"}
    assert {name: one["CUDA_VISIBLE_DEVICES"] for name, one in workers.items()} == {
        "worker-cpu": "", "worker-gpu-0": "0",
    }  # fmt: skip
    run = team.run("harvest/harvest", "preset=demo", "device=cuda", fails=True)
    assert run["state"]["message"].startswith("no such device on this machine; found cuda; expected cpu")


def test_analyses_alone_find_what_they_read_and_link_their_report(
    team: Team, harvested: dict[str, Any], analysed: dict[str, Any]
):
    assert analysed["state_name"] == "Completed"
    report, harvest = analysed["state"]["message"], harvested["state"]["message"]
    page = team.store / "report" / report / "index.html"
    assert "null_space" in page.read_text()
    told = team.artifacts(analysed["id"])
    assert page.as_uri() in told["report"]["data"]
    assert "| quantity | this run | the post |" in told["headline"]["data"]
    stages = {row["stage"]: row for row in json.loads(told["stages"]["data"])}
    assert stages["harvest"] | {"seconds": 0} == {
        "stage": "harvest", "artifact": harvest, "state": "cached", "seconds": 0,
        "folder": str(team.store / "harvest" / harvest),
    }  # fmt: skip
    assert {"L0", "autoencoder"} <= {row["quantity"] for row in json.loads(told["figures"]["data"])}


def test_to_tokenize_and_to_replicate_is_to_find_what_a_harvest_and_analyses_made(
    team: Team, harvested: dict[str, Any], analysed: dict[str, Any], tiny_preset: Path
):
    store = ArtifactStore(team.store)
    tokenized = team.run("tokenize/tokenize", f"preset={tiny_preset}")
    tokens = store.open(harvested["state"]["message"]).parents["tokens"].id
    assert (tokenized["state_name"], tokenized["state"]["message"]) == ("Cached", tokens)
    few = json.dumps([ANALYSES_ASKED.replace("only", "analyze.analyses")])
    replicated = team.run("replicate/replicate", f"preset={tiny_preset}", f"overrides={few}")
    assert (replicated["state_name"], replicated["state"]["message"]) == ("Cached", analysed["state"]["message"])


def test_bad_input_fails_the_run_with_its_message_alone(team: Team):
    run = team.run("harvest/harvest", "preset=demmo", fails=True)
    assert run["state_name"] == "Failed"
    assert run["state"]["message"].startswith("no such preset; found demmo; expected demo")
    assert "Traceback" not in team.log(run["id"])


def test_what_is_transient_is_tried_again_and_damage_is_not(team: Team, tiny_preset: Path, tmp_path: Path):
    output = team._run([sys.executable, "-c", TROUBLED, str(tiny_preset), str(tmp_path / "store")], fails=False)
    later, too_late, denied, damaged = json.loads(output.splitlines()[-1])
    assert later[:2] == [3, "Completed"]
    assert too_late == [4, "Failed", "no answer"]  # three tries more, then no further
    assert denied == [1, "Failed", "no answer"]
    assert damaged[1] == "Failed"
    assert f"{tmp_path}" in damaged[2]
    assert "sha256" in damaged[2]


def chain_at(root: Path, parameters: dict[str, Any]) -> Chain:
    """The chain of a run's parameters, in this process."""
    workspace = Workspace.open(Runtime(root=root, threads=1))
    return Chain(load_preset(parameters["preset"], parameters["overrides"]), workspace, run_directly)


def manifest(root: Path, artifact: Artifact) -> bytes:
    return (root / artifact.stage / artifact.id / "manifest.json").read_bytes()


def test_a_cancelled_harvest_goes_on_from_its_windows_and_is_published(team: Team, tiny_preset: Path, tmp_path: Path):
    parameters: dict[str, Any] = {"preset": str(tiny_preset), "overrides": ["harvest.seed=1"]}
    (tmp_path / "sitecustomize.py").write_text(SLOW_WINDOWS)

    def windows() -> list[Path]:
        return sorted((team.store / ".staging").glob("harvest-*/files/**/window-*"))

    cancelled, processes = team.begun("harvest", {"PYTHONPATH": str(tmp_path)}, **parameters)
    n_windows = len(wait_until(windows))
    team.cancel(cancelled)
    wait_until(lambda: not any(map(is_alive, processes)))
    assert n_windows <= len(windows()) <= n_windows + 1

    shared = tmp_path / "shared"
    shared.mkdir()
    again = team.submit("harvest/harvest", {"SPARSEMILL_REMOTE": str(shared)}, push=True, **parameters)
    resumed = team.ended(again)
    assert resumed["state_name"] == "Resumed"
    made = chain_at(tmp_path / "uninterrupted", parameters).harvest()
    assert resumed["state"]["message"] == made.id
    assert manifest(team.store, made) == manifest(tmp_path / "uninterrupted", made)
    published = ArtifactStore(tmp_path / "elsewhere", remote=RemoteStore(str(shared))).open(made.id)
    assert published.manifest_sha256 == made.manifest_sha256


def test_a_stopped_training_goes_on_after_a_cancellation_a_lost_worker_and_a_restart(
    team: Team, analysed: dict[str, Any], tiny_preset: Path, tmp_path: Path
):
    parameters: dict[str, Any] = {"preset": str(tiny_preset), "overrides": ["train.autoencoder.steps=4000"]}

    def checkpoints() -> list[Path]:
        return sorted((team.store / ".staging").glob("train-*/files/checkpoint-*.safetensors"))

    cancelled, processes = team.begun("train", **parameters)
    team.cancel(cancelled)
    wait_until(lambda: not any(map(is_alive, processes)))
    assert len(first := checkpoints()) == 1

    _, processes = team.begun("train", **parameters)
    before = team.local.running()
    before["worker-cpu"].terminate()
    processes.append(before.pop("worker-cpu"))
    wait_until(lambda: not any(map(is_alive, processes)))
    assert checkpoints() == first  # Prefect kills the runs of a worker that ends
    team.do("up")
    assert before.items() < team.local.running().items()  # what runs is left alone

    _, processes = team.begun("train", **parameters)
    ours = team.processes()
    assert set(processes) < set(ours)
    team.do("down")
    assert not any(map(is_alive, ours))
    assert checkpoints()[-1] > first[-1]
    team.do("up")

    resumed = team.ended(team.submit("train/train", **parameters))
    assert resumed["state_name"] == "Resumed"
    made = chain_at(tmp_path / "uninterrupted", parameters).train()
    assert resumed["state"]["message"] == made.id
    assert manifest(team.store, made) == manifest(tmp_path / "uninterrupted", made)

    again = team.run("analyze/analyze", f"preset={tiny_preset}", ANALYSES_ASKED)
    assert (again["state_name"], again["state"]["message"]) == ("Cached", analysed["state"]["message"])


def test_a_training_outlives_its_server_and_down_ends_what_is_left(
    team: Team, analysed: dict[str, Any], tiny_preset: Path
):
    parameters: dict[str, Any] = {"preset": str(tiny_preset), "overrides": ["train.autoencoder.steps=3000"]}
    soon = {"PREFECT_CLIENT_MAX_RETRIES": "2"}  # what Prefect itself asks a server that is gone: five times, a minute
    _, processes = team.begun("train", soon, **parameters)
    team.local.running()["server"].kill()
    wait_until(lambda: not team.local.answers())
    assert list((team.store / ".staging").glob("train-*"))
    left = team.processes()
    assert set(processes) < set(left)  # the run, and workers that ask for their server for ever
    wait_until(lambda: not any(map(is_alive, processes)))
    chain = chain_at(team.store, parameters)
    chain.train()
    assert chain.runs[-1].made.status == "cached"
    assert team.processes()

    team.do("down")
    assert not any(map(is_alive, left))
    assert team.processes() == []


def test_a_port_of_somebody_else_is_named_and_nothing_started(tmp_path: Path):
    team = Team(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", team.port))
        other.listen()
        said = team.do("up", fails=True)
    assert f"the port is taken; found 127.0.0.1:{team.port}; give another" in said
    assert team.processes() == []
