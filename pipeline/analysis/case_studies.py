"""Every feature for itself: where it fires, what it writes, and what is close to it.

This computes what a page about a feature shows, for all features together: example texts (``examples``), its direct
effect on the logits (``logit_effects``), tokens, neighbours and neurons (``feature_table``), and its histogram of
activations from the survey. ``chosen`` puts the first few frequent features side by side. Ranks begin at 1.

Texts of the corpus stand in the tables as they are: whoever shows them escapes them.

Source: the post, "Interpreting Features", and its interface for one.
"""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import examples, feature_table, figures, logit_effects, statistics
from pipeline.analysis.context import Context, FeatureGroups, Floats, Integers, Mask, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.feature_table import CommonTokens
from pipeline.analysis.logit_effects import LogitEffects
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number
from storage.errors import ConfigError

VERSION = 1
TITLE = "Case studies"
QUESTION = "What does each feature fire on, and what does it do?"
REQUIRES: frozenset[Need] = frozenset({"survey", "model", "tokens", "density"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("features_studied", "Features studied", "count"),
    NumberLabel("examples", "Example texts", "count"),
    NumberLabel(
        "top_token_share_median", "Share of a feature’s most common token, median frequent feature", "fraction"
    ),
    NumberLabel("single_token_fraction", "Frequent features with one token in most firings", "fraction"),
    NumberLabel("logit_kurtosis_median", "Excess kurtosis of logit effects, median frequent feature", "plain"),
    NumberLabel("nearest_cosine_median", "Cosine with the nearest decoder, median frequent feature", "plain"),
)
_SINGLE_TOKEN_ABOVE = 0.5
_SHOWN_TOKENS = 5


class OPTIONS(AnalysisOptions):
    """Options of the case studies."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low, the others are frequent."""
    features: tuple[int, ...] = ()
    """Features studied; all by default."""
    chosen: int = Field(default=12, ge=0)
    """Frequent features, the first in order, that the section puts side by side."""
    top_examples: int = Field(default=6, ge=0)
    """Texts of each feature's largest firings, no more than the survey keeps."""
    quantile_examples: int = Field(default=6, ge=0)
    """Texts of each feature spread over the range of its activations."""
    tokens_before: int = Field(default=16, ge=0)
    """Tokens shown before the one that it fires on."""
    tokens_after: int = Field(default=8, ge=0)
    """Tokens shown after it."""
    micro_batch_prompts: int = Field(default=8, gt=0)
    """Prompts a pass of the model."""


class _Facts(NamedTuple):
    """What is known of each of the m features studied."""

    features: Integers
    token: CommonTokens
    previous: CommonTokens
    effects: LogitEffects
    nearest: Integers
    nearest_cosine: Floats
    largest_share: Floats


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Studies the features; see the module."""
    survey, features = context.need_survey(), _features(context, options)
    strings = list(context.token_strings or map(str, range(context.need_model().W_U.shape[1])))
    choice = examples.choose_examples(survey, features, options.top_examples, options.quantile_examples)
    windows = examples.read_windows(
        context, choice, before=options.tokens_before, after=options.tokens_after, batch=options.micro_batch_prompts
    )
    effects = logit_effects.measure_effects(context, features, choice, windows)
    decoder = statistics.weights64(context.sae.W_dec)
    neighbours = feature_table.nearest_features(decoder, features)
    neurons = feature_table.largest_neurons(decoder, features)
    facts = _Facts(
        features,
        *feature_table.common_tokens(survey, context.need_tokens(), features),
        effects,
        *feature_table.first_of(neighbours, features),
        feature_table.first_of(neurons, features)[1],
    )
    groups = context.need_densities().groups(options.ultra_low_below)
    frequent = groups.frequent[features]
    tables = {
        "chosen": _chosen_table(context, facts, np.flatnonzero(frequent)[: options.chosen], strings),
        "features": _feature_table(facts, strings),
        "examples": examples.example_table(choice, windows, effects.on_next),
        "histograms": feature_table.histogram_table(survey, features),
        "logits": logit_effects.logit_table(features, effects, strings),
        "neighbours": feature_table.neighbour_table(neighbours),
        "neurons": feature_table.neuron_table(context, neurons),
        "vocabulary": pa.table(
            {
                "token_id": pa.array(np.arange(len(strings), dtype=np.int32)),
                "token": pa.array(strings, pa.string()),
            }
        ),
    }
    numbers = _numbers(facts, frequent, choice.feature.size)
    return AnalysisResult(numbers, tables, _figures(facts, groups), _reading(numbers))


def _features(context: Context, options: OPTIONS) -> Integers:
    if not options.features:
        return np.arange(context.sae.d_sae)
    chosen = np.unique(np.array(options.features, np.int64))
    if chosen[0] < 0 or chosen[-1] >= context.sae.d_sae:
        raise ConfigError(
            "no such feature", where="options of case_studies", found=int(chosen[0] if chosen[0] < 0 else chosen[-1]),
            expected=f"0 to {context.sae.d_sae - 1}",
        )  # fmt: skip
    return chosen


def _numbers(facts: _Facts, frequent: Mask, n_examples: int) -> dict[str, Number]:
    share = statistics.finite(facts.token.share[frequent])
    return {
        "features_studied": int(facts.features.size),
        "examples": n_examples,
        "top_token_share_median": statistics.median(share),
        "single_token_fraction": statistics.share(share > _SINGLE_TOKEN_ABOVE),
        "logit_kurtosis_median": statistics.median(facts.effects.kurtosis[frequent]),
        "nearest_cosine_median": statistics.median(facts.nearest_cosine[frequent]),
    }


def _feature_table(facts: _Facts, strings: list[str]) -> pa.Table:
    return pa.table(
        {
            "feature": pa.array(facts.features.astype(np.int32)),
            **_token_columns(facts, slice(None), strings),
            "logit_kurtosis": pa.array(facts.effects.kurtosis, from_pandas=True),
            **_nearest_columns(facts, slice(None)),
        }
    )


def _chosen_table(context: Context, facts: _Facts, rows: Integers, strings: list[str]) -> pa.Table:
    features = facts.features[rows]

    def words(ids: Integers) -> pa.Array:
        texts = [" ".join(strings[token] for token in own[:_SHOWN_TOKENS]) for own in ids[rows].tolist()]
        return pa.array([text if ids.size else None for text in texts], pa.string())

    return pa.table(
        {
            "feature": pa.array(features.astype(np.int32)),
            "density": pa.array(context.need_densities().density[features]),
            "max_activation": pa.array(context.need_survey().largest[features]),
            **_token_columns(facts, rows, strings),
            "raised": words(facts.effects.raised),
            "lowered": words(facts.effects.lowered),
            **_nearest_columns(facts, rows),
            "fve_top_1": pa.array(facts.largest_share[rows], from_pandas=True),
        }
    )


def _token_columns(facts: _Facts, rows: Integers | slice, strings: list[str]) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for name, (token, share) in (("top_token", facts.token), ("previous_token", facts.previous)):
        texts = [strings[one] if one >= 0 else None for one in token[rows].tolist()]
        columns[name] = pa.array(texts, pa.string())
        columns[f"{name}_share"] = pa.array(share[rows], from_pandas=True)
    return columns


def _nearest_columns(facts: _Facts, rows: Integers | slice) -> dict[str, pa.Array]:
    nearest = facts.nearest[rows]
    return {
        "nearest_feature": pa.array(nearest.astype(np.int32), mask=nearest < 0),
        "nearest_cosine": pa.array(facts.nearest_cosine[rows], from_pandas=True),
    }


def _figures(facts: _Facts, groups: FeatureGroups) -> dict[str, go.Figure]:
    frequent = np.flatnonzero(groups.frequent[facts.features])
    rare = np.flatnonzero(groups.rare[facts.features])

    def series(values: Floats) -> list[figures.Series]:
        return [
            figures.Series("frequent", values[frequent], "frequent", facts.features[frequent]),
            figures.Series("ultra-low", values[rare], "rare", facts.features[rare]),
        ]

    shares = figures.histogram(
        series(facts.token.share)[:1],
        np.linspace(0, 1, 41),
        caption="Share of each frequent feature’s firings that are on its most common token.",
        x_title="share of the most common token",
    )
    figures.mark_x(shares, _SINGLE_TOKEN_ABOVE, "mostly one token")
    shares.update_xaxes(tickformat=".0%")
    low = float(min(0.0, statistics.finite(facts.nearest_cosine).min(initial=0.0)))
    nearest = figures.histogram(
        series(facts.nearest_cosine),
        np.linspace(low, 1, 41),
        caption="Cosine of each feature’s decoder with the nearest other feature’s.",
        x_title="cosine with the nearest decoder",
    )
    return {"top_token_share": shares, "nearest_cosine": nearest}


def _reading(numbers: dict[str, Number]) -> str:
    return (
        "The table holds the first frequent features; the features’ own pages show the texts that they fire on. "
        f"{percent(numbers['single_token_fraction'])} of the frequent features fire on one and the same token most of "
        f"the time; in the median one it is {percent(numbers['top_token_share_median'])} of the firings. Effects on "
        f"the logits have a median excess kurtosis of {show(numbers['logit_kurtosis_median'])} over the vocabulary (0 "
        "if they were normal, large where few tokens get most); the decoder nearest to the median feature’s lies at "
        f"cosine {show(numbers['nearest_cosine_median'])}."
    )
