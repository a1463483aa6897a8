"""The chain of stages, once: what each stage needs, in order, for the command line and for Prefect alike.

Every function makes, or finds, what lies upstream and then its own stage. *How* a stage is run is an argument, ``Run``:
called directly here, as a Prefect task in ``flows``.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from pipeline import analyzing, harvest, reporting, surveying, tokens, training
from pipeline.analysis.registry import Analysis, AnalysisOptions
from pipeline.config import Preset
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Made


class Run(Protocol):
    """Runs one stage under a name."""

    def __call__(self, name: str, work: Callable[[], Made]) -> Made:
        """Runs ``work`` and returns what it made or found."""
        ...


@dataclass(frozen=True)
class StageRun:
    """One stage that was run.

    Attributes:
        name: ``tokenize``, ``harvest``, ``train``, ``survey``, ``density``..., ``report``.
        made: its artifact and whether it was made, resumed or found.
        seconds: wall time.
    """

    name: str
    made: Made
    seconds: float


@dataclass
class Chain:
    """Runs stages one after the other and remembers them, in order.

    Attributes:
        preset: the whole run's config.
        workspace: where it happens.
        run: how a stage is run.
        runs: the stages run so far.
    """

    preset: Preset
    workspace: Workspace
    run: Run
    runs: list[StageRun] = field(default_factory=list[StageRun])

    def tokenize(self) -> Artifact:
        """Documents to prompts."""
        return self._stage("tokenize", lambda: tokens.tokenize(self.preset.tokenize, self.workspace))

    def harvest(self) -> Artifact:
        """Prompts to shards."""
        parent = self.tokenize()
        return self._stage("harvest", lambda: harvest.harvest(self.preset.harvest, parent, self.workspace))

    def train(self) -> Artifact:
        """Shards to an autoencoder."""
        parent = self.harvest()
        return self._stage("train", lambda: training.train(self.preset.train, parent, self.workspace))

    def analyze(self, sae: Artifact | None = None, only: Sequence[str] = ()) -> dict[str, Artifact]:
        """An autoencoder to findings: the analyses asked for, and those that they read.

        Args:
            sae: the autoencoder; the preset's own by default.
            only: names of analyses; the preset's by default.
        """
        plan = self._plan(only)
        sae = self.train() if sae is None else sae
        survey = self._survey(sae) if any("survey" in analysis.reads for analysis, _ in plan) else None
        findings: dict[str, Artifact] = {}
        for analysis, options in plan:
            work = partial(analyzing.analyze, analysis, options, sae, findings, self.workspace, survey=survey)
            findings[analysis.name] = self._stage(analysis.name, work)
        return findings

    def report(self, sae: Artifact | None = None, only: Sequence[str] = ()) -> Artifact:
        """Findings to a folder of HTML."""
        self._plan(only)  # a misspelt analysis is better found before a training than after it
        sae = self.train() if sae is None else sae
        findings = self.analyze(sae, only)
        return self._stage("report", lambda: reporting.report(self.preset.name, sae, findings, self.workspace))

    def _survey(self, sae: Artifact) -> Artifact:
        return self._stage("survey", lambda: surveying.survey(self.preset.analyze.survey, sae, self.workspace))

    def _plan(self, only: Sequence[str]) -> list[tuple[Analysis, AnalysisOptions]]:
        return analyzing.plan(only or self.preset.analyze.analyses, self.preset.analyze.options)

    def _stage(self, name: str, work: Callable[[], Made]) -> Artifact:
        started = time.monotonic()
        self.workspace.reporter.say(f"{name} ...")
        made = self.run(name, work)
        seconds = time.monotonic() - started
        self.workspace.reporter.say(f"{name}: {made.artifact.id} {made.status} ({seconds:.1f} s)")
        self.runs.append(StageRun(name, made, seconds))
        return made.artifact


def run_directly(name: str, work: Callable[[], Made]) -> Made:  # noqa: ARG001 - the name is for other runners
    """Runs a stage in this process, without an orchestrator."""
    return work()
