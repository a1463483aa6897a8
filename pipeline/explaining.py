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

_SHOWN_IN_A_LINE = 3
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


def told(answers: Sequence[StageAnswer], *, full: bool = False) -> list[str]:
    """Answers as lines for people: a stage each, and one for all that would run only because others do.

    Args:
        answers: of :func:`explain_chain`.
        full: every difference on a line of its own, of every stage.
    """
    lines: list[str] = []
    following: list[str] = []
    reasons: list[str] = []
    for answer in answers:
        if answer.why is None:
            lines.append(f"{answer.name}: {answer.id} is {'here' if answer.place == 'here' else 'in the remote'}")
        elif not full and _only_follows(answer.why):
            following.append(answer.name)
        else:
            reasons.append(answer.name)
            lines += _why_it_runs(answer.name, answer.why, full=full)
    if following:
        lines.append(f"{', '.join(following)}: would run, as {' and '.join(reasons)} would")
    if answers and answers[-1].name != "report":
        lines.append("what follows: would run, as it is made from what is missing")
    return lines


def _only_follows(why: Explanation) -> bool:
    """Whether all that is new is a parent that would be made first."""
    unmade = any(parent.manifest_sha256 == UNMADE for parent in why.spec.parents.values())
    return unmade and all(one.field.startswith("parents.") for one in why.differences)


def _why_it_runs(name: str, why: Explanation, *, full: bool) -> list[str]:
    if why.nearest is None:
        return [f"{name}: would run; there is none yet"]
    if full:
        return [f"{name}: would run; {why.nearest} differs in", *(f"  {one}" for one in why.differences)]
    config = [one for one in why.differences if not one.field.startswith("parents.")] or why.differences
    named = "; ".join(
        f"{one.field.removeprefix('config.')} {one.there}, not {one.wanted}" for one in config[:_SHOWN_IN_A_LINE]
    )
    more = f"; {len(config) - _SHOWN_IN_A_LINE} more with --full" if len(config) > _SHOWN_IN_A_LINE else ""
    return [f"{name}: would run; the nearest, {why.nearest}, has {named}{more}"]
