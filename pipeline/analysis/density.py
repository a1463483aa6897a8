"""How often each feature fires: densities, dead and ultra-low fractions, L0, and whether densities have two modes.

Counts, largest and mean activations come from the survey: this reads no shard. A fraction below a threshold at which
fewer than ten firings are expected among the rows reads "below resolution": 1e-6 of a million rows is one firing, which
says nothing.

Source: the post, "Ultra Low Frequency Features"; the author counts over 1,638,400 tokens.
"""

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, FeatureDensities, Integers, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import BELOW_RESOLUTION, AnalysisResult, Number
from pipeline.analysis.survey import Survey

VERSION = 2
TITLE = "Feature density"
QUESTION = "How often does each feature fire, and do the densities fall into two groups?"
REQUIRES: frozenset[Need] = frozenset({"survey"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("l0", "L0: features firing on a token, mean", "plain"),
    NumberLabel("l0_median", "L0, median token", "plain"),
    NumberLabel("dead_fraction", "Dead features", "fraction"),
    NumberLabel("below_1e-6", "Features of density < 1e-6", "fraction"),
    NumberLabel("below_1e-5", "Features of density < 1e-5", "fraction"),
    NumberLabel("ultra_low_fraction", "Ultra-low features, density < 1e-4", "fraction"),
    NumberLabel("median_density", "Median density of features that fire", "plain"),
    NumberLabel("ashman_d", "Ashman’s D of two modes in log10 density (above 2: two)", "plain"),
    NumberLabel("lower_mode", "Lower mode, log10 density", "plain"),
    NumberLabel("upper_mode", "Upper mode, log10 density", "plain"),
    NumberLabel("lower_mode_weight", "Share of features in the lower mode", "fraction"),
    NumberLabel("d_sae", "Features", "count"),
    NumberLabel("n_rows", "Tokens counted", "count"),
)
_SPIKE = 10**-6.5
_NEEDED_FIRINGS = 10


class OPTIONS(AnalysisOptions):
    """Options of the density analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    bin_width: float = Field(default=0.1, gt=0)
    """Width of a bin of the histogram, in powers of ten."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures densities; see the module."""
    found = context.need_survey()
    densities = FeatureDensities(found.count, found.n_rows)
    density = densities.density
    fires = density > 0
    fit = statistics.fit_two_gaussians(np.log10(density[fires])) if fires.any() else None
    modes = fit if fit is not None and fit.is_bimodal else None
    numbers: dict[str, Number] = {
        "n_rows": found.n_rows,
        "d_sae": int(density.size),
        "l0": float(density.sum()),
        "l0_median": float(np.searchsorted(np.cumsum(found.l0_histogram), (found.n_rows + 1) // 2)),
        "dead_fraction": float((~fires).mean()),
        "below_1e-6": fraction_below(densities, 1e-6),
        "below_1e-5": fraction_below(densities, 1e-5),
        "ultra_low_fraction": fraction_below(densities, options.ultra_low_below),
        "ultra_low_below": options.ultra_low_below,
        "median_density": statistics.median(density[fires]),
        "ashman_d": None if fit is None else fit.ashman_d,
        "lower_mode": None if modes is None else modes.means[0],
        "upper_mode": None if modes is None else modes.means[1],
        "lower_mode_weight": None if modes is None else modes.weights[0],
    }
    drawn = {"density": _density_figure(densities, options), "l0": _l0_figure(found.l0_histogram)}
    return AnalysisResult(numbers, {"features": _table(found)}, drawn, _reading(numbers))


def fraction_below(densities: FeatureDensities, threshold: float) -> float | str:
    """Fraction of features of density below a threshold, or "below resolution"."""
    if threshold * densities.n_rows < _NEEDED_FIRINGS:
        return BELOW_RESOLUTION
    return float((densities.density < threshold).mean())


def _table(found: Survey) -> pa.Table:
    fires = found.count > 0
    mean_active = np.divide(found.total, found.count, out=np.zeros_like(found.total), where=fires)
    return pa.table(
        {
            "feature": pa.array(np.arange(found.count.size, dtype=np.int32)),
            "count": pa.array(found.count),
            "density": pa.array(found.count / found.n_rows),
            "max_activation": pa.array(found.largest),
            "mean_activation_when_active": pa.array(mean_active),
        }
    )


def _density_figure(densities: FeatureDensities, options: OPTIONS) -> go.Figure:
    values = np.log10(densities.density + _SPIKE)
    edges = np.arange(-6.6, options.bin_width + 1e-9, options.bin_width)
    numbered = np.arange(values.size)
    groups = densities.groups(options.ultra_low_below)
    shown = [
        figures.Series("frequent", values[groups.frequent], "frequent", numbered[groups.frequent]),
        figures.Series("ultra-low", values[groups.rare], "rare", numbered[groups.rare]),
    ]
    caption = (
        "Density of every feature. A spike at −6.5 would be features that never fire: 10⁻⁶·⁵ is added to each density."
    )
    x_title = "log₁₀ of density (firings per token)"
    figure = figures.histogram(shown, edges, caption=caption, x_title=x_title, as_counts=True)
    line = float(np.log10(options.ultra_low_below))
    resolution = float(np.log10(_NEEDED_FIRINGS / densities.n_rows))
    figures.mark_x(figure, line, "ultra-low | frequent", to_left=False)
    if -6.5 < resolution < line - 0.2:
        figures.mark_x(figure, resolution, "ten firings", to_left=True)
    return figure


def _l0_figure(histogram: Integers) -> go.Figure:
    total = max(int(histogram.sum()), 1)
    most = int(np.flatnonzero(histogram)[-1])
    shown = max(int(np.searchsorted(np.cumsum(histogram), 0.999 * total)), 1)
    step = max(1, shown // 80)
    starts = np.arange(0, shown + 1, step)
    pooled = np.add.reduceat(histogram[: starts[-1] + step], starts)
    figure = figures.new_figure(
        f"How many features fire on a token; a token in a thousand lies further right, up to {most:,}.",
        x_title="features firing on a token",
        y_title="share of tokens",
    )
    figure.add_bar(
        x=starts + (step - 1) / 2,
        y=pooled / total,
        width=step,
        marker={"color": figures.LIGHT["third"], "line": {"width": 0}},
        opacity=0.85,
        hovertemplate="%{x} features<br>%{y:.2%} of tokens<extra></extra>",
    )
    figure.update_yaxes(tickformat=".1~%")
    figures.hide_legend(figure)
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    modes = f"Ashman’s D of two normal curves fitted to log₁₀ density is {show(numbers['ashman_d'])}: " + (
        "too little to call them two groups." if numbers["lower_mode"] is None else "two groups."
    )
    return (
        "Each bar counts features by how often they fire; a healthy dictionary has one hump, well to the right of the "
        f"ultra-low line. Here {_some(numbers['ultra_low_fraction'])} of the features are ultra-low and "
        f"{_some(numbers['dead_fraction'])} are dead. {modes if numbers['ashman_d'] is not None else ''}"
    ).rstrip()


def _some(fraction: Number) -> str:
    return "none" if fraction == 0 else percent(fraction)
