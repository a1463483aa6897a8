"""What one pass of the encoder over the store finds for every feature, and its files.

All of it is bounded by the number of features, whatever the number of rows: counts, sums, a histogram of activations
with bins of a fixed ratio, the largest firings, a uniform sample of the firings, and, for features that fired no more
than ``kept_firings`` times, every firing. So thresholds, quantiles, examples and co-firing of rare features are chosen
afterwards, by analyses that never touch a shard.

Firings are named by training prompt and position; an unused place has prompt -1 and activation 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

BINS_AN_OCTAVE: Final = 4
"""Equal bins of the activation histogram between an activation and its double."""
SMALLEST_OCTAVE: Final = -20
"""Activations below 2 to this power are counted in the first bin as well."""
N_BINS: Final = 34 * BINS_AN_OCTAVE
"""Bins; the last takes everything from 2^14 on."""


class Firings(NamedTuple):
    """Some firings of each feature, k places a feature.

    Attributes:
        prompt: training prompt, int32 (d_sae, k); -1 where a place is unused.
        position: position in the prompt, int32 (d_sae, k).
        activation: float32 (d_sae, k); 0 where a place is unused.
    """

    prompt: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    activation: npt.NDArray[np.float32]


class AllFirings(NamedTuple):
    """Every firing of the features that fired seldom; feature i's are pointer[i]:pointer[i + 1], in the store's order.

    Attributes:
        pointer: int64 (d_sae + 1,); an empty range for a feature that fired more often.
        prompt: training prompt, int32 (n,).
        position: position in the prompt, int32 (n,).
        activation: float32 (n,).
    """

    pointer: npt.NDArray[np.int64]
    prompt: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    activation: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Survey:
    """The findings of a pass.

    Attributes:
        n_rows: rows read.
        count: rows on which each feature fired, int64 (d_sae,).
        total: sum of each feature's activations, float64 (d_sae,).
        l0_histogram: rows by number of features firing, int64 (d_sae + 1,).
        histogram: firings by activation, int64 (d_sae, N_BINS); see ``bin_edges``.
        top: the largest firings, largest first; equal ones by prompt, then position.
        sample: a uniform sample of each feature's firings in random order, all of them where there are no more than
            places.
        kept_firings: how often a feature may fire and still have all its firings kept.
        seldom: all firings of the features that fired at most ``kept_firings`` times.
    """

    n_rows: int
    count: npt.NDArray[np.int64]
    total: npt.NDArray[np.float64]
    l0_histogram: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    top: Firings
    sample: Firings
    kept_firings: int
    seldom: AllFirings

    @property
    def largest(self) -> npt.NDArray[np.float32]:
        """Each feature's largest activation, 0 where it never fired, (d_sae,)."""
        return self.top.activation[:, 0]


def bin_edges() -> npt.NDArray[np.float64]:
    """Lower edges of the activation bins, each within its bin, and the upper edge of the last, (N_BINS + 1,)."""
    octave, part = np.divmod(np.arange(N_BINS + 1), BINS_AN_OCTAVE)
    edges = 2.0 ** (SMALLEST_OCTAVE + octave) * (1 + part / BINS_AN_OCTAVE)
    edges[0], edges[-1] = 0.0, np.inf
    return edges


def to_arrays(survey: Survey) -> dict[str, npt.NDArray[np.generic]]:
    """The survey as arrays by name, such as ``top.prompt``."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for item in fields(survey):
        value = getattr(survey, item.name)
        if isinstance(value, Firings | AllFirings):
            arrays |= {f"{item.name}.{part}": array for part, array in value._asdict().items()}
        else:
            arrays[item.name] = np.asarray(value, np.int64) if isinstance(value, int) else value
    return arrays


def from_arrays(arrays: Mapping[str, Any]) -> Survey:
    """Reads back what ``to_arrays`` made."""
    numbers: dict[str, Any] = {name: int(arrays[name]) for name in ("n_rows", "kept_firings")}
    plain: dict[str, Any] = {name: arrays[name] for name in ("count", "total", "l0_histogram", "histogram")}
    groups: dict[str, Any] = {
        name: kind(*(arrays[f"{name}.{part}"] for part in kind._fields))
        for name, kind in (("top", Firings), ("sample", Firings), ("seldom", AllFirings))
    }
    return Survey(**numbers, **plain, **groups)
