"""Attempts: files of a staging folder's units that other processes write, on other machines perhaps.

A coordinator holds the artifact's lock, hands out units of work, and alone journals and commits. For each unit that it
hands out it makes a folder beside the staged files. Whoever does the work writes into a folder of its own below that
one, named at random, so that two attempts at one unit never touch one file, and answers with the sizes and hashes of
what it wrote. The first answer's files are renamed to their places and journalled; then the unit's folder is removed.
So what a worker that was given up for lost writes late is nobody's, and one whose unit's folder has gone can tell that
nobody waits for it.

Cost: a rename a file. What a killed coordinator leaves lies in its staging folder and goes when that is taken over.
Rejected: workers that write where the files belong (two attempts would mix), and hashing again what they wrote (all of
it would pass through the coordinator).
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from storage import atomic
from storage.artifact import size_problem
from storage.errors import InputError
from storage.fingerprint import Json
from storage.manifest import FileRecord
from storage.staging import Staging

_WANTED = "wanted"
"""Marks a unit's folder while its coordinator waits for it: a late worker may make the folder again, not this file."""


class AttemptAbandoned(Exception):  # noqa: N818 - it ends work that nobody waits for; no user sees it
    """The unit was finished by another attempt, or the coordinator has stopped."""


class Attempts:
    """The units that are handed out for one staging folder; a context manager that clears them.

    Args:
        staging: beside whose files they lie.
    """

    def __init__(self, staging: Staging):
        self._folder = staging.folder.with_name("attempts")

    def __enter__(self) -> "Attempts":
        atomic.remove_tree(self._folder)  # an interrupted run's
        return self

    def __exit__(self, *_: object) -> None:
        for unit in self._folder.glob("*"):
            self.end(unit)

    def begin(self, unit: str) -> Path:
        """Makes the folder for attempts at a unit."""
        folder = self._folder / unit
        atomic.make_folder(folder, durable=False)
        atomic.write_file(folder / _WANTED, [])
        return folder

    def end(self, folder: Path) -> None:
        """Removes a unit's folder, and all attempts with it; one that is being written removes itself."""
        with suppress(OSError):
            atomic.remove_file(folder / _WANTED)
            atomic.remove_tree(folder)


class Attempt:
    """One attempt at a unit, as whoever makes it sees it.

    Args:
        unit: the unit's folder.

    Attributes:
        folder: to write in.
    """

    def __init__(self, unit: Path):
        self._unit = unit
        self.folder = unit / uuid4().hex

    def go_on(self) -> None:
        """Checks that somebody still waits for it; costs one look at the file system.

        Raises:
            AttemptAbandoned: nobody does.
        """
        if not (self._unit / _WANTED).is_file():
            raise AttemptAbandoned(str(self._unit))

    def keep(self, names: Iterable[str]) -> None:
        """Makes the files that were written durable; those written too late are removed.

        Raises:
            AttemptAbandoned: they were.
        """
        try:
            self.go_on()
        except AttemptAbandoned:
            atomic.remove_tree(self._unit)
            raise
        atomic.sync_files([self.folder / name for name in names], top=self.folder)


def accept(
    staging: Staging, unit: str, folder: Path, records: Mapping[str, FileRecord], data: Mapping[str, Json] | None = None
) -> bool:
    """Takes an attempt's files over, and journals their unit.

    Args:
        staging: of the artifact.
        unit: the unit's name.
        folder: that holds the files, on the file system of the staging folder.
        records: sizes and hashes of the files by name.
        data: what the stage wants to know about the unit when resuming.

    Returns:
        Whether they were taken; False for a late duplicate: the unit is finished.

    Raises:
        InputError: a file is not there as it was written.
    """
    if unit in staging.finished:
        return False
    for name, record in records.items():
        problem = size_problem(name, folder / name, record)
        if problem is not None:
            raise InputError(
                "a file that a worker wrote is not here as it wrote it", where=folder / name, found=problem.found,
                expected=problem.expected, remedy="see to it that all machines share the artifact root's folder",
            )  # fmt: skip
    for name in records:
        atomic.rename(folder / name, staging.path(name), durable=False)  # finish() makes them durable, with the folders
    staging.finish(unit, records, data)
    return True
