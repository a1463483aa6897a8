"""How densities moved while the autoencoder was trained: from the firing counts of every window of training rows.

A window counts every training row between two logged steps (``density_window_rows``; 1,638,400 by default, at which a
density of 1e-5 is sixteen firings), while the weights move. So the fractions below 1e-4 and 1e-5 and of dead features
are known window by window, and whatever resampling did shows between two of them. A comment under the post proposes to
leave a random subset of features out of resampling and to watch whether their densities fall forever or settle: the
subset is the features that the config exempts (``resampling.exempt_fraction``), or, where it exempts none, those that
this run never resampled, which is a choice by outcome and no experiment. ``drift`` is the median change of their log10
density from the middle window to the last, over those ultra-low in the middle one (10^-6.5 is added to each density, as
in the figures): falling forever is below zero, settled is zero, and the post saw a rise late in training.

A run shorter than a window has none, and says so. Rejected: counting densities of checkpoints over the store, which
needs checkpoints kept that a resumable run does not keep.

Source: the post, "Phase transition in training for feature sparsity", and the first comment.
"""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, FeatureDensities, Floats, Integers, Mask, Need
from pipeline.analysis.density import fraction_below
from pipeline.analysis.display import percent, show, show_large
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Training dynamics"
QUESTION = "How did the densities move during training, and do features that nobody resets die out?"
REQUIRES: frozenset[Need] = frozenset({"training_log"})
OPTIONAL: frozenset[Need] = frozenset()
NUMBERS = (
    NumberLabel("windows", "Windows of densities", "text"),
    NumberLabel("n_windows", "… how many", "count"),
    NumberLabel("tokens", "Training tokens in them", "count"),
    NumberLabel("dead_final", "Dead features, last window", "fraction"),
    NumberLabel("dead_peak", "… at most", "fraction"),
    NumberLabel("dead_peak_tokens", "… after so many tokens", "count"),
    NumberLabel("below_1e-5_final", "Features of density < 1e-5, last window", "fraction"),
    NumberLabel("below_1e-5_peak", "… at most", "fraction"),
    NumberLabel("below_1e-5_peak_tokens", "… after so many tokens", "count"),
    NumberLabel("ultra_low_final", "Ultra-low features, density < 1e-4, last window", "fraction"),
    NumberLabel("ultra_low_peak", "… at most", "fraction"),
    NumberLabel("ultra_low_peak_tokens", "… after so many tokens", "count"),
    NumberLabel("n_resamplings", "Resamplings", "count"),
    NumberLabel("n_resampled", "… features resampled in all of them together", "count"),
    NumberLabel("n_resampled_features", "… different features", "count"),
    NumberLabel("followed", "Features followed", "text"),
    NumberLabel("n_followed", "… how many", "count"),
    NumberLabel("followed_ultra_low_final", "… ultra-low in the last window", "fraction"),
    NumberLabel("others_ultra_low_final", "Other features ultra-low in the last window", "fraction"),
    NumberLabel("n_drifting", "Followed features ultra-low in the middle window", "count"),
    NumberLabel("drift", "… median change of log10 density since", "plain"),
)
EXEMPT, SPARED = "exempt from resampling", "never resampled in this run"
_SPIKE = 10**-6.5


class OPTIONS(AnalysisOptions):
    """Options of the training dynamics analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    paths: int = Field(default=40, gt=0)
    """Followed features whose paths are drawn, chosen at random."""
    bin_width: float = Field(default=0.2, gt=0)
    """Height of a bin of the heat map, in powers of ten."""


@dataclass(frozen=True)
class _History:
    """The windows, and what was resampled between them.

    Attributes:
        windows: densities of each.
        tokens: training rows at the end of each, (n_windows,).
        resets: training rows at each resampling.
        times_resampled: of each feature, (d_sae,).
        followed: features that are followed, (d_sae,).
        why: what they are.
    """

    windows: list[FeatureDensities]
    tokens: Integers
    resets: Floats
    times_resampled: Integers
    followed: Mask
    why: str

    @property
    def density(self) -> Floats:
        """(n_windows, d_sae)."""
        return np.stack([window.density for window in self.windows])


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures the training's densities; see the module."""
    history = _history(context)
    if not history.windows:
        return _no_windows(history)
    numbers = _numbers(history, options)
    tables = {"windows": _window_table(history, options), "features": _feature_table(history)}
    return AnalysisResult(numbers, tables, _figures(context, history, options), _reading(numbers))


def _history(context: Context) -> _History:
    log, found = context.need_training()
    times_resampled = np.zeros(context.sae.d_sae, np.int64)
    for event in found.resamplings:
        times_resampled[list(event.features)] += 1
    steps, rows_seen = (np.r_[0, log[name].to_numpy()] for name in ("step", "rows_seen"))
    return _History(
        windows=[FeatureDensities(counts, int(rows)) for counts, rows in zip(found.counts, found.rows, strict=True)],
        tokens=np.cumsum(found.rows),
        resets=np.interp([event.step for event in found.resamplings], steps, rows_seen),
        times_resampled=times_resampled,
        followed=found.exempt if found.exempt.any() else times_resampled == 0,
        why=EXEMPT if found.exempt.any() else SPARED,
    )


def _no_windows(history: _History) -> AnalysisResult:
    numbers: dict[str, Number] = dict.fromkeys((number.key for number in NUMBERS), None)
    numbers |= {"windows": "no windows", "n_windows": 0, **_resampling_numbers(history)}
    reading = "The training was shorter than one window of densities (density_window_rows), so none was logged."
    return AnalysisResult(numbers, reading=reading)


def _numbers(history: _History, options: OPTIONS) -> dict[str, Number]:
    numbers: dict[str, Number] = {
        "windows": "measured",
        "n_windows": len(history.windows),
        "tokens": int(history.tokens[-1]),
        "ultra_low_below": options.ultra_low_below,
    }
    for name, values in _fractions(history, options).items():
        numbers[f"{name}_final"] = values[-1]
        measured = np.array([value if isinstance(value, float) else -1.0 for value in values])
        peak = int(measured.argmax())
        numbers[f"{name}_peak"] = values[peak]
        numbers[f"{name}_peak_tokens"] = int(history.tokens[peak]) if measured[peak] > 0 else None
    return numbers | _resampling_numbers(history) | _followed_numbers(history, options)


def _fractions(history: _History, options: OPTIONS) -> dict[str, list[float | str]]:
    return {
        "dead": [float((window.counts == 0).mean()) for window in history.windows],
        "below_1e-5": [fraction_below(window, 1e-5) for window in history.windows],
        "ultra_low": [fraction_below(window, options.ultra_low_below) for window in history.windows],
    }


def _resampling_numbers(history: _History) -> dict[str, Number]:
    return {
        "n_resamplings": int(history.resets.size),
        "n_resampled": int(history.times_resampled.sum()),
        "n_resampled_features": int((history.times_resampled > 0).sum()),
    }


def _followed_numbers(history: _History, options: OPTIONS) -> dict[str, Number]:
    density = history.density
    rare = density < options.ultra_low_below
    middle = (len(density) - 1) // 2
    drifting = history.followed & rare[middle]
    change = np.log10(density[-1] + _SPIKE) - np.log10(density[middle] + _SPIKE)
    return {
        "followed": history.why,
        "n_followed": int(history.followed.sum()),
        "followed_ultra_low_final": statistics.share(rare[-1, history.followed]),
        "others_ultra_low_final": statistics.share(rare[-1, ~history.followed]),
        "n_drifting": int(drifting.sum()),
        "drift": statistics.median(change[drifting]) if middle < len(density) - 1 else None,
    }


def _window_table(history: _History, options: OPTIONS) -> pa.Table:
    fractions = {
        name: pa.array([value if isinstance(value, float) else None for value in values], pa.float64())
        for name, values in _fractions(history, options).items()
    }
    before = np.searchsorted(history.resets, history.tokens, side="right")
    return pa.table(
        {
            "tokens": pa.array(history.tokens),
            "rows": pa.array([window.n_rows for window in history.windows], pa.int64()),
            **fractions,
            "median_density": pa.array(np.median(history.density, axis=1)),
            "resamplings_so_far": pa.array(before),
        }
    )


def _feature_table(history: _History) -> pa.Table:
    return pa.table(
        {
            "feature": pa.array(np.arange(history.followed.size, dtype=np.int32)),
            "density_first_window": pa.array(history.windows[0].density),
            "density_last_window": pa.array(history.windows[-1].density),
            "times_resampled": pa.array(history.times_resampled),
            "followed": pa.array(history.followed),
        }
    )


def _figures(context: Context, history: _History, options: OPTIONS) -> dict[str, go.Figure]:
    drawn = {
        "fractions": _fraction_figure(history, options),
        "density": _density_figure(history, options),
        "paths": _path_figure(context, history, options),
    }
    for figure in drawn.values():
        for number, tokens in enumerate(history.resets.tolist()):
            figures.mark_x(figure, tokens, "" if number else "resampling")
        figure.update_xaxes(range=[0, 1.02 * max(history.tokens[-1], history.resets.max(initial=0))])
    return drawn


def _fraction_figure(history: _History, options: OPTIONS) -> go.Figure:
    figure = figures.new_figure(
        "Share of features that are ultra-low, rarer still, and dead, window by window; dotted: resamplings.",
        x_title="training tokens",
        y_title="share of features",
    )
    named: dict[str, tuple[str, figures.Role]] = {
        "ultra_low": (f"density < {options.ultra_low_below:g}", "rare"),
        "below_1e-5": ("density < 1e-5", "third"),
        "dead": ("dead", "baseline"),
    }
    fractions = _fractions(history, options)
    for key, (name, role) in named.items():
        values = [value if isinstance(value, float) else None for value in fractions[key]]
        if any(value is not None for value in values):
            hover = f"{figures.plain(name)}<br>%{{x:.3s}} tokens<br>%{{y:.2%}}"
            figure.add_trace(figures.line(history.tokens, values, name=name, role=role, hover=hover))
    figure.update_yaxes(rangemode="tozero", tickformat=".1~%")
    return figure


def _density_figure(history: _History, options: OPTIONS) -> go.Figure:
    edges = np.arange(-6.6, options.bin_width + 1e-9, options.bin_width)
    values = np.log10(history.density + _SPIKE)
    shares = np.stack([np.histogram(window, edges)[0] / window.size for window in values], axis=1)
    figure = figures.heat_map(
        shares,
        np.r_[0, history.tokens],
        edges,
        caption="How many features have which density, window by window: darker is more. Features that never fire lie "
        "at −6.5.",
        x_title="training tokens",
        y_title="log₁₀ of density (firings per token)",
        hover="about %{x:.3s} tokens<br>log₁₀ density about %{y:.1f}<br>%{z:.2%} of features",
    )
    figure.add_hline(
        y=float(np.log10(options.ultra_low_below)), line={"color": figures.LIGHT["rare"], "width": 1, "dash": "dot"}
    )
    return figure


def _path_figure(context: Context, history: _History, options: OPTIONS) -> go.Figure:
    followed = np.flatnonzero(history.followed)
    chosen = np.sort(context.rng("paths").permutation(followed)[: options.paths])
    density = history.density
    figure = figures.new_figure(
        f"Paths of {chosen.size} random features that are {history.why}; orange: ultra-low at the end.",
        x_title="training tokens",
        y_title="log₁₀ of density (firings per token)",
    )
    for feature in chosen.tolist():
        role: figures.Role = "rare" if density[-1, feature] < options.ultra_low_below else "frequent"
        path = np.log10(density[:, feature] + _SPIKE).tolist()
        hover = f"feature {feature}<br>%{{x:.3s}} tokens<br>log₁₀ density %{{y:.2f}}"
        trace = figures.line(history.tokens, path, name=str(feature), role=role, hover=hover)
        figure.add_trace(trace.update(line={"width": 1}, marker={"size": 3}, opacity=0.6))
    figures.hide_legend(figure)
    return figure


def _reading(numbers: dict[str, Number]) -> str:
    peak = numbers["ultra_low_peak_tokens"]
    most = f", after {show_large(peak)} tokens" if isinstance(peak, int) else ""
    drift = ""
    if numbers["drift"] is not None:
        drift = (
            f" Of the features {numbers['followed']}, those ultra-low in the middle of the training have moved by "
            f"{show(numbers['drift'])} powers of ten since: below zero is dying out."
        )
    return (
        f"{show(numbers['n_windows'], 'count')} windows of densities were logged. Ultra-low features are "
        f"{percent(numbers['ultra_low_final'])} in the last, at most {percent(numbers['ultra_low_peak'])}{most}; "
        f"{show(numbers['n_resamplings'], 'count')} resamplings restarted features "
        f"{show(numbers['n_resampled'], 'count')} times.{drift}"
    )
