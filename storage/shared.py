"""An artifact in a remote: its pointer and manifest, hostile until checked.

``<stage>/<id>/pointer.json`` names the manifest whose files lie beside it, under its sha256 (storage.remote). It is
created last and only if there is none: an artifact is in a remote if and only if its pointer is, and of two that are
pushed under one id at once one is. What a pointer and a manifest say is believed only where it is exactly what this
program writes, within caps, and answers what was asked: the id, which is a hash of the spec, and the manifest's sha256.
Names are further held to what means the same file on every system: no two that differ in case or in Unicode's
composition only, none that another takes for a folder. Everything is JSON; nothing is unpickled or run.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import cast

from storage.errors import CorruptArtifact, SparsemillError, UnsupportedFormat
from storage.fingerprint import Json, seal_json, unseal_json
from storage.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    RESERVED_NAMES,
    Manifest,
    is_id,
    is_sha256,
    stage_of,
)
from storage.remote import RemoteStore

MAX_TOTAL_BYTES = 1 << 50
_MAX_POINTER_BYTES = 4096
_MAX_NAME_BYTES = 1024


@dataclass(frozen=True)
class Pointer:
    """What an artifact's pointer says.

    Attributes:
        id: of the artifact.
        manifest_sha256: of its manifest.
        files: how many it has.
        total_bytes: their size together.
    """

    id: str
    manifest_sha256: str
    files: int
    total_bytes: int

    @property
    def key(self) -> str:
        """Where a remote keeps it."""
        return f"{stage_of(self.id)}/{self.id}/pointer.json"

    def to_bytes(self) -> bytes:
        """Its contents."""
        body: dict[str, Json] = {
            "format_version": FORMAT_VERSION,
            "id": self.id,
            "manifest_sha256": self.manifest_sha256,
            "files": self.files,
            "bytes": self.total_bytes,
        }
        return seal_json(body)


def read_pointer(remote: RemoteStore, artifact_id: str) -> Pointer | None:
    """What a remote has under an id; None where it has nothing.

    Raises:
        CorruptArtifact: something else than a pointer to this artifact.
        UnsupportedFormat: a pointer of another format version.
        RemoteError: the remote cannot be read.
    """
    key = Pointer(artifact_id, "", 0, 0).key
    data = remote.read(key, at_most=_MAX_POINTER_BYTES)
    if data is None:
        return None
    try:
        value = unseal_json(data)
        format_version = value["format_version"]
    except (ValueError, KeyError, RecursionError, SparsemillError) as error:
        raise CorruptArtifact("not a pointer to an artifact", where=f"{remote.shown}/{key}", found=error) from error
    if format_version != FORMAT_VERSION:
        raise UnsupportedFormat(
            "pointer of another format", where=f"{remote.shown}/{key}", found=f"version {format_version}",
            expected=FORMAT_VERSION,
        )  # fmt: skip
    try:
        pointer = Pointer(
            artifact_id, cast("str", value["manifest_sha256"]), _count(value["files"]), _count(value["bytes"])
        )
        valid = is_sha256(pointer.manifest_sha256) and pointer.files <= MAX_FILES and pointer.to_bytes() == data
    except (ValueError, KeyError, TypeError, SparsemillError) as error:
        raise CorruptArtifact("not a pointer to an artifact", where=f"{remote.shown}/{key}", found=error) from error
    if not valid:
        raise CorruptArtifact(
            "not a pointer to this artifact", where=f"{remote.shown}/{key}", found=pointer, expected=artifact_id
        )
    return pointer


def read_manifest(remote: RemoteStore, artifact_id: str, manifest_sha256: str) -> tuple[Manifest, bytes]:
    """The manifest of an artifact in a remote, checked, and its bytes.

    Raises:
        CorruptArtifact: it is missing, or is not one that this program would follow.
        RemoteError: the remote cannot be read.
    """
    key = f"{stage_of(artifact_id)}/{artifact_id}/{manifest_sha256}/{MANIFEST_NAME}"
    where = f"{remote.shown}/{key}"
    data = remote.read(key, at_most=MAX_MANIFEST_BYTES)
    found = None if data is None else hashlib.sha256(data).hexdigest()
    if data is None or found != manifest_sha256:
        raise CorruptArtifact(
            "the remote has another manifest, or none", where=where, found=found, expected=manifest_sha256
        )
    manifest = Manifest.from_bytes(data, where=where)
    check_untrusted(manifest, where)
    if manifest.spec.id != artifact_id:
        raise CorruptArtifact(
            "the manifest is another artifact's", where=where, found=manifest.spec.id, expected=artifact_id
        )
    return manifest, data


def check_untrusted(manifest: Manifest, where: str) -> None:
    """Refuses a manifest by someone else that could harm this machine.

    Args:
        manifest: as it was read; its names are safe ones already (``manifest.safe_name``).
        where: it was read from, for errors.

    Raises:
        CorruptArtifact: too many files or bytes, sizes that are none, or names that not every system keeps apart.
    """
    if len(manifest.files) > MAX_FILES:
        raise CorruptArtifact("too many files", where=where, found=len(manifest.files), expected=MAX_FILES)
    seen = {name: name for name in RESERVED_NAMES}  # nor a folder, nor in other case
    total = 0
    for name, record in manifest.files.items():
        try:
            total += _count(record.bytes)
            whole = is_sha256(record.sha256)
        except TypeError:
            whole = False
        if not whole:
            raise CorruptArtifact("not a size and a sha256", where=where, found=f"{name!r}: {record}")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise CorruptArtifact("a file's name is too long", where=where, found=f"{name[:60]}...")
        _keep_apart(name, seen, where)
    if total > MAX_TOTAL_BYTES:
        raise CorruptArtifact(
            "too many bytes", where=where, found=f"{total:,}", expected=f"at most {MAX_TOTAL_BYTES:,}"
        )


def known_ids(remote: RemoteStore, stage: str | None = None) -> list[str]:
    """Ids of what a remote keeps files of, by stage; those that have a pointer are whole.

    Raises:
        RemoteError: the remote cannot be listed: a web server cannot.
    """
    stages = remote.folders() if stage is None else [stage]
    return [found for name in stages for found in remote.folders(name) if is_id(found) and stage_of(found) == name]


def _keep_apart(name: str, seen: dict[str, str], where: str) -> None:
    """Adds a file and its folders to those seen, by what a system that ignores case makes of them."""
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        entry = path if depth == len(parts) else f"{path}/"  # a folder is none of the files
        other = seen.setdefault(unicodedata.normalize("NFC", path.casefold()), entry)
        if other != entry:
            raise CorruptArtifact("two names that some systems take for one", where=where, found=f"{other}, {entry}")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOTAL_BYTES:
        raise TypeError(f"not a number of files or bytes: {value!r}")
    return value
