"""Whether an encoder kept orthogonal to the ultra-low direction forms another ultra-low cluster, and along what.

Compares an autoencoder with one trained anew whose encoder was kept orthogonal to a direction (by default the mean
ultra-low encoder direction of the first). Of both: the ultra-low features, and their encoders' cosine with their own
mean direction. Of the new one: the largest cosine of any encoder with the directions excluded, which says that the
constraint held (rounding leaves about 1e-7), and the cosine of its cluster's direction with the old cluster's, beside
the largest that is left to a direction orthogonal to what was excluded: where exactly the old direction was excluded
both are zero by construction, and what is to be seen is whether there is a cluster at all. From weights and densities
alone. Fewer than two ultra-low features are no cluster.

Source: the post, "Can we fix ultra-low frequency features?".
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.comparing import need_same_width
from pipeline.analysis.context import Context, Floats, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.rare_direction import mean_directions
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number
from storage.errors import InputError

VERSION = 1
TITLE = "Orthogonal rerun"
QUESTION = "Does an autoencoder that may not use the ultra-low direction have an ultra-low cluster all the same?"
REQUIRES: frozenset[Need] = frozenset({"companions", "density"})
OPTIONAL: frozenset[Need] = frozenset({"loss_recovered"})
NUMBERS = (
    NumberLabel("rare_fraction_before", "Ultra-low features before", "fraction"),
    NumberLabel("rare_fraction", "Ultra-low features of the rerun", "fraction"),
    NumberLabel("n_rare", "… their number", "count"),
    NumberLabel("aligned_fraction_before", "Encoder cosine with their mean direction > 0.95, before", "fraction"),
    NumberLabel("aligned_fraction", "… of the rerun, with its own", "fraction"),
    NumberLabel("cosine_median_before", "Encoder cosine with their mean direction, median, before", "plain"),
    NumberLabel("cosine_median", "… of the rerun, with its own", "plain"),
    NumberLabel("direction_cosine", "Cosine of the rerun’s direction with the one before", "plain"),
    NumberLabel("direction_cosine_possible", "… largest that the constraint leaves room for", "plain"),
    NumberLabel("excluded_cosine_max", "Encoder cosine with the excluded direction, largest", "plain"),
    NumberLabel("l0_before", "L0 before", "plain"),
    NumberLabel("l0", "L0 of the rerun", "plain"),
    NumberLabel("loss_recovered_before", "Loss recovered before", "fraction"),
    NumberLabel("loss_recovered", "Loss recovered by the rerun", "fraction"),
)
_EDGES = np.linspace(-1, 1, 81)
_ROUNDING = 1e-6


class OPTIONS(AnalysisOptions):
    """Options of the orthogonal rerun analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""
    aligned_above: float = Field(default=0.95, gt=-1, lt=1)
    """A cosine with the mean direction above this counts as the same direction."""


class _Rare(NamedTuple):
    """The ultra-low features of an autoencoder; the direction is None where they are no cluster."""

    encoder: Floats
    direction: Floats | None
    cosine: Floats


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Compares before and after; see the module."""
    rerun, excluded = _rerun(context)
    before, after = _rare(context, options), _rare(rerun, options)
    encoder = statistics.weights64(rerun.sae.W_enc).T
    basis = np.linalg.qr(excluded.T)[0].T
    inside = statistics.norms(encoder @ basis.T)
    length = statistics.norms(encoder)
    numbers: dict[str, Number] = {
        "cluster": "no cluster" if after.direction is None else "measured",
        "aligned_above": options.aligned_above,
        "n_rare": len(after.encoder),
        "excluded_directions": len(excluded),
        "excluded_cosine_max": statistics.maximum(inside[length > 0] / length[length > 0]),
        **_of_one(before, context, options, "_before"),
        **_of_one(after, rerun, options, ""),
        **_between(before.direction, after.direction, basis),
    }
    drawn = {
        "own_direction": figures.histogram(
            [
                figures.Series("before", before.cosine, "frequent"),
                figures.Series("rerun", after.cosine, "rare"),
            ],
            _EDGES,
            caption="Cosine of ultra-low encoders with their own mean direction, before and in the rerun.",
            x_title="cosine with the own mean direction",
        )
    }
    if before.direction is not None:
        drawn["old_direction"] = figures.histogram(
            [
                figures.Series("before", before.cosine, "frequent"),
                figures.Series("rerun", statistics.cosines_with(after.encoder, before.direction), "rare"),
            ],
            _EDGES,
            caption="Cosine of ultra-low encoders with the mean direction before, before and in the rerun.",
            x_title="cosine with the mean direction before",
        )
    return AnalysisResult(numbers, {"rerun_features": _table(rerun, after, options)}, drawn, _reading(numbers))


def _rerun(context: Context) -> tuple[Context, Floats]:
    need_same_width(context)
    reruns = context.need_companions()
    if len(reruns) != 1:
        raise InputError("one rerun at a time", found=f"{len(reruns)} autoencoders", expected="one")
    rerun = reruns[0]
    if rerun.encoder_directions is None:
        raise InputError(
            "the encoder was not kept orthogonal to any direction", where=rerun.label,
            remedy="'sparsemill study orthogonal-rerun' trains one that is",
        )  # fmt: skip
    return rerun, rerun.encoder_directions


def _rare(one: Context, options: OPTIONS) -> _Rare:
    rare = one.need_densities().groups(options.ultra_low_below).rare
    encoder = statistics.weights64(one.sae.W_enc).T[rare]
    direction = mean_directions(encoder)[0] if len(encoder) > 1 else None
    cosine = np.empty(0) if direction is None else statistics.cosines_with(encoder, direction)
    return _Rare(encoder, direction, cosine)


def _of_one(rare: _Rare, one: Context, options: OPTIONS, suffix: str) -> dict[str, Number]:
    return {
        f"rare_fraction{suffix}": len(rare.encoder) / one.sae.d_sae,
        f"aligned_fraction{suffix}": statistics.share(statistics.finite(rare.cosine) > options.aligned_above),
        f"cosine_median{suffix}": statistics.median(rare.cosine),
        f"l0{suffix}": one.numbers.get("density", {}).get("l0"),
        f"loss_recovered{suffix}": one.numbers.get("loss_recovered", {}).get("loss_recovered"),
    }


def _between(before: Floats | None, after: Floats | None, basis: Floats) -> dict[str, Number]:
    if before is None:
        return {"direction_cosine": None, "direction_cosine_possible": None}
    outside = before - (before @ basis.T) @ basis
    return {
        "direction_cosine": None if after is None else float(after @ before),
        "direction_cosine_possible": float(np.linalg.norm(outside)),
    }


def _table(rerun: Context, after: _Rare, options: OPTIONS) -> pa.Table:
    numbered = np.flatnonzero(rerun.need_densities().groups(options.ultra_low_below).rare)
    cosine = np.full(numbered.size, np.nan) if after.direction is None else after.cosine
    return pa.table(
        {
            "feature_of_rerun": pa.array(numbered.astype(np.int32)),
            "cosine_with_own_direction": pa.array(cosine, from_pandas=True),
        }
    )


def _reading(numbers: dict[str, Number]) -> str:
    counts = (
        f"Of the features {percent(numbers['rare_fraction_before'])} were ultra-low before and "
        f"{percent(numbers['rare_fraction'])} are in the rerun, whose encoders have a cosine of at most "
        f"{show(numbers['excluded_cosine_max'])} with what was excluded."
    )
    if numbers["cluster"] == "no cluster":
        return f"{counts} The rerun has no ultra-low cluster: taking the direction away was enough."
    possible = numbers["direction_cosine_possible"]
    direction = (
        f"has cosine {show(numbers['direction_cosine'])} with the one before, of at most {show(possible)} left to it."
        if isinstance(possible, float) and possible > _ROUNDING
        else "is another one, since the one before was excluded."
    )
    return (
        f"{counts} Their median cosine with their own mean direction is {show(numbers['cosine_median'])} "
        f"({show(numbers['cosine_median_before'])} before): the closer to 1, the more they are one feature again. That "
        f"direction {direction}"
    )
