"""Google Cloud Storage on loopback: its XML API, as the public reference describes it, in one process over SQLite.

obstore speaks the XML API. Of the emulators there are, fake-gcs-server reads and lists but takes no simple PUT, and
Google's own storage-testbench neither lists nor gives the ETags that obstore wants; neither has multipart uploads. So
this one answers what a push and a pull ask: objects by PUT, GET with ranges, HEAD and DELETE, generations and their
precondition, multipart uploads with their rules, and listings of the second version, in pages. ``kill`` is a power
cut; ``start`` brings it up again over the same objects, and over uploads that were begun.
"""

import base64
import hashlib
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import obstore
from obstore.store import GCSStore

BUCKET = "team"
TOKEN = "testing-token"

_PAGE = 10  # names in a listing at most; Google's has 1,000
_MIN_PART_BYTES = 5 << 20  # of all parts but the last
_MAX_PARTS = 10_000
_UPLOADS = " xmlns='http://s3.amazonaws.com/doc/2006-03-01/'"  # without which Google's own client finds no upload's id
_TABLES = """
CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, generation INTEGER, etag TEXT, type TEXT, data BLOB);
CREATE TABLE IF NOT EXISTS uploads (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, type TEXT);
CREATE TABLE IF NOT EXISTS parts (upload INTEGER, number INTEGER, etag TEXT, data BLOB, PRIMARY KEY (upload, number));
"""


class GcsServer:
    """The server; ``root`` keeps all objects."""

    def __init__(self, root: Path):
        self.root = root
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port: int = one.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment holds."""
        return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": TOKEN}

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        command = [sys.executable, __file__, str(self.root / "objects.sqlite"), str(self._port)]
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                raise RuntimeError((self.root / "log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """Kills the process, at once and without warning."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def keys(self) -> list[str]:
        """Keys of all objects, sorted."""
        store = GCSStore(
            BUCKET, config={"base_url": self.endpoint, "bearer_token": TOKEN}, client_options={"allow_http": True}
        )
        return sorted(found["path"] for page in obstore.list(store) for found in page)

    def uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun, and neither completed nor given up."""
        with _opened(self.root / "objects.sqlite") as database:
            return [name for (name,) in database.execute("SELECT name FROM uploads ORDER BY name")]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True


class RefusalError(Exception):
    """An answer that is an error.

    Args:
        status: of the answer.
        code: by which the reference knows the error.
    """

    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


class Answer(NamedTuple):
    """What the server says: a status, its own headers, and a body."""

    status: int
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    body: bytes = b""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    database: Path

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True  # the client has gone
            return
        url = urlsplit(self.path)
        bucket, _, name = (unquote(part) for part in url.path[1:].partition("/"))
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        try:
            with _opened(self.database) as database, database:
                database.execute("BEGIN" if self.command in ("GET", "HEAD") else "BEGIN IMMEDIATE")
                answer = self._ask(database, bucket, name, query, body)
        except RefusalError as error:
            answer = Answer(error.status, {}, _xml("Error", f"<Code>{error.code}</Code>"))
        self._send(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _ask(self, database: sqlite3.Connection, bucket: str, name: str, query: dict[str, str], body: bytes) -> Answer:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "AuthenticationRequired")
        if bucket != BUCKET:
            raise RefusalError(404, "NoSuchBucket")
        kind = self.headers.get("Content-Type") or "application/octet-stream"
        match self.command:
            case "GET" if not name:
                return Answer(200, {}, _listing(database, query))
            case "GET" | "HEAD":
                return _read(database, name, self.headers.get("Range"))
            case "PUT" if "uploadId" in query:
                return _put_part(database, name, query, body)
            case "PUT":
                wanted = self.headers.get("x-goog-if-generation-match")
                etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
                return Answer(200, _put(database, name, (etag, kind, body), wanted))
            case "POST" if "uploads" in query:
                return _begin(database, name, kind)
            case "POST" if "uploadId" in query:
                return _complete(database, name, query, body)
            case "DELETE" if "uploadId" in query:
                _forget(database, _upload(database, name, query)[0])
                return Answer(204)
            case "DELETE":
                if not database.execute("DELETE FROM objects WHERE name = ?", (name,)).rowcount:
                    raise RefusalError(404, "NoSuchKey")
                return Answer(204)
            case _:
                raise RefusalError(400, "InvalidArgument")

    def _send(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for key, value in ({"Content-Type": "application/xml; charset=UTF-8"} | answer.headers).items():
            self.send_header(key, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - its name there


def _read(database: sqlite3.Connection, name: str, asked: str | None) -> Answer:
    row = database.execute(
        "SELECT generation, etag, type, length(data) FROM objects WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        raise RefusalError(404, "NoSuchKey")
    generation, etag, kind, size = row
    headers = _about(generation, etag) | {
        "Content-Type": kind, "Last-Modified": formatdate(generation / 1e6, usegmt=True), "Accept-Ranges": "bytes",
    }  # fmt: skip
    start, end = 0, size
    if asked is not None and (span := re.fullmatch(r"bytes=(\d*)-(\d*)", asked)):
        start = int(span[1]) if span[1] else max(0, size - int(span[2]))
        end = min(size, int(span[2]) + 1) if span[1] and span[2] else size
        if start >= end:
            raise RefusalError(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    query = "SELECT substr(data, ?, ?) FROM objects WHERE name = ?"
    (data,) = database.execute(query, (start + 1, end - start, name)).fetchone()
    return Answer(206 if "Content-Range" in headers else 200, headers, data or b"")  # of nothing, SQLite gives none


def _put(
    database: sqlite3.Connection, name: str, value: tuple[str, str, bytes], wanted: str | None = None
) -> dict[str, str]:
    """Replaces an object by an ETag, a type and data, if its generation is the one wanted; 0 is that of none."""
    found = database.execute("SELECT generation FROM objects WHERE name = ?", (name,)).fetchone()
    if wanted is not None and int(wanted) != (found[0] if found else 0):
        raise RefusalError(412, "PreconditionFailed")
    generation = max(time.time_ns() // 1000, found[0] + 1 if found else 0)
    database.execute("REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", (name, generation, *value))
    return _about(generation, value[0])


def _begin(database: sqlite3.Connection, name: str, kind: str) -> Answer:
    upload = database.execute("INSERT INTO uploads (name, type) VALUES (?, ?)", (name, kind)).lastrowid
    return Answer(200, {}, _xml("InitiateMultipartUploadResult", f"{_place(name)}<UploadId>{upload}</UploadId>"))


def _put_part(database: sqlite3.Connection, name: str, query: dict[str, str], body: bytes) -> Answer:
    upload, _ = _upload(database, name, query)
    number, etag = int(query["partNumber"]), hashlib.md5(body, usedforsecurity=False).hexdigest()
    if not 1 <= number <= _MAX_PARTS:
        raise RefusalError(400, "InvalidArgument")
    database.execute("REPLACE INTO parts VALUES (?, ?, ?, ?)", (upload, number, etag, body))
    return Answer(200, {"ETag": f'"{etag}"'})


def _complete(database: sqlite3.Connection, name: str, query: dict[str, str], body: bytes) -> Answer:
    upload, kind = _upload(database, name, query)
    try:
        asked = [
            (int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "").strip('"'))
            for part in ElementTree.fromstring(body).iterfind("{*}Part")
        ]
    except (ElementTree.ParseError, ValueError):
        raise RefusalError(400, "MalformedCompleteMultipartUploadRequest") from None
    if not asked or any(one >= other for (one, _), (other, _) in pairwise(asked)):
        raise RefusalError(400, "InvalidPartOrder")
    there = {
        number: (etag, data)
        for number, etag, data in database.execute("SELECT number, etag, data FROM parts WHERE upload = ?", (upload,))
    }
    if any(there.get(number, ("",))[0] != etag for number, etag in asked):
        raise RefusalError(400, "InvalidPart")
    parts: list[bytes] = [there[number][1] for number, _ in asked]
    if any(len(part) < _MIN_PART_BYTES for part in parts[:-1]):
        raise RefusalError(400, "EntityTooSmall")
    data = b"".join(parts)
    etag = f"{zlib.crc32(data):08x}-{len(parts)}"  # no MD5, and not meant to be understood
    headers = _put(database, name, (etag, kind, data))
    _forget(database, upload)
    return Answer(200, headers, _xml("CompleteMultipartUploadResult", f'{_place(name)}<ETag>"{etag}"</ETag>'))


def _upload(database: sqlite3.Connection, name: str, query: dict[str, str]) -> tuple[int, str]:
    asked = (query["uploadId"], name)
    found = database.execute("SELECT id, type FROM uploads WHERE id = ? AND name = ?", asked).fetchone()
    if found is None:
        raise RefusalError(404, "NoSuchUpload")
    return found


def _forget(database: sqlite3.Connection, upload: int) -> None:
    database.execute("DELETE FROM parts WHERE upload = ?", (upload,))
    database.execute("DELETE FROM uploads WHERE id = ?", (upload,))


def _listing(database: sqlite3.Connection, query: dict[str, str]) -> bytes:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    token = base64.urlsafe_b64decode(query.get("continuation-token", "")).decode()
    after = max(token, query.get("start-after", ""))
    limit = min(int(query.get("max-keys", _PAGE)), _PAGE)
    items: dict[str, str] = {}  # by name or common prefix, which counts as one
    rest = ""
    rows = "SELECT name, generation, etag, length(data) FROM objects WHERE name > ? ORDER BY name"
    for name, generation, etag, size in database.execute(rows, (after,)):
        if not name.startswith(prefix):
            continue
        inside, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        item = f"{prefix}{inside}{mark}" if mark else name
        if item in items or (mark and item == token):
            continue
        if len(items) == limit:
            rest = base64.urlsafe_b64encode(list(items)[-1].encode()).decode()
            break
        when = datetime.fromtimestamp(generation / 1e6, UTC).isoformat(timespec="milliseconds")
        inside = f"<Key>{escape(name)}</Key><Generation>{generation}</Generation><MetaGeneration>1</MetaGeneration>"
        inside += f'<LastModified>{when[:-6]}Z</LastModified><ETag>"{etag}"</ETag><Size>{size}</Size>'
        items[item] = f"<Contents>{inside}</Contents>"
        if mark:
            items[item] = f"<CommonPrefixes><Prefix>{escape(item)}</Prefix></CommonPrefixes>"
    head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items)}</KeyCount>"
    head += f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
    if rest:
        head += f"<NextContinuationToken>{rest}</NextContinuationToken>"
    return _xml("ListBucketResult", head + "".join(items.values()))


def _about(generation: int, etag: str) -> dict[str, str]:
    return {"ETag": f'"{etag}"', "x-goog-generation": str(generation), "x-goog-metageneration": "1"}


def _place(name: str) -> str:
    return f"<Bucket>{BUCKET}</Bucket><Key>{escape(name)}</Key>"


def _xml(tag: str, inside: str) -> bytes:
    space = {"Error": "", "ListBucketResult": " xmlns='http://doc.s3.amazonaws.com/2006-03-01'"}.get(tag, _UPLOADS)
    return f"<?xml version='1.0' encoding='UTF-8'?><{tag}{space}>{inside}</{tag}>".encode()


@contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        yield database
    finally:
        database.close()


def _serve(path: Path, port: int) -> None:
    with _opened(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(_TABLES)
    _Handler.database = path
    ThreadingHTTPServer(("127.0.0.1", port), _Handler).serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
