"""What an artifact is: its spec (the question), and its manifest (the answer's files, with size and sha256).

The id is a hash of the spec alone: stage, the stage's output version, the identity fields of the config, and each
parent's id and manifest hash. So one question has one id before any of it is computed, and a changed parent changes it.

``manifest.json`` is canonical JSON whose field ``checksum`` is the sha256 of the rest; a reader accepts only bytes that
are exactly what it would itself write, so that no flipped bit of a manifest goes unseen, spaces included. Rejected: a
second file with the hash (two files cannot be renamed as one outside their folder), and hashing only file contents
(stats are read and believed too).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import cast

from storage.errors import ConfigError, CorruptArtifact, InputError, SparsemillError, UnsupportedFormat
from storage.fingerprint import Json, fingerprint, seal_json, unseal_json, without_signed_zeros

FORMAT_VERSION = 0
MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"
RESERVED_NAMES = frozenset({MANIFEST_NAME, RUN_NAME})
MAX_FILES = 1_000_000
MAX_MANIFEST_BYTES = 1 << 28  # a million files take about half of it
_MAX_VALUES = 4 * MAX_FILES  # a file is three, and small ones take a hundred times their bytes once they are parsed

_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_ID = re.compile(r"([a-z][a-z0-9_]*)-[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Parent:
    """An artifact that another was made from.

    Attributes:
        id: of the parent.
        manifest_sha256: of the parent's ``manifest.json``, so that a parent made again differently is another parent.
    """

    id: str
    manifest_sha256: str


@dataclass(frozen=True)
class Spec:
    """The question that an artifact answers.

    Attributes:
        stage: a verb, such as ``"harvest"``.
        version: of the stage's output: raised when the same config and parents would give something else.
        config: identity fields alone, as JSON.
        parents: by role, such as ``"tokens"``.
    """

    stage: str
    version: int
    config: Mapping[str, Json]
    parents: Mapping[str, Parent] = field(default_factory=dict[str, Parent])

    def __post_init__(self) -> None:
        if _STAGE.fullmatch(self.stage) is None:
            raise ConfigError("a stage's name is a lower-case word", found=repr(self.stage))
        for role, parent in self.parents.items():
            if not is_id(parent.id) or not is_sha256(parent.manifest_sha256):
                raise ConfigError("a parent is an artifact id and a sha256", where=f"parents.{role}", found=parent)
        object.__setattr__(self, "config", without_signed_zeros(self.config))

    @property
    def id(self) -> str:
        """``<stage>-<12 hexadecimal digits>``."""
        return f"{self.stage}-{fingerprint(self.to_json())[:12]}"

    def to_json(self) -> dict[str, Json]:
        """The spec as JSON; :meth:`from_json` reads it back."""
        parents = {
            role: {"id": parent.id, "manifest_sha256": parent.manifest_sha256} for role, parent in self.parents.items()
        }
        return {"stage": self.stage, "version": self.version, "config": self.config, "parents": parents}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> "Spec":
        """Reads :meth:`to_json` back; ``KeyError`` or ``TypeError`` where it is something else."""
        parents = cast("Mapping[str, Mapping[str, str]]", value["parents"])
        if type(value["version"]) is not int:
            raise TypeError(f"not a version: {value['version']!r}")
        return cls(
            stage=cast("str", value["stage"]),
            version=value["version"],
            config=_object(value["config"]),
            parents={role: Parent(parent["id"], parent["manifest_sha256"]) for role, parent in parents.items()},
        )


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes, and the sha256 of its contents in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Json]) -> "FileRecord":
        """Reads a file's record; ``KeyError`` or ``TypeError`` where it is something else."""
        size, digest = value["bytes"], value["sha256"]
        if type(size) is not int or size < 0 or type(digest) is not str or not is_sha256(digest):
            raise TypeError(f"not a size and a sha256 of {name!r}: {value}")
        return cls(size, digest)


@dataclass(frozen=True)
class Manifest:
    """What a committed artifact holds.

    Attributes:
        spec: the question.
        files: by name, a relative POSIX path; all files of the artifact but the manifest and ``run.json``.
        stats: figures that the stage computed.
        provenance: what the bytes depend on beside the spec: device kind, instruction set, library versions, threads.
    """

    spec: Spec
    files: Mapping[str, FileRecord]
    stats: Mapping[str, Json]
    provenance: Mapping[str, Json]

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.bytes for record in self.files.values())

    def to_bytes(self) -> bytes:
        """The contents of ``manifest.json``."""
        body: dict[str, Json] = {
            "format_version": FORMAT_VERSION,
            "id": self.spec.id,
            "spec": self.spec.to_json(),
            "files": {safe_name(name): {"bytes": r.bytes, "sha256": r.sha256} for name, r in self.files.items()},
            "stats": self.stats,
            "provenance": self.provenance,
        }
        return seal_json(body)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str | Path) -> "Manifest":
        """Reads and checks the contents of a ``manifest.json``.

        Args:
            data: the file's bytes.
            where: named in errors.

        Raises:
            UnsupportedFormat: written in another format version.
            CorruptArtifact: anything else than what :meth:`to_bytes` writes, or more than a million files take.
        """
        values = sum(map(data.count, (b",", b"[", b"{")))  # at least; before any of them is made
        if len(data) > MAX_MANIFEST_BYTES or values > _MAX_VALUES:
            raise CorruptArtifact(
                "too large for a manifest", where=where, found=f"{len(data):,} bytes, {values:,} values",
                expected=f"at most {MAX_MANIFEST_BYTES:,} and {_MAX_VALUES:,}",
            )  # fmt: skip
        try:
            value = unseal_json(data)
            format_version = value["format_version"]
        except (ValueError, KeyError, RecursionError, InputError) as error:
            raise CorruptArtifact("not a manifest, or damaged", where=where, found=str(error)) from error
        if format_version != FORMAT_VERSION:
            raise UnsupportedFormat(
                "manifest of another format", where=where, found=f"version {format_version}", expected=FORMAT_VERSION
            )
        try:
            manifest = cls._from_json(value)
            same = manifest.to_bytes() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SparsemillError) as error:
            raise CorruptArtifact("not a manifest", where=where, found=f"{type(error).__name__}: {error}") from error
        if not same:
            raise CorruptArtifact(
                "the manifest contradicts itself", where=where, found=value.get("id"), expected=manifest.spec.id
            )
        return manifest

    @classmethod
    def _from_json(cls, value: Mapping[str, Json]) -> "Manifest":
        files = cast("Mapping[str, Mapping[str, Json]]", value["files"])
        return cls(
            spec=Spec.from_json(cast("Mapping[str, Json]", value["spec"])),
            files={name: FileRecord.from_json(name, record) for name, record in files.items()},
            stats=_object(value["stats"]),
            provenance=_object(value["provenance"]),
        )


def _object(value: Json) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise TypeError(f"not a JSON object: {value!r}")
    return value


def is_id(text: str) -> bool:
    """Whether a text has the form of an artifact id."""
    return _ID.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Whether a text is a sha256 in hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def stage_of(artifact_id: str) -> str:
    """The stage that an artifact id names."""
    match = _ID.fullmatch(artifact_id)
    if match is None:
        raise InputError("not an artifact id", found=repr(artifact_id), expected="<stage>-<12 hexadecimal digits>")
    return match[1]


def safe_name(name: str) -> str:
    """Checks a file's name within an artifact and returns it.

    A name is a relative POSIX path that stays inside its folder and means the same file everywhere: no empty, ``.`` or
    ``..`` part, no backslash, colon or control character, and not the manifest's own name.

    Raises:
        InputError: the name is none of these.
    """
    path = PurePosixPath(name)
    bad_character = any(character in '\\:*?"<>|' or ord(character) < 32 or ord(character) == 127 for character in name)
    bad_part = any(part in {"", ".", ".."} or len(part.encode(errors="replace")) > 255 for part in name.split("/"))
    if bad_character or bad_part or path.is_absolute() or str(path) != name or name in RESERVED_NAMES:
        raise InputError("not a safe file name in an artifact", found=repr(name), expected="a relative path like a/b.c")
    return name
