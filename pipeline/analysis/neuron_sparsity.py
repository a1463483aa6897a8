"""How many neurons a decoder direction is made of.

Decoder entries squared and normalised are shares of the direction: fve_top_1 is the largest, fve_next_9 the nine after
it together. A feature is 1-sparse (top_1 > .35 and next_9 < .1), dense (top_10 < .35), or 10-ish-sparse: the rest. A
feature with a zero decoder has no label. Rejected: encoder rows, since the decoder is the better guess at the feature.

Source: the post, "Exploring Neuron Sparsity".
"""

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Mask, Need
from pipeline.analysis.display import percent
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Neuron sparsity"
QUESTION = "Is a feature one neuron, a handful of them, or spread over the layer?"
REQUIRES: frozenset[Need] = frozenset()
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("dense_fraction", "Dense, of frequent features", "fraction"),
    NumberLabel("one_sparse_fraction", "1-sparse, of frequent features", "fraction"),
    NumberLabel("ten_sparse_fraction", "10-ish-sparse, of frequent features", "fraction"),
    NumberLabel("dense_fraction_all", "Dense, of all features", "fraction"),
    NumberLabel("one_sparse_fraction_all", "1-sparse, of all features", "fraction"),
    NumberLabel("ten_sparse_fraction_all", "10-ish-sparse, of all features", "fraction"),
    NumberLabel("fve_top_1_median", "Largest neuron's share, median frequent feature", "fraction"),
    NumberLabel("fve_top_10_median", "Ten largest neurons' share, median frequent feature", "fraction"),
)
DENSE, ONE_SPARSE, TEN_SPARSE, NO_LABEL = "dense", "1-sparse", "10-ish-sparse", "zero decoder"
_ROLES: dict[str, figures.Role] = {DENSE: "frequent", ONE_SPARSE: "rare", TEN_SPARSE: "third"}


class OPTIONS(AnalysisOptions):
    """Options of the neuron sparsity analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    one_sparse_top_1_above: float = Field(default=0.35, gt=0, lt=1)
    """A 1-sparse feature's largest neuron has more than this share."""
    one_sparse_next_9_below: float = Field(default=0.1, gt=0, lt=1)
    """A 1-sparse feature's next nine neurons have less than this share."""
    dense_top_10_below: float = Field(default=0.35, gt=0, lt=1)
    """A dense feature's ten largest neurons have less than this share."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Labels every feature; see the module."""
    top_1, next_9 = neuron_shares(statistics.weights64(context.sae.W_dec))
    labels = label_features(top_1, next_9, options)
    groups = context.groups(options.ultra_low_below)
    everything = np.ones(labels.size, np.bool_)
    frequent = everything if groups is None else groups.frequent
    numbers: dict[str, Number] = {
        **_fractions(labels, everything, "_all"),
        **(_fractions(labels, frequent, "") if groups is not None else {}),
        "fve_top_1_median": statistics.median(top_1[frequent]),
        "fve_top_10_median": statistics.median((top_1 + next_9)[frequent]),
    }
    table = pa.table(
        {
            "feature": pa.array(np.arange(labels.size, dtype=np.int32)),
            "fve_top_1": pa.array(top_1, from_pandas=True),
            "fve_next_9": pa.array(next_9, from_pandas=True),
            "fve_top_10": pa.array(top_1 + next_9, from_pandas=True),
            "label": pa.array(labels.tolist(), pa.string()),
        }
    )
    figure = _figure(top_1, next_9, labels, frequent, options, known=groups is not None)
    return AnalysisResult(numbers, {"features": table}, {"neuron_sparsity": figure}, _reading(numbers))


def neuron_shares(decoder: Floats) -> tuple[Floats, Floats]:
    """Shares of the largest neuron and of the nine after it in each decoder row's squared norm.

    Args:
        decoder: (d_sae, d_in).

    Returns:
        ``(fve_top_1, fve_next_9)``, each (d_sae,); NaN for a row of zeros.
    """
    squared = decoder * decoder
    total = squared.sum(axis=1)
    kept = min(10, squared.shape[1])
    largest = -np.sort(-np.partition(squared, -kept, axis=1)[:, -kept:], axis=1)
    shares = np.divide(largest, total[:, None], out=np.full_like(largest, np.nan), where=total[:, None] > 0)
    return shares[:, 0], shares[:, 1:].sum(axis=1)


def label_features(top_1: Floats, next_9: Floats, options: OPTIONS) -> "np.ndarray[tuple[int], np.dtype[np.str_]]":
    """The label of each feature, str (d_sae,)."""
    one_sparse = (top_1 > options.one_sparse_top_1_above) & (next_9 < options.one_sparse_next_9_below)
    dense = top_1 + next_9 < options.dense_top_10_below
    return np.select([np.isnan(top_1), one_sparse, dense], [NO_LABEL, ONE_SPARSE, DENSE], TEN_SPARSE)


def _fractions(labels: "np.ndarray[tuple[int], np.dtype[np.str_]]", chosen: Mask, suffix: str) -> dict[str, Number]:
    kept = labels[chosen & (labels != NO_LABEL)]
    names = {"dense": DENSE, "one_sparse": ONE_SPARSE, "ten_sparse": TEN_SPARSE}
    return {f"{key}_fraction{suffix}": statistics.share(kept == label) for key, label in names.items()}


def _figure(
    top_1: Floats,
    next_9: Floats,
    labels: "np.ndarray[tuple[int], np.dtype[np.str_]]",
    chosen: Mask,
    options: OPTIONS,
    *,
    known: bool,
) -> go.Figure:
    figure = figures.new_figure(
        f"Each {'frequent ' if known else ''}feature by the share of its largest neuron and of the nine after it.",
        x_title="share of the largest neuron (fve_top_1)",
        y_title="share of the next nine (fve_next_9)",
    )
    for label, role in _ROLES.items():
        where = np.flatnonzero(chosen & (labels == label))
        if where.size:
            hover = "largest neuron %{x:.1%}<br>next nine %{y:.1%}"
            name = f"{label} ({where.size:,})"
            figure.add_trace(figures.scatter(top_1[where], next_9[where], where, name=name, role=role, hover=hover))
    edge, low, top_10 = options.one_sparse_top_1_above, options.one_sparse_next_9_below, options.dense_top_10_below
    line = {"color": figures.LIGHT["muted"], "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=edge, x1=1, y0=low, y1=low, line=line)
    figure.add_shape(type="line", x0=edge, x1=edge, y0=0, y1=low, line=line)
    figure.add_shape(type="line", x0=0, x1=top_10, y0=top_10, y1=0, line=line)
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    figure.update_yaxes(range=[0, 0.92], tickformat=".0%")
    figure.update_layout(height=420, legend={"itemsizing": "constant"})
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    suffix, group = ("", "frequent ") if "dense_fraction" in numbers else ("_all", "")
    return (
        "Features near the origin are spread over many neurons; those at the right edge are a single neuron. Of the "
        f"{group}features {percent(numbers['dense_fraction' + suffix])} are dense, "
        f"{percent(numbers['one_sparse_fraction' + suffix])} 1-sparse and "
        f"{percent(numbers['ten_sparse_fraction' + suffix])} 10-ish-sparse."
    )
