"""Per-neuron statistics of a harvest, gathered window by window and folded in the windows' order.

A left fold over windows gives the same bits however they were computed: at once, resumed, or in a shorter harvest.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


@dataclass
class Moments:
    """Sums over rows of width d.

    Attributes:
        rows: rows summed.
        total: sum, float64 (d,).
        low: minimum, float64 (d,).
        high: maximum, float64 (d,).
        sampled_rows: rows in the second moment.
        second_moment: sum of outer products over the sampled rows, float64 (d, d), uncentred.
    """

    rows: int
    total: Array
    low: Array
    high: Array
    sampled_rows: int
    second_moment: Array

    @staticmethod
    def empty(d_in: int) -> "Moments":
        """Of no rows."""
        low, high = np.full(d_in, np.inf), np.full(d_in, -np.inf)
        return Moments(0, np.zeros(d_in), low, high, 0, np.zeros((d_in, d_in)))

    @property
    def mean(self) -> Array:
        """Mean of each neuron over all rows, float64 (d,)."""
        return self.total / self.rows

    def add(self, activations: torch.Tensor, *, stride: int) -> None:
        """Takes in a batch.

        Args:
            activations: float32 (prompts, positions, d).
            stride: every how many prompts of the batch one enters the second moment.
        """
        rows = activations.flatten(0, 1)
        self.rows += len(rows)
        self.total += rows.sum(0, dtype=torch.float64).cpu().numpy()
        self.low = np.minimum(self.low, rows.amin(0).cpu().numpy())
        self.high = np.maximum(self.high, rows.amax(0).cpu().numpy())
        sampled = activations[::stride].flatten(0, 1)
        self.sampled_rows += len(sampled)
        self.second_moment += (sampled.T @ sampled).double().cpu().numpy()

    def merge(self, later: "Moments") -> "Moments":
        """The moments of both, this one's rows first."""
        return Moments(
            self.rows + later.rows,
            self.total + later.total,
            np.minimum(self.low, later.low),
            np.maximum(self.high, later.high),
            self.sampled_rows + later.sampled_rows,
            self.second_moment + later.second_moment,
        )

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Named arrays for a safetensors file; the second moment in float32, which halves its bytes."""
        return {
            "rows": np.array(self.rows, np.int64),
            "total": self.total,
            "low": self.low.astype(np.float32),
            "high": self.high.astype(np.float32),
            "sampled_rows": np.array(self.sampled_rows, np.int64),
            "second_moment": self.second_moment.astype(np.float32),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, npt.NDArray[np.generic]]) -> "Moments":
        """The inverse of ``to_arrays``."""
        wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        return Moments(
            int(arrays["rows"]), wide["total"], wide["low"], wide["high"],
            int(arrays["sampled_rows"]), wide["second_moment"],
        )  # fmt: skip
