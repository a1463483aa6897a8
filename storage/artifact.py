"""A committed artifact: its files, found only through the manifest, and checked against it.

Opening reads and checks the manifest alone. ``file`` compares a file's size (one ``stat``); ``read_bytes`` and
``checked_file`` its sha256 too, for files that nothing else protects. (The chunks of an activation store carry their
own checksums, which its reader checks.)
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from storage.errors import ArtifactNotFound, CorruptArtifact, SparsemillError
from storage.fingerprint import Json
from storage.manifest import MANIFEST_NAME, RESERVED_NAMES, FileRecord, Manifest, Parent, Spec

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Problem:
    """One difference between an artifact and its manifest.

    Attributes:
        name: of the file.
        kind: what is wrong with it.
        found: what is there.
        expected: what the manifest says.
    """

    name: str
    kind: Literal["missing", "size", "sha256", "extra", "unreadable", "manifest"]
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class Artifact:
    """A committed artifact.

    Attributes:
        folder: where its files are.
        manifest: what they are.
        manifest_sha256: of ``manifest.json``.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str

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
        """
        record = self._record(name)
        path = self.folder / name
        problem = _size_problem(name, path, record)
        if problem is not None:
            raise self._corrupt(problem)
        return path

    def checked_file(self, name: str) -> Path:
        """As :meth:`file`, having compared the contents' sha256 with the manifest's; reads the file once."""
        path = self.file(name)
        problem = _content_problem(name, path, self._record(name), lambda _: None)
        if problem is not None:
            raise self._corrupt(problem)
        return path

    def read_bytes(self, name: str) -> bytes:
        """Contents of a file, compared with the manifest's sha256."""
        record = self._record(name)
        data = self.file(name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.sha256:
            raise self._corrupt(Problem(name, "sha256", digest, record.sha256))
        return data

    def read_json(self, name: str) -> Json:
        """Contents of a JSON file, compared with the manifest's sha256."""
        return cast("Json", json.loads(self.read_bytes(name)))

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise ArtifactNotFound("the artifact has no such file", where=self.id, found=name)
        return self.manifest.files[name]

    def _corrupt(self, problem: Problem) -> CorruptArtifact:
        return CorruptArtifact(
            f"{problem.name} of {self.id}: {problem.kind}",
            where=self.folder / problem.name,
            found=problem.found,
            expected=problem.expected,
            remedy="'sparsemill verify' lists all damage; remove the folder to compute it again",
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
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactNotFound("no artifact in this folder", where=folder, expected=f"a {MANIFEST_NAME}") from error
    return Artifact(folder, Manifest.from_bytes(data, where=path), hashlib.sha256(data).hexdigest())


def verify(artifact: Artifact, on_progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Compares every file of an artifact with its manifest; reads all of them once.

    Args:
        artifact: what to check.
        on_progress: called with (bytes done, bytes in all) as it goes.

    Returns:
        All differences: damaged manifest first, then files in the manifest's order, then files it does not name.
    """
    problems = list(_manifest_problems(artifact))
    total, done = artifact.manifest.total_bytes, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for name, record in artifact.manifest.files.items():
        path = artifact.folder / name
        problem = _size_problem(name, path, record)
        if problem is None:
            problem = _content_problem(name, path, record, advance)
        else:
            advance(record.bytes)
        if problem is not None:
            problems.append(problem)
    expected = artifact.manifest.files.keys() | RESERVED_NAMES
    extra = sorted(name for name in file_names(artifact.folder) if name not in expected)
    return problems + [Problem(name, "extra", "a file", "none of this name") for name in extra]


def file_names(folder: Path) -> Iterator[str]:
    """Names, relative to ``folder``, of all that lies in it at any depth and is not a folder."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _manifest_problems(artifact: Artifact) -> Iterator[Problem]:
    try:
        found = open_folder(artifact.folder).manifest_sha256
    except (SparsemillError, OSError) as error:
        found = str(error)
    if found != artifact.manifest_sha256:
        yield Problem(MANIFEST_NAME, "manifest", found, artifact.manifest_sha256)
    if artifact.folder.name != artifact.id:
        yield Problem(MANIFEST_NAME, "manifest", f"folder {artifact.folder.name}", artifact.id)


def _size_problem(name: str, path: Path, record: FileRecord) -> Problem | None:
    if path.is_symlink() or not path.is_file():
        return Problem(name, "missing", "no regular file", f"{record.bytes} bytes")
    size = path.stat().st_size
    return None if size == record.bytes else Problem(name, "size", f"{size} bytes", f"{record.bytes} bytes")


def _content_problem(name: str, path: Path, record: FileRecord, advance: Callable[[int], None]) -> Problem | None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ_BYTES, record.bytes + 1)))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                advance(count)
    except OSError as error:
        return Problem(name, "unreadable", str(error), record.sha256)
    found = digest.hexdigest()
    return None if found == record.sha256 else Problem(name, "sha256", found, record.sha256)
