"""Findings about made-up features, with the tables of every analysis that the feature explorer reads."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.analysis import AnalysisResult
from pipeline.report import Section

BEFORE, AFTER = 3, 2
_TOP, _QUANTILES = 2, 3


def case_studies(n: int, words: Sequence[str], seed: int = 0) -> AnalysisResult:
    """Case studies of n features over a vocabulary.

    Args:
        n: features; the last one never fired.
        words: text of each token id.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    each = np.repeat(np.arange(n - 1), _TOP + _QUANTILES)
    kinds, width = ["top"] * _TOP + ["quantile"] * _QUANTILES, BEFORE + 1 + AFTER
    tokens = rng.integers(0, len(words), (each.size, width))
    activations = np.where(rng.random(tokens.shape) < 0.2, rng.random(tokens.shape), 0)
    activations[:, BEFORE] = 1 + each / n
    position = rng.integers(BEFORE, 100, each.size)
    logit_tokens = rng.integers(0, len(words), 4 * n)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.array(values.tolist(), pa.list_(kind))

    def ranks(upto: int, repeats: int) -> pa.Array:
        return pa.array(np.tile(np.arange(1, upto + 1), repeats).astype(np.int32))

    def numbers(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.int32))

    every = np.arange(n)
    examples = {
        "feature": numbers(each),
        "kind": pa.array(kinds * (n - 1)),
        "quantile": pa.array([None] * _TOP + [0.75, 0.5, 0.25], pa.float64()).take(
            pa.array(np.tile(np.arange(_TOP + _QUANTILES), n - 1))
        ),
        "rank": pa.array([1, 2, 1, 2, 3] * (n - 1), pa.int32()),
        "prompt": numbers(rng.integers(0, 1000, each.size)),
        "position": numbers(position),
        "activation": pa.array(activations[:, BEFORE].astype(np.float32)),
        "first_position": numbers(position - BEFORE),
        "tokens": lists(tokens, pa.int32()),
        "activations": lists(activations.astype(np.float32), pa.float32()),
        "effects": lists((activations * rng.normal(size=tokens.shape)).astype(np.float32), pa.float32()),
    }
    features = {
        "feature": numbers(every),
        "top_token": pa.array([words[one % len(words)] for one in every]),
        "logit_kurtosis": pa.array(rng.random(n)),
        "nearest_feature": numbers((every + 1) % n),
        "nearest_cosine": pa.array(rng.random(n)),
    }
    bins = np.repeat(np.arange(n - 1), 4)
    edges = 2.0 ** np.tile(np.arange(-3, 1), n - 1)
    tables = {
        "chosen": {"feature": numbers(every[:3]), "top_token": pa.array(list(words[:3]))},
        "features": features,
        "examples": examples,
        "histograms": {
            "feature": numbers(bins),
            "from_activation": pa.array(edges),
            "to_activation": pa.array(2 * edges),
            "count": pa.array(rng.integers(1, 50, bins.size)),
        },
        "logits": {
            "feature": numbers(np.repeat(every, 4)),
            "direction": pa.array(["raised", "raised", "lowered", "lowered"] * n),
            "rank": ranks(2, 2 * n),
            "token_id": numbers(logit_tokens),
            "token": pa.array([words[token] for token in logit_tokens]),
            "effect": pa.array(np.tile([0.5, 0.25, -0.5, -0.25], n).astype(np.float32)),
        },
        "neighbours": {
            "feature": numbers(np.repeat(every, 2)),
            "rank": ranks(2, n),
            "neighbour": numbers(np.stack([(every + 1) % n, (every + 2) % n], axis=1).ravel()),
            "cosine": pa.array(rng.random(2 * n).astype(np.float32)),
        },
        "neurons": {
            "feature": numbers(np.repeat(every, 2)),
            "rank": ranks(2, n),
            "neuron": numbers(rng.integers(0, 512, 2 * n)),
            "weight": pa.array(rng.normal(size=2 * n).astype(np.float32)),
            "share": pa.array(rng.random(2 * n).astype(np.float32)),
        },
        "vocabulary": {"token_id": numbers(np.arange(len(words))), "token": pa.array(list(words))},
    }
    return AnalysisResult({"features_studied": n}, {name: pa.table(columns) for name, columns in tables.items()})


def sections(n: int, words: Sequence[str]) -> list[Section]:
    """Densities, kurtosis and case studies of n features; feature i has density (i + 1) / n / 100."""
    every = np.arange(n)
    density = {"feature": every.astype(np.int32), "density": (every + 1) / n / 100, "max_activation": 1 + every / n}
    kurtosis = {"feature": every.astype(np.int32), "decoder_kurtosis": np.random.default_rng(1).normal(size=n)}
    return [
        Section("density", "analyze-0", {"ultra_low_below": 1e-3}, AnalysisResult({}, {"features": pa.table(density)})),
        Section("kurtosis", "analyze-1", {}, AnalysisResult({}, {"features": pa.table(kurtosis)})),
        Section("case_studies", "analyze-2", {}, case_studies(n, words)),
    ]
