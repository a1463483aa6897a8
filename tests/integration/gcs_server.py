"""Google Cloud Storage on loopback: its XML API, as the public reference describes it, in one process over SQLite.

obstore speaks the XML API. Of the emulators there are, fake-gcs-server reads and lists but takes no simple PUT, and
Google's own storage-testbench neither lists nor gives the ETags that obstore wants; neither has multipart uploads. So
this one answers what a push and a pull ask: objects by PUT, GET with ranges, HEAD and DELETE, generations and their
precondition, multipart uploads with their rules, and listings of the second version, in pages.
"""

import base64
import hashlib
import sqlite3
import time
import zlib
from datetime import UTC, datetime
from email.utils import formatdate
from itertools import pairwise
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.integration.object_server import Answer, Cloud, Listed, RefusalError, Request, data_of, page, serve, xml

TOKEN = "testing-token"

_BUCKET = "team"
GCS = Cloud(
    module=__name__,
    url=f"gs://{_BUCKET}",
    variables=("GOOGLE_", "SERVICE_ACCOUNT"),
    environment=lambda endpoint: {"GOOGLE_BASE_URL": endpoint, "GOOGLE_BEARER_TOKEN": TOKEN},
    secret=("GOOGLE_BEARER_TOKEN", "another-token"),
    sends_part=lambda path: "?partNumber=" in path,
    ends_upload=lambda method, path: method == "POST" and "?uploadId=" in path,
    uploads="SELECT name FROM uploads ORDER BY name",
    keeps_abandoned=True,
)
_MIN_PART_BYTES = 5 << 20  # of all parts but the last
_MAX_PARTS = 10_000
_UPLOADS = " xmlns='http://s3.amazonaws.com/doc/2006-03-01/'"  # without which Google's own client finds no upload's id
_LISTED = " xmlns='http://doc.s3.amazonaws.com/2006-03-01'"
_TABLES = """
CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, generation INTEGER, etag TEXT, type TEXT, data BLOB);
CREATE TABLE IF NOT EXISTS uploads (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, type TEXT);
CREATE TABLE IF NOT EXISTS parts (upload INTEGER, number INTEGER, etag TEXT, data BLOB, PRIMARY KEY (upload, number));
"""


def _ask(database: sqlite3.Connection, request: Request) -> Answer:
    bucket, _, name = (unquote(part) for part in request.path[1:].partition("/"))
    query, body = request.query, request.body
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise RefusalError(401, "AuthenticationRequired")
    if bucket != _BUCKET:
        raise RefusalError(404, "NoSuchBucket")
    kind = request.headers.get("Content-Type") or "application/octet-stream"
    match request.method:
        case "GET" if not name:
            return Answer(200, {}, _listing(database, query))
        case "GET" | "HEAD":
            return _read(database, name, request.headers.get("Range"))
        case "PUT" if "uploadId" in query:
            return _put_part(database, name, query, body)
        case "PUT":
            wanted = request.headers.get("x-goog-if-generation-match")
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
    return data_of(database, name, size, asked, headers)


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
    return Answer(
        200, {}, xml("InitiateMultipartUploadResult", f"{_place(name)}<UploadId>{upload}</UploadId>", _UPLOADS)
    )


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
    return Answer(200, headers, xml("CompleteMultipartUploadResult", f'{_place(name)}<ETag>"{etag}"</ETag>', _UPLOADS))


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
    token = base64.urlsafe_b64decode(query.get("continuation-token", "")).decode()
    rows = "SELECT name, generation, etag, length(data) FROM objects WHERE name > ? ORDER BY name"
    found = database.execute(rows, (max(token, query.get("start-after", "")),))
    items, rest = page((_listed(*row) for row in found), query, token, query.get("max-keys"))
    head = f"<Name>{_BUCKET}</Name><Prefix>{escape(query.get('prefix', ''))}</Prefix><KeyCount>{len(items)}</KeyCount>"
    head += f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
    if rest:
        token = base64.urlsafe_b64encode(rest.encode()).decode()
        head += f"<NextContinuationToken>{token}</NextContinuationToken>"
    prefixes = "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>"
    return xml(
        "ListBucketResult",
        head + "".join(item.xml or prefixes.format(escape(item.name)) for item in items),
        _LISTED,
    )


def _listed(name: str, generation: int, etag: str, size: int) -> Listed:
    when = datetime.fromtimestamp(generation / 1e6, UTC).isoformat(timespec="milliseconds")
    inside = f"<Key>{escape(name)}</Key><Generation>{generation}</Generation><MetaGeneration>1</MetaGeneration>"
    inside += f'<LastModified>{when[:-6]}Z</LastModified><ETag>"{etag}"</ETag><Size>{size}</Size>'
    return Listed(name, f"<Contents>{inside}</Contents>")


def _about(generation: int, etag: str) -> dict[str, str]:
    return {"ETag": f'"{etag}"', "x-goog-generation": str(generation), "x-goog-metageneration": "1"}


def _place(name: str) -> str:
    return f"<Bucket>{_BUCKET}</Bucket><Key>{escape(name)}</Key>"


if __name__ == "__main__":
    serve(_ask, _TABLES)
