"""What a step reports, and densities from firing counts. All training rows are counted; nothing is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class ResamplingEvent:
    """Features that were resampled after a step.

    Attributes:
        step: the step after which it happened, counted from 1.
        scheme: which scheme.
        features: their numbers, ascending.
        window_rows: training rows over which their firing was counted.
    """

    step: int
    scheme: Literal["reinit", "anthropic"]
    features: tuple[int, ...]
    window_rows: int


@dataclass(frozen=True)
class StepMetrics:
    """One training step; quantities of the batch are those before the weights moved.

    Attributes:
        step: counted from 1.
        rows: rows of the batch.
        rows_seen: training rows up to and including this batch.
        loss: l2 + l1_coeff x l1 + encoder penalties.
        l2: squared error summed over d_in, mean over the batch.
        l1: per-token L1 norm of the features, mean over the batch.
        l0: active features a token, mean over the batch.
        fve: fraction of variance explained: 1 - sum of squared errors / sum of squared deviations from the dataset mean
            given at the start, both over the batch.
        learning_rate: used by this step.
        l1_coeff: used by this step.
        grad_norm: global norm of the projected gradient, before clipping.
        decoder_norm_min: smallest norm of a decoder row, after the step.
        decoder_norm_max: largest.
        engine: which engine took the step.
        resampled: None, or what was resampled after it.
    """

    step: int
    rows: int
    rows_seen: int
    loss: float
    l2: float
    l1: float
    l0: float
    fve: float
    learning_rate: float
    l1_coeff: float
    grad_norm: float
    decoder_norm_min: float
    decoder_norm_max: float
    engine: Literal["dense", "sparse"]
    resampled: ResamplingEvent | None


@dataclass(frozen=True)
class DensityWindow:
    """Firing counts over a window of training rows.

    Attributes:
        counts: (d_sae,) int64, rows on which each feature fired.
        rows: rows counted.
        complete: whether the window has its full length.
    """

    counts: Tensor
    rows: int
    complete: bool

    @property
    def density(self) -> Tensor:
        """(d_sae,) float64: fraction of the window's rows on which each feature fired; zeros for an empty window."""
        return self.counts.double() / max(1, self.rows)

    def dead_fraction(self) -> float:
        """Fraction of features that never fired."""
        return float((self.counts == 0).double().mean())

    def fractions_below(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """Fraction of features with density under each threshold, dead ones included."""
        return tuple(float((self.density < threshold).double().mean()) for threshold in thresholds)
