import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import local as flows_local
from flows.local import MARK, Local, up
from storage.errors import ConfigError

PREFECT = f"""#!{sys.executable}
import sys, time
time.sleep(60 * (sys.argv[1] in ("server", "worker")))
"""
SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


def sleeping(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(SLEEPS, env=environment)


def record(local: Local, **processes: psutil.Process) -> None:
    local.home.mkdir(exist_ok=True)
    written = {
        name: {"pid": process.pid, "started": process.create_time(), "api": local.api}
        for name, process in processes.items()
    }
    (local.home / "local.json").write_text(json.dumps(written))


def test_stop_ends_what_is_on_record_and_what_that_started_and_nothing_else(tmp_path: Path):
    local, other = Local(tmp_path / "mine", 4200), Local(tmp_path / "theirs", 4200)
    with sleeping(local.environment) as server, sleeping(local.environment) as run_of_a_lost_worker, \
         sleeping(other.environment) as theirs:  # fmt: skip
        record(local, server=psutil.Process(server.pid))
        assert local.stop() == ["server"]
        assert server.wait(5) != 0
        assert run_of_a_lost_worker.wait(5) != 0
        assert theirs.poll() is None
        theirs.kill()
    assert local.running() == {}
    assert local.stop() == []


def test_a_number_given_to_another_process_since_is_not_ours(tmp_path: Path):
    local = Local(tmp_path, 4200)
    unmarked = {name: value for name, value in local.environment.items() if name != MARK}
    with sleeping(unmarked) as stranger:
        process = psutil.Process(stranger.pid)
        written = {"server": {"pid": process.pid, "started": process.create_time() - 1, "api": local.api}}
        (tmp_path / "local.json").write_text(json.dumps(written))
        assert local.running() == {}
        assert local.stop() == []
        assert stranger.poll() is None
        stranger.kill()


def test_what_runs_for_another_port_is_neither_used_nor_started_again(tmp_path: Path):
    with sleeping(Local(tmp_path, 4200).environment) as server:
        record(Local(tmp_path, 4200), server=psutil.Process(server.pid))
        with pytest.raises(ConfigError, match=r"for another port; where: server; found http://127\.0\.0\.1:4200/api"):
            Local(tmp_path, 4201).start("server", ["server", "start"])
        server.kill()


class Answered(Local):
    """What waits for no server: each of Prefect's commands is a process that sleeps."""

    def answers(self) -> bool:
        return True

    def pools(self) -> list[str]:
        return []

    def is_online(self, pool: str, worker: str) -> bool:
        return bool(pool and worker)


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # they outlive who starts them, as they are meant to
@pytest.mark.parametrize("n_gpus", [0, 1, 2])
def test_a_worker_takes_one_run_at_a_time_and_sees_its_own_gpu_alone(
    n_gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planted = {"prefect": PREFECT, "nvidia-smi": "#!/bin/sh\n" + "echo 'GPU: planted'\n" * n_gpus}
    for name, text in planted.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(flows_local, "_PREFECT", str(tmp_path / "prefect"))
    monkeypatch.setattr(flows_local, "_taken", lambda _: False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    local = Answered(tmp_path / "home", 4200)
    try:
        up(local, lambda _: None)
        running = local.running()
        workers = {name: process.cmdline()[2:] for name, process in running.items() if name != "server"}
        seen = {name: running[name].environ()["CUDA_VISIBLE_DEVICES"] for name in workers}
    finally:
        local.stop()
    gpus = [str(gpu) for gpu in range(n_gpus)]
    assert seen == {"worker-cpu": ""} | {f"worker-gpu-{gpu}": gpu for gpu in gpus}
    expected = {"cpu": "cpu"} | {f"gpu-{gpu}": "gpu" for gpu in gpus}
    assert workers == {
        f"worker-{name}": ["worker", "start", "--pool", pool, "--name", name, "--limit", "1"]
        for name, pool in expected.items()
    }
