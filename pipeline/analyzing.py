"""The analyze stage: one artifact an analysis, whose parents are just what that analysis reads.

So another threshold of one analysis makes that one again and nothing else, and an analysis of weights alone needs no
activations on this machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from pipeline import language_model, training
from pipeline.analysis import ANALYSES, comparing
from pipeline.analysis.comparing import Described
from pipeline.analysis.context import EVERYTHING, Context, FeatureDensities, Need
from pipeline.analysis.passes import Here
from pipeline.analysis.registry import Analysis, AnalysisOptions, choose
from pipeline.analysis.result import AnalysisResult, from_folder, to_files
from pipeline.cluster_worker import Reference, Site
from pipeline.config import validate
from pipeline.harvest import mean_activation, moments
from pipeline.language_model import LanguageModel
from pipeline.pass_work import PassWork
from pipeline.surveying import load_survey
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import ConfigError
from storage.reader import ShardReader

FINDINGS: tuple[Need, ...] = ("loss_recovered", "density")
"""Needs that are analyses themselves, each before what it reads."""
_COMPANION = "companion"


class Analysed(NamedTuple):
    """An autoencoder, and analyses made of it by name."""

    sae: Artifact
    findings: Mapping[str, Artifact]


def available(sae: Artifact) -> frozenset[Need]:
    """What there is to read beside an autoencoder's own weights: one that was imported may have come alone."""
    found: set[Need] = {"training_log"} if sae.stage == "train" else set()
    if "activations" in sae.parents:
        found |= {"store", "statistics", "model", "tokens", "survey", "density", "loss_recovered"}
    elif sae.config["model"] is not None:
        found |= {"model"}
    return frozenset(found)


def plan(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], there: frozenset[Need] = EVERYTHING
) -> list[tuple[Analysis, AnalysisOptions]]:
    """The analyses to make, in order, with those they read before them, and their options checked.

    Args:
        names: analyses asked for.
        options: by analysis, what differs from the defaults.
        there: what there is to read; :func:`available`.

    Raises:
        ConfigError: no analysis, or no option, of that name; or an analysis that needs what is not there.
    """
    asked = choose(ANALYSES, tuple(names))
    for analysis in asked:
        if missing := analysis.requires - there:
            able = [name for name, one in ANALYSES.items() if one.requires <= there]
            if "companions" in missing:
                raise ConfigError(
                    f"analysis {analysis.name} compares autoencoders, and there is one",
                    remedy=f"'sparsemill study {analysis.name.replace('_', '-')}' trains the others; "
                    "or name some with --with",
                )
            raise ConfigError(
                f"analysis {analysis.name} reads what this autoencoder came without",
                found=", ".join(sorted(missing)) + " missing", expected=f"one of {', '.join(able)}",
                remedy="import it with --activations HARVEST, or --model NAME",
            )  # fmt: skip
    for name in FINDINGS:
        if name in findings_read(asked, there):
            asked = choose(ANALYSES, (name, *(analysis.name for analysis in asked)))
    choose(ANALYSES, tuple(options))
    return [
        (analysis, validate(analysis.options, options.get(analysis.name, {}), where=f"options of {analysis.name}"))
        for analysis in asked
    ]


def findings_read(analyses: Sequence[Analysis], there: frozenset[Need]) -> list[str]:
    """Names of the analyses that some read, of what there is."""
    return [name for name in FINDINGS if any(name in analysis.reads & there for analysis in analyses)]


def analyze(
    analysis: Analysis,
    options: AnalysisOptions,
    sae: Artifact,
    findings: Mapping[str, Artifact],
    workspace: Workspace,
    *,
    survey: Artifact | None = None,
    companions: Sequence[Analysed] = (),
    work: PassWork | None = None,
) -> Made:
    """Makes, or finds, one analysis of an autoencoder.

    Args:
        analysis: which.
        options: its options.
        sae: an artifact of ``training.AUTOENCODER_STAGES``.
        findings: analyses made before, by name.
        workspace: where it happens.
        survey: of the autoencoder, where the analysis reads it.
        companions: the autoencoders that it is compared with, where the analysis compares, in the order of its tables.
        work: where its passes are computed; in this process by default.
    """
    others = tuple(Inputs(other.sae, other.findings, workspace, None) for other in companions)
    inputs = Inputs(sae, findings, workspace, survey, others)
    spec = Spec(
        "analyze",
        analysis.version,
        {"analysis": analysis.name, "options": options.model_dump(mode="json")},
        {role: artifact.as_parent() for role, artifact in inputs.parents(analysis).items()},
    )

    def produce(staging: Staging) -> Result:
        passes = Here(workspace.reporter) if work is None else work.passes(staging, inputs.on_site(analysis))
        result = analysis.run(replace(inputs.context(analysis), passes=passes), options)
        for name, data in to_files(result).items():
            staging.write_bytes(name, data)
        return Result({"numbers": dict(result.numbers)})

    return workspace.make(spec, produce)


def companion_ids(artifact: Artifact) -> list[str]:
    """Ids of the autoencoders that an analyze artifact compares its own with, in order."""
    return [artifact.parents[role].id for role in sorted(artifact.parents) if role.startswith(f"{_COMPANION}-")
            and role.endswith(".sae")]  # fmt: skip


def load_densities(density: Artifact) -> FeatureDensities:
    """What a density analysis counted."""
    rows = int(facts(density)["numbers"]["n_rows"])
    return FeatureDensities.from_table(load_result(density).tables["features"], rows)


def load_result(artifact: Artifact) -> AnalysisResult:
    """What an analyze artifact found; every file is compared with its hash first."""
    for name in artifact.manifest.files:
        artifact.checked_file(name)
    return from_folder(artifact.folder)


@dataclass(frozen=True)
class Inputs:
    """What there is to read of one autoencoder, opened when first asked for.

    Attributes:
        sae: the autoencoder.
        findings: analyses made of it, by name.
        workspace: where parents are.
        survey: of the autoencoder, where something reads it.
        companions: the autoencoders that it is compared with.
        opened: those of its ancestors that are open, by role.
    """

    sae: Artifact
    findings: Mapping[str, Artifact]
    workspace: Workspace
    survey: Artifact | None = None
    companions: "tuple[Inputs, ...]" = ()
    opened: Mapping[str, Artifact] = field(default_factory=dict[str, Artifact])

    @cached_property
    def activations(self) -> Artifact:
        """Its parent."""
        there = self.opened.get("activations")
        return self.workspace.store.parent(self.sae, "activations") if there is None else there

    @cached_property
    def tokens(self) -> Artifact:
        """The activations' parent."""
        there = self.opened.get("tokens")
        return self.workspace.store.parent(self.activations, "tokens") if there is None else there

    @cached_property
    def model(self) -> LanguageModel:
        """The language model, as it was when the activations were harvested.

        Raises:
            ConfigError: it is another now, or none was named at an import.
        """
        if "model" not in available(self.sae):
            raise ConfigError(
                "the language model is not known", where=self.sae.id,
                remedy="import the autoencoder with --activations HARVEST, or --model NAME",
            )  # fmt: skip
        recorded = self.activations if "activations" in self.sae.parents else self.sae
        return language_model.load_recorded(recorded)  # beside the autoencoder, on the CPU

    def reads(self, analysis: Analysis) -> frozenset[Need]:
        """What the analysis declared that it reads, as far as it is there."""
        return analysis.requires | (analysis.optional & available(self.sae))

    def parents(self, analysis: Analysis) -> dict[str, Artifact]:
        """Artifacts by role, the companions' too."""
        found = self.artifacts(analysis)
        if "companions" in analysis.requires:
            for number, other in enumerate(self.companions, 1):
                for role, artifact in other.parents(analysis).items():
                    found[f"{_COMPANION}-{number:02d}.{role}"] = artifact
        return found

    def on_site(self, analysis: Analysis) -> "InputsOnSite":
        """What a worker of a cluster reads for the analysis."""
        root = self.workspace.store.root
        return InputsOnSite({role: Reference.to(one, root) for role, one in self.artifacts(analysis).items()})

    def artifacts(self, analysis: Analysis) -> dict[str, Artifact]:
        """Artifacts by role; the language model's hashes are part of the activations' spec."""
        parents: dict[str, Callable[[], Artifact]] = {
            "store": lambda: self.activations,
            "statistics": lambda: self.activations,
            "model": lambda: self.activations,
            "tokens": lambda: self.tokens,
            "survey": self._need_survey,
            "density": lambda: self.findings["density"],
            "loss_recovered": lambda: self.findings["loss_recovered"],
        }
        roles: dict[str, str] = dict.fromkeys(("store", "statistics", "model"), "activations")
        for name in findings_read([analysis], available(self.sae) | analysis.requires):
            if name not in self.findings:
                raise ConfigError(f"analysis {analysis.name} reads the {name} analysis, which was not made")
        wanted = [need for need in sorted(self.reads(analysis)) if need in parents]
        if "activations" not in self.sae.parents:
            wanted = []  # its model's hashes are part of its own spec
        return {"sae": self.sae} | {roles.get(need, need): parents[need]() for need in wanted}

    def context(self, analysis: Analysis) -> Context:
        """Everything the analysis declared that it reads, and nothing else."""
        context = self.read(self.reads(analysis))
        return self._beside_others(context, analysis) if "companions" in analysis.requires else context

    def read(self, reads: frozenset[Need]) -> Context:
        """What is asked for, and nothing else."""
        settings = training.settings(self.sae)
        directions = training.read_directions(self.sae)
        return Context(
            sae=training.load_autoencoder(self.sae),
            hook_name=settings["hook_name"],
            sae_config=settings["config"],
            model=self.model if "model" in reads else None,
            reader=ShardReader.of(self.activations) if "store" in reads else None,
            tokens=TokenTable(self.tokens) if "tokens" in reads else None,
            token_strings=self.model.token_strings() if "tokens" in reads else None,
            survey=load_survey(self._need_survey()) if "survey" in reads else None,
            densities=load_densities(self.findings["density"]) if "density" in reads else None,
            training_log=training.training_log(self.sae) if "training_log" in reads else None,
            training_densities=training.training_densities(self.sae) if "training_log" in reads else None,
            mean_activation=torch.from_numpy(mean_activation(self.activations)) if "statistics" in reads else None,
            moments=moments(self.activations) if "statistics" in reads else None,
            first_position=0 if "activations" in self.sae.parents and self.activations.config["include_bos"] else 1,
            encoder_directions=None if directions is None else directions.double().numpy(),
            numbers={name: facts(self.findings[name])["numbers"] for name in FINDINGS if name in reads},
            site=settings["hook_name"],
        )

    def _beside_others(self, context: Context, analysis: Analysis) -> Context:
        described = [self.describe(), *(other.describe() for other in self.companions)]
        labels, sites = comparing.labels(described), comparing.sites(described)
        named = [
            replace(one, label=label, site=site)
            for one, label, site in zip(
                [context, *(other.context(analysis) for other in self.companions)], labels, sites, strict=True
            )
        ]
        return replace(named[0], companions=tuple(named[1:]))

    def describe(self) -> Described:
        """What the autoencoder says of itself."""
        settings, name = training.settings(self.sae), facts(self.sae).get("language_model_as_named")
        if "activations" in self.sae.parents:
            name = facts(self.activations)["language_model"]
        return Described(
            id=self.sae.id,
            model=str(name).rpartition("/")[2],
            model_identity=settings["model"],
            hook_name=settings["hook_name"],
            config=settings["config"],
            orthogonal=training.DIRECTIONS in self.sae.manifest.files,
        )

    def _need_survey(self) -> Artifact:
        if self.survey is None:
            raise ConfigError("an analysis reads the survey of the autoencoder, which was not made")
        return self.survey


@dataclass(frozen=True)
class InputsOnSite:
    """Opens on a worker of a cluster what its coordinator reads.

    Attributes:
        references: to the artifacts, by role.
    """

    references: Mapping[str, Reference]

    def __call__(self, site: Site, reads: frozenset[Need]) -> Context:
        """The autoencoder, and what is asked for."""
        found = {role: reference.open(site.root) for role, reference in self.references.items()}
        findings = {name: found[name] for name in FINDINGS if name in found}
        return Inputs(found["sae"], findings, site.workspace, found.get("survey"), opened=found).read(reads)
