"""Which features fire together: one pass over the store for a set of features.

For every row the number of these features that fire is counted into a histogram, and the rows with most are kept. For a
bounded subset of the features the pairwise counts of rows on which both fire are kept too; from them follows whether
firing sets are nested: with the features ordered from easiest to hardest to set off, the share of a harder one's rows
on which an easier one fires as well. It is 1 for sets nested in that order, and the easier one's density where features
fire independently.

Cost: the encoder product for these features alone; pairs cost subset squared on the few rows where any of them fires.
Rejected: pairs of all rare features (ten thousand squared) and keeping firing sets (they grow with the store).
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.analysis.context import Floats, Integers, RowSource
from pipeline.analysis.streaming import EncodedBlock, encode_rows, take_features
from sae.autoencoder import Autoencoder


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
    """What one pass finds.

    Attributes:
        histogram: rows by number of the features firing, int64 (n_features + 1,).
        top: the rows with most, most first.
        pair_features: the subset for pairs, as indices into the features given, (m,).
        pair_counts: rows on which both fire; the diagonal is each one's own count, int64 (m, m).
        n_rows: rows read.
    """

    histogram: Integers
    top: tuple[TopRow, ...]
    pair_features: Integers
    pair_counts: Integers
    n_rows: int


def count_cofiring(
    sae: Autoencoder, reader: RowSource, features: Integers, *, n_rows: int, top_rows: int, pair_features: Integers
) -> CoFiring:
    """Counts co-firing over the first rows of the store.

    Args:
        sae: the autoencoder.
        reader: the store.
        features: the features looked at, (n,).
        n_rows: rows to read.
        top_rows: rows to keep, of those on which at least two fire.
        pair_features: indices into ``features`` of those counted in pairs, (m,).
    """
    part = take_features(sae, features)
    histogram = np.zeros(features.size + 1, np.int64)
    pairs = torch.zeros(pair_features.size, pair_features.size, dtype=torch.float64)
    pair_index = torch.from_numpy(pair_features)
    ones = torch.ones(features.size)
    top: list[TopRow] = []
    seen = 0
    for block in encode_rows(part, reader, n_rows):
        fired = torch.sign(block.feature_acts)
        firing = (fired @ ones).long()
        histogram += np.bincount(firing.numpy(), minlength=histogram.size)
        seen += len(firing)
        top = _keep_top(top, block, firing, top_rows)
        some = fired[firing > 0][:, pair_index]
        pairs += (some.T @ some).double()
    return CoFiring(histogram, tuple(top), pair_features, pairs.numpy().astype(np.int64), seen)


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


def _keep_top(top: list[TopRow], block: EncodedBlock, firing: torch.Tensor, wanted: int) -> list[TopRow]:
    best, where = torch.topk(firing, min(wanted, len(firing)))
    floor = top[-1].firing if len(top) == wanted else 1  # one feature alone fires with nothing
    found = [
        TopRow(int(count), int(block.prompt[row]), int(block.position[row]))
        for count, row in zip(best.tolist(), where.tolist(), strict=True)
        if count > floor
    ]
    return sorted(top + found, key=lambda row: (-row.firing, row.prompt, row.position))[:wanted]
