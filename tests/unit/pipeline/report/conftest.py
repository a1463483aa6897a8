"""A report's inputs with everything hostile that a corpus, a name or an option could bring."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis import AnalysisResult, figures
from pipeline.analysis.published import HeadlineRow, Highlight
from pipeline.report import LineageStep, ReportInputs, Section

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"' & {{ 7 * 7 }} \u2028"


def make_result() -> AnalysisResult:
    figure = figures.histogram(
        [figures.Series(HOSTILE, np.arange(20.0), "frequent", np.arange(20))],
        np.linspace(0, 20, 6),
        caption=HOSTILE,
        x_title="x",
    )
    passages = pa.table(
        {
            "features_firing": [12_345, 2],
            "before": [HOSTILE, "=1+1"],
            "token": ["<b>", None],
            "after": ["\n\u0000tail", ""],
        }
    )
    table = pa.table({"feature": list(range(40)), "label": ["=HYPERLINK(1)"] * 40, "value": [0.5] * 39 + [None]})
    numbers = {"l0": 24.0, "dead_fraction": 0.25, "below_1e-6": "below resolution", "n_rows": 1000, "unknown": 1.0}
    return AnalysisResult(numbers, {"top_tokens": passages, "features": table}, {"density": figure}, HOSTILE)


def make_inputs() -> ReportInputs:
    return ReportInputs(
        title=HOSTILE,
        preset=HOSTILE,
        facts={HOSTILE: HOSTILE, "site": "blocks.0.mlp.hook_post"},
        lineage=[LineageStep("tokenize", "tokenize-0123456789ab", {"prompts": HOSTILE}), LineageStep(HOSTILE, HOSTILE)],
        sections=[
            Section("density", "analyze-00000000000a", {"ultra_low_below": 1e-4}, make_result(), f"run {HOSTILE}"),
            Section("not_registered", "analyze-00000000000b", {"x": HOSTILE}, make_result()),
        ],
        headline=[
            HeadlineRow("quantity one", "94 %", "92 %", True, "same model and size", "density", "TLDR"),
            HeadlineRow(HOSTILE, HOSTILE, HOSTILE, False, HOSTILE, "density", HOSTILE),
        ],
        note=HOSTILE,
        highlights=[Highlight(HOSTILE, HOSTILE, HOSTILE)],
        summary=HOSTILE,
        command=HOSTILE,
        version=HOSTILE,
    )


@pytest.fixture
def hostile() -> SimpleNamespace:
    """The text itself, and inputs full of it."""
    return SimpleNamespace(text=HOSTILE, inputs=make_inputs())
