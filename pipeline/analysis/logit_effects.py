"""The direct effect of features on the logits: what a unit of a feature adds to the logit of every token.

A decoder direction d of an MLP's activations writes d W_out W_U, one of a site of the residual stream's width d W_U; at
other sites there is no direct path. The final layer norm is left out, as the post does: its scale would multiply all
effects of a feature on a token alike. Softmax does not see what all logits gain together, so effects are centred over
the vocabulary.

Cost: a product of d_sae x d_model x d_vocab in float64, in blocks of features, since the whole matrix (16,384 x 48,262)
takes 6 GB; whatever is asked of it is therefore asked of a block while it is there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.analysis import statistics
from pipeline.analysis.context import Context, Floats, Integers
from pipeline.analysis.examples import Choice, Windows

KEPT = 10
_BLOCK_FEATURES = 128


@dataclass(frozen=True)
class LogitEffects:
    """What is kept of the effects of m features.

    Attributes:
        kurtosis: excess kurtosis of each feature's effects over the vocabulary, (m,); NaN where they are all zero.
        raised: ids of the tokens raised most, most first, int64 (m, kept).
        raised_by: effects on them, (m, kept).
        lowered: ids of the tokens lowered most, most first, int64 (m, kept).
        lowered_by: effects on them, (m, kept).
        on_next: activation times effect on the token that came next in each example, 0 after a prompt's last token,
            float32 (n, width).
    """

    kurtosis: Floats
    raised: Integers
    raised_by: Floats
    lowered: Integers
    lowered_by: Floats
    on_next: npt.NDArray[np.float32]


def measure_effects(context: Context, features: Integers, choice: Choice, windows: Windows) -> LogitEffects:
    """Measures the effects of features on the logits; at a site without a path to them, nothing is kept.

    Args:
        context: the autoencoder and the language model.
        features: the features studied, ascending, (m,).
        choice: the examples, feature by feature, n.
        windows: around them.
    """
    unembedding = statistics.weights64(context.need_model().W_U)
    written = written_to_residual(context, statistics.weights64(context.sae.W_dec)[features])
    kept = 0 if written is None else min(KEPT, unembedding.shape[1])
    ids, values = np.zeros((2, features.size, kept), np.int64), np.zeros((2, features.size, kept))
    on_next = np.zeros(windows.activations.shape, np.float32)
    found = LogitEffects(np.full(features.size, np.nan), ids[0], values[0], ids[1], values[1], on_next)
    if written is None:
        return found
    unembedding -= unembedding.mean(axis=1, keepdims=True)
    starts = np.append(np.searchsorted(choice.feature, features), choice.feature.size)
    for first in range(0, features.size, _BLOCK_FEATURES):
        part = slice(first, min(first + _BLOCK_FEATURES, features.size))
        effects = written[part] @ unembedding
        found.kurtosis[part] = statistics.excess_kurtosis(effects)
        for side, sign in enumerate((1, -1)):
            ids[side, part] = statistics.largest(sign * effects, kept)
            values[side, part] = np.take_along_axis(effects, ids[side, part], axis=1)
        rows = slice(int(starts[part.start]), int(starts[part.stop]))
        own = np.searchsorted(features[part], choice.feature[rows])[:, None]
        following, activation = windows.following[rows], windows.activations[rows]
        known = (following >= 0) & (activation > 0)
        on_next[rows] = np.where(known, activation * effects[own, following], 0)
    return found


def logit_table(features: Integers, found: LogitEffects, strings: list[str]) -> pa.Table:
    """The table ``logits``.

    Args:
        features: the features studied, (m,).
        found: their effects.
        strings: text of each token id.
    """
    kept = found.raised.shape[1]
    ids = np.concatenate([found.raised, found.lowered], axis=1).ravel()
    effects = np.concatenate([found.raised_by, found.lowered_by], axis=1).ravel()
    directions = ["raised"] * kept + ["lowered"] * kept
    ranks = np.tile(np.arange(1, kept + 1), 2 * features.size)
    return pa.table(
        {
            "feature": pa.array(np.repeat(features, 2 * kept).astype(np.int32)),
            "direction": pa.array(directions * features.size, pa.string()),
            "rank": pa.array(ranks.astype(np.int32)),
            "token_id": pa.array(ids.astype(np.int32)),
            "token": pa.array([strings[token] for token in ids], pa.string()),
            "effect": pa.array(effects.astype(np.float32)),
        }
    )


def written_to_residual(context: Context, directions: Floats) -> Floats | None:
    """What directions at the autoencoder's site add to the residual stream, a unit of each.

    Args:
        context: with the language model.
        directions: (m, d_in).

    Returns:
        (m, d_model): through W_out from an MLP's activations, as they are at a site of the residual stream's width;
        None at other sites.
    """
    model = context.need_model()
    if context.hook_name.endswith("mlp.hook_post"):
        return directions @ statistics.weights64(model.W_out(context.layer))
    return directions if directions.shape[1] == len(model.W_U) else None


def logit_weights(context: Context, direction: Floats) -> Floats | None:
    """Logits that a unit of the direction writes, centred over the vocabulary, which softmax does not see.

    Returns:
        (d_vocab,): through W_out and W_U from an MLP's activations, through W_U alone from a site of the residual
        stream's width; None at other sites.
    """
    written = written_to_residual(context, direction[None])
    if written is None:
        return None
    logits = written[0] @ statistics.weights64(context.need_model().W_U)
    return logits - logits.mean()
