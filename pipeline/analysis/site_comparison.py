"""The same corpus at two sites: what the language model gets back at equal L0, dead and ultra-low features, and cost.

Autoencoders of at least two sites, several a site where a sweep of ``l1_coeff`` was made. "Equal L0" is reached by
linear interpolation in L0 between the runs of a site, at the first autoencoder's L0 moved into the range that both
sites cover; where the ranges do not meet nothing is compared. L0, loss recovered and cross-entropy are those of the
held-out prompts. A site's zero ablation is its own (at ``hook_post`` the MLP's output bias stays, at ``hook_mlp_out``
it goes too), so the cross-entropy with the reconstruction stands beside the fraction recovered: it has the same zero at
every site. Cost is counted, not timed: a row's width, weights, and the multiplications of a dense pass over one row.

Source: the post, "Should we train autoencoders on the MLP output?", and its comments on gelu-2l.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures
from pipeline.analysis.context import Context, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number
from storage.errors import InputError

VERSION = 1
TITLE = "Sites compared"
QUESTION = "Is an autoencoder better placed at another site of the model?"
REQUIRES: frozenset[Need] = frozenset({"companions", "density", "loss_recovered"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("site", "Site of this one", "text"),
    NumberLabel("other_site", "The other site (the first of them)", "text"),
    NumberLabel("equal_l0", "L0 that both reach", "plain"),
    NumberLabel("loss_recovered", "Loss recovered at that L0, this site", "fraction"),
    NumberLabel("loss_recovered_other", "… the other site", "fraction"),
    NumberLabel("ce_reconstruction", "Cross-entropy with the reconstruction at that L0, this site", "nats"),
    NumberLabel("ce_reconstruction_other", "… the other site", "nats"),
    NumberLabel("ce_clean", "Cross-entropy, unedited", "nats"),
    NumberLabel("rare_fraction", "Ultra-low features, this one", "fraction"),
    NumberLabel("rare_fraction_other", "… the other site’s run of nearest L0", "fraction"),
    NumberLabel("dead_fraction", "Dead features, this one", "fraction"),
    NumberLabel("dead_fraction_other", "… the other site’s run of nearest L0", "fraction"),
    NumberLabel("parameters", "Weights, this one", "count"),
    NumberLabel("parameters_other", "… the other site’s", "count"),
)
_ROLES: tuple[figures.Role, ...] = ("frequent", "rare", "third", "fourth")
_INTERPOLATED = ("loss_recovered", "ce_reconstruction")


class OPTIONS(AnalysisOptions):
    """Options of the site comparison."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low; dead ones are among them."""


class _Run(NamedTuple):
    """One autoencoder."""

    site: str
    label: str
    l1_coeff: float | None
    l0: float
    loss_recovered: float | None
    ce_reconstruction: float
    ce_zero: float
    ce_clean: float
    fve: float | None
    dead_fraction: float
    ultra_low_fraction: float
    d_in: int
    d_sae: int
    parameters: int
    multiplications_a_row: int


class _Pair(NamedTuple):
    """The first site beside another, at equal L0; None where their ranges of L0 do not meet."""

    site: str
    equal_l0: float | None
    here: Mapping[str, float | None]
    there: Mapping[str, float | None]


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Compares sites; see the module."""
    runs = [_row(one, options) for one in (context, *context.need_companions())]
    sites = list(dict.fromkeys(one.site for one in runs))
    if len(sites) < 2:
        raise InputError(
            "the autoencoders are all of one site", found=sites[0], expected="two sites or more",
            remedy="'sparsemill study site-comparison' trains one at another site",
        )  # fmt: skip
    here = [one for one in runs if one.site == sites[0]]
    pairs = [_pair(here, [one for one in runs if one.site == site]) for site in sites[1:]]
    first, pair = runs[0], pairs[0]
    nearest = min((one for one in runs if one.site == sites[1]), key=lambda one: abs(one.l0 - first.l0))
    numbers: dict[str, Number] = {
        "site": first.site,
        "other_site": pair.site,
        "equal_l0": pair.equal_l0,
        **pair.here,
        **{f"{key}_other": value for key, value in pair.there.items()},
        "ce_clean": first.ce_clean,
        "rare_fraction": first.ultra_low_fraction,
        "rare_fraction_other": nearest.ultra_low_fraction,
        "dead_fraction": first.dead_fraction,
        "dead_fraction_other": nearest.dead_fraction,
        "parameters": first.parameters,
        "parameters_other": nearest.parameters,
    }
    drawn = {
        "loss_recovered": _figure(runs, "loss_recovered", "loss recovered", pair.equal_l0),
        "cross_entropy": _figure(runs, "ce_reconstruction", "cross-entropy, nats per token", pair.equal_l0),
    }
    return AnalysisResult(
        numbers, {"sites": _pair_table(first.site, pairs), "runs": _table(runs)}, drawn, _reading(numbers)
    )


def at_l0(l0s: Sequence[float], values: Sequence[float], wanted: float) -> float | None:
    """A quantity at an L0, by linear interpolation between runs; None outside of their range.

    Args:
        l0s: of the runs, (n,).
        values: the quantity of the same runs, (n,).
        wanted: the L0.
    """
    if not min(l0s) <= wanted <= max(l0s):
        return None
    order = np.argsort(l0s, kind="stable")
    return float(np.interp(wanted, np.asarray(l0s)[order], np.asarray(values)[order]))


def _row(one: Context, options: OPTIONS) -> _Run:
    densities, quality = one.need_densities(), one.numbers["loss_recovered"]
    trained: Any = one.sae_config.get("autoencoder")
    values: dict[str, Any] = {
        key: quality[key] for key in ("loss_recovered", "ce_reconstruction", "ce_zero", "ce_clean")
    }
    d_in, d_sae = one.sae.d_in, one.sae.d_sae
    return _Run(
        site=one.site,
        label=one.label,
        l1_coeff=trained.get("l1_coeff") if isinstance(trained, Mapping) else None,
        l0=_float(quality["l0_held_out"]),
        fve=None if quality["fve"] is None else _float(quality["fve"]),
        dead_fraction=float((densities.counts == 0).mean()),
        ultra_low_fraction=float(densities.groups(options.ultra_low_below).rare.mean()),
        d_in=d_in,
        d_sae=d_sae,
        parameters=2 * d_in * d_sae + d_in + d_sae,
        multiplications_a_row=2 * d_in * d_sae,
        **values,
    )


def _float(value: Number) -> float:
    return float(value or 0)


def _pair(here: Sequence[_Run], there: Sequence[_Run]) -> _Pair:
    low = max(min(one.l0 for one in here), min(one.l0 for one in there))
    high = min(max(one.l0 for one in here), max(one.l0 for one in there))
    wanted = min(max(here[0].l0, low), high) if low <= high else None
    sides = [{key: _at(side, key, wanted) for key in _INTERPOLATED} for side in (here, there)]
    return _Pair(there[0].site, wanted, *sides)


def _at(runs: Sequence[_Run], key: str, wanted: float | None) -> float | None:
    known = [one for one in runs if getattr(one, key) is not None]
    if wanted is None or not known:
        return None
    return at_l0([one.l0 for one in known], [getattr(one, key) for one in known], wanted)


def _pair_table(site: str, pairs: Sequence[_Pair]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        for name, side in ((site, pair.here), (pair.site, pair.there)):
            rows.append(
                {"site": name, "compared_with": pair.site if name == site else site, "equal_l0": pair.equal_l0, **side}
            )
    names = [("site", pa.string()), ("compared_with", pa.string()), ("equal_l0", pa.float64())]
    return pa.Table.from_pylist(rows, pa.schema([*names, *((key, pa.float64()) for key in _INTERPOLATED)]))


def _table(runs: Sequence[_Run]) -> pa.Table:
    kinds = {"site": pa.string(), "label": pa.string()}
    kinds |= dict.fromkeys(("d_in", "d_sae", "parameters", "multiplications_a_row"), pa.int64())
    columns = zip(_Run._fields, zip(*runs, strict=True), strict=True)
    return pa.table({name: pa.array(values, kinds.get(name, pa.float64())) for name, values in columns})


def _figure(runs: Sequence[_Run], key: str, title: str, equal_l0: float | None) -> go.Figure:
    what = title.partition(",")[0].capitalize()
    figure = figures.new_figure(
        f"{what} with the reconstruction in place, against L0; a line a site, a point an autoencoder.",
        x_title="L0 on held-out prompts",
        y_title=title,
    )
    for number, site in enumerate(dict.fromkeys(one.site for one in runs)):
        shown = sorted((one for one in runs if one.site == site), key=lambda one: one.l0)
        figure.add_scatter(
            x=[one.l0 for one in shown],
            y=[getattr(one, key) for one in shown],
            mode="lines+markers",
            name=figures.plain(site),
            line={"color": figures.LIGHT[_ROLES[number % len(_ROLES)]], "width": 2},
            marker={"size": 7},
            customdata=[one.label for one in shown],
            hovertemplate=f"%{{customdata}}<br>L0 %{{x:.1f}}<br>%{{y:{'.2%' if key == 'loss_recovered' else '.4f'}}}"
            "<extra></extra>",
        )
    if equal_l0 is not None:
        figures.mark_x(figure, equal_l0, "compared here")
    if key == "loss_recovered":
        figure.update_yaxes(tickformat=".1~%")
    figure.update_layout(showlegend=True)
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    if numbers["equal_l0"] is None:
        return (
            f"The runs at {numbers['site']} and at {numbers['other_site']} have no L0 in common, so nothing is "
            "compared at equal L0; the table has each as it is."
        )
    return (
        f"At an L0 of {show(numbers['equal_l0'])} the reconstruction recovers {percent(numbers['loss_recovered'])} at "
        f"{numbers['site']} and {percent(numbers['loss_recovered_other'])} at {numbers['other_site']}; the "
        f"cross-entropies are {show(numbers['ce_reconstruction'], 'nats')} and "
        f"{show(numbers['ce_reconstruction_other'], 'nats')} ({show(numbers['ce_clean'], 'nats')} unedited), with "
        f"{show(numbers['parameters'], 'count')} and {show(numbers['parameters_other'], 'count')} weights."
    )
