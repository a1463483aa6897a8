"""The analyze stage: one artifact an analysis, whose parents are just what that analysis reads.

So another threshold of one analysis makes that one again and nothing else, and an analysis of weights alone needs no
activations on this machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pipeline import language_model, training
from pipeline.analysis import ANALYSES
from pipeline.analysis.context import Context, FeatureDensities
from pipeline.analysis.registry import Analysis, AnalysisOptions, choose
from pipeline.analysis.result import AnalysisResult, from_folder, to_files
from pipeline.config import validate
from pipeline.harvest import mean_activation
from pipeline.language_model import LanguageModel
from pipeline.surveying import load_survey
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import ConfigError
from storage.reader import ShardReader


def plan(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[tuple[Analysis, AnalysisOptions]]:
    """The analyses to make, in order, with those they read before them, and their options checked.

    Args:
        names: analyses asked for.
        options: by analysis, what differs from the defaults.

    Raises:
        ConfigError: no analysis, or no option, of that name.
    """
    asked = choose(ANALYSES, tuple(names))
    if any("density" in analysis.reads for analysis in asked):
        asked = choose(ANALYSES, ("density", *names))
    choose(ANALYSES, tuple(options))
    return [
        (analysis, validate(analysis.options, options.get(analysis.name, {}), where=f"options of {analysis.name}"))
        for analysis in asked
    ]


def analyze(
    analysis: Analysis,
    options: AnalysisOptions,
    sae: Artifact,
    findings: Mapping[str, Artifact],
    workspace: Workspace,
    *,
    survey: Artifact | None = None,
) -> Made:
    """Makes, or finds, one analysis of an autoencoder.

    Args:
        analysis: which.
        options: its options.
        sae: a train artifact.
        findings: analyses made before, by name.
        workspace: where it happens.
        survey: of the autoencoder, where the analysis reads it.
    """
    inputs = _Inputs(sae, findings, workspace, survey)
    spec = Spec(
        "analyze",
        analysis.version,
        {"analysis": analysis.name, "options": options.model_dump(mode="json")},
        {role: artifact.as_parent() for role, artifact in inputs.parents(analysis).items()},
    )

    def produce(staging: Staging) -> Result:
        result = analysis.run(inputs.context(analysis), options)
        for name, data in to_files(result).items():
            staging.write_bytes(name, data)
        return Result({"numbers": dict(result.numbers)})

    return workspace.make(spec, produce)


def load_result(artifact: Artifact) -> AnalysisResult:
    """What an analyze artifact found; every file is compared with its hash first."""
    for name in artifact.manifest.files:
        artifact.checked_file(name)
    return from_folder(artifact.folder)


@dataclass(frozen=True)
class _Inputs:
    """What analyses of one autoencoder may read, opened when first asked for."""

    sae: Artifact
    findings: Mapping[str, Artifact]
    workspace: Workspace
    survey: Artifact | None

    @cached_property
    def activations(self) -> Artifact:
        return self.workspace.store.parent(self.sae, "activations")

    @cached_property
    def tokens(self) -> Artifact:
        return self.workspace.store.parent(self.activations, "tokens")

    @cached_property
    def model(self) -> LanguageModel:
        return language_model.load_recorded(self.activations)  # beside the autoencoder, on the CPU

    def parents(self, analysis: Analysis) -> dict[str, Artifact]:
        """Artifacts by role; the language model's hashes are part of the activations' spec."""
        available: dict[str, Callable[[], Artifact]] = {
            "store": lambda: self.activations,
            "model": lambda: self.activations,
            "tokens": lambda: self.tokens,
            "survey": self._need_survey,
            "density": lambda: self.findings["density"],
        }
        roles = {"store": "activations", "model": "activations"}
        missing = "density" in analysis.requires and "density" not in self.findings
        if missing:
            raise ConfigError(f"analysis {analysis.name} reads the density analysis, which was not made")
        wanted = [need for need in sorted(analysis.reads) if need in available]
        return {"sae": self.sae} | {roles.get(need, need): available[need]() for need in wanted}

    def context(self, analysis: Analysis) -> Context:
        """Everything the analysis declared that it reads, and nothing else."""
        reads = analysis.reads
        settings = training.settings(self.sae)
        return Context(
            sae=training.load_autoencoder(self.sae),
            hook_name=settings["hook_name"],
            sae_config=settings["config"],
            model=self.model if "model" in reads else None,
            reader=ShardReader.of(self.activations) if "store" in reads else None,
            tokens=TokenTable(self.tokens) if "tokens" in reads else None,
            token_strings=self.model.token_strings() if "tokens" in reads else None,
            survey=load_survey(self._need_survey()) if "survey" in reads else None,
            densities=self._densities() if "density" in reads else None,
            training_log=training.training_log(self.sae) if "training_log" in reads else None,
            mean_activation=torch.from_numpy(mean_activation(self.activations)) if "store" in reads else None,
            first_position=0 if self.activations.config["include_bos"] else 1,
        )

    def _need_survey(self) -> Artifact:
        if self.survey is None:
            raise ConfigError("an analysis reads the survey of the autoencoder, which was not made")
        return self.survey

    def _densities(self) -> FeatureDensities:
        artifact = self.findings["density"]
        rows = int(facts(artifact)["numbers"]["n_rows"])
        return FeatureDensities.from_table(load_result(artifact).tables["features"], rows)
