"""What was begun and is not committed, as somebody sees it who only looks.

Looking waits for nothing, writes nothing and takes no lock. Meanwhile folders may come, grow and go, and they may hold
anything: what cannot be read is said to be so, never raised. A journal counts as far as its lines parse; whether the
files are as it says is for whoever goes on with them to find out, as that reads them all.

Work that an error ended leaves a note of it beside its journal, for those who look; nothing goes on from it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import cast

from storage import atomic
from storage.errors import SparsemillError
from storage.fingerprint import Json
from storage.manifest import FORMAT_VERSION, MANIFEST_NAME, Spec, is_id, stage_of

_FAILURE_NAME = "failure.txt"
_MAX_FAILURE_BYTES = 2000
_MAX_LINE_BYTES = 1 << 26  # of a journal; a unit of a hundred thousand files takes less
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SparsemillError)


@dataclass(frozen=True)
class Unfinished:
    """An artifact that is being made, or whose making was interrupted.

    Attributes:
        id: of the artifact.
        folder: that holds its staged files and its journal.
        spec: the question; None where the journal is damaged or of another version.
        units: what the journal says is finished, in that order.
        disk_bytes: what would be free without it.
        working: whether a process holds its lock; None where the system cannot tell.
        committed: whether an artifact of this id is there all the same: it is made again, or was pulled meanwhile.
        failure: the error that ended it, in a line; None where a signal, a crash or nothing did.
    """

    id: str
    folder: Path
    spec: Spec | None
    units: tuple[str, ...]
    disk_bytes: int
    working: bool | None
    committed: bool
    failure: str | None = None

    @property
    def stage(self) -> str:
        """The stage that makes it."""
        return stage_of(self.id)


def unfinished(root: Path, stage: str | None = None) -> list[Unfinished]:
    """What is unfinished in a store, or of one stage there, by id."""
    found: list[Unfinished] = []
    for artifact_id in begun(root):
        if stage in (None, stage_of(artifact_id)):
            folder = root / ".staging" / artifact_id
            spec, units = _read_journal(folder / "journal.jsonl", artifact_id)
            own = sum(stat.st_blocks * 512 for stat in file_stats(folder) if stat.st_nlink == 1)
            working, committed = is_worked_on(root, artifact_id), _is_committed(root, artifact_id)
            failure = None if working else _read_failure(folder)
            found.append(Unfinished(artifact_id, folder, spec, units, own, working, committed, failure))
    return found


def begun(root: Path) -> list[str]:
    """Ids of all that is unfinished in a store, sorted; looks at the names of folders alone."""
    try:
        names = sorted(path.name for path in (root / ".staging").iterdir())
    except OSError:
        return []
    return [name for name in names if is_id(name) and _is_begun(root, name)]


def is_worked_on(root: Path, artifact_id: str) -> bool | None:
    """Whether a process makes or mends an artifact at this moment; None where the system cannot tell."""
    return atomic.is_locked(root / ".locks" / artifact_id)


def state(working: bool | None) -> str:
    """In words, what :func:`is_worked_on` answers of something unfinished."""
    return {True: "being made", False: "interrupted", None: "unfinished"}[working]


def note_failure(root: Path, artifact_id: str, error: Exception | None) -> None:
    """Leaves a note of the error that ended work, or of None removes that of an earlier end; for who holds its lock.

    Where that fails there is no note: it says nothing that the error, which is raised, did not say.
    """
    note = root / ".staging" / artifact_id / _FAILURE_NAME
    with suppress(OSError):
        if error is not None:
            atomic.replace_file(note, _in_a_line(_told(error)).encode()[:_MAX_FAILURE_BYTES])
        elif note.is_file():
            atomic.remove_file(note)


def file_stats(folder: Path) -> Iterator[os.stat_result]:
    """Of all that lies in a folder at any depth and is no folder; what is removed meanwhile is left out."""
    ahead = [os.fspath(folder)]
    while ahead:
        with suppress(OSError), os.scandir(ahead.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    if S_ISDIR(stat.st_mode):
                        ahead.append(entry.path)
                    else:
                        yield stat


def _is_begun(root: Path, artifact_id: str) -> bool:
    folder = root / ".staging" / artifact_id
    if not S_ISDIR(_mode(folder)):
        return False
    # Who commits moves the files away and then removes the rest: that alone is left where it was killed in between.
    return S_ISDIR(_mode(folder / "files")) or not _is_committed(root, artifact_id)


def _is_committed(root: Path, artifact_id: str) -> bool:
    return S_ISREG(_mode(root / stage_of(artifact_id) / artifact_id / MANIFEST_NAME))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:  # not there, or somebody else's
        return 0


def _told(error: Exception) -> str:
    if isinstance(error, SparsemillError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _read_failure(folder: Path) -> str | None:
    note = folder / _FAILURE_NAME
    with suppress(OSError):
        if S_ISREG(_mode(note)):
            with note.open("rb") as file:
                return _in_a_line(file.read(_MAX_FAILURE_BYTES).decode(errors="ignore")) or None
    return None


def _in_a_line(text: str) -> str:
    """What a terminal shows as it is: documents, whose names errors quote, may hold anything."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def _read_journal(journal: Path, artifact_id: str) -> tuple[Spec | None, tuple[str, ...]]:
    """The spec and the finished units, as far as the journal's lines are what they should be."""
    spec, units = None, dict[str, None]()
    with suppress(*_DAMAGED):
        for line in _lines(journal):
            if spec is None:
                recorded = Spec.from_json(cast("dict[str, Json]", line["spec"]))
                if line["format_version"] != FORMAT_VERSION or recorded.id != artifact_id:
                    break
                spec = recorded
            elif "dropped" in line:
                units.pop(cast("str", line["dropped"]), None)
            elif type(unit := line["unit"]) is str:
                units[unit] = None
    return spec, tuple(units)


def _lines(journal: Path) -> Iterator[dict[str, Json]]:
    if not S_ISREG(_mode(journal)):  # nothing, or a pipe that would keep its reader waiting
        return
    with journal.open("rb") as file:
        while (text := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):  # else torn, or being written
            yield json.loads(text)
