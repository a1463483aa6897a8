"""Whether another autoencoder finds the same features, and the same direction of ultra-low ones.

Of another random start that is the post's question; of another setting or width it is what the comparison of reports
asks, and the reading says so.

Two autoencoders or more of one site. Of every pair of them the cosine between their mean ultra-low encoder directions:
of raw columns (the author's) and of unit ones; an autoencoder with fewer than two ultra-low features has no cluster and
no direction. Of the first with each other one, every feature is matched with the feature of the other whose decoder has
the largest cosine with its own, both ways; matches need not be mutual. Among n random directions in d dimensions the
best match has the distribution F(c)^n, F that of one cosine: (1 + c) / 2 is Beta((d - 1) / 2, (d - 1) / 2). Cost: one
product of the two decoders in blocks, whose rows and columns give both ways. Rejected: an assignment of pairs (16,384
features: minutes and 2 GB), which a dictionary with split features does not have.

Source: the post, "The encoder direction is consistent across random seeds".
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.comparing import need_same_width, random_starts_alone
from pipeline.analysis.context import Context, Floats, Integers, Mask, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.rare_direction import mean_directions
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 2
TITLE = "Features found again"
QUESTION = "Does another autoencoder find the same features, and the same ultra-low direction?"
REQUIRES: frozenset[Need] = frozenset({"companions"})
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("n_compared", "Autoencoders compared", "count"),
    NumberLabel("n_with_cluster", "… with an ultra-low cluster", "count"),
    NumberLabel("direction_cosine", "Cosine between their mean ultra-low encoder directions, mean of pairs", "plain"),
    NumberLabel("direction_cosine_min", "… smallest of pairs", "plain"),
    NumberLabel("direction_cosine_unit", "… of unit encoders, mean of pairs", "plain"),
    NumberLabel("direction_cosine_random", "… of random directions, standard deviation (1 / √d_in)", "plain"),
    NumberLabel("matched_median_frequent", "Decoder cosine with the best match, frequent features, median", "plain"),
    NumberLabel("matched_fraction_frequent", "… above 0.9", "fraction"),
    NumberLabel("matched_median_rare", "Decoder cosine with the best match, ultra-low features, median", "plain"),
    NumberLabel("matched_fraction_rare", "… above 0.9", "fraction"),
    NumberLabel("matched_median_all", "Decoder cosine with the best match, all features, median", "plain"),
    NumberLabel("matched_fraction_all", "… above 0.9", "fraction"),
    NumberLabel("matched_median_random", "Best match of a random direction, median", "plain"),
)
_BLOCK = 1024
_EDGES = np.linspace(-1, 1, 81)
_MATCH_EDGES = np.linspace(0, 1, 81)


class OPTIONS(AnalysisOptions):
    """Options of the cross-seed analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""
    matched_above: float = Field(default=0.9, gt=-1, lt=1)
    """A decoder cosine above this counts as the same feature."""


class Matches(NamedTuple):
    """The best match of every feature of one autoencoder in another.

    Attributes:
        cosine: of the decoders, (d_sae,); NaN for a decoder of zeros.
        feature: its number in the other, (d_sae,); -1 for a decoder of zeros.
    """

    cosine: Floats
    feature: Integers


class _Way(NamedTuple):
    """Matches one way: ``of`` is searched in ``within``."""

    of: Context
    within: Context
    matches: Matches


class _Cluster(NamedTuple):
    label: str
    n_rare: int
    raw: Floats
    unit: Floats


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Compares autoencoders; see the module."""
    need_same_width(context)
    everyone = (context, *context.companions)
    clusters = [found for one in everyone if (found := _cluster(one, options)) is not None]
    pairs = _pair_table(clusters)
    ways: list[_Way] = []
    for other in context.companions:
        there, back = best_matches(*(statistics.weights64(one.sae.W_dec) for one in (context, other)))
        ways += [_Way(context, other, there), _Way(other, context, back)]
    numbers: dict[str, Number] = {
        "cluster": "measured" if len(clusters) > 1 else "no cluster",
        "n_compared": len(everyone),
        "n_with_cluster": len(clusters),
        "direction_cosine": statistics.mean(pairs["cosine"].to_numpy()),
        "direction_cosine_min": min(pairs["cosine"].to_pylist(), default=None),
        "direction_cosine_unit": statistics.mean(pairs["cosine_unit"].to_numpy()),
        "direction_cosine_random": context.sae.d_in**-0.5,
        "matched_above": options.matched_above,
        "matched_median_random": random_best_cosine(0.5, context.companions[0].sae.d_sae, context.sae.d_in),
    }
    pooled = {group: np.concatenate([_group(way, group, options) for way in ways]) for group in _groups(everyone)}
    for group, cosines in pooled.items():
        numbers[f"matched_median_{group}"] = statistics.median(cosines)
        numbers[f"matched_fraction_{group}"] = statistics.share(cosines > options.matched_above)
    tables = {"pairs": pairs, "matches": _match_table(ways, everyone, options), "features": _feature_table(ways[::2])}
    drawn = {"matches": _match_figure(pooled, context)}
    if len(clusters) > 1:
        drawn["directions"] = _direction_figure(everyone, clusters[0], options)
    return AnalysisResult(numbers, tables, drawn, _reading(numbers, everyone))


def best_matches(left: Floats, right: Floats) -> tuple[Matches, Matches]:
    """The best match of each row in the other matrix's rows, by cosine, both ways.

    Args:
        left: (n, d).
        right: (m, d).

    Returns:
        Of the n rows of ``left``, and of the m rows of ``right``.
    """
    units = [_units(left), _units(right)]
    there = Matches(np.full(len(left), -np.inf), np.full(len(left), -1, np.int64))
    back = Matches(np.full(len(right), -np.inf), np.full(len(right), -1, np.int64))
    columns = np.arange(len(right))
    for start in range(0, len(left), _BLOCK):
        rows = slice(start, start + _BLOCK)
        cosines = np.nan_to_num(units[0][rows] @ units[1].T, nan=-np.inf)
        there.feature[rows] = cosines.argmax(axis=1)
        there.cosine[rows] = cosines.max(axis=1)
        best = cosines.argmax(axis=0)
        better = cosines[best, columns] > back.cosine
        back.cosine[better] = cosines[best, columns][better]
        back.feature[better] = start + best[better]
    for found in (there, back):
        found.feature[np.isneginf(found.cosine)] = -1
        found.cosine[np.isneginf(found.cosine)] = np.nan
    return there, back


def random_best_cosine(quantile: float, n: int, d: int) -> float:
    """A quantile of the largest cosine of a direction with n independent random directions in d dimensions."""
    from scipy.stats import beta  # half a second that a found analysis need not wait for

    half = (d - 1) / 2
    return float(2 * beta.ppf(quantile ** (1 / n), half, half) - 1)


def _units(rows: Floats) -> Floats:
    length = statistics.norms(rows)[:, None]
    return np.divide(rows, length, out=np.full_like(rows, np.nan), where=length > 0)


def _cluster(one: Context, options: OPTIONS) -> _Cluster | None:
    groups = one.groups(options.ultra_low_below)
    if groups is None or groups.rare.sum() < 2:
        return None
    raw, unit = mean_directions(statistics.weights64(one.sae.W_enc).T[groups.rare])
    return None if raw is None or unit is None else _Cluster(one.label, int(groups.rare.sum()), raw, unit)


def _groups(everyone: Sequence[Context]) -> list[str]:
    return ["frequent", "rare", "all"] if all(one.densities is not None for one in everyone) else ["all"]


def _group(way: _Way, group: str, options: OPTIONS) -> Floats:
    groups = way.of.groups(options.ultra_low_below)
    chosen: Mask = np.ones(way.of.sae.d_sae, np.bool_)
    if group != "all" and groups is not None:
        chosen = groups.frequent if group == "frequent" else groups.rare
    return statistics.finite(way.matches.cosine[chosen])


def _pair_table(clusters: Sequence[_Cluster]) -> pa.Table:
    pairs = list(combinations(clusters, 2))
    return pa.table(
        {
            "one": pa.array([one.label for one, _ in pairs], pa.string()),
            "other": pa.array([other.label for _, other in pairs], pa.string()),
            "cosine": pa.array([float(one.raw @ other.raw) for one, other in pairs], pa.float64()),
            "cosine_unit": pa.array([float(one.unit @ other.unit) for one, other in pairs], pa.float64()),
            "ultra_low_one": pa.array([one.n_rare for one, _ in pairs], pa.int64()),
            "ultra_low_other": pa.array([other.n_rare for _, other in pairs], pa.int64()),
        }
    )


def _match_table(ways: Sequence[_Way], everyone: Sequence[Context], options: OPTIONS) -> pa.Table:
    names = {"frequent": "frequent", "rare": "ultra-low", "all": "all"}
    rows = [(way, group, _group(way, group, options)) for way in ways for group in _groups(everyone)]
    return pa.table(
        {
            "features_of": pa.array([way.of.label for way, _, _ in rows], pa.string()),
            "matched_in": pa.array([way.within.label for way, _, _ in rows], pa.string()),
            "group": pa.array([names[group] for _, group, _ in rows], pa.string()),
            "features": pa.array([cosines.size for _, _, cosines in rows], pa.int64()),
            "cosine_median": pa.array([statistics.median(cosines) for _, _, cosines in rows], pa.float64()),
            "matched_fraction": pa.array(
                [statistics.share(cosines > options.matched_above) for _, _, cosines in rows], pa.float64()
            ),
        }
    )


def _feature_table(ways: Sequence[_Way]) -> pa.Table:
    cosines = np.stack([way.matches.cosine for way in ways])
    return pa.table(
        {
            "feature": pa.array(np.arange(cosines.shape[1], dtype=np.int32)),
            "matched_cosine": pa.array(cosines.mean(axis=0), from_pandas=True),
            "matched_feature": pa.array(ways[0].matches.feature, mask=ways[0].matches.feature < 0),
        }
    )


def _match_figure(pooled: dict[str, Floats], context: Context) -> go.Figure:
    shown = (
        [
            figures.Series("frequent", pooled["frequent"], "frequent"),
            figures.Series("ultra-low", pooled["rare"], "rare"),
        ]
        if "rare" in pooled
        else [figures.Series("features", pooled["all"], "frequent")]
    )
    figure = figures.histogram(
        shown,
        _MATCH_EDGES,
        caption="Cosine of every decoder with the best match in the other autoencoder, both ways, and the curve of "
        "random directions.",
        x_title="decoder cosine with the best match",
    )
    from scipy.stats import beta  # half a second that a found analysis need not wait for

    n, half = context.companions[0].sae.d_sae, (context.sae.d_in - 1) / 2
    figure.add_scatter(
        x=(_MATCH_EDGES[:-1] + _MATCH_EDGES[1:]) / 2,
        y=np.diff(beta.cdf((1 + _MATCH_EDGES) / 2, half, half) ** n),
        mode="lines",
        name="random directions",
        line={"color": figures.LIGHT["muted"], "width": 1.5, "dash": "dot"},
        hovertemplate="%{y:.2%}<extra>random directions</extra>",
    )
    figure.update_layout(showlegend=True, margin={"t": 36})
    return figure


def _direction_figure(everyone: Sequence[Context], cluster: _Cluster, options: OPTIONS) -> go.Figure:
    of_others: list[Floats] = []
    own = np.empty(0)
    for one in everyone:
        groups = one.groups(options.ultra_low_below)
        if groups is not None:
            rare = statistics.weights64(one.sae.W_enc).T[groups.rare]
            cosines = statistics.cosines_with(rare, cluster.raw)
            own = cosines if one.label == cluster.label else own
            of_others += [] if one.label == cluster.label else [cosines]
    return figures.histogram(
        [
            figures.Series(cluster.label, own, "frequent"),
            figures.Series("the others", np.concatenate(of_others), "rare"),
        ],
        _EDGES,
        caption=f"Cosine of ultra-low encoders with the mean ultra-low encoder direction of {cluster.label}: its own "
        "features, and those of the others.",
        x_title=f"cosine with the mean direction of {cluster.label}",
    )


def _reading(numbers: dict[str, Number], everyone: Sequence[Context]) -> str:
    group, named = ("frequent", "frequent ") if "matched_median_frequent" in numbers else ("all", "")
    direction = (
        f"The mean ultra-low encoder directions of two of them have cosine {show(numbers['direction_cosine'])}, where "
        f"random directions have 0 give or take {show(numbers['direction_cosine_random'])}."
        if numbers["cluster"] == "measured"
        else "Fewer than two of them have an ultra-low cluster, so there are no directions to compare."
    )
    return (
        f"A feature at cosine 1 is found again {_whatever(everyone)}; one on the dotted curve is matched no better "
        f"than by chance. Of the {named}features {percent(numbers[f'matched_fraction_{group}'])} have a match above "
        f"{show(numbers['matched_above'])}; the median is {show(numbers[f'matched_median_{group}'])} and chance gives "
        f"{show(numbers['matched_median_random'])}. {direction}"
    )


def _whatever(everyone: Sequence[Context]) -> str:
    """What the autoencoders do not have in common."""
    names = [one.label for one in everyone]
    if random_starts_alone(names):
        return "whatever the random start"
    widths = sorted({one.sae.d_sae for one in everyone})
    sizes = f", of {' and '.join(f'{width:,}' for width in widths)} features" if len(widths) > 1 else ""
    return f"by autoencoders that differ in more than the random start ({'; '.join(names[1:])}{sizes})"
