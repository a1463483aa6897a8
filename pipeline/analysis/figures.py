"""One look for all figures: palette, template, and the three or four kinds of figure that the analyses draw.

Colours stand for roles, the same in every figure: frequent features blue, ultra-low ones orange, baselines grey.
Figures are stored in the light colours; a reader in the dark replaces each light colour by its dark partner
(``DARK_OF``) and the template by the dark one, so one stored figure serves both. Titles stay out of figures: the
caption travels in ``layout.meta`` and the page sets it as text.

Histograms are binned here, not in the browser: sixteen thousand features become a few hundred bars, and a bar can name
some of the features in it.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from pipeline.analysis.context import Floats, Integers

Role = Literal["frequent", "rare", "baseline", "third", "fourth"]

LIGHT = {
    "frequent": "#2b6ca3",
    "rare": "#d1661f",
    "baseline": "#9ba1a8",
    "third": "#2c8c7c",
    "fourth": "#8158a6",
    "ink": "#1f2124",
    "muted": "#6a6e75",
    "grid": "#e7e6e2",
    "paper": "#fdfdfc",
}
DARK = {
    "frequent": "#78b2e8",
    "rare": "#f2a15f",
    "baseline": "#80868e",
    "third": "#66c7b5",
    "fourth": "#bb9ae2",
    "ink": "#e9e9ea",
    "muted": "#9ea2a9",
    "grid": "#303338",
    "paper": "#17181b",
}
DARK_OF = {LIGHT[role]: DARK[role] for role in LIGHT}

FONT_FAMILY = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_NAMED_FEATURES = 5


@dataclass(frozen=True)
class Series:
    """One group of values in a histogram.

    Attributes:
        name: in the legend.
        values: (n,); what is not finite is left out.
        role: its colour.
        features: feature of each value, to be named on hover, (n,).
    """

    name: str
    values: Floats
    role: Role
    features: Integers | None = None


def template(colours: dict[str, str]) -> go.layout.Template:
    """The look of every figure in one set of colours."""
    axis = {
        "gridcolor": colours["grid"], "linecolor": colours["muted"], "zeroline": False, "ticks": "outside",
        "ticklen": 4, "tickcolor": colours["grid"], "automargin": True, "title": {"standoff": 10, "font": {"size": 13}},
        "tickfont": {"size": 12, "color": colours["muted"]},
    }  # fmt: skip
    scene_axis = {
        "gridcolor": colours["grid"], "backgroundcolor": "rgba(0,0,0,0)", "zerolinecolor": colours["grid"],
        "linecolor": colours["muted"], "tickfont": {"size": 11, "color": colours["muted"]},
    }  # fmt: skip
    layout = {
        "font": {"family": FONT_FAMILY, "size": 13, "color": colours["ink"]},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [colours[role] for role in ("frequent", "rare", "third", "fourth", "baseline")],
        "margin": {"l": 64, "r": 16, "t": 36, "b": 52},
        "xaxis": axis | {"showgrid": False, "showline": True},
        "yaxis": axis | {"showline": False, "ticks": ""},
        "scene": {"xaxis": scene_axis, "yaxis": scene_axis, "zaxis": scene_axis},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "hoverlabel": {
            "bgcolor": colours["paper"], "bordercolor": colours["muted"], "align": "left",
            "font": {"family": FONT_FAMILY, "size": 12, "color": colours["ink"]},
        },
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": colours["muted"], "activecolor": colours["ink"]},
        "bargap": 0,
    }  # fmt: skip
    return go.layout.Template(layout=layout)


def new_figure(caption: str, *, x_title: str, y_title: str) -> go.Figure:
    """An empty figure with the shared look.

    Args:
        caption: what the figure shows, in a sentence.
        x_title: horizontal axis, with its unit.
        y_title: vertical axis, with its unit.
    """
    figure = go.Figure(layout={"template": template(LIGHT), "height": 380, "meta": {"caption": caption}})
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return figure


def histogram(
    series: Sequence[Series],
    edges: Floats,
    *,
    caption: str,
    x_title: str,
    what: str = "features",
    as_counts: bool = False,
) -> go.Figure:
    """Overlaid histograms over common bins, each group by its own total, so that groups of any size compare.

    A baseline is an outline, the other groups are bars.

    Args:
        series: the groups; one without a value is left out.
        edges: bin edges, ascending, (bins + 1,); values beyond them count in the outermost bins.
        caption: what the figure shows.
        x_title: horizontal axis, with its unit.
        what: what is counted.
        as_counts: show counts rather than shares.
    """
    shown = [group for group in series if np.isfinite(group.values).any()]
    y_title = what if as_counts else (f"share of {what}" if len(shown) < 2 else "share of each group")
    figure = new_figure(caption, x_title=x_title, y_title=y_title)
    opacity = 0.85 if len(shown) == 1 else 0.68
    for group in shown:
        counts = _counts(group, edges)
        if group.role == "baseline":
            figure.add_trace(_outline(group, edges, counts, as_counts=as_counts))
        else:
            figure.add_trace(_bars(group, edges, counts, what=what, as_counts=as_counts, opacity=opacity))
    figure.update_layout(barmode="overlay")
    if len(shown) < 2:
        hide_legend(figure)
    figure.update_xaxes(range=[float(edges[0]), float(edges[-1])])
    figure.update_yaxes(rangemode="tozero", tickformat="," if as_counts else ".1~%")
    return figure


def scatter(
    x: Floats, y: Floats, features: Integers, *, name: str, role: Role, hover: str, extra: Sequence[Any] | None = None
) -> go.Scatter | go.Scattergl:
    """Points that name their feature on hover; drawn with WebGL where they are many.

    Args:
        x: (n,).
        y: (n,).
        features: (n,).
        name: in the legend.
        role: colour.
        hover: template of the lines after the feature's name.
        extra: a value per point for ``%{customdata[1]}`` of the template.
    """
    kind = go.Scattergl if len(features) > 4000 else go.Scatter
    columns = [features.tolist(), list(extra)] if extra is not None else [features.tolist()]
    return kind(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker={"color": LIGHT[role], "size": 5, "opacity": 0.65},
        customdata=[list(row) for row in zip(*columns, strict=True)],
        hovertemplate=f"feature %{{customdata[0]}}<br>{hover}<extra></extra>",
    )


def line(x: Integers, y: Sequence[float | None], *, name: str, role: Role, hover: str) -> go.Scatter:
    """A line through points; it breaks where a value is missing.

    Args:
        x: (n,).
        y: (n,).
        name: in the legend.
        role: colour.
        hover: template of its lines.
    """
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        name=name,
        line={"color": LIGHT[role], "width": 2},
        marker={"size": 6},
        hovertemplate=f"{hover}<extra></extra>",
    )


def heat_map(
    values: Floats, x_edges: Floats, y_edges: Floats, *, caption: str, x_title: str, y_title: str, hover: str
) -> go.Figure:
    """Values over two axes: nothing is the page, the largest is the ink.

    Args:
        values: from 0, (n_y, n_x).
        x_edges: of the columns, ascending, (n_x + 1,).
        y_edges: of the rows, ascending, (n_y + 1,).
        caption: what the figure shows.
        x_title: horizontal axis, with its unit.
        y_title: vertical axis, with its unit.
        hover: template of the lines on a cell.
    """
    figure = new_figure(caption, x_title=x_title, y_title=y_title)
    figure.add_heatmap(
        x=x_edges,
        y=y_edges,
        z=values,
        zmin=0,
        colorscale=[[0, LIGHT["paper"]], [0.5, LIGHT["frequent"]], [1, LIGHT["ink"]]],
        showscale=False,
        hovertemplate=f"{hover}<extra></extra>",
    )
    hide_legend(figure)
    return figure


def hide_legend(figure: go.Figure) -> None:
    """Takes the legend away, and the room above the plot that it needs."""
    figure.update_layout(showlegend=False, margin={"t": 14})


def log_axis(axis: str, figure: go.Figure) -> None:
    """Makes an axis, ``x`` or ``y``, logarithmic with one label a power of ten."""
    # plotly draws labels of powers a quarter larger than it is told to
    figure.update_layout(
        {f"{axis}axis": {"type": "log", "exponentformat": "power", "dtick": 1, "tickfont": {"size": 10}}}
    )


def mark_x(figure: go.Figure, x: float, label: str, *, to_left: bool = False) -> None:
    """Draws a vertical line, its label at the top on one side."""
    figure.add_vline(x=x, line={"color": LIGHT["muted"], "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=x, y=1, yref="paper", text=plain(label), showarrow=False, yanchor="top",
        xanchor="right" if to_left else "left", xshift=-4 if to_left else 4,
        font={"size": 11, "color": LIGHT["muted"]},
    )  # fmt: skip


def plain(text: str) -> str:
    """Escapes text for plotly, which takes some tags for markup: text of a corpus is never markup."""
    return html.escape(text, quote=False)


def _counts(group: Series, edges: Floats) -> Integers:
    values = group.values[np.isfinite(group.values)]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _outline(group: Series, edges: Floats, counts: Integers, *, as_counts: bool) -> go.Scatter:
    heights = counts if as_counts else counts / max(int(counts.sum()), 1)
    return go.Scatter(
        x=edges,
        y=np.append(heights, heights[-1]),
        mode="lines",
        line={"color": LIGHT[group.role], "width": 1.5, "shape": "hv"},
        name=f"{group.name} ({int(counts.sum()):,})",
        hovertemplate=f"<b>{plain(group.name)}</b><br>" + ("%{y:,}" if as_counts else "%{y:.2%}") + "<extra></extra>",
    )


def _bars(group: Series, edges: Floats, counts: Integers, *, what: str, as_counts: bool, opacity: float) -> go.Bar:
    full = np.flatnonzero(counts)
    examples = _examples(group, edges)
    hover = [[f"{edges[bar]:.3g} to {edges[bar + 1]:.3g}", int(counts[bar]), examples[bar]] for bar in full]
    share = "" if as_counts else " (%{y:.2%})"
    heights = counts if as_counts else counts / max(int(counts.sum()), 1)
    return go.Bar(
        x=((edges[:-1] + edges[1:]) / 2)[full],
        y=heights[full],
        width=np.diff(edges)[full],
        name=f"{group.name} ({int(counts.sum()):,})",
        marker={"color": LIGHT[group.role], "line": {"width": 0}},
        opacity=opacity,
        customdata=hover,
        hovertemplate=f"<b>{plain(group.name)}</b><br>%{{customdata[0]}}<br>%{{customdata[1]:,}} {what}{share}"
        "%{customdata[2]}<extra></extra>",
    )


def _examples(group: Series, edges: Floats) -> list[str]:
    bins = len(edges) - 1
    if group.features is None:
        return [""] * bins
    keep = np.isfinite(group.values)
    features = group.features[keep]
    place = np.clip(np.searchsorted(edges, group.values[keep], side="right") - 1, 0, bins - 1)
    named: list[str] = []
    for number in range(bins):
        inside = features[place == number]
        text = ", ".join(str(feature) for feature in inside[:_NAMED_FEATURES])
        more = "…" if len(inside) > _NAMED_FEATURES else ""
        named.append(f"<br>feature{'s' if len(inside) > 1 else ''} {text}{more}" if len(inside) else "")
    return named
