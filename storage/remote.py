"""Files of committed artifacts in an object store, a web server or a shared folder.

Layout under the remote's URL: a file lies at ``<stage>/<id>/<sha256 of the manifest>/<name>``, so that two artifacts of
one id with different bytes never mix, and what belongs to a manifest is found from the manifest alone. A file is
streamed into a temporary one, hashed on the way, and renamed only if size and sha256 are the manifest's: what a remote
serves is never trusted. A large file comes in ranges, several at a time and each asked for again where the connection
broke; it goes up in parts likewise, hashed on the way, and appears only if it was as its manifest says. obstore talks
to all of them, retries what is transient, and takes credentials from where each service's own tools do
(storage.credentials). Ours are not chained to its errors, which quote secrets (storage.remote_errors).

A service has what it acknowledged; a folder has it once it is fsynced, which obstore does not do. So into a folder we
write ourselves (storage.atomic): a file's bytes are durable before its name is there, as a later push believes a name
and a size, and names are made durable (``settle``) before the pointer that counts on them.
Rejected: boto3, fsspec (a package a service, and each its own way of streaming).
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from storage import atomic
from storage.artifact import Artifact, size_problem
from storage.credentials import aws_profile
from storage.errors import ArtifactNotFound, ConfigError, CorruptArtifact, InputError, RemoteError, repair_remedy
from storage.remote_errors import Done, explained, reason, status_of

VARIABLE = "SPARSEMILL_REMOTE"

T = TypeVar("T")

OnBytes: TypeAlias = Callable[[int], None]
"""Told how many more bytes have moved."""

_PIECE_BYTES = 1 << 22
_RANGE_BYTES = 1 << 24  # of a large file; a smaller one is one request
_RANGES_AHEAD = 4
_PART_BYTES = 1 << 24  # S3 takes 10,000 parts: files up to 156 GiB
_BAD_REQUEST = 400
_ATTEMPTS = 3  # of an object, or a range of it, whose answer broke off: obstore itself does not ask for it again
_RETRY = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1 day"}  # a file may be large, not stuck
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


def uncounted(n_bytes: int) -> None:
    """Takes no notice of bytes that moved."""


class RemoteStore:
    """A place that holds artifacts' files; safe to use from several threads, and cheap to pickle.

    Args:
        url: ``s3://``, ``gs://``, ``az://``, ``https://``, ``http://``, ``file://``, or the path of a folder.

    Raises:
        ConfigError: no such kind of place, or it is set up wrongly.
    """

    def __init__(self, url: str):
        if "://" not in url:
            url = Path(url).expanduser().absolute().as_uri()
        self._url = url
        self.shown = without_secrets(url)
        """The URL without user, password and query, for people."""
        self.read_only = url.startswith(("http:", "https:"))
        """Whether it is a web server: it takes no files, lists none, and may know no ranges."""
        self._folder = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None
        try:
            self._store = from_url(url, **_options(url))
        except (BaseError, OSError, ValueError) as error:
            missing = self._folder is not None and not self._folder.exists()
            raise ConfigError(
                "the remote cannot be used",
                where=self.shown,
                found="no such folder" if missing else reason(error),
                expected="s3://, gs://, az://, https://, http://, file://, or an existing folder",
            ) from None

    def __reduce__(self) -> tuple[object, ...]:
        return (RemoteStore, (self._url,))

    @classmethod
    def configured(cls, url: str | None = None) -> "RemoteStore | None":
        """The remote of a URL, or else of the environment's SPARSEMILL_REMOTE; None where neither names one."""
        url = url or os.environ.get(VARIABLE)
        return cls(url) if url else None

    def fetch_file(self, artifact: Artifact, name: str, target: Path, on_bytes: OnBytes = uncounted) -> None:
        """Fetches one file of a committed artifact.

        Args:
            artifact: whose manifest says what the file must be.
            name: of the file in the artifact.
            target: where to put it; the old bytes, if any, stay until the new ones are there and checked.
            on_bytes: told how many more bytes have come.

        Raises:
            ArtifactNotFound: the manifest names no such file, or the remote does not have it.
            RemoteError: the remote cannot be read, or has other bytes.
        """

        def ask() -> None:
            counted = 0

            def count(n_bytes: int) -> None:
                nonlocal counted
                counted += n_bytes
                on_bytes(n_bytes)

            try:
                atomic.stream_file(target, self.file_pieces(artifact, name, count))
            except BaseException:
                on_bytes(-counted)  # they will have to come again
                raise

        _persistently(ask)

    def file_pieces(self, artifact: Artifact, name: str, on_bytes: OnBytes = uncounted) -> Generator[bytes]:
        """A file's bytes in pieces; fails where they are too many or, after the last, not the ones wanted."""
        if name not in artifact.manifest.files:
            raise ArtifactNotFound("the artifact has no such file", where=artifact.id, found=name)
        record, key = artifact.manifest.files[name], file_key(artifact, name)
        digest, size = hashlib.sha256(), 0
        for piece in self._pieces(key, record.bytes):
            size += len(piece)
            digest.update(piece)
            if size > record.bytes:
                break
            yield piece
            on_bytes(len(piece))
        found = (size, digest.hexdigest())
        if found != (record.bytes, record.sha256):
            raise RemoteError(
                "the remote has another file under this name",
                where=f"{self.shown}/{key}",
                found=f"{'more than ' if size > record.bytes else ''}{size:,} bytes, sha256 {found[1]}",
                expected=f"{record.bytes:,} bytes, sha256 {record.sha256}",
            )

    def read(self, key: str, *, at_most: int) -> bytes | None:
        """An object's bytes; None where there is none.

        Raises:
            RemoteError: the remote cannot be read, or the object has more than ``at_most`` bytes.
        """

        def ask() -> bytes:
            data = bytearray()
            for piece in self._stream(key):
                data += piece
                if len(data) > at_most:
                    raise RemoteError(
                        "an object of the remote is too large for what it is", where=f"{self.shown}/{key}",
                        found=f"more than {at_most:,} bytes",
                    )  # fmt: skip
            return bytes(data)

        try:
            return _persistently(ask)
        except ArtifactNotFound:
            return None

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """A part of an object; of a file's, the caller checks it.

        Raises:
            ArtifactNotFound: the remote does not have it.
            RemoteError: the remote cannot be read, or the object ends earlier.
        """

        def ask() -> bytes:
            with self._told(key):
                return cast("bytes", obstore.get_range(self._store, key, start=start, length=n_bytes))

        data = _persistently(ask)
        if len(data) != n_bytes:
            raise RemoteError(
                "the remote has a shorter file", where=f"{self.shown}/{key}", found=f"{len(data):,} bytes at {start:,}",
                expected=f"{n_bytes:,}",
            )  # fmt: skip
        return data

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, replacing what was there."""
        with self._told(key, "written"):
            if self._folder is not None:
                _put_in_folder(self._folder / key, [data])
            else:
                obstore.put(self._store, key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object unless there is one; whether it did.

        Of several that try at once one does, in S3, GCS, Azure and a folder; Swift looks before it writes, so that two
        may, and the later one's bytes stay: who must know reads them back.
        """
        with self._told(key, "written"):
            if self._folder is not None:
                return atomic.create_file(self._folder / key, data)
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def put_file(self, artifact: Artifact, name: str, on_bytes: OnBytes = uncounted) -> None:
        """Writes one file of a committed artifact, which appears whole or not at all.

        Raises:
            CorruptArtifact: the file is not as its manifest says; nothing has appeared.
            RemoteError: the remote does not take it.
        """
        record, key = artifact.manifest.files[name], file_key(artifact, name)
        pieces = _checked_pieces(artifact, name, on_bytes)
        with self._told(key, "written"):
            if self._folder is not None:
                _put_in_folder(self._folder / key, pieces)
            elif record.bytes <= _PART_BYTES:
                obstore.put(self._store, key, b"".join(pieces), use_multipart=False)
            else:
                self._put_in_parts(key, pieces, record.bytes)

    def settle(self, keys: Iterable[str]) -> None:
        """Makes sure that objects which were written stay, where the remote is a folder; services have done so."""
        if self._folder is not None:
            with self._told("", "written"):
                atomic.sync_names([self._folder / key for key in keys], top=self._folder)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Sizes of all objects below a prefix, by what follows it in their keys."""

        def ask() -> dict[str, int]:
            with self._told(prefix, "listed"):
                pages = obstore.list(self._store, prefix)
                return {found["path"].removeprefix(f"{prefix}/"): found["size"] for page in pages for found in page}

        return _persistently(ask)

    def folders(self, prefix: str | None = None) -> list[str]:
        """Names of what lies below a prefix and has something below it, sorted."""

        def ask() -> list[str]:
            with self._told(prefix or "", "listed"):
                found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

        return _persistently(ask)

    def _put_in_parts(self, key: str, pieces: Iterable[bytes], size: int) -> None:
        """Writes a large file; that another push of the same bytes was quicker is no error.

        Azure keeps all pushes' parts under the object's name and drops them once one push has put its own together, so
        that it refuses the others, and a second try of one whose answer was lost. A key has one content (``file_key``).
        """
        try:
            obstore.put(self._store, key, pieces, chunk_size=_PART_BYTES, max_concurrency=_RANGES_AHEAD)
        except BaseError as error:
            if status_of(error) != _BAD_REQUEST or self._size(key) != size:
                raise

    def _size(self, key: str) -> int | None:
        """Size of an object; None where it cannot be told."""
        with suppress(BaseError, OSError):
            return obstore.head(self._store, key)["size"]
        return None

    def _pieces(self, key: str, size: int) -> Generator[bytes]:
        if size <= _RANGE_BYTES or self.read_only:
            yield from self._stream(key)
            return
        starts = range(0, size, _RANGE_BYTES)
        with ThreadPoolExecutor(_RANGES_AHEAD, "sparsemill-range") as pool:
            coming: deque[Future[bytes]] = deque()
            try:
                for start in starts:
                    coming.append(pool.submit(self.read_range, key, start, min(_RANGE_BYTES, size - start)))
                    if len(coming) >= _RANGES_AHEAD:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _stream(self, key: str) -> Generator[bytes]:
        with self._told(key):
            yield from obstore.get(self._store, key).stream(min_chunk_size=_PIECE_BYTES)

    @contextmanager
    def _told(self, key: str, done: Done = "read") -> Generator[None]:
        """Makes obstore's errors ours."""
        try:
            yield
        except (BaseError, OSError) as error:
            where = f"{self.shown}/{key}"
            raise explained(error, done, where=where, in_folder=self._folder is not None) from None


def file_key(artifact: Artifact, name: str) -> str:
    """Where a remote keeps a file of an artifact."""
    return f"{artifact.stage}/{artifact.id}/{artifact.manifest_sha256}/{name}"


def without_secrets(url: str) -> str:
    """A URL without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _options(url: str) -> dict[str, Any]:
    if url.startswith("file:"):
        return {}
    profile = aws_profile() if url.startswith("s3") else {}
    named = [profile.get("endpoint", ""), *(os.environ.get(name, "") for name in _ENDPOINTS)]
    # Google's is https unless named otherwise.
    plain = url.startswith(("http:", "gs:")) or any(endpoint.startswith("http:") for endpoint in named)
    options: dict[str, Any] = {"retry_config": _RETRY, "client_options": _CLIENT | {"allow_http": plain}}
    return options | ({"config": profile} if profile else {})


def _put_in_folder(path: Path, pieces: Iterable[bytes]) -> None:
    atomic.make_folder(path.parent, durable=False)
    atomic.put_file(path, pieces)


def _persistently(ask: Callable[[], T]) -> T:
    for attempt in range(_ATTEMPTS - 1):
        try:
            return ask()
        except RemoteError as error:
            if not error.transient:
                raise
            time.sleep(0.1 * 4**attempt)
    return ask()


def _checked_pieces(artifact: Artifact, name: str, on_bytes: OnBytes) -> Generator[bytes]:
    """A local file's bytes in pieces; fails after the last where they are not as the manifest says."""
    record, path = artifact.manifest.files[name], artifact.folder / name
    problem = size_problem(name, path, record)
    digest = hashlib.sha256()
    if problem is None:
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    yield piece
                    on_bytes(len(piece))
        except OSError as error:  # the disk's, not the remote's
            raise CorruptArtifact(
                f"{name} of {artifact.id} cannot be read, and was not pushed", where=path, found=error.strerror,
                expected=record.sha256, remedy=repair_remedy(artifact.id),
            ) from error  # fmt: skip
    if problem is not None or digest.hexdigest() != record.sha256:
        raise CorruptArtifact(
            f"{name} of {artifact.id} is not as it was committed, and was not pushed", where=path,
            found=problem.found if problem else digest.hexdigest(), expected=record.sha256,
            remedy=repair_remedy(artifact.id),
        )  # fmt: skip


def split_reference(reference: str) -> tuple[str, str]:
    """The remote's URL and the artifact id of a reference such as ``s3://bucket/team/harvest/harvest-0123456789ab``.

    Raises:
        InputError: it does not end so.
    """
    address, mark, query = reference.partition("?")
    url, _, artifact_id = address.rstrip("/").rpartition("/")
    if url.rpartition("/")[2] == artifact_id.rpartition("-")[0] != "":
        url = url.rpartition("/")[0]
    else:
        raise InputError(
            "not an artifact in a remote", found=without_secrets(reference),
            expected="URL/<stage>/<id>, the id in full",
            remedy="'sparsemill artifacts ls URL' lists a remote's artifacts",
        )  # fmt: skip
    return url + mark + query, artifact_id
