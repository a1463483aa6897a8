"""What the direction shared by the ultra-low features is, or rather: everything it might be, one number each.

The direction is the mean of the raw encoder columns of ultra-low features, as the author's (of unit columns in a second
column of the table), made a unit vector u. Measured of it: the text on which x . u is largest and smallest, and what
edits leave of it (``direction_pass``, ``direction_texts``); how few neurons it is made of; the logits it would write
through W_out and W_U (the final norm's scale is not folded in), whether few tokens get most of them and whether those
begin with a space; cosines with the mean activation, with the top singular vectors of the activations, with the
all-ones vector and with mean loss gradients (``direction_gradients``); correlation of x . u with |x|; and on which side
of every ultra-low feature's hyperplane the tokens lie: those beyond it are its density, since a ReLU fires just there.

A random direction's cosine with a given one has mean 0 and standard deviation 1 / sqrt(d_in). ``features`` names other
features than the ultra-low ones, to look at a dictionary that has none. Fewer than two features are no cluster.

Source: the post, "What does the encoder direction mean?", and its comments on features that try to die, on one-sided
hyperplanes, and on the positive quadrant.
"""

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import direction_gradients, direction_report, direction_texts, neuron_sparsity, statistics
from pipeline.analysis.context import Context, Floats, Integers, Need
from pipeline.analysis.direction_gradients import WEIGHTS, MeanGradients
from pipeline.analysis.direction_pass import project_rows, projection_stds
from pipeline.analysis.direction_report import Found, SingularVectors
from pipeline.analysis.display import percent, show
from pipeline.analysis.logit_effects import logit_weights
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number
from storage.errors import ConfigError

VERSION = 1
TITLE = "The rare direction"
QUESTION = "What is the direction that the ultra-low features share?"
REQUIRES: frozenset[Need] = frozenset({"store", "statistics", "model", "tokens", "density"})
OPTIONAL: frozenset[Need] = frozenset()
OF_A_DIRECTION = (
    NumberLabel("fve_top_1", "Share of the largest neuron", "fraction"),
    NumberLabel("fve_top_10", "Share of the ten largest neurons", "fraction"),
    NumberLabel("neuron_kurtosis", "Excess kurtosis over neurons", "plain"),
    NumberLabel("logit_kurtosis", "Excess kurtosis of its logits over the vocabulary", "plain"),
    NumberLabel("space_correlation", "Correlation of its logits with “begins with a space”", "plain"),
    NumberLabel("cosine_mean", "Cosine with the mean activation", "plain"),
    NumberLabel("cosine_singular", "Largest cosine with a top singular vector, either sign", "plain"),
    NumberLabel("singular_number", "Number of that singular vector", "count"),
    NumberLabel("singular_share", "Share of it in the span of the top singular vectors", "fraction"),
    NumberLabel("cosine_ones", "Cosine with the all-ones vector", "plain"),
    NumberLabel("positive_share", "Share of its entries that are positive", "fraction"),
    NumberLabel("gradient_autoencoder_all", "Cosine with the autoencoder’s mean gradient, all tokens", "plain"),
    NumberLabel("gradient_autoencoder_firing", "Cosine with the autoencoder’s mean gradient, firing tokens", "plain"),
    NumberLabel("gradient_autoencoder_flip", "Cosine with the autoencoder’s mean gradient, flipping tokens", "plain"),
    NumberLabel("gradient_model_all", "Cosine with the language model’s mean gradient, all tokens", "plain"),
    NumberLabel("gradient_model_firing", "Cosine with the language model’s mean gradient, firing tokens", "plain"),
    NumberLabel("gradient_model_flip", "Cosine with the language model’s mean gradient, flipping tokens", "plain"),
)
NUMBERS = (
    NumberLabel("n_rare", "Features whose encoders’ mean it is", "count"),
    NumberLabel("cosine_raw_unit", "Cosine of the mean of raw with the mean of unit encoders", "plain"),
    NumberLabel("cosine_random", "Cosine of a random direction with any, standard deviation", "plain"),
    *OF_A_DIRECTION,
    NumberLabel("gradient_firings", "Pairs of token and feature that fires, of the gradients", "count"),
    NumberLabel("gradient_flips", "… that is close to flipping", "count"),
    NumberLabel("norm_correlation", "Correlation of the projection with the activation’s norm", "plain"),
    NumberLabel("projection_mean", "Projection of a token, mean", "plain"),
    NumberLabel("projection_std", "… standard deviation", "plain"),
    NumberLabel("projection_max", "… largest", "plain"),
    NumberLabel("projection_min", "… smallest", "plain"),
    NumberLabel("edit_share_left", "… of the top texts, above the mean, left after the median edit", "fraction"),
    NumberLabel("beyond_median", "Tokens beyond a feature’s hyperplane, median feature", "fraction"),
    NumberLabel("beyond_max", "… feature with most", "fraction"),
    NumberLabel("behind_median", "Tokens behind it, median feature", "fraction"),
    NumberLabel("one_sided_fraction", "Features with all tokens behind their hyperplane", "fraction"),
    NumberLabel("n_rows", "Tokens projected", "count"),
)
_BINS_TO_A_SIDE, _BINS_A_STD = 160, 4


class OPTIONS(AnalysisOptions):
    """Options of the rare direction analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""
    features: tuple[int, ...] = ()
    """Features whose mean encoder is the direction, in place of the ultra-low ones."""
    rows: int = Field(default=1_638_400, gt=0)
    """Rows of the store projected, no more than densities were counted over."""
    top_tokens: int = Field(default=20, gt=0)
    """Tokens of largest and of smallest projection kept with their text; those of largest are edited."""
    top_logits: int = Field(default=20, gt=0)
    """Tokens of the vocabulary raised most and lowered most."""
    singular_vectors: int = Field(default=10, gt=0)
    """Top singular vectors of the activations it is compared with."""
    gradient_prompts: int = Field(default=256, gt=0)
    """Held-out prompts that gradients are averaged over, drawn without replacement; all where there are fewer."""
    flip_within: float = Field(default=0.1, gt=0)
    """A token is close to flipping a feature within this many standard deviations of its pre-activation."""
    micro_batch_prompts: int = Field(default=8, gt=0)
    """Prompts a pass of the model."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures the rare direction; see the module."""
    features = _features(context, options)
    encoder = statistics.weights64(context.sae.W_enc).T[features]
    direction, of_units = mean_directions(encoder)
    if features.size < 2 or direction is None or of_units is None:
        return _no_cluster(features.size)
    gradients = _gradients(context, features, options)
    singular = _singular_vectors(context, options.singular_vectors)
    measures = [_measures(context, one, gradients, singular) for one in (direction, of_units)]
    found = _find(context, direction, features, singular, options)
    numbers: dict[str, Number] = {
        "cluster": "measured",
        "n_rare": int(features.size),
        "cosine_raw_unit": float(direction @ of_units),
        "cosine_random": direction.size**-0.5,
        **measures[0],
        "gradient_firings": gradients.pairs["firing"],
        "gradient_flips": gradients.pairs["flip"],
        **_numbers(found),
    }
    labels = {label.key: label.label for label in OF_A_DIRECTION}
    tables = direction_report.tables(context, found) | {
        "quantities": direction_report.quantity_table(labels, dict(zip(("raw", "unit"), measures, strict=True)))
    }
    return AnalysisResult(numbers, tables, direction_report.figures(found, numbers), _reading(numbers))


def mean_directions(encoder: Floats) -> tuple[Floats | None, Floats | None]:
    """Unit vectors along the mean of encoder columns, and along the mean of these made unit vectors.

    Args:
        encoder: a column of W_enc a row, (n, d_in).

    Returns:
        Each (d_in,), or None where the mean is zero.
    """
    lengths = statistics.norms(encoder)
    units = encoder[lengths > 0] / lengths[lengths > 0, None]
    return _unit(encoder.sum(axis=0)), _unit(units.sum(axis=0))


def _unit(vector: Floats) -> Floats | None:
    length = np.linalg.norm(vector)
    return vector / length if length else None


def _features(context: Context, options: OPTIONS) -> Integers:
    if not options.features:
        return np.flatnonzero(context.need_densities().groups(options.ultra_low_below).rare)
    chosen = np.unique(np.array(options.features, np.int64))
    if chosen[0] < 0 or chosen[-1] >= context.sae.d_sae:
        raise ConfigError(
            "no such feature", where="options of rare_direction", found=int(chosen[0] if chosen[0] < 0 else chosen[-1]),
            expected=f"0 to {context.sae.d_sae - 1}",
        )  # fmt: skip
    return chosen


def _no_cluster(n_rare: int) -> AnalysisResult:
    numbers: dict[str, Number] = dict.fromkeys((number.key for number in NUMBERS), None)
    numbers |= {"cluster": "no cluster", "n_rare": n_rare}
    if n_rare > 1:
        why = f"The encoders of the {n_rare:,} features add up to nothing"
    else:
        why = "There is one ultra-low feature" if n_rare else "There are no ultra-low features"
    return AnalysisResult(numbers, reading=f"{why}, so there is no shared direction to look at.")


def _gradients(context: Context, features: Integers, options: OPTIONS) -> MeanGradients:
    there = context.need_tokens().n_prompts("held_out")
    chosen = np.sort(context.rng("gradient prompts").permutation(there)[: options.gradient_prompts])
    return direction_gradients.mean_gradients(
        context,
        features,
        chosen.tolist(),
        within=options.flip_within,
        micro_batch_prompts=options.micro_batch_prompts,
    )


def _singular_vectors(context: Context, kept: int) -> SingularVectors:
    moments = context.need_moments()
    values, vectors = moments.singular_vectors()
    return SingularVectors(values[:kept] / moments.rows**0.5, vectors[:kept])


def _measures(
    context: Context, direction: Floats, gradients: MeanGradients, singular: SingularVectors
) -> dict[str, Number]:
    """The numbers of ``OF_A_DIRECTION``."""
    cosines = singular.vectors @ direction
    strongest = int(np.abs(cosines).argmax())
    top_1, next_9 = neuron_sparsity.neuron_shares(direction[None])
    logits = logit_weights(context, direction)
    numbers: dict[str, Number] = {
        "fve_top_1": float(top_1[0]),
        "fve_top_10": float(top_1[0] + next_9[0]),
        "neuron_kurtosis": _kurtosis(direction),
        "logit_kurtosis": None if logits is None else _kurtosis(logits),
        "space_correlation": None if logits is None else _space_correlation(context, logits),
        "cosine_mean": _cosine(direction, context.need_moments().mean),
        "cosine_singular": abs(float(cosines[strongest])),
        "singular_number": strongest + 1,
        "singular_share": float(cosines @ cosines),
        "cosine_ones": _cosine(direction, np.ones_like(direction)),
        "positive_share": float((direction > 0).mean()),
    }
    for loss, by_weight in (("autoencoder", gradients.autoencoder), ("model", gradients.model)):
        for weight in WEIGHTS:
            there = weight in by_weight
            numbers[f"gradient_{loss}_{weight}"] = _cosine(direction, by_weight[weight]) if there else None
    return numbers


def _cosine(direction: Floats, other: Floats) -> float | None:
    return statistics.mean(statistics.cosines_with(other[None], direction))


def _kurtosis(values: Floats) -> float | None:
    return statistics.mean(statistics.excess_kurtosis(values[None]))


def _space_correlation(context: Context, logits: Floats) -> float | None:
    spaced = np.array([text.startswith(" ") for text in context.token_strings or ()], np.float64)
    if spaced.size != logits.size or np.ptp(spaced) == 0 or np.ptp(logits) == 0:
        return None
    return float(np.corrcoef(spaced, logits)[0, 1])


def _find(
    context: Context, direction: Floats, features: Integers, singular: SingularVectors, options: OPTIONS
) -> Found:
    moments = context.need_moments()
    std = float(projection_stds(moments, direction[None])[0]) or 1.0
    edges = moments.mean @ direction + std * np.arange(-_BINS_TO_A_SIDE, _BINS_TO_A_SIDE + 1) / _BINS_A_STD
    n_rows = min(options.rows, context.need_densities().n_rows)
    projections = project_rows(context, direction, edges, n_rows=n_rows, kept=options.top_tokens)
    edits = direction_texts.try_edits(context, direction, projections.top, batch=options.micro_batch_prompts)
    logits = logit_weights(context, direction)
    return Found(
        direction=direction,
        features=features,
        beyond=context.need_densities().density[features],
        thresholds=_thresholds(context, direction, features, moments.mean),
        projections=projections,
        edges=edges,
        singular=singular,
        logits=None if logits is None else _logit_table(context, logits, options.top_logits),
        edits=edits,
    )


def _thresholds(context: Context, direction: Floats, features: Integers, mean: Floats) -> Floats:
    """Projection at which a token that is average otherwise sets each feature off; NaN where no projection does."""
    sae = context.sae
    encoder = statistics.weights64(sae.W_enc).T[features]
    origin = statistics.weights64(sae.b_dec) if sae.subtract_b_dec else np.zeros_like(mean)
    needed = encoder @ (origin - mean) - statistics.weights64(sae.b_enc)[features]
    along = encoder @ direction
    return mean @ direction + np.divide(needed, along, out=np.full(along.size, np.nan), where=along > 0)


def _numbers(found: Found) -> dict[str, Number]:
    beyond, rows = found.beyond, found.projections
    return {
        "norm_correlation": rows.norm_correlation,
        "projection_mean": rows.mean,
        "projection_std": rows.std,
        "projection_max": rows.top[0].projection,
        "projection_min": rows.bottom[0].projection,
        "edit_share_left": statistics.median(np.array([edit.share_left(rows.mean) for edit in found.edits])),
        "beyond_median": statistics.median(beyond),
        "beyond_max": statistics.maximum(beyond),
        "behind_median": statistics.median(1 - beyond),
        "one_sided_fraction": statistics.share(beyond == 0),
        "n_rows": rows.n_rows,
    }


def _logit_table(context: Context, logits: Floats, kept: int) -> pa.Table:
    order = np.argsort(-logits, kind="stable")
    raised, lowered = order[:kept], order[::-1][:kept]
    strings = context.token_strings or [str(number) for number in range(logits.size)]
    return pa.table(
        {
            "raised": pa.array([strings[token] for token in raised], pa.string()),
            "logit_raised": pa.array(logits[raised]),
            "lowered": pa.array([strings[token] for token in lowered], pa.string()),
            "logit_lowered": pa.array(logits[lowered]),
        }
    )


def _reading(numbers: dict[str, Number]) -> str:
    return (
        "If the direction were something known, one of the bars would be long; the band is where 95 % of random "
        f"directions fall. Here its cosine is {show(numbers['cosine_mean'])} with the mean activation, at most "
        f"{show(numbers['cosine_singular'])} with a top singular vector, and "
        f"{show(numbers['gradient_autoencoder_flip'])} with the autoencoder’s mean gradient over tokens close to "
        f"flipping its features. Its ten largest neurons hold {percent(numbers['fve_top_10'])} of it, and the median "
        f"edit of the texts with the largest projection leaves {percent(numbers['edit_share_left'])} of what they have "
        "above the mean."
    )
