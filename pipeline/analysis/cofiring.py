"""Which seldom features fire together, from the firings that the survey kept.

For every row the number of these features that fire is counted into a histogram, and the rows with most are kept. For a
bounded subset of the features the pairwise counts of rows on which both fire are kept too; from them follows whether
firing sets are nested: with the features ordered from easiest to hardest to set off, the share of a harder one's rows
on which an easier one fires as well. It is 1 for sets nested in that order, and the easier one's density where features
fire independently.

Cost: a sort of the firings. Rejected: another pass over the store, and pairs of all rare features (ten thousand
squared).
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from pipeline.analysis.context import Floats, Integers
from pipeline.analysis.survey import Survey
from storage.errors import ConfigError


@dataclass(frozen=True)
class TopRow:
    """A row on which many of the features fire.

    Attributes:
        firing: how many.
        prompt: training prompt.
        position: position in it.
    """

    firing: int
    prompt: int
    position: int


@dataclass(frozen=True)
class CoFiring:
    """What was found.

    Attributes:
        histogram: rows by number of the features firing, int64 (n_features + 1,).
        top: the rows with most, most first, of those on which at least two fire.
        pair_features: the subset for pairs, as indices into the features given, (m,).
        pair_counts: rows on which both fire; the diagonal is each one's own count, int64 (m, m).
        n_rows: rows looked at.
    """

    histogram: Integers
    top: tuple[TopRow, ...]
    pair_features: Integers
    pair_counts: Integers
    n_rows: int


def count_cofiring(survey: Survey, features: Integers, *, top_rows: int, pair_features: Integers) -> CoFiring:
    """Counts co-firing.

    Args:
        survey: of the autoencoder; it must have kept every firing of the features.
        features: the features looked at, (n,).
        top_rows: rows to keep.
        pair_features: indices into ``features`` of those counted in pairs, (m,).

    Raises:
        ConfigError: a feature fired more often than the survey keeps firings.
    """
    most = int(survey.count[features].max(initial=0))
    if most > survey.kept_firings:
        raise ConfigError(
            "the survey did not keep all firings of the ultra-low features",
            found=f"a feature with {most} firings, {survey.kept_firings} kept",
            remedy=f"set analyze.survey.kept_firings to {most} or more, or ultra_low_below lower",
        )
    prompt, position, owner = _firings(survey, features)
    tokens, row = np.unique(np.stack([prompt, position], axis=1), axis=0, return_inverse=True)
    firing = np.bincount(row, minlength=len(tokens))
    histogram = np.bincount(firing, minlength=features.size + 1)
    histogram[0] = survey.n_rows - len(tokens)
    fires = sparse.csr_array((np.ones(len(row), np.int64), (row, owner)), shape=(len(tokens), features.size))
    chosen = fires[:, pair_features]
    best = np.argsort(-firing, kind="stable")[:top_rows]
    top = tuple(TopRow(int(firing[t]), int(tokens[t, 0]), int(tokens[t, 1])) for t in best if firing[t] > 1)
    pairs = (chosen.T @ chosen).toarray().astype(np.int64)
    return CoFiring(histogram.astype(np.int64), top, pair_features, pairs, survey.n_rows)


def containment(pair_counts: Integers, ease: Floats) -> float | None:
    """Mean share of a harder feature's firings on which an easier one fires too, weighted by firings.

    Args:
        pair_counts: of ``CoFiring``, (m, m).
        ease: larger for features that are easier to set off, (m,); ties count in neither direction.

    Returns:
        A fraction, or None where there is no such pair that fires.
    """
    easier = ease[:, None] > ease[None, :]
    own = np.broadcast_to(np.diag(pair_counts)[None, :], pair_counts.shape)
    total = int(own[easier].sum())
    return float(pair_counts[easier].sum() / total) if total else None


def containment_if_independent(pair_counts: Integers, ease: Floats, n_rows: int) -> float | None:
    """What ``containment`` is expected to be for features of the same densities that fire independently."""
    own = np.diag(pair_counts)
    expected = np.outer(own, own) / n_rows
    easier = ease[:, None] > ease[None, :]
    total = int(np.broadcast_to(own[None, :], pair_counts.shape)[easier].sum())
    return float(expected[easier].sum() / total) if total else None


def evenly_spaced(n: int, wanted: int) -> Integers:
    """At most ``wanted`` of the numbers below n, evenly spaced, int64."""
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).round().astype(np.int64)) if n else np.empty(0, np.int64)


def _firings(survey: Survey, features: Integers) -> tuple[Integers, Integers, Integers]:
    """Prompts and positions of the features' firings, and which of the features each belongs to; all (n,)."""
    seldom = survey.seldom
    sizes = np.diff(seldom.pointer)[features]
    owner = np.repeat(np.arange(features.size), sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    where = seldom.pointer[features][owner] + within
    return seldom.prompt[where].astype(np.int64), seldom.position[where].astype(np.int64), owner
