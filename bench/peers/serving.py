"""A peer's side of ``bench.peers.process``: runs in the peer's environment, with nothing of ours but this file."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Answer = dict[str, Any] | None


class Training:
    """Rows of a file in batches, through a peer's step.

    Args:
        step: takes one step on float32 (batch_rows, d_in).
        weights: gives W_enc, b_enc, W_dec, b_dec, in our shapes.
        rows: a .npy file of rows, float16 or float32.
        batch_rows: rows a batch; batches follow each other in the file, and begin anew at its end.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor], object],
        weights: Callable[[], Mapping[str, torch.Tensor]],
        rows: str,
        batch_rows: int,
    ) -> None:
        self._step, self._weights = step, weights
        self._rows, self._batch_rows, self._taken = np.load(rows, mmap_mode="r"), batch_rows, 0
        self._kept: torch.Tensor | None = None

    def step(self, times: int = 1) -> Answer:
        for _ in range(times):
            self._step(self._batch())
        return None

    def save(self, path: str) -> Answer:
        np.savez(path, **{name: tensor.detach().float().numpy() for name, tensor in self._weights().items()})
        return None

    def _batch(self) -> torch.Tensor:
        batches = len(self._rows) // self._batch_rows
        number, self._taken = self._taken % batches, self._taken + 1
        if batches > 1 or self._kept is None:  # one batch, in memory, where steps alone are timed
            rows = self._rows[number * self._batch_rows : (number + 1) * self._batch_rows]
            self._kept = torch.from_numpy(np.array(rows, dtype=np.float32))
        return self._kept


def load(weights: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(weights).items()}


def serve(handlers: Mapping[str, Callable[..., Answer]]) -> None:
    """Answers requests until there are no more."""
    torch.manual_seed(0)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("what")](**request)
        print(f"answer: {json.dumps(answer or {})}", flush=True)


def serve_training(start: Callable[..., Training], **more: Callable[..., Answer]) -> None:
    """Serves ``start``, ``step`` and ``save`` of one training at a time."""
    current: list[Training] = []

    def begin(**arguments: Any) -> Answer:
        torch.set_num_threads(arguments.pop("threads"))
        current[:] = [start(**arguments)]
        return None

    serve(
        {
            "start": begin,
            "step": lambda times=1: current[0].step(times),
            "save": lambda path: current[0].save(path),
            **more,
        }
    )
