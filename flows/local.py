"""A Prefect server of one's own, with pools, deployments and workers: ``python -m flows.local up|down|status``.

On loopback, everything kept in PREFECT_HOME (``.prefect``), nothing reported to anybody. ``up`` starts what is not
running and leaves alone what is; ``down`` ends exactly what ``up`` started, which is on record by process number and
start time, so that a number given to another process since is never mistaken for ours. Flow runs are known by a
variable that they inherit, so that those of a worker that was killed are found too. They are ended first, while the
server still takes what they say: a stage that is told to stop saves what it has, where a worker that ends would kill
it. Then the workers (without a server they go on for ever), then the server.

Each worker takes one run at a time: a stage uses all cores, or the GPU, which the other workers do not see. A run holds
its GPU besides (``flows.gpu``), as that of a worker that was killed goes on. Rejected: limits of the pool or the
deployment (a run whose process was killed counts as running for ever, and nothing would follow it); containers and
service managers, which this is no more than a handful of processes for.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
from cyclopts import App

from storage.atomic import replace_file
from storage.errors import ConfigError, SparsemillError

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
DEFAULT_PORT = 4200
_PREFECT = str(Path(sys.executable).with_name("prefect"))
START_SECONDS = 180  # a server's first start makes its database
STOP_SECONDS = 60  # a stage that is told to stop finishes its step, or its window, and saves it

MARK = "SPARSEMILL_LOCAL"
"""Variable of everything that is started here, and of what that starts: the home it belongs to."""
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PREFECT_LOGGING_LEVEL": "INFO",  # what stages say belongs in a run's log, also where make says otherwise
}

app = App(name="python -m flows.local", help="A Prefect server of one's own, with pools, deployments and workers.")


class Local:
    """The server and its workers, as far as they are on record.

    Args:
        home: where Prefect and this module keep everything.
        port: of the server.
    """

    def __init__(self, home: Path, port: int):
        self.home = home.absolute()
        self.port = port
        self.api = f"http://{HOST}:{port}/api"
        self.environment = {**os.environ, **SETTINGS, "PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.api}
        self.environment[MARK] = str(self.home)
        self._record = self.home / "local.json"

    def running(self) -> dict[str, psutil.Process]:
        """The processes on record that are still those that were started, by name."""
        found: dict[str, psutil.Process] = {}
        for name, one in self._recorded().items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(one["pid"])
                if process.create_time() == one["started"] and is_alive(process):
                    found[name] = process
        return found

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
        """Starts one of Prefect's commands in the background, unless it runs; whether it had to be started.

        Raises:
            ConfigError: it runs for another port.
        """
        if name in self.running():
            if self._recorded()[name]["api"] != self.api:
                raise ConfigError(
                    "it runs already, for another port", where=name, found=self._recorded()[name]["api"],
                    expected=self.api, remedy="'make down' ends it",
                )  # fmt: skip
            return False
        with self.log(name).open("ab") as log:
            process = psutil.Popen(
                [_PREFECT, *arguments], cwd=ROOT, env=self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        record = self._recorded() | {name: {"pid": process.pid, "started": process.create_time(), "api": self.api}}
        replace_file(self._record, json.dumps(record, indent=1).encode())
        return True

    def stop(self) -> list[str]:
        """Ends what runs, and what that started: flow runs, then workers, then the server; the names."""
        running = self.running()
        server = [running[name] for name in running if name == "server"]
        kept = {*running.values(), *(child for one in server for child in one.children(recursive=True))}
        _end([process for process in self._marked() if process not in kept])
        _end([process for name, process in running.items() if name != "server"])
        _end([process for process in self._marked() if process not in server])  # begun meanwhile
        _end(server)
        self._record.unlink(missing_ok=True)
        return list(running)

    def _marked(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it ended, or is another user's
                if process.environ().get(MARK) == str(self.home):
                    found.append(process)
        return found

    def answers(self) -> bool:
        """Whether a Prefect server answers at the port."""
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait_for(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Waits until what was started is ready.

        Raises:
            ConfigError: it ended, or takes too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and name in self.running():
            if is_ready():
                return
            time.sleep(0.3)
        tail = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-5:])
        raise ConfigError("it did not start", where=self.log(name), found=tail)

    def prefect(self, *arguments: str) -> str:
        """Runs one of Prefect's commands to its end; its output.

        Raises:
            ConfigError: it failed.
        """
        done = subprocess.run(
            [_PREFECT, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-2000:]
            raise ConfigError(f"prefect {' '.join(arguments)} failed", found=said)
        return done.stdout

    def pools(self) -> list[str]:
        """Names of the server's work pools."""
        return [pool["name"] for pool in self._ask("work_pools/filter")]

    def is_online(self, pool: str, worker: str) -> bool:
        """Whether a worker has told the server that it is there."""
        workers = self._ask(f"work_pools/{pool}/workers/filter")
        return any(one["name"] == worker and one["status"] == "ONLINE" for one in workers)

    def _ask(self, path: str) -> list[dict[str, Any]]:
        headers = {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.api}/{path}", b"{}", headers), timeout=30) as answer:
            return json.load(answer)

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self.home / f"{name}.log"

    def _recorded(self) -> dict[str, dict[str, Any]]:
        return json.loads(self._record.read_bytes()) if self._record.exists() else {}


def up(local: Local, say: Any = print) -> None:
    """Starts what is not running: server, pools, deployments, a worker of the CPU and one of each GPU.

    Raises:
        ConfigError: the port is somebody else's, or something does not start.
    """
    local.home.mkdir(parents=True, exist_ok=True)
    if "server" not in local.running() and _taken(local.port):
        raise ConfigError(
            "the port is taken", found=f"{HOST}:{local.port}",
            remedy="give another, as in PREFECT_PORT=4201 make up; if a Prefect server of yours runs there, use that",
        )  # fmt: skip
    if local.start("server", ["server", "start", "--host", HOST, "--port", str(local.port)]):
        say("starting the server ...")
    local.wait_for("server", local.answers)
    for pool in {"cpu", "gpu"}.difference(local.pools()):
        local.prefect("work-pool", "create", pool, "--type", "process")
    say("deploying ...")
    local.prefect("--no-prompt", "deploy", "--all")
    gpus = gpu_count()
    _start_worker(local, "cpu", "cpu", {"CUDA_VISIBLE_DEVICES": ""})
    for gpu in range(gpus):
        _start_worker(local, "gpu", f"gpu-{gpu}", {"CUDA_VISIBLE_DEVICES": str(gpu)})
    workers = f"a worker for the CPU{f', one for each of {gpus} GPUs' if gpus else ''}"
    say(
        f"A Prefect server at http://{HOST}:{local.port}, with {workers}. Next:\n\n"
        f"  export PREFECT_API_URL={local.api} PREFECT_HOME={local.home}\n"
        f"  {_PREFECT} deployment run harvest/harvest -p preset=demo --watch\n\n"
        "make down ends it all; a run that is ended saves what it has, and goes on when it is run again."
    )


def _start_worker(local: Local, pool: str, name: str, environment: Mapping[str, str]) -> None:
    local.start(f"worker-{name}", ["worker", "start", "--pool", pool, "--name", name, "--limit", "1"], environment)
    local.wait_for(f"worker-{name}", lambda: local.is_online(pool, name))


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, counted without importing torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    done = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


@app.default
def main(action: Literal["up", "down", "status"]) -> None:
    """Starts, ends or shows them; the port is PREFECT_PORT's, 4200 by default.

    Args:
        action: what to do.
    """
    home = Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect"))
    try:
        local = Local(home, int(os.environ.get("PREFECT_PORT", DEFAULT_PORT)))
        if action == "up":
            up(local)
        elif action == "down":
            print("ended:", ", ".join(local.stop()) or "nothing was running")
        else:
            for name, process in local.running().items():
                print(f"{name}: process {process.pid}, {local.log(name)}")
    except SparsemillError as error:
        sys.exit(f"sparsemill: {error}")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _end(processes: Sequence[psutil.Process]) -> None:
    """Asks processes to end, then ends those that did not."""
    for send, seconds in ((psutil.Process.terminate, STOP_SECONDS), (psutil.Process.kill, 10)):
        deadline = time.monotonic() + seconds
        for process in filter(is_alive, processes):
            with suppress(psutil.NoSuchProcess):
                send(process)
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    """Whether it is that process still, and more than an entry that nobody has collected."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.is_running()
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    app()
