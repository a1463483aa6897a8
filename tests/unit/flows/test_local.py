import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.local import MARK, Local
from storage.errors import ConfigError

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
