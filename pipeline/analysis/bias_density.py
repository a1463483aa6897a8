"""Density, bias and D/E projection of every feature, together: Anthropic's three-dimensional plot.

A feature that carries a signal has a dot product of encoder and decoder near 1; a comment under the post asks whether
ultra-low features stand apart by a large negative bias too. Numbers: medians of each group and rank correlations.

Source: Towards Monosemanticity, appendix; the comment on features that try to die.
"""

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Need
from pipeline.analysis.display import show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 2
TITLE = "Density, bias and projection"
QUESTION = "Do ultra-low features stand apart by their bias, or by not passing a signal through?"
REQUIRES: frozenset[Need] = frozenset({"density"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("bias_median_frequent", "Encoder bias, frequent features, median", "plain"),
    NumberLabel("bias_median_rare", "Encoder bias, ultra-low features, median", "plain"),
    NumberLabel("projection_median_frequent", "D/E projection, frequent features, median", "plain"),
    NumberLabel("projection_median_rare", "D/E projection, ultra-low features, median", "plain"),
    NumberLabel("density_bias_correlation", "Rank correlation of density and bias", "plain"),
    NumberLabel("density_projection_correlation", "Rank correlation of density and D/E projection", "plain"),
)
_SPIKE = 10**-6.5


class OPTIONS(AnalysisOptions):
    """Options of the bias-density analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    drawn_features: int = Field(default=8192, gt=0)
    """Features drawn, chosen at random where there are more."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures the three together; see the module."""
    densities = context.need_densities()
    frequent, rare = densities.groups(options.ultra_low_below)
    bias = statistics.weights64(context.sae.b_enc)
    encoder, decoder = statistics.weights64(context.sae.W_enc).T, statistics.weights64(context.sae.W_dec)
    projection = np.einsum("ij,ij->i", encoder, decoder)
    density = densities.density
    numbers: dict[str, Number] = {
        "bias_median_frequent": statistics.median(bias[frequent]),
        "bias_median_rare": statistics.median(bias[rare]),
        "projection_median_frequent": statistics.median(projection[frequent]),
        "projection_median_rare": statistics.median(projection[rare]),
        "density_bias_correlation": rank_correlation(density, bias),
        "density_projection_correlation": rank_correlation(density, projection),
    }
    chosen = np.sort(context.rng("bias density").permutation(density.size)[: options.drawn_features])
    figure = figures.new_figure(
        "Every feature by density, encoder bias and dot product of encoder and decoder. Drag to turn.",
        x_title="",
        y_title="",
    )
    for name, mask, role in (("frequent", frequent, "frequent"), ("ultra-low", rare, "rare")):
        where = chosen[mask[chosen]]
        if where.size:
            points = (np.log10(density[where] + _SPIKE), bias[where], projection[where])
            figure.add_trace(_points(points, where, f"{name} ({int(mask.sum()):,})", figures.LIGHT[role]))
    figure.update_layout(
        height=540,
        margin={"l": 0, "r": 0, "t": 36, "b": 0},
        legend={"itemsizing": "constant"},
        scene={
            "xaxis": {"title": {"text": "log₁₀ density"}},
            "yaxis": {"title": {"text": "encoder bias"}},
            "zaxis": {"title": {"text": "D/E projection"}},
            "aspectmode": "manual",
            "aspectratio": {"x": 1.4, "y": 1.1, "z": 0.9},
            "camera": {"eye": {"x": 1.5, "y": -1.6, "z": 0.65}, "center": {"x": 0, "y": 0, "z": -0.12}},
        },
    )
    table = pa.table(
        {
            "feature": pa.array(np.arange(bias.size, dtype=np.int32)),
            "density": pa.array(density),
            "encoder_bias": pa.array(bias),
            "encoder_decoder_projection": pa.array(projection),
        }
    )
    return AnalysisResult(numbers, {"features": table}, {"density_bias_projection": figure}, _reading(numbers))


def rank_correlation(left: Floats, right: Floats) -> float | None:
    """Spearman's rank correlation, or None where either does not vary."""
    if left.size < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    from scipy.stats import rankdata  # half a second that a found analysis need not wait for

    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def _points(points: tuple[Floats, Floats, Floats], features: np.ndarray, name: str, colour: str) -> go.Scatter3d:
    x, y, z = points
    return go.Scatter3d(
        x=x,
        y=y,
        z=z,
        mode="markers",
        name=name,
        marker={"color": colour, "size": 2.4, "opacity": 0.6},
        customdata=features.tolist(),
        hovertemplate="feature %{customdata}<br>log₁₀ density %{x:.2f}<br>bias %{y:.3g}"
        "<br>projection %{z:.3g}<extra></extra>",
    )


def _reading(numbers: dict[str, Number]) -> str:
    if numbers["bias_median_rare"] is None:
        return "There are no ultra-low features; frequent ones that carry a signal gather near projection 1."
    return (
        "Features that carry a signal gather near projection 1; features that carry none scatter around 0. Ultra-low "
        f"features here have a median bias of {show(numbers['bias_median_rare'])} and projection of "
        f"{show(numbers['projection_median_rare'])}, frequent ones "
        f"{show(numbers['bias_median_frequent'])} and "
        f"{show(numbers['projection_median_frequent'])}."
    )
