"""Small statistics that several analyses share: weights as float64, safe cosines, moments, a two-Gaussian fit.

Pure weight analyses run in float64 numpy: at 16,384 x 2,048 a matrix is 268 MB and every number then agrees with an
independent computation to more digits than anybody prints.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.analysis.context import Floats, Integers, Mask

_EM_STEPS = 500
_EM_TOLERANCE = 1e-10
_STARTING_SPLITS = tuple(tenth / 10 for tenth in range(1, 10))


class TwoGaussians(NamedTuple):
    """A mixture of two normal distributions, the lower mean first.

    Attributes:
        weights: shares of the two, adding up to 1.
        means: their means.
        stds: their standard deviations.
        log_likelihood: mean log likelihood of a value.
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    stds: tuple[float, float]
    log_likelihood: float

    @property
    def ashman_d(self) -> float:
        """Separation of the two: above 2 they are clearly two.

        Source: Ashman, Bird and Zepf 1994, Detecting bimodality in astronomical datasets.
        """
        gap = abs(self.means[1] - self.means[0])
        return gap * 2**0.5 / (self.stds[0] ** 2 + self.stds[1] ** 2) ** 0.5

    @property
    def is_bimodal(self) -> bool:
        """Whether Ashman's D says that the two are apart."""
        return self.ashman_d > 2


def weights64(weights: torch.Tensor) -> Floats:
    """Weights as float64 numpy."""
    return weights.detach().to("cpu", torch.float64).numpy()


def norms(rows: Floats) -> Floats:
    """Euclidean norm of each row, (n,)."""
    return np.linalg.norm(rows, axis=1)


def row_cosines(left: Floats, right: Floats) -> Floats:
    """Cosine of each row of one matrix with the same row of the other, (n,); NaN where a row is zero."""
    return _divide(np.einsum("ij,ij->i", left, right), norms(left) * norms(right))


def cosines_with(rows: Floats, direction: Floats) -> Floats:
    """Cosine of each row with a direction (d,), (n,); NaN where either is zero."""
    return _divide(rows @ direction, norms(rows) * np.linalg.norm(direction))


def excess_kurtosis(rows: Floats) -> Floats:
    """Excess kurtosis of the entries of each row, as scipy's with ``fisher=True, bias=True``, (n,); NaN if constant."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    squared = centred * centred
    variance = squared.mean(axis=1)
    return _divide((squared * squared).mean(axis=1), variance * variance) - 3.0


def mean(values: Floats) -> float | None:
    """Mean of what is finite, or None where nothing is."""
    return _reduce(values, np.mean)


def median(values: Floats) -> float | None:
    """Median of what is finite, or None where nothing is."""
    return _reduce(values, np.median)


def std(values: Floats) -> float | None:
    """Standard deviation of what is finite, or None where nothing is."""
    return _reduce(values, np.std)


def maximum(values: Floats) -> float | None:
    """Largest of what is finite, or None where nothing is."""
    return _reduce(values, np.max)


def share(where: Mask) -> float | None:
    """Fraction of True, or None where there is nothing."""
    return float(where.mean()) if where.size else None


def largest(values: npt.NDArray[np.floating[Any]], kept: int) -> Integers:
    """Places of the largest values of each row, largest first, equal ones in the order they stand in.

    Args:
        values: no NaN, (n, m).
        kept: how many, 1 to m.

    Returns:
        int64 (n, kept).
    """
    threshold = np.partition(values, -kept, axis=1)[:, -kept, None]
    row, place = np.nonzero(values >= threshold)
    order = np.lexsort((place, -values[row, place], row))
    starts = np.searchsorted(row, np.arange(len(values)))
    return place[order][starts[:, None] + np.arange(kept)]


def finite(values: Floats) -> Floats:
    """The finite ones."""
    return values[np.isfinite(values)]


def ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or None where the denominator is zero."""
    return None if denominator == 0 else numerator / denominator


def fit_two_gaussians(values: Floats, *, smallest_std: float = 0.01) -> TwoGaussians | None:
    """Fits a mixture of two normal distributions by expectation-maximisation.

    Deterministic: EM starts once from a split at each decile, and the likeliest end is kept. A floor under the standard
    deviations keeps one component from collapsing onto a repeated value.

    Args:
        values: finite, (n,).
        smallest_std: floor of the standard deviations, in the unit of the values.

    Returns:
        The fit, or None where there are fewer than four different values.
    """
    if np.unique(values).size < 4:
        return None
    fits = [_expectation_maximisation(values, quantile, smallest_std) for quantile in _STARTING_SPLITS]
    return max(fits, key=lambda fit: fit.log_likelihood)


def _expectation_maximisation(values: Floats, quantile: float, smallest_std: float) -> TwoGaussians:
    above = (values > np.quantile(values, quantile)).astype(np.float64)
    belongs = np.stack([1 - above, above])
    likelihood = before = -np.inf
    weights = means = stds = np.zeros(2)
    for _ in range(_EM_STEPS):
        total = np.maximum(belongs.sum(axis=1), 1e-12)
        weights = total / values.size
        means = belongs @ values / total
        stds = np.sqrt((belongs * (values - means[:, None]) ** 2).sum(axis=1) / total)
        stds = np.maximum(stds, smallest_std)
        deviations = (values - means[:, None]) / stds[:, None]
        joint = np.log(weights / stds)[:, None] - 0.5 * deviations**2 - 0.5 * np.log(2 * np.pi)
        marginal: Floats = np.logaddexp(joint[0], joint[1])
        likelihood = float(np.mean(marginal))
        if likelihood - before < _EM_TOLERANCE:
            break
        before = likelihood
        belongs = np.exp(joint - marginal)
    low, high = np.argsort(means, kind="stable")
    return TwoGaussians(
        (float(weights[low]), float(weights[high])),
        (float(means[low]), float(means[high])),
        (float(stds[low]), float(stds[high])),
        likelihood,
    )


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)


def _reduce(values: Floats, function: Callable[[Floats], Any]) -> float | None:
    kept = finite(values)
    return float(function(kept)) if kept.size else None
