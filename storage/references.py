"""The names that artifacts answer to: ids and their unique beginnings, ``latest``, and tags that people give.

A tag is a file of the id under ``.tags``; ``latest`` follows the times of manifests, of which each is later than those
committed before it. Resolving reads the names of folders and no manifest.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from storage import atomic
from storage.errors import AmbiguousReference, ArtifactNotFound, CorruptArtifact, InputError
from storage.fingerprint import canonical_json
from storage.manifest import MANIFEST_NAME, is_id, stage_of
from storage.root import create_root, make_durable_folder
from storage.unfinished import begun, is_worked_on, state

LATEST = "latest"

Stages = str | tuple[str, ...] | None
"""A stage, any of some stages, or any at all."""

_FIRST = "'sparsemill replicate' makes all stages of a preset, 'sparsemill pull' fetches what others made"
_SUGGESTED = 4
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
_HEX = re.compile(r"[0-9a-f]{1,12}")


def committed(root: Path, folders: Sequence[str] = ("[a-z]*",)) -> list[tuple[int, str]]:
    """(order, id) of the artifacts in some stages' folders; a manifest's time is later than those before it."""
    found: list[tuple[int, str]] = []
    for path in (path for folder in folders for path in root.glob(f"{folder}/*/{MANIFEST_NAME}")):
        with suppress(FileNotFoundError):  # removed since the folder was listed
            if is_id(path.parent.name):
                found.append((path.stat().st_mtime_ns, path.parent.name))
    return found


def ids(root: Path, stage: Stages = None) -> list[str]:
    """Ids of all artifacts, or of some stages, newest first."""
    folders = (stage,) if isinstance(stage, str) else stage or ("[a-z]*",)
    return [artifact_id for _, artifact_id in sorted(committed(root, folders), reverse=True)]


def resolve_id(root: Path, reference: str, stage: Stages = None) -> str:
    """The id that a name means, among the artifacts of some stages.

    Raises:
        ArtifactNotFound: none answers to it.
        AmbiguousReference: several ids begin so.
        CorruptArtifact: a damaged tag.
    """
    if is_id(reference):
        return reference
    if reference == LATEST:
        newest = ids(root, stage)
        if not newest:
            raise ArtifactNotFound(
                f"no {named(stage) or 'artifact'} yet", where=root, found=reference,
                remedy=unfinished_remedy(root, stage) or _FIRST,
            )  # fmt: skip
        return newest[0]
    tag = root / ".tags" / reference
    if _TAG.fullmatch(reference) and tag.is_file():
        return _read_tag(tag)
    return _resolve_prefix(root, reference, stage)


def write_tag(root: Path, name: str, artifact_id: str) -> None:
    """Gives an id a name, moving it from the one that had it.

    Raises:
        InputError: not a usable name.
    """
    if _TAG.fullmatch(name) is None or name == LATEST or is_id(name):
        raise InputError("not a usable tag", found=repr(name), expected="letters, digits, '.', '_', '-'; not an id")
    create_root(root)
    folder = root / ".tags"
    make_durable_folder(root, folder)
    atomic.replace_file(folder / name, canonical_json({"id": artifact_id}))


def read_tags(root: Path) -> dict[str, str]:
    """Ids by tag, sorted."""
    paths = sorted(path for path in (root / ".tags").glob("*") if _TAG.fullmatch(path.name))
    return {path.name: _read_tag(path) for path in paths}


def named(stages: Stages) -> str:
    """For a message: ``harvest``, ``train or import``, or nothing for any stage."""
    return stages if isinstance(stages, str) else " or ".join(stages or ())


def unfinished_remedy(root: Path, stage: Stages = None, answers: Callable[[str], bool] = lambda _: True) -> str | None:
    """For a message that something is not there: what of it was begun, and how to go on; None where nothing was.

    Args:
        root: the store's folder.
        stage: a stage, or some, that are meant.
        answers: whether an id does to the name that was given.
    """
    stages = (stage,) if isinstance(stage, str) else stage
    meant = [name for name in begun(root) if (stages is None or stage_of(name) in stages) and answers(name)]
    if not meant:
        return None
    shown = ", ".join(f"{name} ({state(is_worked_on(root, name))})" for name in meant[:3])
    more = f" and {len(meant) - 3} more" if len(meant) > 3 else ""
    return (
        f"not finished yet: {shown}{more}; the command that began it goes on when given again, and"
        " 'sparsemill artifacts ls' says how far it is"
    )


def _resolve_prefix(root: Path, reference: str, stage: Stages) -> str:
    def answers(artifact_id: str) -> bool:
        digits = artifact_id.rpartition("-")[2]
        return artifact_id.startswith(reference) or (
            _HEX.fullmatch(reference) is not None and digits.startswith(reference)
        )

    there = ids(root, stage)
    matches = sorted(filter(answers, there)) if reference else []
    if not matches:
        kind = "" if stage is None else f"{named(stage)} "
        names = [*read_tags(root), *there]
        known = ", ".join(
            dict.fromkeys([*get_close_matches(reference, names, _SUGGESTED), LATEST, *names[:_SUGGESTED]])
        )
        raise ArtifactNotFound(
            f"no {kind}artifact answers to this name",
            where=root,
            found=repr(reference),
            expected=f"one of {known}, ...",
            remedy=unfinished_remedy(root, stage, answers) if reference else None,
        )
    if len(matches) > 1:
        raise AmbiguousReference(
            "several artifacts answer to this name",
            where=root,
            found=", ".join(matches),
            expected="one",
            remedy="give more of the id",
        )
    return matches[0]


def _read_tag(path: Path) -> str:
    try:
        artifact_id = cast("dict[str, str]", json.loads(path.read_bytes()))["id"]
        stage_of(artifact_id)
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise CorruptArtifact("not a tag", where=path, remedy="tag the artifact again") from error
    return artifact_id
