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
from pipeline.analysis import ANALYSES
from pipeline.analysis.context import EVERYTHING, Need
from pipeline.analysis.registry import Analysis, AnalysisOptions
from pipeline.analyzing import Analysed
from pipeline.config import Preset
from pipeline.pass_work import open_pass_work
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
        return self.stage("tokenize", lambda: tokens.tokenize(self.preset.tokenize, self.workspace))

    def harvest(self) -> Artifact:
        """Prompts to shards."""
        parent = self.tokenize()
        return self.stage("harvest", lambda: harvest.harvest(self.preset.harvest, parent, self.workspace))

    def train(self, activations: Artifact | None = None) -> Artifact:
        """Shards to an autoencoder; the preset's own shards by default."""
        parent = self.harvest() if activations is None else activations
        return self.stage("train", lambda: training.train(self.preset.train, parent, self.workspace))

    def analyses(self, sae: Artifact) -> list[str]:
        """The preset's analyses that an autoencoder can have by itself."""
        return self._able(analyzing.available(sae))

    def analyze(
        self, sae: Artifact | None = None, only: Sequence[str] = (), companions: Sequence[Artifact] = ()
    ) -> dict[str, Artifact]:
        """An autoencoder to findings: the analyses asked for, and those that they read.

        Args:
            sae: the autoencoder; the preset's own by default.
            only: names of analyses; the preset's by default.
            companions: the autoencoders that it is compared with.
        """
        sae = self.train() if sae is None else sae
        plan = self._plan(only, sae, companions)
        comparing = [analysis for analysis, _ in plan if "companions" in analysis.requires]
        others: list[Analysed] = []
        for other in companions if comparing else ():
            there = analyzing.available(other)
            read = analyzing.findings_read(comparing, there)
            named = analyzing.plan(read, self.preset.analyze.options, there)
            others.append(Analysed(other, self._make(named, other, (), f" of {other.id}")))
        return self._make(plan, sae, others)

    def report(
        self, sae: Artifact | None = None, only: Sequence[str] = (), companions: Sequence[Artifact] = ()
    ) -> Artifact:
        """Findings to a folder of HTML; for arguments see :meth:`analyze`."""
        self._plan(only, sae, companions)  # a misspelt analysis is better found before a training than after it
        sae = self.train() if sae is None else sae
        findings = self.analyze(sae, only, companions)
        return self.stage("report", lambda: reporting.report(self.preset.name, sae, findings, self.workspace))

    def _make(
        self,
        plan: Sequence[tuple[Analysis, AnalysisOptions]],
        sae: Artifact,
        others: Sequence[Analysed] = (),
        whose: str = "",
    ) -> dict[str, Artifact]:
        survey = self._survey(sae, whose) if any("survey" in analysis.requires for analysis, _ in plan) else None
        findings: dict[str, Artifact] = {}
        with open_pass_work(self.workspace) as passes:
            for analysis, options in plan:
                work = partial(
                    analyzing.analyze, analysis, options, sae, findings, self.workspace, survey=survey,
                    companions=others, work=passes,
                )  # fmt: skip
                findings[analysis.name] = self.stage(f"{analysis.name}{whose}", work)
        return findings

    def _survey(self, sae: Artifact, whose: str) -> Artifact:
        config = self.preset.analyze.survey
        return self.stage(f"survey{whose}", lambda: surveying.survey(config, sae, self.workspace))

    def _plan(
        self, only: Sequence[str], sae: Artifact | None, companions: Sequence[Artifact]
    ) -> list[tuple[Analysis, AnalysisOptions]]:
        there = EVERYTHING if sae is None else analyzing.available(sae)
        others: frozenset[Need] = frozenset({"companions"})
        there = there | others if companions else there - others
        return analyzing.plan(only or self._able(there), self.preset.analyze.options, there)

    def _able(self, there: frozenset[Need]) -> list[str]:
        wanted = self.preset.analyze.analyses
        return [name for name in wanted if name not in ANALYSES or ANALYSES[name].requires <= there]

    def stage(self, name: str, work: Callable[[], Made]) -> Artifact:
        """Runs one stage under a name and remembers it."""
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
