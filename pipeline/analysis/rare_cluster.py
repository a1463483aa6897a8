"""Whether ultra-low features are one and the same: their encoder directions, their decoders, and what fires together.

The rare direction is the mean of the raw encoder columns of ultra-low features (the author's; also with unit
columns). Pure weights give each feature's cosine with it, its projection on it, and |e||d|, "the meaningful property";
the survey's firings (``cofiring``) give how many of them fire on one token, and whether their firing sets are nested
by bias. With fewer than two ultra-low features there is no cluster to measure, and the result says so.

Source: the post, "Ultra Low Frequency Features Are All The Same Feature".
"""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field
from scipy import linalg

from pipeline.analysis import cofiring, figures, passages, statistics
from pipeline.analysis.cofiring import CoFiring
from pipeline.analysis.context import Context, FeatureGroups, Floats, Integers, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 3
TITLE = "The ultra-low cluster"
QUESTION = "Are the ultra-low features all the same feature?"
REQUIRES: frozenset[Need] = frozenset({"survey", "density"})
OPTIONAL: frozenset[Need] = frozenset({"tokens"})
NUMBERS = (
    NumberLabel("n_rare", "Ultra-low features", "count"),
    NumberLabel("n_rare_dead", "… of them dead", "count"),
    NumberLabel("aligned_fraction", "Encoder cosine with their mean direction > 0.95", "fraction"),
    NumberLabel("aligned_fraction_unit", "… with the mean of unit encoders", "fraction"),
    NumberLabel("cosine_median", "Encoder cosine with their mean direction, median", "plain"),
    NumberLabel("cosine_median_frequent", "… of frequent features, median", "plain"),
    NumberLabel("cosine_max_frequent", "… of frequent features, largest", "plain"),
    NumberLabel("projection_mean", "Projection on the mean direction, mean", "plain"),
    NumberLabel("projection_ashman_d", "Ashman’s D of two modes in the projection (above 2: two)", "plain"),
    NumberLabel("projection_smaller_mode", "… share of features in the smaller mode", "fraction"),
    NumberLabel("norm_product_median", "|e||d|, median", "plain"),
    NumberLabel("norm_product_p05", "|e||d|, 5th percentile", "plain"),
    NumberLabel("norm_product_p95", "|e||d|, 95th percentile", "plain"),
    NumberLabel("norm_product_median_frequent", "|e||d| of frequent features, median", "plain"),
    NumberLabel("decoder_top_share", "Decoder variance along the top singular direction", "fraction"),
    NumberLabel("decoder_top_share_centred", "… with the mean decoder removed", "fraction"),
    NumberLabel("decoder_top_share_random", "… of random rows of the same shape", "fraction"),
    NumberLabel("cofiring_max", "Ultra-low features firing on one token, at most", "fraction"),
    NumberLabel("nested_by_bias", "Firing sets nested by bias (1 = fully)", "plain"),
    NumberLabel("nested_by_threshold", "Firing sets nested by threshold −b/|e| (1 = fully)", "plain"),
    NumberLabel("nested_if_independent", "… if they fired independently", "plain"),
)


class OPTIONS(AnalysisOptions):
    """Options of the rare cluster analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""
    aligned_above: float = Field(default=0.95, gt=-1, lt=1)
    """A cosine with the mean direction above this counts as the same direction."""
    top_tokens: int = Field(default=20, gt=0)
    """Tokens on which most ultra-low features fire, kept with their text."""
    pair_features: int = Field(default=512, ge=2)
    """Ultra-low features counted in pairs for nesting, evenly spaced by bias."""


@dataclass(frozen=True)
class _Weights:
    """Per-feature quantities from weights alone, each (d_sae,)."""

    cosine: Floats
    cosine_unit: Floats
    projection: Floats
    encoder_norm: Floats
    decoder_norm: Floats
    threshold: Floats

    @property
    def norm_product(self) -> Floats:
        return self.encoder_norm * self.decoder_norm


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures the rare cluster; see the module."""
    groups = context.need_densities().groups(options.ultra_low_below)
    rare = np.flatnonzero(groups.rare)
    if rare.size < 2:
        return _no_cluster(rare.size)
    weights = _measure_weights(context, groups)
    together = _measure_cofiring(context, rare, options)
    numbers = _numbers(context, options, groups, weights) | _cofiring_numbers(context, rare, weights, together)
    tables = {"features": _table(groups, weights), "top_tokens": _top_token_table(context, together, rare.size)}
    return AnalysisResult(numbers, tables, _figures(groups, weights, together), _reading(numbers))


def _no_cluster(n_rare: int) -> AnalysisResult:
    numbers: dict[str, Number] = dict.fromkeys((number.key for number in NUMBERS), None)
    numbers |= {"cluster": "no cluster", "n_rare": n_rare}
    some = "There is one ultra-low feature" if n_rare else "There are no ultra-low features"
    return AnalysisResult(numbers, reading=f"{some}, so there is no cluster to measure: a good sign in a dictionary.")


def _measure_weights(context: Context, groups: FeatureGroups) -> _Weights:
    encoder = statistics.weights64(context.sae.W_enc).T
    decoder_norm = statistics.norms(statistics.weights64(context.sae.W_dec))
    encoder_norm = statistics.norms(encoder)
    direction = encoder[groups.rare].mean(axis=0)
    positive = encoder_norm > 0
    unit_columns = encoder[groups.rare & positive] / encoder_norm[groups.rare & positive, None]
    unit_direction = unit_columns.mean(axis=0) if len(unit_columns) else direction
    length = np.linalg.norm(direction)
    bias = statistics.weights64(context.sae.b_enc)
    return _Weights(
        cosine=statistics.cosines_with(encoder, direction),
        cosine_unit=statistics.cosines_with(encoder, unit_direction),
        projection=encoder @ direction / length if length else np.full(len(encoder), np.nan),
        encoder_norm=encoder_norm,
        decoder_norm=decoder_norm,
        threshold=np.divide(-bias, encoder_norm, out=np.full(len(bias), np.nan), where=positive),
    )


def _measure_cofiring(context: Context, rare: Integers, options: OPTIONS) -> CoFiring:
    bias = statistics.weights64(context.sae.b_enc)[rare]
    fires = np.flatnonzero(context.need_densities().counts[rare] > 0)
    by_bias = fires[np.argsort(bias[fires], kind="stable")]
    return cofiring.count_cofiring(
        context.need_survey(),
        rare,
        top_rows=options.top_tokens,
        pair_features=by_bias[cofiring.evenly_spaced(by_bias.size, options.pair_features)],
    )


def _numbers(context: Context, options: OPTIONS, groups: FeatureGroups, weights: _Weights) -> dict[str, Number]:
    frequent, rare = groups
    densities = context.need_densities()
    decoder = statistics.weights64(context.sae.W_dec)[rare]
    random = context.rng("rare decoder").standard_normal(decoder.shape)
    modes = statistics.fit_two_gaussians(statistics.finite(weights.projection[rare]))
    product = weights.norm_product
    return {
        "cluster": "measured",
        "n_rare": int(rare.sum()),
        "n_rare_dead": int((densities.counts[rare] == 0).sum()),
        "aligned_above": options.aligned_above,
        "aligned_fraction": _aligned(weights.cosine[rare], options.aligned_above),
        "aligned_fraction_unit": _aligned(weights.cosine_unit[rare], options.aligned_above),
        "cosine_median": statistics.median(weights.cosine[rare]),
        "cosine_median_frequent": statistics.median(weights.cosine[frequent]),
        "cosine_max_frequent": statistics.maximum(weights.cosine[frequent]),
        "projection_mean": statistics.mean(weights.projection[rare]),
        "projection_ashman_d": None if modes is None else modes.ashman_d,
        "projection_smaller_mode": None if modes is None else min(modes.weights),
        "norm_product_median": statistics.median(product[rare]),
        "norm_product_p05": float(np.quantile(product[rare], 0.05)),
        "norm_product_p95": float(np.quantile(product[rare], 0.95)),
        "norm_product_median_frequent": statistics.median(product[frequent]),
        "decoder_top_share": top_direction_share(decoder),
        "decoder_top_share_centred": top_direction_share(decoder - decoder.mean(axis=0)),
        "decoder_top_share_random": top_direction_share(random),
    }


def _cofiring_numbers(context: Context, rare: Integers, weights: _Weights, found: CoFiring) -> dict[str, Number]:
    chosen = rare[found.pair_features]
    bias = statistics.weights64(context.sae.b_enc)[chosen]
    most = int(np.flatnonzero(found.histogram)[-1]) if found.n_rows else 0
    return {
        "cofiring_max": most / rare.size,
        "nested_by_bias": cofiring.containment(found.pair_counts, bias),
        "nested_by_threshold": cofiring.containment(found.pair_counts, -weights.threshold[chosen]),
        "nested_if_independent": cofiring.containment_if_independent(found.pair_counts, bias, found.n_rows),
        "cofiring_rows": found.n_rows,
    }


def top_direction_share(rows: Floats) -> float | None:
    """Share of the rows' squared norm along their top singular direction; None where all are zero.

    Args:
        rows: (n, d).
    """
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    last = len(gram) - 1
    largest = linalg.eigvalsh(gram, subset_by_index=[last, last])[0]
    return statistics.ratio(float(largest), float(np.trace(gram)))


def _aligned(cosines: Floats, above: float) -> float | None:
    return statistics.share(statistics.finite(cosines) > above)


def _table(groups: FeatureGroups, weights: _Weights) -> pa.Table:
    return pa.table(
        {
            "feature": pa.array(np.arange(groups.rare.size, dtype=np.int32)),
            "rare": pa.array(groups.rare),
            "cosine_with_rare_direction": pa.array(weights.cosine, from_pandas=True),
            "projection_on_rare_direction": pa.array(weights.projection, from_pandas=True),
            "encoder_norm": pa.array(weights.encoder_norm),
            "decoder_norm": pa.array(weights.decoder_norm),
            "norm_product": pa.array(weights.norm_product),
            "threshold": pa.array(weights.threshold, from_pandas=True),
        }
    )


def _top_token_table(context: Context, found: CoFiring, n_rare: int) -> pa.Table:
    return pa.table(
        {
            "fraction_firing": pa.array([row.firing / n_rare for row in found.top], pa.float64()),
            "features_firing": pa.array([row.firing for row in found.top], pa.int64()),
            **passages.columns(context, [(row.prompt, row.position) for row in found.top]),
        }
    )


def _figures(groups: FeatureGroups, weights: _Weights, found: CoFiring) -> dict[str, go.Figure]:
    rare = np.flatnonzero(groups.rare)
    product = weights.norm_product
    fractions = np.arange(found.histogram.size) / rare.size
    together = figures.new_figure(
        "How many of the ultra-low features fire together on a token (vertical axis logarithmic).",
        x_title="share of ultra-low features firing",
        y_title="tokens",
    )
    edges = np.linspace(0, 1, 41)
    pooled, _ = np.histogram(fractions, edges, weights=found.histogram)
    together.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=np.where(pooled > 0, pooled, np.nan),
        width=np.diff(edges),
        marker={"color": figures.LIGHT["rare"], "line": {"width": 0}},
        opacity=0.85,
        hovertemplate="about %{x:.0%} of them firing<br>%{y:,} tokens<extra></extra>",
    )
    together.update_xaxes(tickformat=".0%", range=[0, 1])
    together.update_yaxes(range=[np.log10(0.7), np.log10(max(2, pooled.max())) + 0.2])
    figures.log_axis("y", together)
    figures.hide_legend(together)
    return {
        "direction": figures.histogram(
            _both(groups, weights.cosine),
            np.linspace(-1, 1, 81),
            caption="Cosine of every encoder direction with the mean encoder direction of the ultra-low features.",
            x_title="cosine with the mean direction",
        ),
        "projection": figures.histogram(
            [figures.Series("ultra-low", weights.projection[rare], "rare", rare)],
            _edges(weights.projection[rare]),
            caption="Projection of the ultra-low encoders on their mean direction: how long they are along it.",
            x_title="projection (units of encoder weight)",
        ),
        "norm_product": figures.histogram(
            _both(groups, product),
            _edges(product),
            caption="|e||d|, the length of encoder times decoder, which rescaling a feature does not change.",
            x_title="|e||d|",
        ),
        "cofiring": together,
    }


def _both(groups: FeatureGroups, values: Floats) -> list[figures.Series]:
    frequent, rare = np.flatnonzero(groups.frequent), np.flatnonzero(groups.rare)
    return [
        figures.Series("frequent", values[frequent], "frequent", frequent),
        figures.Series("ultra-low", values[rare], "rare", rare),
    ]


def _edges(values: Floats) -> Floats:
    kept = statistics.finite(values)
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 1.0)
    pad = 0.02 * (high - low) or 0.5
    return np.linspace(low - pad, high + pad, 61)


def _reading(numbers: dict[str, Number]) -> str:
    return (
        "If ultra-low features were one feature, their encoders would pile up at cosine 1 and fire on the same tokens. "
        f"Here {percent(numbers['aligned_fraction'])} of {show(numbers['n_rare'])} point within cosine "
        f"{numbers['aligned_above']} of their mean direction, and at most "
        f"{percent(numbers['cofiring_max'])} of them fire on one token. One direction explains "
        f"{percent(numbers['decoder_top_share'])} of their decoders’ variance "
        f"({percent(numbers['decoder_top_share_random'])} for random rows)."
    )
