"""Why a stage would run: what its question has that the nearest artifact's has not.

Nearest is the artifact of the same stage (and of the same kind: analyses have names) whose spec differs in the fewest
fields, the newest of several. Fields are the leaves of the config by their dotted names, the output version, and the
parents by role.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.fingerprint import Json
from storage.manifest import Spec

UNMADE = "0" * 64
"""Stands for the manifest's sha256 of a parent that is not made yet."""

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A field that two specs do not have in common.

    Attributes:
        field: ``version``, ``config.<dotted name>`` or ``parents.<role>``.
        there: the artifact's value, None where it has no such field.
        wanted: the question's.
    """

    field: str
    there: object
    wanted: object

    def __str__(self) -> str:
        return f"{self.field}: {self.there} there, {self.wanted} wanted"


@dataclass(frozen=True)
class Explanation:
    """Why a question is not answered yet.

    Attributes:
        spec: the question.
        nearest: id of the nearest artifact, or None where the store has none of the stage.
        differences: from it.
    """

    spec: Spec
    nearest: str | None
    differences: Sequence[Difference]


def explain(store: ArtifactStore, spec: Spec) -> Explanation:
    """Compares a question with the artifacts of its stage in a store."""
    nearest: tuple[str, list[Difference]] | None = None
    for artifact in store.list(spec.stage):  # newest first
        if artifact.config.get("analysis") == spec.config.get("analysis"):
            found = differences(artifact.spec, spec)
            if nearest is None or len(found) < len(nearest[1]):
                nearest = (artifact.id, found)
    return Explanation(spec, None, []) if nearest is None else Explanation(spec, *nearest)


def differences(there: Spec, wanted: Spec) -> list[Difference]:
    """The fields in which two specs differ, by name."""
    old, new = dict(_leaves(there)), dict(_leaves(wanted))
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    return [Difference(name, old.get(name), new.get(name)) for name in names]


def _leaves(spec: Spec) -> Iterator[tuple[str, object]]:
    yield "version", spec.version
    yield from _flat("config", spec.config)
    for role, parent in spec.parents.items():
        unmade = parent.manifest_sha256 == UNMADE
        yield (
            f"parents.{role}",
            f"{parent.id} ({'not made yet' if unmade else f'manifest {parent.manifest_sha256[:12]}'})",
        )


def _flat(name: str, value: Json) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(f"{name}.{number}", item)
    else:
        yield name, list(value) if isinstance(value, tuple) else value
