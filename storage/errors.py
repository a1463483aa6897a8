# ruff: noqa: N818  (most names say what is wrong; "Error" at the end of each would add nothing)
"""One tree of errors; each says what is wrong, where, what was found and expected, and what to do about it."""

from collections.abc import Generator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import ClassVar


class SparsemillError(Exception):
    """Root of all errors that this project raises on purpose.

    Args:
        what: the problem in a few words, such as ``"unknown hook name"``.
        where: the file, artifact, field or prompt concerned.
        found: the offending value.
        expected: what would have been right.
        remedy: what the reader can do, as a clause such as ``"free some space"``.
    """

    kind: ClassVar[str] = "error"
    """Stable name of the class of problem, for scripts and for tests."""

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.what]
        if self.where is not None:
            parts.append(f"where: {self.where}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.remedy is not None:
            parts.append(self.remedy)
        return "; ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds an exception from its positional arguments alone: the fields would not cross processes.
        return (_rebuild, (type(self), self.what, self.__dict__))


def _rebuild(cls: type[SparsemillError], what: str, fields: dict[str, object]) -> SparsemillError:
    error = cls.__new__(cls, what)
    error.args = (what,)
    error.__dict__.update(fields)
    return error


def repair_remedy(artifact_id: str) -> str:
    """The remedy for damage within an artifact."""
    return f"'sparsemill verify {artifact_id} --repair' finds all damage and mends it"


@contextmanager
def naming(path: str | PathLike[str]) -> Generator[None]:
    """Has an error of the operating system name a file: calls that know a descriptor only cannot."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = fspath(path)
        raise


class ConfigError(SparsemillError):
    """A setting that cannot be, alone or beside the others."""

    kind = "config"


class InputError(SparsemillError):
    """Documents, names or numbers given by the user that cannot be used."""

    kind = "input"


class ArtifactNotFound(SparsemillError):
    """No artifact, or no file in an artifact, answers to this reference."""

    kind = "not-found"


class AmbiguousReference(SparsemillError):
    """More than one artifact answers to this reference."""

    kind = "ambiguous"


class CorruptArtifact(SparsemillError):
    """Bytes on disk are not those that were committed."""

    kind = "corrupt"


class RepairRefused(SparsemillError):
    """Damage that cannot be mended without changing what was committed."""

    kind = "repair"


class RemoteError(SparsemillError):
    """A remote that does not answer, does not have a file, or has other bytes under its name.

    Attributes:
        transient: whether the same may well succeed later: the network, or the server, had trouble.
    """

    kind = "remote"

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
        transient: bool = False,
    ):
        super().__init__(what, where=where, found=found, expected=expected, remedy=remedy)
        self.transient = transient


class RemoteConflict(RemoteError):
    """A remote that has other bytes under an artifact's id: two machines answered one question differently."""

    kind = "remote-conflict"


class NotAStore(SparsemillError):
    """A folder that holds something else than an artifact store."""

    kind = "not-a-store"


class StorageFull(SparsemillError):
    """The disk has no room for what is to be written.

    Attributes:
        needed_bytes: what the write needs; 0 where it is not known.
        free_bytes: what the disk has.
    """

    kind = "storage-full"

    def __init__(
        self,
        what: str,
        *,
        needed_bytes: int,
        free_bytes: int,
        where: str | PathLike[str] | None = None,
        remedy: str | None = None,
    ):
        needed = f"{needed_bytes:,} bytes" if needed_bytes else None
        super().__init__(what, where=where, found=f"{free_bytes:,} bytes free", expected=needed, remedy=remedy)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class UnsupportedFormat(SparsemillError):
    """Written by a version whose format this one does not read."""

    kind = "format"


class UnknownHook(SparsemillError):
    """A hook name that the model does not have."""

    kind = "unknown-hook"


class NumericsError(SparsemillError):
    """A value that is not finite, or too large for where it is to be kept.

    Attributes:
        row: index of the first offending row in the array given, or None.
    """

    kind = "numerics"

    def __init__(
        self,
        what: str,
        *,
        row: int | None = None,
        where: str | PathLike[str] | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ):
        super().__init__(what, where=where, found=found, expected=expected, remedy=remedy)
        self.row = row


class MemoryBudgetExceeded(SparsemillError):
    """A stage needs more memory than it was allowed."""

    kind = "memory"


class WorkersLost(SparsemillError):
    """Workers of a cluster that died, one after the other, over the same piece of work."""

    kind = "workers-lost"


class TrainingDiverged(SparsemillError):
    """Training met a loss or a weight that is not finite."""

    kind = "diverged"
