"""The id that each stage would give its artifact, without making any: for tests of what an id depends on."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from pipeline import analyzing, harvest, reporting, surveying, tokens, training
from pipeline.analysis import ANALYSES
from pipeline.config import Preset, Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging


class _Asked(Exception):  # noqa: N818 - a signal
    """A stage asked its store for an artifact."""


def id_of(ask: Callable[[], Made]) -> str:
    """The id that a stage asks for, the first of several."""

    def refuse(_self: Workspace, specs: Sequence[Spec], *_rest: object, **_more: object) -> list[Made]:
        raise _Asked(specs[0].id)

    with mock.patch.object(Workspace, "make_together", refuse), mock.patch.object(Workspace, "provenance", dict):
        try:
            ask()
        except _Asked as asked:
            return str(asked)
    raise AssertionError("the stage asked for nothing")


class Questions:
    """Stages of a preset over parents that hold nothing but what an id is made from.

    Args:
        preset: of the run.
        runtime: where it happens.
    """

    def __init__(self, preset: Preset, runtime: Runtime):
        self.preset = preset
        self.workspace = Workspace(runtime, Quiet())
        self.tokens = self.made("tokenize", {}, stats={"train": {"prompts": 5000}})
        said = {"include_bos": False, "hook_name": "h", "model": {}}
        self.activations = self.made("harvest", said, {"tokens": self.tokens})
        self.sae = self.made("train", {"reader_seed": 0}, {"activations": self.activations})
        self.other = self.made("train", {"reader_seed": 1}, {"activations": self.activations})
        self.survey = self.made("survey", {}, {"sae": self.sae})

    def made(
        self, stage: str, config: Mapping[str, Any], parents: Mapping[str, Artifact] = {}, stats: Mapping[str, Any] = {}
    ) -> Artifact:
        def produce(staging: Staging) -> Result:
            staging.write_bytes("nothing", b"")
            return Result(stats)

        modules = {"tokenize": tokens, "harvest": harvest, "train": training}
        version = modules[stage].OUTPUT_VERSION if stage in modules else 1
        spec = Spec(stage, version, config, {role: parent.as_parent() for role, parent in parents.items()})
        return self.workspace.store.make(spec, produce, provenance={}).artifact

    def findings(self, sae: Artifact) -> dict[str, Artifact]:
        return {name: self.made("analyze", {"analysis": name}, {"sae": sae}) for name in analyzing.FINDINGS}

    def asking(self) -> dict[str, tuple[BaseModel, Callable[[Any], str]]]:
        """By stage: its config, and what gives the id for one like it."""
        preset, workspace = self.preset, self.workspace
        found: dict[str, tuple[BaseModel, Callable[[Any], str]]] = {
            "tokenize": (preset.tokenize, lambda config: id_of(lambda: tokens.tokenize(config, workspace))),
            "harvest": (preset.harvest, lambda config: id_of(lambda: harvest.harvest(config, self.tokens, workspace))),
            "train": (preset.train, lambda config: training.spec(config, self.activations).id),
            "survey": (
                preset.analyze.survey,
                lambda config: id_of(lambda: surveying.survey(config, self.sae, workspace)),
            ),
        }
        for name, analysis in ANALYSES.items():
            found[f"analyze {name}"] = (analysis.options(), lambda options, name=name: self.analysis(name, options))
        return found

    def analysis(self, name: str, options: Any) -> str:
        findings, analysis = self.findings(self.sae), ANALYSES[name]
        companions = [analyzing.Analysed(self.other, self.findings(self.other))]
        return id_of(
            lambda: analyzing.analyze(
                analysis, options, self.sae, findings, self.workspace, survey=self.survey,
                companions=companions if "companions" in analysis.requires else (),
            )
        )  # fmt: skip

    def report(self, title: str = "title") -> str:
        return id_of(lambda: reporting.report(title, self.sae, self.findings(self.sae), self.workspace))

    def ids(self) -> dict[str, str]:
        """Every stage's id for the preset's own config."""
        return {name: ask(config) for name, (config, ask) in self.asking().items()} | {"report": self.report()}


if __name__ == "__main__":
    print(json.dumps(Questions(load_preset(sys.argv[1]), Runtime(root=Path(sys.argv[2]))).ids()))
