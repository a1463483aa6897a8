"""What is known of each feature besides its examples and logits: tokens it fires on, its neighbours, its neurons.

- *Tokens*: of the distinct firings among the survey's largest and its uniform sample (all of them, for a feature that
  fired no more often than the sample has places), the most common token and the most common token before it, with their
  shares; equally common ones go by token id. Prompts are read in blocks.
- *Neighbours*: the features of largest decoder cosine, in blocks of rows of the cosine matrix, which as a whole takes
  1 GB at 16,384 features. A zero decoder neither has nor is a neighbour.
- *Neurons*: the entries of largest share in the decoder's squared norm; at a site other than an MLP's activations these
  are basis directions, not neurons.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.analysis import statistics
from pipeline.analysis.context import Context, Floats, Integers, TokenSource
from pipeline.analysis.survey import Survey, bin_edges

NEIGHBOURS, NEURONS = 5, 8
_BLOCK_FEATURES, _BLOCK_PROMPTS = 512, 4096


class CommonTokens(NamedTuple):
    """The most common token of each feature.

    Attributes:
        token: id, -1 where there is none, int64 (m,).
        share: of the firings that have such a token; NaN where there is none, (m,).
    """

    token: Integers
    share: Floats


class Ranked(NamedTuple):
    """A few related things of each feature, the closest first; fewer where there are no more.

    Attributes:
        feature: the feature studied, int64 (n,).
        rank: from 1, int64 (n,).
        other: number of the neighbour, or of the neuron, int64 (n,).
        value: cosine, or share, (n,).
    """

    feature: Integers
    rank: Integers
    other: Integers
    value: Floats


def common_tokens(survey: Survey, tokens: TokenSource, features: Integers) -> tuple[CommonTokens, CommonTokens]:
    """The most common firing token, and the most common token before it.

    Args:
        survey: what a pass over the store found.
        tokens: the prompts.
        features: the features studied, (m,).
    """
    prompt, position = (
        np.concatenate([top[features], sample[features]], axis=1).astype(np.int64)
        for top, sample in zip(survey.top[:2], survey.sample[:2], strict=True)
    )
    row, place = np.nonzero(prompt >= 0)
    bases = (prompt.max(initial=0) + 1, position.max(initial=0) + 1)
    distinct = np.unique((row * bases[0] + prompt[row, place]) * bases[1] + position[row, place])
    rest, at = np.divmod(distinct, bases[1])
    row, number = np.divmod(rest, bases[0])
    fired, before = _read_tokens(tokens, number, at)
    has_before = before >= 0
    return (
        _most_common(row, fired, features.size),
        _most_common(row[has_before], before[has_before], features.size),
    )


def nearest_features(decoder: Floats, features: Integers, kept: int = NEIGHBOURS) -> Ranked:
    """The features of largest decoder cosine.

    Args:
        decoder: all decoder rows, (d_sae, d_in).
        features: the features studied, (m,).
        kept: neighbours wanted of each.
    """
    length = statistics.norms(decoder)
    there = length > 0
    units = np.divide(decoder, length[:, None], out=np.zeros_like(decoder), where=there[:, None]).astype(np.float32)
    others, cosines = [np.zeros((0, kept), np.int64)], [np.zeros((0, kept), np.float32)]
    for part in np.split(features, range(_BLOCK_FEATURES, features.size, _BLOCK_FEATURES)):
        block = units[part] @ units.T
        block[~there[part]] = -np.inf
        block[:, ~there] = -np.inf
        block[np.arange(part.size), part] = -np.inf
        found = statistics.largest(block, min(kept, len(units)))
        others.append(found)
        cosines.append(np.take_along_axis(block, found, axis=1))
    return _ranked(features, np.concatenate(others[1:]), np.concatenate(cosines[1:]))


def largest_neurons(decoder: Floats, features: Integers, kept: int = NEURONS) -> Ranked:
    """The neurons of largest share in each decoder's squared norm.

    Args:
        decoder: all decoder rows, (d_sae, d_in).
        features: the features studied, (m,).
        kept: neurons wanted of each.
    """
    squared = np.square(decoder[features])
    total = squared.sum(axis=1, keepdims=True)
    shares = np.divide(squared, total, out=np.full_like(squared, -np.inf), where=total > 0)
    found = statistics.largest(shares, min(kept, shares.shape[1]))
    return _ranked(features, found, np.take_along_axis(shares, found, axis=1))


def first_of(ranked: Ranked, features: Integers) -> tuple[Integers, Floats]:
    """The closest of each feature, -1 with NaN where there is none, (m,) each."""
    other, value = np.full(features.size, -1), np.full(features.size, np.nan)
    first = ranked.rank == 1
    at = np.searchsorted(features, ranked.feature[first])
    other[at], value[at] = ranked.other[first], ranked.value[first]
    return other, value


def neighbour_table(found: Ranked) -> pa.Table:
    """The table ``neighbours``."""
    return pa.table(
        {
            "feature": pa.array(found.feature.astype(np.int32)),
            "rank": pa.array(found.rank.astype(np.int32)),
            "neighbour": pa.array(found.other.astype(np.int32)),
            "cosine": pa.array(found.value.astype(np.float32)),
        }
    )


def neuron_table(context: Context, found: Ranked) -> pa.Table:
    """The table ``neurons``."""
    weights = statistics.weights64(context.sae.W_dec)[found.feature, found.other]
    return pa.table(
        {
            "feature": pa.array(found.feature.astype(np.int32)),
            "rank": pa.array(found.rank.astype(np.int32)),
            "neuron": pa.array(found.other.astype(np.int32)),
            "weight": pa.array(weights.astype(np.float32)),
            "share": pa.array(found.value.astype(np.float32)),
        }
    )


def histogram_table(survey: Survey, features: Integers) -> pa.Table:
    """The table ``histograms``: bins that are not empty; the outermost one ends at the feature's largest activation."""
    row, place = np.nonzero(survey.histogram[features])
    edges = bin_edges()
    end = edges[place + 1]
    return pa.table(
        {
            "feature": pa.array(features[row].astype(np.int32)),
            "from_activation": pa.array(edges[place]),
            "to_activation": pa.array(np.where(np.isinf(end), survey.largest[features[row]], end)),
            "count": pa.array(survey.histogram[features[row], place]),
        }
    )


def _read_tokens(tokens: TokenSource, prompt: Integers, position: Integers) -> tuple[Integers, Integers]:
    """Tokens at places of training prompts, and the tokens before them, -1 at a prompt's first, (n,) each."""
    at, before = np.zeros(prompt.size, np.int64), np.full(prompt.size, -1)
    order = np.argsort(prompt, kind="stable")
    numbers, starts = np.unique(prompt[order], return_index=True)
    ends = np.append(starts, prompt.size)
    for first in range(0, numbers.size, _BLOCK_PROMPTS):
        block = numbers[first : first + _BLOCK_PROMPTS]
        rows = order[ends[first] : ends[first + block.size]]
        ids = tokens.prompts("train", block.tolist())
        own, where = np.searchsorted(block, prompt[rows]), position[rows]
        at[rows] = ids[own, where]
        before[rows] = np.where(where > 0, ids[own, where - 1], -1)
    return at, before


def _most_common(row: Integers, token: Integers, n_rows: int) -> CommonTokens:
    base = token.max(initial=0) + 1
    pair, count = np.unique(row * base + token, return_counts=True)
    of, which = np.divmod(pair, base)
    order = np.lexsort((which, -count, of))
    has, first = np.unique(of[order], return_index=True)
    found = CommonTokens(np.full(n_rows, -1), np.full(n_rows, np.nan))
    found.token[has] = which[order][first]
    found.share[has] = count[order][first] / np.bincount(row, minlength=n_rows)[has]
    return found


def _ranked(features: Integers, others: Integers, values: npt.NDArray[np.floating[Any]]) -> Ranked:
    row, place = np.nonzero(np.isfinite(values))
    return Ranked(features[row], place + 1, others[row, place], values[row, place].astype(np.float64))
