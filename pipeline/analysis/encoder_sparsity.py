"""What a penalty on the encoder's weights does: to the ultra-low features, and to how many neurons a feature reads.

A sweep: the autoencoder and others that differ in ``encoder_l1`` or ``encoder_l2``, the coefficient of the sum of
absolute, or of squared, encoder weights in the loss. Of each a row: dead and ultra-low features, L0, explained variance
and loss recovered, and the fraction of frequent features whose encoder, and whose decoder, is neuron-sparse, which is
everything that ``neuron_sparsity`` does not call dense. The numbers answer two questions. Does a penalty remove the
ultra-low cluster: the run with the fewest ultra-low features, beside the first one. Does it give
neuron-sparse features at no cost: the most neuron-sparse encoders among the runs that lose at most ``tolerated_loss``
of loss recovered and gain at most ``tolerated_l0`` of L0. From weights and the findings of each autoencoder.

Source: a comment under the post, on L1 or L2 regularisation of encoder weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Need
from pipeline.analysis.display import percent
from pipeline.analysis.neuron_sparsity import DENSE, NO_LABEL, label_features, neuron_shares
from pipeline.analysis.neuron_sparsity import OPTIONS as SPARSITY_OPTIONS
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Encoder sparsity"
QUESTION = "Does a penalty on encoder weights remove the ultra-low cluster, or give neuron-sparse features for free?"
REQUIRES: frozenset[Need] = frozenset({"companions", "density", "loss_recovered"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("n_runs", "Runs of the sweep, this one included", "count"),
    NumberLabel("rare_fraction", "Ultra-low features of this one", "fraction"),
    NumberLabel("rare_fraction_least", "… fewest of the sweep", "fraction"),
    NumberLabel("rare_fraction_least_at", "… at", "text"),
    NumberLabel("rare_fraction_least_loss_recovered", "… loss recovered there", "fraction"),
    NumberLabel("loss_recovered", "Loss recovered by this one", "fraction"),
    NumberLabel("l0", "L0 of this one", "plain"),
    NumberLabel("encoder_sparse", "Neuron-sparse encoders of this one", "fraction"),
    NumberLabel("encoder_sparse_free", "… most that cost nothing", "fraction"),
    NumberLabel("encoder_sparse_free_at", "… at", "text"),
    NumberLabel("encoder_sparse_free_rare_fraction", "… ultra-low features there", "fraction"),
    NumberLabel("encoder_sparse_most", "… most of the sweep", "fraction"),
    NumberLabel("encoder_sparse_most_at", "… at", "text"),
    NumberLabel("encoder_sparse_most_loss_recovered", "… loss recovered there", "fraction"),
)
PENALTIES = ("encoder_l1", "encoder_l2")
_LINES: tuple[tuple[str, str, figures.Role], ...] = (
    ("loss_recovered", "loss recovered", "frequent"),
    ("ultra_low_fraction", "ultra-low features", "rare"),
    ("encoder_sparse_fraction", "neuron-sparse encoders", "third"),
    ("decoder_sparse_fraction", "neuron-sparse decoders", "fourth"),
)


class OPTIONS(AnalysisOptions):
    """Options of the encoder sparsity analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""
    tolerated_loss: float = Field(default=0.01, ge=0, lt=1)
    """A run costs nothing if it recovers at most this much less of the loss..."""
    tolerated_l0: float = Field(default=0.1, ge=0)
    """... and has at most this share more features firing on a token."""


class _Run(NamedTuple):
    """One row of the sweep."""

    label: str
    encoder_l1: float
    encoder_l2: float
    dead_fraction: float
    ultra_low_fraction: float
    l0: float
    fve: float | None
    loss_recovered: float | None
    encoder_sparse_fraction: float | None
    decoder_sparse_fraction: float | None


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Compares the runs of a sweep; see the module."""
    runs = [_row(one, options) for one in (context, *context.need_companions())]
    first = runs[0]
    least = min(runs, key=lambda one: one.ultra_low_fraction)
    most = max(runs, key=_sparse)
    free = max((one for one in runs if _costs_nothing(one, first, options)), key=_sparse)
    numbers: dict[str, Number] = {
        "n_runs": len(runs),
        "rare_fraction": first.ultra_low_fraction,
        "rare_fraction_least": least.ultra_low_fraction,
        "rare_fraction_least_at": _named(least),
        "rare_fraction_least_loss_recovered": least.loss_recovered,
        "loss_recovered": first.loss_recovered,
        "l0": first.l0,
        "encoder_sparse": first.encoder_sparse_fraction,
        "encoder_sparse_free": free.encoder_sparse_fraction,
        "encoder_sparse_free_at": _named(free),
        "encoder_sparse_free_rare_fraction": free.ultra_low_fraction,
        "encoder_sparse_most": most.encoder_sparse_fraction,
        "encoder_sparse_most_at": _named(most),
        "encoder_sparse_most_loss_recovered": most.loss_recovered,
    }
    drawn = {name: _figure(name, runs) for name in PENALTIES if any(getattr(one, name) for one in runs)}
    return AnalysisResult(numbers, {"runs": _table(runs)}, drawn, _reading(numbers, options))


def neuron_sparse_fraction(rows: Floats) -> float | None:
    """Fraction of directions, those of zeros left out, that ``neuron_sparsity`` does not call dense.

    Args:
        rows: (n, d_in).
    """
    labels = label_features(*neuron_shares(rows), SPARSITY_OPTIONS())
    return statistics.share(labels[labels != NO_LABEL] != DENSE)


def _row(one: Context, options: OPTIONS) -> _Run:
    densities, trained = one.need_densities(), one.sae_config.get("autoencoder", {})
    trainer: Mapping[str, Any] = trained if isinstance(trained, Mapping) else {}
    groups = densities.groups(options.ultra_low_below)
    quality = one.numbers["loss_recovered"]
    return _Run(
        label=one.label,
        encoder_l1=float(trainer.get("encoder_l1", 0)),
        encoder_l2=float(trainer.get("encoder_l2", 0)),
        dead_fraction=float((densities.counts == 0).mean()),
        ultra_low_fraction=float(groups.rare.mean()),
        l0=float(densities.density.sum()),
        fve=_number(quality.get("fve")),
        loss_recovered=_number(quality.get("loss_recovered")),
        encoder_sparse_fraction=neuron_sparse_fraction(statistics.weights64(one.sae.W_enc).T[groups.frequent]),
        decoder_sparse_fraction=neuron_sparse_fraction(statistics.weights64(one.sae.W_dec)[groups.frequent]),
    )


def _number(value: Number) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _sparse(one: _Run) -> float:
    return -1.0 if one.encoder_sparse_fraction is None else one.encoder_sparse_fraction


def _costs_nothing(one: _Run, first: _Run, options: OPTIONS) -> bool:
    if one is first:
        return True
    if one.loss_recovered is None or first.loss_recovered is None:
        return False
    return (
        one.loss_recovered >= first.loss_recovered - options.tolerated_loss
        and one.l0 <= (1 + options.tolerated_l0) * first.l0
    )


def _named(one: _Run) -> str:
    penalties = [f"{name} {getattr(one, name):g}" for name in PENALTIES if getattr(one, name)]
    return ", ".join(penalties) or "no penalty"


def _table(runs: Sequence[_Run]) -> pa.Table:
    columns = zip(_Run._fields, zip(*runs, strict=True), strict=True)
    return pa.table(
        {name: pa.array(values, pa.string() if name == "label" else pa.float64()) for name, values in columns}
    )


def _figure(name: str, runs: Sequence[_Run]) -> go.Figure:
    other = next(penalty for penalty in PENALTIES if penalty != name)
    comparable = (one for one in runs if getattr(one, other) == getattr(runs[0], other))
    shown = sorted(comparable, key=lambda one: getattr(one, name))
    figure = figures.new_figure(
        f"What the penalty {name} does; its steps are drawn evenly spaced.",
        x_title=f"{name}: coefficient of the penalty",
        y_title="fraction",
    )
    for key, label, role in _LINES:
        figure.add_scatter(
            x=[f"{getattr(one, name):g}" for one in shown],
            y=[getattr(one, key) for one in shown],
            mode="lines+markers",
            name=label,
            line={"color": figures.LIGHT[role], "width": 2},
            marker={"size": 7},
            hovertemplate=f"{label}<br>{name} %{{x}}<br>%{{y:.2%}}<extra></extra>",
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0~%", rangemode="tozero")
    return figure


def _reading(numbers: dict[str, Number], options: OPTIONS) -> str:
    return (
        f"Each point is an autoencoder of its own. Of this one’s features {percent(numbers['rare_fraction'])} are "
        "ultra-low; the fewest, "
        f"{percent(numbers['rare_fraction_least'])}, are at {numbers['rare_fraction_least_at']}, which recovers "
        f"{percent(numbers['rare_fraction_least_loss_recovered'])} of the loss (this one "
        f"{percent(numbers['loss_recovered'])}). Neuron-sparse encoders are {percent(numbers['encoder_sparse'])} of "
        "the frequent ones, and at most "
        f"{percent(numbers['encoder_sparse_free'])} (at {numbers['encoder_sparse_free_at']}, where "
        f"{percent(numbers['encoder_sparse_free_rare_fraction'])} are ultra-low) among the runs that recover at most "
        f"{percent(options.tolerated_loss)} less of the loss and fire at most {percent(options.tolerated_l0)} more."
    )
