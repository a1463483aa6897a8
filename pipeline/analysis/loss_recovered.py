"""What the reconstruction costs the language model: cross-entropy clean, replaced, ablated, and loss recovered.

All of it on held-out prompts, through ``pipeline.evaluation``. The interval is a bootstrap over prompts. The curve
keeps only features of density at or above a floor: where it falls is where the features that matter are; at 1e-4 it is
the post's "without ultra-low features".

Source: the post, "Implementation Details"; Towards Monosemanticity reports the same ratio.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import torch
from pydantic import Field

from pipeline import evaluation
from pipeline.analysis import figures
from pipeline.analysis.context import Context, Need
from pipeline.analysis.display import percent
from pipeline.analysis.passes import Parts, Pass, in_batches, model_needs
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number
from pipeline.evaluation import HeldOut, Interval, Losses, MicroBatch

VERSION = 2
TITLE = "Loss recovered"
QUESTION = "How much of what the activations do for the language model does the reconstruction keep?"
REQUIRES: frozenset[Need] = frozenset({"model", "statistics", "tokens", "density"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("loss_recovered", "Loss recovered (0 = zero ablation)", "fraction"),
    NumberLabel("loss_recovered_low", "… interval, low", "fraction"),
    NumberLabel("loss_recovered_high", "… interval, high", "fraction"),
    NumberLabel("loss_recovered_without_ultra_low", "… without ultra-low features", "fraction"),
    NumberLabel("loss_recovered_from_mean", "Loss recovered (0 = mean ablation)", "fraction"),
    NumberLabel("mean_ablation_recovered", "Loss recovered by mean ablation (0 = zero ablation)", "fraction"),
    NumberLabel("ce_clean", "Cross-entropy, unedited", "nats"),
    NumberLabel("ce_reconstruction", "Cross-entropy, reconstruction", "nats"),
    NumberLabel("ce_without_ultra_low", "Cross-entropy, reconstruction without ultra-low", "nats"),
    NumberLabel("ce_mean", "Cross-entropy, mean-ablated", "nats"),
    NumberLabel("ce_zero", "Cross-entropy, zero-ablated", "nats"),
    NumberLabel("fve", "Explained variance on these prompts", "fraction"),
    NumberLabel("norm_ratio", "Norm ratio, reconstruction over activation", "plain"),
    NumberLabel("l0_held_out", "L0 on these prompts", "plain"),
    NumberLabel("n_prompts", "Held-out prompts", "count"),
)
_CONDITIONS = 5  # reconstruction, its sum so far, clean, zero and mean: with a floor each, replacements at once


class OPTIONS(AnalysisOptions):
    """Options of the loss recovered analysis."""

    prompts: int = Field(default=400, gt=0)
    """Held-out prompts, drawn without replacement; all where there are fewer."""
    micro_batch_prompts: int = Field(default=8, gt=0)
    """Prompts a forward pass: bounds memory at this many times positions times vocabulary floats."""
    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    floors: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Density floors of the curve."""
    resamples: int = Field(default=2000, gt=0)
    """Bootstrap resamples of the prompts."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the bootstrap intervals."""


class _Point(NamedTuple):
    recovered: float | None
    interval: Interval | None
    loss: float


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures loss recovered; see the module."""
    density = context.need_densities().density
    floors = sorted({options.ultra_low_below, *options.floors})
    prompts = _held_out_prompts(context, options.prompts)
    losses, fit = evaluation.collect(context.passes.in_order(_pass(context, prompts, floors, options), context))
    points = {name: _point(name, losses, context, options) for name in losses}
    without = points[evaluation.floor_name(options.ultra_low_below)]
    full, mean = points["reconstruction"], points.get("mean")
    numbers: dict[str, Number] = {
        "loss_recovered": full.recovered,
        "loss_recovered_low": None if full.interval is None else full.interval.low,
        "loss_recovered_high": None if full.interval is None else full.interval.high,
        "loss_recovered_without_ultra_low": without.recovered,
        "loss_recovered_from_mean": (
            None if mean is None else evaluation.recovered(losses["mean"], losses["reconstruction"], losses["clean"])
        ),
        "mean_ablation_recovered": None if mean is None else mean.recovered,
        "ce_clean": points["clean"].loss,
        "ce_zero": points["zero"].loss,
        "ce_mean": None if mean is None else mean.loss,
        "ce_reconstruction": full.loss,
        "ce_without_ultra_low": without.loss,
        "fve": fit.fve,
        "norm_ratio": fit.norm_ratio,
        "l0_held_out": fit.l0,
        "n_prompts": len(prompts),
        "confidence": options.confidence,
    }
    curve = _curve(points, density, floors)
    drawn = {"cross_entropy": _bars(points, without), "density_floor": _curve_figure(curve, full, options)}
    return AnalysisResult(numbers, {"density_floor": curve}, drawn, _reading(numbers))


def _held_out_prompts(context: Context, wanted: int) -> list[int]:
    there = context.need_tokens().n_prompts("held_out")
    return np.sort(context.rng("held-out prompts").permutation(there)[:wanted]).tolist()


def _pass(
    context: Context, prompts: list[int], floors: list[float], options: OPTIONS
) -> Pass[Sequence[int], MicroBatch]:
    return Pass(
        label="loss_recovered",
        unit="prompts",
        batches=in_batches(prompts, options.micro_batch_prompts),
        reads=REQUIRES,
        needs=model_needs(context, "held_out", options.micro_batch_prompts, copies=len(floors) + _CONDITIONS),
        opening=_Measuring(tuple(floors)),
    )


@dataclass(frozen=True)
class _Measuring:
    """Opens a pass over held-out prompts, each batch a micro-batch."""

    floors: tuple[float, ...]

    def __call__(self, context: Context) -> Parts[Sequence[int], MicroBatch]:
        density = context.need_densities().density

        def measure(batches: Sequence[Sequence[int]]) -> Iterator[MicroBatch]:
            for prompts in batches:
                held_out = HeldOut(
                    context.need_model(),
                    torch.from_numpy(context.need_tokens().prompts("held_out", prompts).astype(np.int64)),
                    context.hook_name,
                    first_position=context.first_position,
                    mean=context.mean_activation,
                    micro_batch_prompts=len(prompts),
                )
                yield from evaluation.micro_batches(
                    context.sae, held_out, density=density, floors=self.floors, baselines=True
                )

        return measure


def _point(name: str, losses: dict[str, Losses], context: Context, options: OPTIONS) -> _Point:
    rng = context.rng("bootstrap")  # the same resamples for every condition, so that conditions compare
    zero, clean = losses["zero"], losses["clean"]
    interval = evaluation.bootstrap_recovered(
        zero, losses[name], clean, rng, resamples=options.resamples, confidence=options.confidence
    )
    return _Point(evaluation.recovered(zero, losses[name], clean), interval, float(losses[name].mean()))


def _curve(points: dict[str, _Point], density: Losses, floors: list[float]) -> pa.Table:
    rows = [points[evaluation.floor_name(floor)] for floor in floors]
    return pa.table(
        {
            "density_floor": pa.array(floors, pa.float64()),
            "features_kept": pa.array([int((density >= floor).sum()) for floor in floors], pa.int64()),
            "cross_entropy": pa.array([row.loss for row in rows], pa.float64()),
            "loss_recovered": pa.array([row.recovered for row in rows], pa.float64()),
            "low": pa.array([None if row.interval is None else row.interval.low for row in rows], pa.float64()),
            "high": pa.array([None if row.interval is None else row.interval.high for row in rows], pa.float64()),
        }
    )


def _bars(points: dict[str, _Point], without: _Point) -> go.Figure:
    shown = [
        ("unedited", points["clean"], "baseline"),
        ("reconstruction", points["reconstruction"], "frequent"),
        ("… without ultra-low", without, "rare"),
        *([("mean-ablated", points["mean"], "baseline")] if "mean" in points else []),
        ("zero-ablated", points["zero"], "baseline"),
    ]
    figure = figures.new_figure(
        "Cross-entropy of the language model with the activations replaced; the shorter the bar the better.",
        x_title="cross-entropy, nats per token",
        y_title="",
    )
    losses = [point.loss for _, point, _ in shown]
    figure.add_bar(
        x=losses,
        y=[name for name, _, _ in shown],
        orientation="h",
        width=0.62,
        marker={"color": [figures.LIGHT[role] for _, _, role in shown], "line": {"width": 0}},
        text=[f"{loss:.3f}" for loss in losses],
        textposition="outside",
        cliponaxis=False,
        customdata=[[percent(point.recovered)] for _, point, _ in shown],
        hovertemplate="%{y}<br>%{x:.4f} nats per token<br>%{customdata[0]} recovered<extra></extra>",
    )
    figure.update_layout(height=340)
    figures.hide_legend(figure)
    figure.update_layout(margin={"r": 32})
    figure.update_xaxes(range=[0, 1.18 * max(losses)])
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=6)
    return figure


def _curve_figure(curve: pa.Table, full: _Point, options: OPTIONS) -> go.Figure:
    figure = figures.new_figure(
        f"Loss recovered when only features at or above a density are kept; band: {options.confidence:.0%} bootstrap.",
        x_title="density floor (firings per token)",
        y_title="loss recovered",
    )
    x, y = curve["density_floor"].to_pylist(), curve["loss_recovered"].to_pylist()
    low, high = curve["low"].to_pylist(), curve["high"].to_pylist()
    if None not in low:
        figure.add_scatter(
            x=x + x[::-1], y=high + low[::-1], fill="toself", mode="none", hoverinfo="skip", showlegend=False,
            fillcolor=figures.LIGHT["frequent"], opacity=0.18,
        )  # fmt: skip
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": figures.LIGHT["frequent"], "width": 2},
        marker={"size": 7},
        customdata=curve["features_kept"].to_pylist(),
        hovertemplate="density ≥ %{x:.0e}<br>%{customdata:,} features kept<br>%{y:.2%} recovered<extra></extra>",
        showlegend=False,
    )
    if full.recovered is not None:
        figure.add_hline(y=full.recovered, line={"color": figures.LIGHT["muted"], "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=0, xref="paper", y=full.recovered, text="all features", showarrow=False, yanchor="bottom",
            xanchor="left", xshift=6, font={"size": 11, "color": figures.LIGHT["muted"]},
        )  # fmt: skip
    figures.log_axis("x", figure)
    figures.hide_legend(figure)
    figure.update_layout(height=340)
    figure.update_yaxes(tickformat=".1~%")
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    mean, zero = numbers["ce_mean"], numbers["ce_zero"]
    caution = ""
    if isinstance(mean, float) and isinstance(zero, float) and mean > zero:
        caution = " Mean ablation is worse than zero ablation here: read this beside the explained variance."
    return (
        f"Loss recovered is {percent(1.0)} where the reconstruction changes nothing and {percent(0.0)} where it does "
        "no better than zeros. "
        f"Here the reconstruction recovers {percent(numbers['loss_recovered'])}, and "
        f"{percent(numbers['loss_recovered_without_ultra_low'])} without ultra-low features; mean ablation "
        f"alone recovers {percent(numbers['mean_ablation_recovered'])}. The curve falls where the features "
        f"that matter to the model lie.{caution}"
    )
