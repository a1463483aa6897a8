"""Whether what a feature detects is what it writes: cosine of encoder and decoder direction.

Per feature the cosine of e_i and d_i, and their dot product, the "D/E projection" of Anthropic's plot: near 1 for a
feature that passes a signal through. A zero row has no cosine and is left out.

Source: the post, "Should encoder and decoder weights be tied?".
"""

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Need
from pipeline.analysis.display import show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Encoder against decoder"
QUESTION = "Does a feature write the direction that it reads?"
REQUIRES: frozenset[Need] = frozenset()
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("cosine_median_frequent", "Cosine of encoder and decoder, frequent features, median", "plain"),
    NumberLabel("cosine_median_rare", "… ultra-low features, median", "plain"),
    NumberLabel("cosine_median_all", "… all features, median", "plain"),
    NumberLabel("projection_median_frequent", "Dot product of encoder and decoder, frequent features, median", "plain"),
    NumberLabel("projection_median_rare", "… ultra-low features, median", "plain"),
    NumberLabel("ashman_d", "Ashman’s D of two modes in the cosine (above 2: two)", "plain"),
    NumberLabel("lower_mode", "Lower mode of the cosine", "plain"),
    NumberLabel("upper_mode", "Upper mode of the cosine", "plain"),
)


class OPTIONS(AnalysisOptions):
    """Options of the encoder-decoder analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    bin_width: float = Field(default=0.02, gt=0)
    """Width of a bin of the cosine histogram."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures cosines and dot products; see the module."""
    encoder = statistics.weights64(context.sae.W_enc).T
    decoder = statistics.weights64(context.sae.W_dec)
    cosine = statistics.row_cosines(encoder, decoder)
    projection = np.einsum("ij,ij->i", encoder, decoder)
    groups = context.groups(options.ultra_low_below)
    frequent = np.ones(cosine.size, np.bool_) if groups is None else groups.frequent
    fit = statistics.fit_two_gaussians(statistics.finite(cosine[frequent]))
    modes = fit if fit is not None and fit.is_bimodal else None
    numbers: dict[str, Number] = {
        "cosine_median_all": statistics.median(cosine),
        "ashman_d": None if fit is None else fit.ashman_d,
        "lower_mode": None if modes is None else modes.means[0],
        "upper_mode": None if modes is None else modes.means[1],
    }
    if groups is not None:
        numbers |= {
            "cosine_median_frequent": statistics.median(cosine[groups.frequent]),
            "cosine_median_rare": statistics.median(cosine[groups.rare]),
            "projection_median_frequent": statistics.median(projection[groups.frequent]),
            "projection_median_rare": statistics.median(projection[groups.rare]),
        }
    table = pa.table(
        {
            "feature": pa.array(np.arange(cosine.size, dtype=np.int32)),
            "encoder_decoder_cosine": pa.array(cosine, from_pandas=True),
            "encoder_decoder_projection": pa.array(projection),
        }
    )
    rare = ~frequent
    drawn = {
        "cosine": figures.histogram(
            _series(cosine, frequent, rare),
            np.linspace(-1, 1, round(2 / options.bin_width) + 1),
            caption="Cosine between each feature's encoder and decoder direction.",
            x_title="cosine of encoder and decoder",
        ),
        "projection": figures.histogram(
            _series(projection, frequent, rare),
            _spread(projection),
            caption="Dot product of encoder and decoder: 1 where a feature passes its signal through unscaled.",
            x_title="dot product of encoder and decoder",
        ),
    }
    return AnalysisResult(numbers, {"features": table}, drawn, _reading(numbers))


def _series(values: Floats, frequent: np.ndarray, rare: np.ndarray) -> list[figures.Series]:
    first, second = np.flatnonzero(frequent), np.flatnonzero(rare)
    name = "frequent" if second.size else "features"
    return [
        figures.Series(name, values[first], "frequent", first),
        figures.Series("ultra-low", values[second], "rare", second),
    ]


def _spread(values: Floats) -> Floats:
    low, high = float(np.quantile(values, 0.002)), float(np.quantile(values, 0.998))
    pad = 0.05 * (high - low) or 0.5
    return np.linspace(low - pad, high + pad, 61)


def _reading(numbers: dict[str, Number]) -> str:
    median = numbers.get("cosine_median_frequent", numbers["cosine_median_all"])
    return (
        "At cosine 1 a feature writes exactly what it reads, and the two could be tied; the further left, the more the "
        "best detector of a feature differs from the feature itself, because it steers clear of its neighbours. "
        f"The median here is {show(median)}."
    )
