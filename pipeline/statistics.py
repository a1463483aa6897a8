"""Per-neuron statistics of a harvest, gathered batch by batch, kept window by window, folded in the windows' order.

A left fold over batches and windows gives the same bits however they were computed: at once, resumed, in several
threads, or in a shorter harvest. A batch is summed where it is encoded (``pipeline.windows``), and folded in float64.
The second moment, of which the singular vectors are the eigenvectors, costs d products a row and neuron, more than the
forward pass itself, so only every so many batches enter it; as prompts are in random order these are a fair sample.
Rejected: a second pass over the store (reads it all).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Sums(NamedTuple):
    """What one batch adds to the statistics.

    Attributes:
        rows: rows summed.
        total: sum, float64 (d,).
        low: minimum, float32 (d,).
        high: maximum, float32 (d,).
        outer: sum of outer products of its rows, float32 (d, d), or None where the batch is not sampled.
    """

    rows: int
    total: Array
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    outer: npt.NDArray[np.float32] | None


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

    def singular_vectors(self) -> tuple[Array, Array]:
        """Singular values and right singular vectors of the matrix of all activations, not centred.

        The vectors are the eigenvectors of the second moment of the sampled rows; the values are scaled to all rows.

        Returns:
            ``(values, vectors)``: float64 (d,), falling; float64 (d, d), a unit vector a row.
        """
        eigenvalues, eigenvectors = np.linalg.eigh(self.second_moment / max(self.sampled_rows, 1))
        values = np.sqrt(np.maximum(eigenvalues[::-1], 0) * self.rows)
        return values, np.ascontiguousarray(eigenvectors[:, ::-1].T)

    def add(self, sums: Sums) -> None:
        """Takes in a batch."""
        self.rows += sums.rows
        self.total += sums.total
        self.low = np.minimum(self.low, sums.low)
        self.high = np.maximum(self.high, sums.high)
        if sums.outer is not None:
            self.sampled_rows += sums.rows
            self.second_moment += sums.outer

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
