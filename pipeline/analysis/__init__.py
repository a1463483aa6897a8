"""The analyses of an autoencoder: one module each, one signature, listed here once.

``ANALYSES`` maps names to what ``registry.Analysis`` describes. ``run(context, options)`` of each is a pure function of
what it reads; it writes nothing. ``result.to_files`` turns its outcome into files.
"""

from pipeline.analysis import (
    bias_density,
    density,
    enc_dec,
    geometry,
    kurtosis,
    loss_recovered,
    neuron_sparsity,
    null_space,
    rare_cluster,
)
from pipeline.analysis.context import Context, FeatureDensities, FeatureGroups
from pipeline.analysis.registry import Analysis, AnalysisOptions, NumberLabel, choose, from_module
from pipeline.analysis.result import AnalysisResult, from_folder, to_files

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in map(
        from_module,
        (
            density,
            loss_recovered,
            rare_cluster,
            neuron_sparsity,
            kurtosis,
            enc_dec,
            null_space,
            geometry,
            bias_density,
        ),
    )
}
"""Every analysis by name, in the order of the report."""

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisOptions",
    "AnalysisResult",
    "Context",
    "FeatureDensities",
    "FeatureGroups",
    "NumberLabel",
    "choose",
    "from_folder",
    "to_files",
]
