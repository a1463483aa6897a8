"""The analyses of an autoencoder: one module each, one signature, listed here once.

``ANALYSES`` maps names to what ``registry.Analysis`` describes. ``run(context, options)`` of each is a pure function of
what it reads; it writes nothing. ``result.to_files`` turns its outcome into files.
"""

from pipeline.analysis import (
    bias_density,
    case_studies,
    cross_seed,
    density,
    enc_dec,
    encoder_sparsity,
    geometry,
    kurtosis,
    loss_recovered,
    neuron_sparsity,
    null_space,
    orthogonal_rerun,
    rare_cluster,
    rare_direction,
    site_comparison,
    training_dynamics,
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
            neuron_sparsity,
            kurtosis,
            rare_cluster,
            rare_direction,
            cross_seed,
            orthogonal_rerun,
            enc_dec,
            null_space,
            geometry,
            bias_density,
            training_dynamics,
            case_studies,
            encoder_sparsity,
            site_comparison,
        ),
    )
}
"""Every analysis by name, in the order of the report; none comes before one that it reads."""

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
