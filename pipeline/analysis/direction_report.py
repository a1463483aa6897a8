"""Tables and figures of the rare direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from pipeline.analysis import figures as drawing
from pipeline.analysis import passages, statistics
from pipeline.analysis.context import Context, Floats, Integers
from pipeline.analysis.direction_pass import OuterRow, Projections
from pipeline.analysis.direction_texts import EditOutcome
from pipeline.analysis.result import Number


class SingularVectors(NamedTuple):
    """The top right singular vectors of the matrix of all activations, not centred.

    Attributes:
        rms: root mean square of the activations' projections on each, falling, (k,).
        vectors: unit vectors, one a row, (k, d_in).
    """

    rms: Floats
    vectors: Floats


@dataclass(frozen=True)
class Found:
    """What was measured of the direction besides its numbers.

    Attributes:
        direction: a unit vector, (d_in,).
        features: the features whose encoders' mean it is, (n,).
        beyond: share of tokens beyond each feature's hyperplane, (n,).
        thresholds: projection at which a token that is average otherwise sets each feature off, (n,).
        projections: of the pass over the store.
        edges: of its histogram's bins.
        singular: the top singular vectors it is compared with.
        logits: tokens raised and lowered most; None at a site where that does not apply.
        edits: what each edit did.
    """

    direction: Floats
    features: Integers
    beyond: Floats
    thresholds: Floats
    projections: Projections
    edges: Floats
    singular: SingularVectors
    logits: pa.Table | None
    edits: Sequence[EditOutcome]


def tables(context: Context, found: Found) -> dict[str, pa.Table]:
    """The tables, those with text first."""
    encoder = statistics.weights64(context.sae.W_enc).T[found.features]
    numbered = np.arange(1, found.singular.rms.size + 1)
    tables = {
        "top_tokens": _token_table(context, found.projections.top),
        "bottom_tokens": _token_table(context, found.projections.bottom),
        "edits": _edit_table(found),
        "singular_vectors": pa.table(
            {
                "number": pa.array(numbered),
                "rms_projection": pa.array(found.singular.rms),
                "cosine": pa.array(found.singular.vectors @ found.direction),
            }
        ),
        "hyperplanes": pa.table(
            {
                "feature": pa.array(found.features.astype(np.int32)),
                "beyond": pa.array(found.beyond),
                "behind": pa.array(1 - found.beyond),
                "threshold": pa.array(found.thresholds, from_pandas=True),
                "cosine": pa.array(statistics.cosines_with(encoder, found.direction), from_pandas=True),
            }
        ),
    }
    return tables if found.logits is None else tables | {"logits": found.logits}


def quantity_table(labels: Mapping[str, str], measures: Mapping[str, Mapping[str, Number]]) -> pa.Table:
    """Quantities that were measured of several directions: a row each, a column a direction.

    Args:
        labels: by key.
        measures: by direction, then by key.
    """
    columns = {
        f"mean_of_{name}": pa.array([one[key] for key in labels], pa.float64()) for name, one in measures.items()
    }
    return pa.table({"quantity": pa.array(list(labels.values()), pa.string()), **columns})


def figures(found: Found, numbers: Mapping[str, Number]) -> dict[str, go.Figure]:
    """The figures; the one of edits only where a text was edited."""
    drawn = {"cosines": _cosine_figure(found, numbers), "projection": _projection_figure(found)}
    return drawn | {"edits": _edit_figure(found)} if found.edits else drawn


def _token_table(context: Context, rows: Sequence[OuterRow]) -> pa.Table:
    return pa.table(
        {
            "projection": pa.array([row.projection for row in rows], pa.float64()),
            "norm": pa.array([row.norm for row in rows], pa.float64()),
            **passages.columns(context, [(row.prompt, row.position) for row in rows]),
        }
    )


def _edit_table(found: Found) -> pa.Table:
    left = np.array([edit.share_left(found.projections.mean) for edit in found.edits], np.float64)
    return pa.table(
        {
            "edit": pa.array([edit.edit for edit in found.edits], pa.string()),
            "examples": pa.array([edit.examples for edit in found.edits], pa.int64()),
            "projection_before": pa.array([edit.before for edit in found.edits], pa.float64()),
            "projection_after": pa.array([edit.after for edit in found.edits], pa.float64()),
            "share_left": pa.array(left, from_pandas=True),
        }
    )


def _cosine_figure(found: Found, numbers: Mapping[str, Number]) -> go.Figure:
    losses = {"autoencoder": "autoencoder’s gradient", "model": "language model’s gradient"}
    weights = {"all": "all tokens", "firing": "firing", "flip": "flipping"}
    named: list[tuple[str, Number, drawing.Role]] = [
        ("mean activation", numbers["cosine_mean"], "frequent"),
        ("all-ones vector", numbers["cosine_ones"], "frequent"),
        *((f"{what}, {over}", numbers[f"gradient_{loss}_{weight}"], "third")
          for loss, what in losses.items() for weight, over in weights.items()),
        *((f"singular vector {number}", float(cosine), "fourth")
          for number, cosine in enumerate(found.singular.vectors @ found.direction, start=1)),
    ]  # fmt: skip
    shown = [(name, value, role) for name, value, role in named if isinstance(value, float)]
    figure = drawing.new_figure(
        "Cosine of the rare direction with what it might be. Band: 95 % of random directions.",
        x_title="cosine with the rare direction",
        y_title="",
    )
    figure.add_bar(
        x=[value for _, value, _ in shown],
        y=[name for name, _, _ in shown],
        orientation="h",
        width=0.62,
        marker={"color": [drawing.LIGHT[role] for _, _, role in shown], "line": {"width": 0}},
        hovertemplate="%{y}<br>cosine %{x:.3f}<extra></extra>",
    )
    band = 1.96 * found.direction.size**-0.5
    figure.add_vrect(x0=-band, x1=band, fillcolor=drawing.LIGHT["baseline"], opacity=0.25, line_width=0, layer="below")
    drawing.hide_legend(figure)
    figure.update_layout(height=110 + 22 * len(shown))
    figure.update_xaxes(range=[-1, 1])
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=6)
    return figure


def _projection_figure(found: Found) -> go.Figure:
    counts, edges = found.projections.histogram, found.edges
    full = np.flatnonzero(counts)
    figure = drawing.new_figure(
        "Projection of tokens on the rare direction (vertical axis logarithmic), and where its features begin to fire.",
        x_title="projection (units of activation)",
        y_title="tokens",
    )
    figure.add_bar(
        x=((edges[:-1] + edges[1:]) / 2)[full],
        y=counts[full],
        width=np.diff(edges)[full],
        marker={"color": drawing.LIGHT["frequent"], "line": {"width": 0}},
        opacity=0.85,
        hovertemplate="projection about %{x:.3g}<br>%{y:,} tokens<extra></extra>",
    )
    figure.update_yaxes(range=[np.log10(0.7), np.log10(max(2, int(counts.max()))) + 0.2])
    drawing.log_axis("y", figure)
    drawing.hide_legend(figure)
    threshold = statistics.median(found.thresholds)
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        drawing.mark_x(figure, threshold, "median feature fires", to_left=True)
    return figure


def _edit_figure(found: Found) -> go.Figure:
    figure = drawing.new_figure(
        "Mean projection of the top texts before and after each edit; dotted: the mean of all tokens.",
        x_title="projection (units of activation)",
        y_title="",
    )
    names = [edit.edit for edit in found.edits]
    counts = [edit.examples for edit in found.edits]
    shown: list[tuple[str, list[float], drawing.Role]] = [
        ("before", [edit.before for edit in found.edits], "baseline"),
        ("after", [edit.after for edit in found.edits], "rare"),
    ]
    for name, values, role in shown:
        figure.add_bar(
            x=values,
            y=names,
            orientation="h",
            name=name,
            marker={"color": drawing.LIGHT[role], "line": {"width": 0}},
            customdata=counts,
            hovertemplate=f"%{{y}}, {name}<br>%{{x:.3g}}, mean of %{{customdata}} texts<extra></extra>",
        )
    drawing.mark_x(figure, found.projections.mean, "")
    figure.update_layout(height=140 + 34 * len(names), barmode="group", bargap=0.3)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=6)
    return figure
