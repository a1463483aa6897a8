"""Files of committed artifacts in an object store, a web server or a shared folder.

Layout under the remote's URL: a file lies at ``<stage>/<id>/<sha256 of the manifest>/<name>``, so that two artifacts of
one id with different bytes never mix, and what belongs to a manifest is found from the manifest alone. A file is
streamed into a temporary one, hashed on the way, and renamed only if size and sha256 are the manifest's: what a remote
serves is never trusted. obstore talks to all of them, retries what is transient, and takes credentials from where each
service's own tools do. Its error messages quote the URL with its user, password and signature, and the server's page:
ours keep the reason alone, and are not chained to them.
Rejected: boto3, fsspec (a package a service, and each its own way of streaming).
"""

import hashlib
import os
import re
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from storage import atomic
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound, ConfigError, RemoteError
from storage.manifest import FileRecord

VARIABLE = "SPARSEMILL_REMOTE"

_PIECE_BYTES = 1 << 22
_RETRY = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1 day"}  # a file may be large, not stuck


class RemoteStore:
    """A place that holds artifacts' files.

    Args:
        url: ``s3://``, ``gs://``, ``az://``, ``https://``, ``http://``, ``file://``, or the path of a folder.

    Raises:
        ConfigError: no such kind of place, or it is set up wrongly.
    """

    def __init__(self, url: str):
        if "://" not in url:
            url = Path(url).expanduser().absolute().as_uri()
        self.shown = _without_secrets(url)
        """The URL without user, password and query, for people."""
        options: dict[str, Any] = {}
        if not url.startswith("file:"):
            options = {"retry_config": _RETRY, "client_options": _CLIENT | {"allow_http": url.startswith("http:")}}
        try:
            self._store = from_url(url, **options)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigError(
                "the remote cannot be used",
                where=self.shown,
                found=_reason(error),
                expected="s3://, gs://, az://, https://, http://, file://, or an existing folder",
            ) from None

    @classmethod
    def configured(cls, url: str | None = None) -> "RemoteStore | None":
        """The remote of a URL, or else of the environment's SPARSEMILL_REMOTE; None where neither names one."""
        url = url or os.environ.get(VARIABLE)
        return cls(url) if url else None

    def fetch_file(self, artifact: Artifact, name: str, target: Path) -> None:
        """Fetches one file of a committed artifact.

        Args:
            artifact: whose manifest says what the file must be.
            name: of the file in the artifact.
            target: where to put it; the old bytes, if any, stay until the new ones are there and checked.

        Raises:
            ArtifactNotFound: the manifest names no such file, or the remote does not have it.
            RemoteError: the remote cannot be read, or has other bytes.
        """
        if name not in artifact.manifest.files:
            raise ArtifactNotFound("the artifact has no such file", where=artifact.id, found=name)
        key = f"{artifact.stage}/{artifact.id}/{artifact.manifest_sha256}/{name}"
        atomic.stream_file(target, self._checked(key, artifact.manifest.files[name]))

    def _checked(self, key: str, record: FileRecord) -> Generator[bytes]:
        """A file's bytes in pieces; fails where they are too many or, after the last, not the ones wanted."""
        digest, size = hashlib.sha256(), 0
        for piece in self._pieces(key):
            size += len(piece)
            digest.update(piece)
            if size > record.bytes:
                break
            yield piece
        found = (size, digest.hexdigest())
        if found != (record.bytes, record.sha256):
            raise RemoteError(
                "the remote has another file under this name",
                where=f"{self.shown}/{key}",
                found=f"{'more than ' if size > record.bytes else ''}{size:,} bytes, sha256 {found[1]}",
                expected=f"{record.bytes:,} bytes, sha256 {record.sha256}",
            )

    def _pieces(self, key: str) -> Generator[bytes]:
        try:
            yield from obstore.get(self._store, key).stream(min_chunk_size=_PIECE_BYTES)
        except FileNotFoundError:
            raise ArtifactNotFound("the remote does not have this file", where=f"{self.shown}/{key}") from None
        except (BaseError, OSError) as error:
            raise RemoteError(
                "the remote could not be read", where=f"{self.shown}/{key}", found=_reason(error)
            ) from None


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _reason(error: Exception) -> str:
    """What went wrong, from an error's first line, without addresses and without what a server wrote."""
    line = str(error).partition("\n")[0]
    text = re.sub(r"\S*://\S*", "...", re.split(r"[<{]", line)[0]).strip(" :")
    return f"{type(error).__name__}: {text}"
