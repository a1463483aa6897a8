"""How orthogonal features are: cosines between distinct frequent decoder directions.

Mean and variance over all pairs follow exactly from sums, without the pairs: for unit rows u the mean cosine is
(|sum u|^2 - n) / n(n-1), and the mean square (|U^T U|^2 - n) / n(n-1), a d_in x d_in matrix. Only the histogram looks
at pairs, of a bounded random subset of features. Random directions have mean 0 and variance 1 / d_in. Rejected: the
n x n matrix of cosines (16,384 features: 2 GB in float64).

Source: a comment under the post, on cosine similarity of frequent features.
"""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Need
from pipeline.analysis.display import show
from pipeline.analysis.neuron_sparsity import DENSE, label_features, neuron_shares
from pipeline.analysis.neuron_sparsity import OPTIONS as SPARSITY_OPTIONS
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 2
TITLE = "Geometry of the dictionary"
QUESTION = "Are features packed as orthogonally as random directions would be?"
REQUIRES: frozenset[Need] = frozenset()
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("cosine_mean", "Cosine of distinct frequent decoders, mean", "plain"),
    NumberLabel("cosine_variance", "… variance", "plain"),
    NumberLabel("cosine_mean_dense", "… without neuron-sparse features, mean", "plain"),
    NumberLabel("cosine_variance_dense", "… without neuron-sparse features, variance", "plain"),
    NumberLabel("random_mean", "Random directions, mean", "plain"),
    NumberLabel("random_variance", "Random directions, variance (1 / d_in)", "plain"),
    NumberLabel("n_features", "Features compared", "count"),
)


class OPTIONS(AnalysisOptions):
    """Options of the geometry analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low and left out."""
    histogram_features: int = Field(default=2048, ge=2)
    """Features, drawn at random, whose pairs make the histogram; mean and variance are over all."""


class PairMoments(NamedTuple):
    """Of the cosines between distinct rows; None where there are fewer than two."""

    mean: float | None
    variance: float | None


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures cosines between features; see the module."""
    decoder = statistics.weights64(context.sae.W_dec)
    groups = context.groups(options.ultra_low_below)
    length = statistics.norms(decoder)
    kept = (length > 0) & (True if groups is None else groups.frequent)
    dense = label_features(*neuron_shares(decoder), SPARSITY_OPTIONS()) == DENSE
    units = decoder[kept] / length[kept, None]
    everything, without_sparse = pair_moments(units), pair_moments(units[dense[kept]])
    numbers: dict[str, Number] = {
        "cosine_mean": everything.mean,
        "cosine_variance": everything.variance,
        "cosine_mean_dense": without_sparse.mean,
        "cosine_variance_dense": without_sparse.variance,
        "random_mean": 0.0,
        "random_variance": 1 / context.sae.d_in,
        "n_features": len(units),
    }
    tables = {"cosines": _table(numbers, int(dense[kept].sum()))}
    if len(units) < 2:
        return AnalysisResult(numbers, tables, reading="Fewer than two features fire often enough to compare.")
    chosen = context.rng("geometry").permutation(len(units))[: options.histogram_features]
    figure = _figure(units[np.sort(chosen)], context.sae.d_in)
    return AnalysisResult(numbers, tables, {"cosines": figure}, _reading(numbers))


def pair_moments(units: Floats) -> PairMoments:
    """Mean and variance of the cosine between distinct unit rows.

    Args:
        units: (n, d), unit rows.
    """
    n = len(units)
    if n < 2:
        return PairMoments(None, None)
    pairs = n * (n - 1)
    gram = units.T @ units
    mean = (float(np.square(units.sum(axis=0)).sum()) - n) / pairs
    square = (float(np.square(gram).sum()) - n) / pairs
    return PairMoments(mean, max(square - mean * mean, 0.0))


def _table(numbers: dict[str, Number], n_dense: int) -> pa.Table:
    groups = {"frequent": "", "frequent, without neuron-sparse": "_dense"}
    means = [*(numbers[f"cosine_mean{suffix}"] for suffix in groups.values()), numbers["random_mean"]]
    variances = [*(numbers[f"cosine_variance{suffix}"] for suffix in groups.values()), numbers["random_variance"]]
    return pa.table(
        {
            "directions": pa.array([*groups, "random"], pa.string()),
            "features": pa.array([numbers["n_features"], n_dense, None], pa.int64()),
            "cosine_mean": pa.array(means, pa.float64()),
            "cosine_variance": pa.array(variances, pa.float64()),
        }
    )


def _figure(units: Floats, d_in: int) -> go.Figure:
    cosines = (units @ units.T)[np.triu_indices(len(units), 1)]
    reach = max(6 / d_in**0.5, float(np.quantile(np.abs(cosines), 0.999)))
    edges = np.linspace(-reach, reach, 121)
    figure = figures.histogram(
        [figures.Series("pairs of features", cosines, "frequent")],
        edges,
        caption=f"Cosine between decoders of distinct features ({len(units):,} features; beyond ±{reach:.2g} counts at "
        "the edge), and the normal curve of random directions.",
        x_title="cosine between decoder directions",
        what="pairs",
    )
    centres = (edges[:-1] + edges[1:]) / 2
    from scipy.stats import norm  # half a second that a found analysis need not wait for

    expected = np.diff(norm.cdf(edges, scale=d_in**-0.5))
    figure.add_scatter(
        x=centres,
        y=expected,
        mode="lines",
        name="random directions",
        line={"color": figures.LIGHT["muted"], "width": 1.5, "dash": "dot"},
        hovertemplate="%{y:.2%}<extra>random directions</extra>",
    )
    figure.update_layout(showlegend=True, margin={"t": 36})
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    variance, random = numbers["cosine_variance"], numbers["random_variance"]
    times = variance / random if isinstance(variance, float) and isinstance(random, float) else None
    return (
        "The dotted curve is what random directions would give; bars beyond it are features that share a direction. "
        f"The mean cosine is {show(numbers['cosine_mean'])} and the variance "
        f"{show(times)} times that of random directions."
    )
