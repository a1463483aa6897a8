"""The pass that makes a survey: active features of a batch of rows in, bounded state out.

The state takes batches in the store's order and is exact after each: saved, restored and continued, it ends with the
same bits as a pass made in one go. A firing's place in the uniform sample is decided by a hash of its row and feature
(the ``k`` smallest hashes of a feature are kept), so the sample depends on nothing but the store's order.

Cost: a few nanoseconds a firing on one thread, beside the encoder's product; memory: places x features, whatever the
rows. Rejected: one pass an analysis (the product is most of the cost), and keeping all firings (they grow with the
store).
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.analysis import compiled
from pipeline.analysis.survey import N_BINS, AllFirings, Firings, Survey
from sae.kernels.encoder import ActiveFeatures
from storage.errors import NumericsError

_UNUSED = np.uint64(2**64 - 1)


class Places(NamedTuple):
    """How many firings of each feature are kept.

    Attributes:
        top: the largest.
        sample: of the uniform sample.
        seldom: all, of a feature that fired no more often than this.
    """

    top: int
    sample: int
    seldom: int


class SurveyState(NamedTuple):
    """A survey in the making: arrays only, to be saved as they are.

    Attributes:
        rows: rows taken in so far, int64 (1,).
        counts: int64 (d_sae,).
        total: float64 (d_sae,).
        l0_histogram: int64 (d_sae + 1,).
        histogram: int64 (d_sae, N_BINS).
        top_where: prompt and position of the largest firings, int32 (d_sae, places, 2); -1 where unused.
        top_act: their activations, largest first, float32 (d_sae, places).
        sample_where: prompt and position of sampled firings, int32 (d_sae, places, 2).
        sample_act: float32 (d_sae, places).
        sample_hash: their hashes, uint64 (d_sae, places).
        sample_last: which place has the largest hash, int64 (d_sae,).
        seldom_where: prompt and position of each feature's first firings, int32 (d_sae, places, 2).
        seldom_act: float32 (d_sae, places).
    """

    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    total: npt.NDArray[np.float64]
    l0_histogram: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    top_where: npt.NDArray[np.int32]
    top_act: npt.NDArray[np.float32]
    sample_where: npt.NDArray[np.int32]
    sample_act: npt.NDArray[np.float32]
    sample_hash: npt.NDArray[np.uint64]
    sample_last: npt.NDArray[np.int64]
    seldom_where: npt.NDArray[np.int32]
    seldom_act: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, d_sae: int, places: Places) -> Self:
        """No rows yet."""

        def unused(count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
            return np.full((d_sae, count, 2), -1, np.int32), np.zeros((d_sae, count), np.float32)

        return cls(
            np.zeros(1, np.int64),
            np.zeros(d_sae, np.int64),
            np.zeros(d_sae, np.float64),
            np.zeros(d_sae + 1, np.int64),
            np.zeros((d_sae, N_BINS), np.int64),
            *unused(places.top),
            *unused(places.sample),
            np.full((d_sae, places.sample), _UNUSED),
            np.zeros(d_sae, np.int64),
            *unused(places.seldom),
        )

    def take(self, active: ActiveFeatures, prompt: npt.NDArray[np.int32], position: npt.NDArray[np.int32]) -> None:
        """Takes in the next rows of the store, in place.

        Args:
            active: their active features.
            prompt: (B,) training prompt of each.
            position: (B,) position of each in its prompt.
        """
        compiled.take(active, prompt, position, self)

    def survey(self) -> Survey:
        """What was found so far.

        Raises:
            NumericsError: a feature's activations are not finite.
        """
        broken = np.flatnonzero(~np.isfinite(self.total))
        if broken.size:
            raise NumericsError("activations of a feature are not finite", where=f"feature {broken[0]}")
        kept = self.seldom_act.shape[1]
        order = np.argsort(self.sample_hash, axis=1, kind="stable")
        return Survey(
            n_rows=int(self.rows[0]),
            count=self.counts.copy(),
            total=self.total.copy(),
            l0_histogram=self.l0_histogram.copy(),
            histogram=self.histogram.copy(),
            top=_firings(self.top_where, self.top_act),
            sample=_firings(
                np.take_along_axis(self.sample_where, order[:, :, None], axis=1),
                np.take_along_axis(self.sample_act, order, axis=1),
            ),
            kept_firings=kept,
            seldom=_seldom(self, kept),
        )


def _firings(where: npt.NDArray[np.int32], activation: npt.NDArray[np.float32]) -> Firings:
    return Firings(np.ascontiguousarray(where[:, :, 0]), np.ascontiguousarray(where[:, :, 1]), activation.copy())


def _seldom(state: SurveyState, kept: int) -> AllFirings:
    counts = np.where(state.counts <= kept, state.counts, 0)
    used = np.arange(kept) < counts[:, None]
    where = state.seldom_where[used]
    return AllFirings(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.ascontiguousarray(where[:, 0]),
        np.ascontiguousarray(where[:, 1]),
        state.seldom_act[used],
    )
