"""Whether the neuron basis is privileged: excess kurtosis of decoder and encoder directions over neurons.

A random direction has normal entries and kurtosis near 0 (exactly -6 / (d_in + 1) on average, for the biased
estimate); a direction that prefers some neurons has a heavy tail and a large one. The baseline draws normal rows of the
same shape. The figure is clipped, as the post's is, and says what was clipped.

Source: the post, "Exploring Neuron Sparsity"; scipy's kurtosis with fisher=True, bias=True.
"""

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from pydantic import Field

from pipeline.analysis import figures, statistics
from pipeline.analysis.context import Context, Floats, Integers, Need
from pipeline.analysis.display import percent, show
from pipeline.analysis.registry import AnalysisOptions, NumberLabel
from pipeline.analysis.result import AnalysisResult, Number

VERSION = 1
TITLE = "Kurtosis in the neuron basis"
QUESTION = "Do features prefer the directions of neurons?"
REQUIRES: frozenset[Need] = frozenset()
OPTIONAL: frozenset[Need] = frozenset({"density"})
NUMBERS = (
    NumberLabel("decoder_median", "Decoder kurtosis, median", "plain"),
    NumberLabel("decoder_max", "Decoder kurtosis, largest", "plain"),
    NumberLabel("decoder_above_random", "Decoders above every random row", "fraction"),
    NumberLabel("decoder_median_frequent", "Decoder kurtosis of frequent features, median", "plain"),
    NumberLabel("decoder_median_rare", "Decoder kurtosis of ultra-low features, median", "plain"),
    NumberLabel("encoder_median", "Encoder kurtosis, median", "plain"),
    NumberLabel("encoder_max", "Encoder kurtosis, largest", "plain"),
    NumberLabel("random_mean", "Kurtosis of random normal rows, mean", "plain"),
    NumberLabel("random_max", "Kurtosis of random normal rows, largest", "plain"),
)


class OPTIONS(AnalysisOptions):
    """Options of the kurtosis analysis."""

    ultra_low_below: float = Field(default=1e-4, gt=0, lt=1)
    """A feature of smaller density is ultra-low."""
    clip: float | None = Field(default=None, gt=0)
    """Largest kurtosis drawn; by default what 97 % of the features stay below, at least twice any random row's."""


def run(context: Context, options: OPTIONS) -> AnalysisResult:
    """Measures kurtosis; see the module."""
    decoder = statistics.excess_kurtosis(statistics.weights64(context.sae.W_dec))
    encoder = statistics.excess_kurtosis(statistics.weights64(context.sae.W_enc).T)
    shape = (context.sae.d_sae, context.sae.d_in)
    random = statistics.excess_kurtosis(context.rng("kurtosis").standard_normal(shape))
    groups = context.groups(options.ultra_low_below)
    numbers: dict[str, Number] = {
        "decoder_median": statistics.median(decoder),
        "decoder_max": statistics.maximum(decoder),
        "decoder_above_random": statistics.share(statistics.finite(decoder) > random.max()),
        "encoder_median": statistics.median(encoder),
        "encoder_max": statistics.maximum(encoder),
        "random_mean": statistics.mean(random),
        "random_max": statistics.maximum(random),
    }
    if groups is not None:
        numbers["decoder_median_frequent"] = statistics.median(decoder[groups.frequent])
        numbers["decoder_median_rare"] = statistics.median(decoder[groups.rare])
    table = pa.table(
        {
            "feature": pa.array(np.arange(decoder.size, dtype=np.int32)),
            "decoder_kurtosis": pa.array(decoder, from_pandas=True),
            "encoder_kurtosis": pa.array(encoder, from_pandas=True),
        }
    )
    drawn = {
        "decoder": _figure("decoder", decoder, random, options),
        "encoder": _figure("encoder", encoder, random, options),
    }
    return AnalysisResult(numbers, {"features": table}, drawn, _reading(numbers))


def _figure(what: str, values: Floats, random: Floats, options: OPTIONS) -> go.Figure:
    kept = statistics.finite(values)
    usual = float(np.quantile(kept, 0.97)) if kept.size else 0.0
    clip = options.clip or max(2 * float(random.max()), usual)
    beyond = int((kept > clip).sum())
    clipped = ""
    if beyond:
        largest = show(float(kept.max()))
        clipped = f" The last bar holds the {beyond:,} features beyond {clip:.3g}; the largest is {largest}."
    numbered: Integers = np.arange(values.size)
    return figures.histogram(
        [
            figures.Series("random normal rows", random, "baseline"),
            figures.Series(f"{what}s", values, "frequent", numbered),
        ],
        np.linspace(min(-1.0, float(kept.min()) if kept.size else -1.0), clip, 71),
        caption=f"Excess kurtosis of {what} directions over neurons.{clipped}",
        x_title="excess kurtosis over neurons",
    )


def _reading(numbers: dict[str, Number]) -> str:
    return (
        "Directions with no preference for neurons would lie within the grey outline, around zero. "
        f"Here {percent(numbers['decoder_above_random'])} of the decoders lie above every random row; the "
        f"median is {show(numbers['decoder_median'])} and the largest "
        f"{show(numbers['decoder_max'])}."
    )
