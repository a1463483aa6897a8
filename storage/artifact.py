"""A committed artifact: its files, found only through the manifest, and checked against it.

Opening reads and checks the manifest alone. ``file`` compares a file's size (one ``stat``); ``read_bytes`` and
``checked_file`` its sha256 too, for files that nothing else protects. (The chunks of an activation store carry their
own checksums, which its reader checks.)
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from storage.errors import ArtifactNotFound, CorruptArtifact, naming, repair_remedy
from storage.fingerprint import Json, sha256_file
from storage.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, Parent, Spec


@dataclass(frozen=True)
class Problem:
    """One difference between an artifact and its manifest.

    Attributes:
        name: of the file.
        kind: what is wrong with it.
        found: what is there.
        expected: what the manifest says.
        detail: of a damaged shard, its chunks that are.
    """

    name: str
    kind: Literal["missing", "size", "sha256", "crc32c", "extra", "unreadable", "manifest"]
    found: str
    expected: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f"{self.detail}; " if self.detail else ""
        return f"{self.name}: {self.kind}: {detail}found {self.found}, expected {self.expected}"


class Origin(Protocol):
    """Where an artifact that is not, or not whole, on this machine comes from."""

    @property
    def streams(self) -> bool:
        """Whether large files are read where they are, in parts, instead of being fetched."""
        ...

    def fetch(self, artifact: "Artifact", names: Sequence[str]) -> None:
        """Puts those of the artifact's files that are missing into its folder, checked against its manifest."""
        ...

    def read_range(self, artifact: "Artifact", name: str, start: int, n_bytes: int) -> bytes:
        """A part of a file, unchecked."""
        ...

    def verify(self, artifact: "Artifact", on_progress: Callable[[int, int], None] | None) -> list[Problem]:
        """Compares every file, where it is, with the manifest; told (bytes done, bytes in all)."""
        ...

    def find(self, artifact_id: str, manifest_sha256: str | None = None) -> "Artifact | None":
        """An artifact of the same place; of this manifest, where it is given."""
        ...


@dataclass(frozen=True)
class Artifact:
    """A committed artifact.

    Attributes:
        folder: where its files are, or go when they are fetched.
        manifest: what they are.
        manifest_sha256: of ``manifest.json``.
        origin: where files come from when they are asked for; None where all are here.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    origin: Origin | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """``<stage>-<12 hexadecimal digits>``."""
        return self.manifest.spec.id

    @property
    def spec(self) -> Spec:
        """The question it answers."""
        return self.manifest.spec

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.manifest.spec.stage

    @property
    def config(self) -> Mapping[str, Json]:
        """The identity fields of the config it was made with."""
        return self.manifest.spec.config

    @property
    def parents(self) -> Mapping[str, Parent]:
        """What it was made from, by role."""
        return self.manifest.spec.parents

    @property
    def stats(self) -> Mapping[str, Json]:
        """The figures its stage computed."""
        return self.manifest.stats

    def as_parent(self) -> Parent:
        """This artifact as an entry of a child's spec."""
        return Parent(self.id, self.manifest_sha256)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest names, which is there and has the right size.

        Raises:
            ArtifactNotFound: the manifest names no such file.
            CorruptArtifact: the file is missing or has another size.
            RemoteError: it is elsewhere, and could not be fetched.
        """
        record = self._record(name)
        self.fetch([name])
        path = self.folder / name
        problem = size_problem(name, path, record)
        if problem is not None:
            raise self._corrupt(problem)
        return path

    def fetch(self, names: Sequence[str] | None = None) -> None:
        """Sees to it that files are here, all of them by default; at no cost where the artifact is."""
        if self.origin is not None:
            self.origin.fetch(self, list(self.manifest.files) if names is None else names)

    def checked_file(self, name: str) -> Path:
        """As :meth:`file`, having compared the contents' sha256 with the manifest's; reads the file once."""
        path = self.file(name)
        self._check_digest(name, sha256_file(path))
        return path

    def read_bytes(self, name: str) -> bytes:
        """Contents of a file, compared with the manifest's sha256."""
        path = self.file(name)
        with naming(path):
            data = path.read_bytes()
        self._check_digest(name, hashlib.sha256(data).hexdigest())
        return data

    def read_json(self, name: str) -> Json:
        """Contents of a JSON file, compared with the manifest's sha256."""
        return cast("Json", json.loads(self.read_bytes(name)))

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise ArtifactNotFound("the artifact has no such file", where=self.id, found=name)
        return self.manifest.files[name]

    def _check_digest(self, name: str, found: str) -> None:
        expected = self._record(name).sha256
        if found != expected:
            raise self._corrupt(Problem(name, "sha256", found, expected))

    def _corrupt(self, problem: Problem) -> CorruptArtifact:
        return CorruptArtifact(
            f"{problem.name} of {self.id}: {problem.kind}",
            where=self.folder / problem.name,
            found=problem.found,
            expected=problem.expected,
            remedy=repair_remedy(self.id),
        )


def open_folder(folder: Path) -> Artifact:
    """Opens a committed artifact by its folder, wherever that is.

    Raises:
        ArtifactNotFound: the folder holds no manifest.
        CorruptArtifact: the manifest is damaged.
        UnsupportedFormat: it is of another format version.
    """
    path = folder / MANIFEST_NAME
    try:
        with naming(path), path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)  # of a larger one, enough to refuse it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactNotFound("no artifact in this folder", where=folder, expected=f"a {MANIFEST_NAME}") from error
    try:
        manifest = Manifest.from_bytes(data, where=path)
    except CorruptArtifact as error:
        error.remedy = "nothing else says what its files must be: remove the folder, then make or fetch it again"
        raise
    return Artifact(folder, manifest, hashlib.sha256(data).hexdigest())


def file_names(folder: Path) -> Iterator[str]:
    """Names, relative to ``folder``, of all that lies in it at any depth and is not a folder."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def size_problem(name: str, path: Path, record: FileRecord) -> Problem | None:
    """What one look at a file tells: it is no regular file, or of another size."""
    if path.is_symlink() or not path.is_file():
        return Problem(name, "missing", "no regular file", f"{record.bytes} bytes")
    size = path.stat().st_size
    return None if size == record.bytes else Problem(name, "size", f"{size} bytes", f"{record.bytes} bytes")
