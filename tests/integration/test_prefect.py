"""The deployments as a user runs them: a real server, a real worker, real flow runs."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Team:
    """A server with a worker, and the environment that reaches them."""

    environment: dict[str, str]

    def prefect(self, *arguments: str, timeout: float = 240, fails: bool = False) -> str:
        done = subprocess.run(
            [PREFECT, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout

    def run_deployment(self, name: str, *parameters: str, fails: bool = False) -> tuple[str, str]:
        """Runs a deployment to its end, which is a failure or not; returns the state's name and message."""
        flags = [flag for parameter in parameters for flag in ("-p", parameter)]
        output = self.prefect("deployment", "run", f"{name}/{name}", *flags, "--watch", fails=fails)
        found = re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", output)
        assert found is not None, output
        with urllib.request.urlopen(f"{self.environment['PREFECT_API_URL']}/flow_runs/{found[0]}") as answer:
            state = json.load(answer)["state"]
        return state["name"], state["message"] or ""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | QUIET | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "SPARSEMILL_HOME": str(home / "store"),
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        command = [PREFECT, *arguments]
        with (home / f"{arguments[0]}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))

    try:
        start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        _wait_for(f"http://127.0.0.1:{port}/api/health", home / "server.log")
        team = Team(environment)
        team.prefect("work-pool", "create", "cpu", "--type", "process")
        team.prefect("--no-prompt", "deploy", "--all")
        start("worker", "start", "--pool", "cpu")
        yield team
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no Prefect server: {log.read_text()[-2000:]}")


def test_deployments_make_artifacts_and_then_find_them(team: Team, tiny_preset: Path):
    preset = f"preset={tiny_preset}"
    state, harvest = team.run_deployment("harvest", preset)
    assert state == "Completed"
    assert harvest.startswith("harvest-")
    assert team.run_deployment("harvest", preset) == ("Cached", harvest)
    state, report = team.run_deployment("analyze", preset, 'only=["null_space", "density"]')
    assert state == "Completed"
    page = Path(team.environment["SPARSEMILL_HOME"]) / "report" / report / "index.html"
    assert "null_space" in page.read_text()


def test_bad_input_fails_the_run_with_its_message(team: Team):
    state, message = team.run_deployment("harvest", "preset=demmo", fails=True)
    assert state == "Failed"
    assert "no such preset" in message
