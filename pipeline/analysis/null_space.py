"""How much of each feature the model cannot see: the part of its direction in the null space of W_out.

An MLP activation a reaches the residual stream as a @ W_out, so what lies in W_out's left null space has no effect. The
null space comes from the SVD in float64, its rank from the singular values above ``tolerance`` times the largest; the
default tolerance is numpy's rule for the precision the weights come in, max(shape) x 2^-23. Three null spaces: of W_out
as it is, of W_out centred over d_model (the layer norm after it removes the mean, so one more direction is unseen), and
the author's fixed ``U[:, d_model:]``.

A random direction of d dimensions has a fraction Beta(k/2, r/2) in a null space of k = d - r: mean 1 - r/d, and
standard deviation sqrt(mean (1 - mean) / (d/2 + 1)): 0.75 and 0.0135 for 2048 -> 512. Cost: one SVD and two products of
(d_sae, d_in) x (d_in, r). Rejected: projecting on the null space itself, which is the larger of the two.

Source: the post, "Should we train autoencoders on the MLP output?".
"""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, FeatureGroups, Floats, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Null space of the output weights"
QUESTION = "How much of each feature lies where the rest of the model cannot see it?"
REQUIRES: frozenset[Need] = frozenset({"model"})
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("applies", "Applies to this site", "text"),
    NumberLabel("encoder_mean_frequent", "Encoder in the null space, frequent features, mean", "fraction"),
    NumberLabel("encoder_std_frequent", "… standard deviation", "plain"),
    NumberLabel("encoder_mean_frequent_centred", "… of centred W_out", "fraction"),
    NumberLabel("encoder_mean_frequent_fixed", "… by the author’s U[:, d_model:]", "fraction"),
    NumberLabel("decoder_mean_frequent", "Decoder in the null space, frequent features, mean", "fraction"),
    NumberLabel("decoder_std_frequent", "… standard deviation", "plain"),
    NumberLabel("decoder_mean_frequent_centred", "… of centred W_out", "fraction"),
    NumberLabel("decoder_mean_frequent_fixed", "… by the author’s U[:, d_model:]", "fraction"),
    NumberLabel("encoder_mean_rare", "Encoder in the null space, ultra-low features, mean", "fraction"),
    NumberLabel("encoder_std_rare", "… standard deviation", "plain"),
    NumberLabel("decoder_mean_rare", "Decoder in the null space, ultra-low features, mean", "fraction"),
    NumberLabel("decoder_std_rare", "… standard deviation", "plain"),
    NumberLabel("encoder_mean_all", "Encoder in the null space, all features, mean", "fraction"),
    NumberLabel("encoder_std_all", "… standard deviation", "plain"),
    NumberLabel("encoder_mean_all_centred", "… of centred W_out", "fraction"),
    NumberLabel("encoder_mean_all_fixed", "… by the author’s U[:, d_model:]", "fraction"),
    NumberLabel("decoder_mean_all", "Decoder in the null space, all features, mean", "fraction"),
    NumberLabel("decoder_std_all", "… standard deviation", "plain"),
    NumberLabel("decoder_mean_all_centred", "… of centred W_out", "fraction"),
    NumberLabel("decoder_mean_all_fixed", "… by the author’s U[:, d_model:]", "fraction"),
    NumberLabel("random_mean_theory", "Random direction, mean by theory", "fraction"),
    NumberLabel("random_std_theory", "… standard deviation by theory", "plain"),
    NumberLabel("random_mean_sample", "… mean of a sample", "fraction"),
    NumberLabel("random_std_sample", "… standard deviation of a sample", "plain"),
    NumberLabel("rank", "Rank of W_out", "count"),
    NumberLabel("rank_centred", "… of centred W_out", "count"),
    NumberLabel("tolerance", "… of singular values above this share of the largest", "plain"),
    NumberLabel("w_out_is_centred", "W_out came centred", "text"),
)
_SITE = "mlp.hook_post"


class OPTIONS(AnalysisOptions):
    """Options of the null space analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """Singular values at or below this share of the largest count as zero; max(shape) x 2^-23 by default."""
    random_rows: int = Field(default=4096, gt=1)
    """Random directions of the sampled baseline."""


class ColumnSpace(NamedTuple):
    """What W_out sees.

    Attributes:
        basis: orthonormal, (d_mlp, rank).
        tolerance: share of the largest singular value below which one counts as zero.
    """

    basis: Floats
    tolerance: float

    @property
    def rank(self) -> int:
        """Its dimension."""
        return self.basis.shape[1]


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures null space fractions; see the module."""
    if not context.hook_name.endswith(_SITE):
        return _not_here(context.hook_name)
    W_out = statistics.weights64(context.need_model().W_out(context.layer))
    centred = W_out - W_out.mean(axis=1, keepdims=True)
    raw_space = column_space(W_out, options.tolerance)
    spaces = {
        "": raw_space,
        "_centred": column_space(centred, options.tolerance),
        "_fixed": ColumnSpace(np.linalg.svd(W_out, full_matrices=False)[0], 0.0),
    }
    weights = {
        "encoder": statistics.weights64(context.sae.W_enc).T,
        "decoder": statistics.weights64(context.sae.W_dec),
    }
    fractions = {
        f"{what}{kind}": null_fraction(rows, space.basis)
        for what, rows in weights.items()
        for kind, space in spaces.items()
    }
    random = null_fraction(
        context.rng("null space").standard_normal((options.random_rows, len(W_out))), raw_space.basis
    )
    groups = context.groups(options.ultra_low_below)
    numbers = _group_numbers(fractions, groups)
    expected_mean, expected_std = random_fraction(len(W_out), raw_space.rank)
    numbers |= {
        "random_mean_theory": expected_mean,
        "random_std_theory": expected_std,
        "random_mean_sample": statistics.mean(random),
        "random_std_sample": statistics.std(random),
        "rank": raw_space.rank,
        "rank_centred": spaces["_centred"].rank,
        "tolerance": raw_space.tolerance,
        "w_out_is_centred": "yes" if spaces["_centred"].rank == raw_space.rank < W_out.shape[1] else "no",
    }
    table = pa.table(
        {"feature": pa.array(np.arange(context.sae.d_sae, dtype=np.int32))}
        | {f"{name}_null_fraction": pa.array(values, from_pandas=True) for name, values in fractions.items()}
    )
    drawn = {what: _figure(what, fractions[what], random, groups, expected_mean) for what in weights}
    return AnalysisResult(numbers, {"features": table}, drawn, _reading(numbers))


def column_space(W_out: Floats, tolerance: float | None = None) -> ColumnSpace:
    """Orthonormal basis of what W_out sees.

    Args:
        W_out: (d_mlp, d_model).
        tolerance: share of the largest singular value below which one counts as zero.
    """
    share = max(W_out.shape) * 2.0**-23 if tolerance is None else tolerance
    U, singular, _ = np.linalg.svd(W_out, full_matrices=False)
    return ColumnSpace(U[:, singular > share * singular[0]], share)


def null_fraction(rows: Floats, basis: Floats) -> Floats:
    """Fraction of each row's squared norm outside a subspace, (n,); NaN for a row of zeros.

    Args:
        rows: (n, d).
        basis: of the subspace, orthonormal, (d, r).
    """
    seen = ((rows @ basis) ** 2).sum(axis=1)
    total = (rows * rows).sum(axis=1)
    visible = np.divide(seen, total, out=np.full(total.shape, np.nan), where=total > 0)
    return np.clip(1 - visible, 0, 1)


def random_fraction(d: int, rank: int) -> tuple[float, float]:
    """Mean and standard deviation of a random direction's fraction in the null space, in closed form."""
    expected = 1 - rank / d
    return expected, (expected * (1 - expected) / (d / 2 + 1)) ** 0.5


def _not_here(hook_name: str) -> AnalysisResult:
    numbers: dict[str, Number] = dict.fromkeys((number.key for number in NUMBERS), None)
    numbers |= {"applies": f"no: the site is {hook_name}"}
    reading = f"W_out reads the MLP's neurons, and {hook_name} is not that site: there is no null space to measure."
    return AnalysisResult(numbers, reading=reading)


def _group_numbers(fractions: dict[str, Floats], groups: FeatureGroups | None) -> dict[str, Number]:
    numbers: dict[str, Number] = {}
    for what in ("encoder", "decoder"):
        everything = np.ones(fractions[what].size, np.bool_)
        chosen = {"all": everything} if groups is None else {"frequent": groups.frequent, "rare": groups.rare}
        for kind in ("", "_centred", "_fixed"):
            for name, mask in chosen.items():
                numbers[f"{what}_mean_{name}{kind}"] = statistics.mean(fractions[what + kind][mask])
                numbers[f"{what}_std_{name}{kind}"] = statistics.std(fractions[what + kind][mask])
    return numbers


def _figure(what: str, values: Floats, random: Floats, groups: FeatureGroups | None, expected: float) -> go.Figure:
    numbered = np.arange(values.size)
    frequent = numbered if groups is None else np.flatnonzero(groups.frequent)
    rare = numbered[:0] if groups is None else np.flatnonzero(groups.rare)
    kept = statistics.finite(np.concatenate([values, random]))
    low, high = float(kept.min()), float(kept.max())
    edges = np.linspace(max(0.0, low - 0.01), min(1.0, high + 0.01), 81)
    name = "frequent" if rare.size else "features"
    figure = figures.histogram(
        [
            figures.Series("random", random, "baseline"),
            figures.Series(name, values[frequent], "frequent", frequent),
            figures.Series("ultra-low", values[rare], "rare", rare),
        ],
        edges,
        caption=f"Fraction of each {what}'s squared norm in the null space of W_out.",
        x_title=f"share of |{what}|² in the null space",
    )
    figure.update_xaxes(tickformat=".0%")
    figures.mark_x(figure, expected, f"random: {percent(expected)}")
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    group = "frequent" if "encoder_mean_frequent" in numbers else "all"
    encoder, decoder = numbers[f"encoder_mean_{group}"], numbers[f"decoder_mean_{group}"]
    spread = numbers[f"decoder_std_{group}"]
    return (
        f"A feature at {percent(1.0)} would be invisible to the rest of the model; random directions pile up at "
        f"{percent(numbers['random_mean_theory'])}. Encoders here hold {percent(encoder)} on "
        f"average and decoders {percent(decoder)}, spread {show(spread)} against "
        f"{show(numbers['random_std_theory'])} for random: wider means W_out prefers some directions."
    )
