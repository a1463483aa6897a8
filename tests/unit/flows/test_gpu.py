import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from flows import gpu
from flows.gpu import alone_on, gpu_of

HOLDS = """
import sys, time
from pathlib import Path
from flows import gpu
gpu.gpu_of = lambda device: "planted-" + device
with gpu.alone_on("cuda:0", Path(sys.argv[1]), sys.exit):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not there yet, and two GPUs."""
    monkeypatch.setattr(gpu, "gpu_of", lambda device: None if device == "cpu" else f"planted-{device}")
    return tmp_path / "prefect"


@contextmanager
def held(home: Path) -> Generator["subprocess.Popen[str]"]:
    """Another process that holds the first GPU."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(home)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def test_a_gpu_is_waited_for_until_the_process_that_holds_it_is_gone(home: Path):
    waiting, mine = Event(), Event()

    def take() -> None:
        with alone_on("cuda:0", home, waiting.set):
            mine.set()

    with held(home) as other:
        thread = Thread(target=take)
        thread.start()
        assert waiting.wait(60)
        assert not mine.wait(0.2)
        other.kill()
        assert mine.wait(60)
        thread.join()


def test_another_gpu_and_the_cpu_are_waited_for_by_nobody(home: Path):
    with held(home):
        for device in ("cuda:1", "cpu"):
            with alone_on(device, home, lambda: pytest.fail("it waits")):
                pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_a_name_that_does_not_depend_on_which_ones_a_process_sees():
    uuid = gpu_of("cuda")
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    assert uuid is not None
    assert uuid in listed
