"""Why stages would run again: the chain of stages, asked stage by stage, with nothing computed.

A workspace that makes nothing answers each stage with the artifact that is there, or else notes why there is none
(storage.explaining) and goes on with a stand-in, whose manifest nobody knows yet. What follows a stage that is missing
would run too, for that reason at least. Stages that need their parent's figures to know what they would be (a harvest,
the tokens') end the walk.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.config import Preset
from pipeline.progress import Quiet
from pipeline.stages import Chain
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.explaining import UNMADE, Explanation, explain
from storage.fingerprint import Json
from storage.manifest import Manifest

_NEED_FIGURES = frozenset({"tokenize", "harvest"})


@dataclass(frozen=True)
class StageAnswer:
    """One stage of the chain.

    Attributes:
        name: of the stage, or of the analysis.
        id: of its artifact, there or not.
        place: where it is: ``here``, ``remote``, or None where it would be made.
        why: what it has that the nearest artifact has not, where it would be made.
    """

    name: str
    id: str
    place: str | None
    why: Explanation | None


class _EndOfWalk(Exception):  # noqa: N818 - no error, the end of a walk
    """The next stage cannot know what it would be."""


@dataclass(frozen=True)
class _Asking(Workspace):
    """A workspace that finds, and makes nothing."""

    answers: list[StageAnswer] = field(default_factory=list[StageAnswer])

    def make_together(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],  # noqa: ARG002
        *,
        provenance: Mapping[str, Json] | None = None,  # noqa: ARG002
    ) -> list[Made]:
        """Notes for each spec whether it is there."""
        return [Made(self._answer(spec), "cached") for spec in specs]

    def _answer(self, spec: Spec) -> Artifact:
        name = str(spec.config.get("analysis", spec.stage))
        found = self.store.find(spec)
        if found is not None:
            place = "here" if found.origin is None else "remote"
            self.answers.append(StageAnswer(name, found.id, place, None))
            return found
        self.answers.append(StageAnswer(name, spec.id, None, explain(self.store, spec)))
        if spec.stage in _NEED_FIGURES:
            raise _EndOfWalk
        return Artifact(self.store.root / spec.stage / spec.id, Manifest(spec, {}, {}, {}), UNMADE)


def explain_chain(preset: Preset, workspace: Workspace) -> list[StageAnswer]:
    """What of a preset's stages is there, and why the others would run, in order, as far as can be known.

    Args:
        preset: the whole run's config.
        workspace: where it would happen.
    """
    asking = _Asking(workspace.runtime, Quiet())  # a stage that is asked about would be reported as found

    def ask(name: str, work: Callable[[], Made]) -> Made:  # noqa: ARG001
        return work()

    with suppress(_EndOfWalk):
        Chain(preset, asking, ask).report()
    return asking.answers
