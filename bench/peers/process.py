"""Another program at work in its own process, asked for one thing at a time so that contenders take turns.

A request is a line of JSON, and so is its answer, behind a word that tells it from what libraries print; between
requests the process waits and takes no processor time.
"""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.peers.environments import python_of

ANSWER = "answer: "


class Peer:
    """A peer's process; a context manager that ends it.

    Args:
        peer: whose.
        threads: that it may use.
    """

    def __init__(self, peer: str, threads: int) -> None:
        script = Path(__file__).with_name(f"peer_{peer}.py")
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) | {"HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [str(python_of(peer)), str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | limits,
        )  # fmt: skip

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Has something done, and returns what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()} when asked to {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
