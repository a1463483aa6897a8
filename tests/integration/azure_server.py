"""Azure's Blob service on loopback, as the public reference describes it, in one process over SQLite.

Azurite, the emulator that there is, is no Python package. This one answers what a push and a pull ask: block blobs by
Put Blob, or by Put Block and Put Block List with their rules, read with ranges, HEAD and DELETE, If-None-Match, and
listings in pages; who asks is known by Shared Key or by an account's shared access signature, both verified. The
account's name is the first folder of a path, as Azurite has it.
"""

import base64
import binascii
import hashlib
import hmac
import sqlite3
import time
from email.utils import formatdate
from urllib.parse import quote, unquote, urlencode
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.integration.object_server import Answer, Cloud, Listed, RefusalError, Request, data_of, page, serve, xml

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(hashlib.sha512(b"a key for tests").digest()).decode()

_CONTAINER = "team"
AZURE = Cloud(
    module=__name__,
    url=f"az://{_CONTAINER}",
    variables=("AZURE_", "AZURITE_"),
    environment=lambda endpoint: {
        "AZURE_STORAGE_ENDPOINT": f"{endpoint}/{ACCOUNT}",
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    },
    secret=("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another key").decode()),
    sends_part=lambda path: "?comp=block&" in path,
    ends_upload=lambda method, path: method == "PUT" and path.endswith("?comp=blocklist"),
    uploads="SELECT DISTINCT name FROM blocks ORDER BY name",
    keeps_abandoned=False,
)
_MAX_BLOCKS = 50_000
_SIGNED_HEADERS = (
    "Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date",
    "If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range",
)  # fmt: skip
_SIGNED_QUERY = ("sp", "ss", "srt", "st", "se", "sip", "spr", "sv", "ses")
_TABLES = """
CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, written REAL, etag TEXT, type TEXT, data BLOB);
CREATE TABLE IF NOT EXISTS blocks (name TEXT, id TEXT, data BLOB, PRIMARY KEY (name, id));
"""


def signature(text: str, key: str = KEY) -> str:
    """HMAC-SHA256 of a text under an account's key."""
    return base64.b64encode(hmac.digest(base64.b64decode(key), text.encode(), "sha256")).decode()


def account_sas(key: str = KEY) -> str:
    """A shared access signature for all that a push asks for, valid for an hour."""
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    query = {"sv": "2022-11-02", "ss": "b", "srt": "sco", "sp": "rwdlac", "se": until, "spr": "https,http"}
    return urlencode(query | {"sig": signature(_sas_text(query), key)}, quote_via=quote)


def _ask(database: sqlite3.Connection, request: Request) -> Answer:
    account, container, name = (unquote(part) for part in f"{request.path[1:]}//".split("/", 2))
    name, query = name.removesuffix("/").removesuffix("/"), request.query
    if account != ACCOUNT or "x-ms-version" not in request.headers or not _known(request):
        raise RefusalError(403, "AuthenticationFailed")
    if container != _CONTAINER:
        raise RefusalError(404, "ContainerNotFound")
    match request.method:
        case "GET" if query.get("comp") == "list" and query.get("restype") == "container":
            return Answer(200, {}, _listing(database, query))
        case "GET" | "HEAD":
            return _read(database, name, request.headers.get("x-ms-range") or request.headers.get("Range"))
        case "PUT" if query.get("comp") == "block":
            return _put_block(database, name, query["blockid"], request.body)
        case "PUT" if query.get("comp") == "blocklist":
            return _put(database, name, request, _joined(database, name, request.body))
        case "PUT" if request.headers.get("x-ms-blob-type") == "BlockBlob":
            return _put(database, name, request, request.body)
        case "DELETE":
            if not database.execute("DELETE FROM objects WHERE name = ?", (name,)).rowcount:
                raise RefusalError(404, "BlobNotFound")
            return Answer(202)
        case _:
            raise RefusalError(400, "InvalidQueryParameterValue")


def _known(request: Request) -> bool:
    query, headers = request.query, request.headers
    if "sig" in query:
        return hmac.compare_digest(query["sig"], signature(_sas_text(query)))
    signed = {name: headers.get(name, "") for name in _SIGNED_HEADERS}
    if signed["Content-Length"] == "0":
        signed["Content-Length"] = ""
    own = sorted((name.lower(), value.strip()) for name, value in headers.items() if name.lower().startswith("x-ms-"))
    lines = [request.method, *signed.values(), *(f"{name}:{value}" for name, value in own)]
    lines += [f"/{ACCOUNT}{request.path}", *(f"{name}:{query[name]}" for name in sorted(query))]
    signed_text = "\n".join(lines)
    return hmac.compare_digest(headers.get("Authorization", ""), f"SharedKey {ACCOUNT}:{signature(signed_text)}")


def _sas_text(query: dict[str, str]) -> str:
    return "".join(f"{line}\n" for line in (ACCOUNT, *(query.get(name, "") for name in _SIGNED_QUERY)))


def _read(database: sqlite3.Connection, name: str, asked: str | None) -> Answer:
    row = database.execute("SELECT written, etag, type, length(data) FROM objects WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise RefusalError(404, "BlobNotFound")
    written, etag, kind, size = row
    headers = {
        "ETag": etag, "Content-Type": kind, "Last-Modified": formatdate(written, usegmt=True), "Accept-Ranges": "bytes",
        "x-ms-blob-type": "BlockBlob",
    }  # fmt: skip
    return data_of(database, name, size, asked, headers)


def _put(database: sqlite3.Connection, name: str, request: Request, data: bytes) -> Answer:
    """Replaces a blob, unless there is none wanted; blocks of its name that were not put together are gone."""
    there = database.execute("SELECT 1 FROM objects WHERE name = ?", (name,)).fetchone()
    if there and request.headers.get("If-None-Match") == "*":
        raise RefusalError(409, "BlobAlreadyExists")
    written = time.time()
    etag = f'"0x{time.time_ns():X}"'
    kind = request.headers.get("x-ms-blob-content-type") or "application/octet-stream"
    database.execute("REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", (name, written, etag, kind, data))
    database.execute("DELETE FROM blocks WHERE name = ?", (name,))
    return Answer(201, {"ETag": etag, "Last-Modified": formatdate(written, usegmt=True)})


def _put_block(database: sqlite3.Connection, name: str, block: str, data: bytes) -> Answer:
    try:
        size = len(base64.b64decode(block, validate=True))
    except binascii.Error:
        raise RefusalError(400, "InvalidQueryParameterValue") from None
    others = database.execute("SELECT id FROM blocks WHERE name = ?", (name,)).fetchall()
    if not data or not 0 < size <= 64 or any(len(other) != len(block) for (other,) in others):
        raise RefusalError(400, "InvalidBlobOrBlock")
    database.execute("REPLACE INTO blocks VALUES (?, ?, ?)", (name, block, data))
    return Answer(201)


def _joined(database: sqlite3.Connection, name: str, body: bytes) -> bytes:
    """The blocks that a list names; those that were put together before are not kept, so that none can be named."""
    try:
        items = list(ElementTree.fromstring(body))
    except ElementTree.ParseError:
        raise RefusalError(400, "InvalidXmlDocument") from None
    asked = [item.text or "" for item in items]
    there = dict(database.execute("SELECT id, data FROM blocks WHERE name = ?", (name,)).fetchall())
    if len(asked) > _MAX_BLOCKS or any(item.tag == "Committed" for item in items) or not there.keys() >= {*asked}:
        raise RefusalError(400, "InvalidBlockList")
    return b"".join(there[block] for block in asked)


def _listing(database: sqlite3.Connection, query: dict[str, str]) -> bytes:
    marker = base64.urlsafe_b64decode(query.get("marker", "")).decode()
    rows = "SELECT name, written, etag, type, length(data) FROM objects WHERE name > ? ORDER BY name"
    found = (_listed(*row) for row in database.execute(rows, (marker,)))
    items, rest = page(found, query, marker, query.get("maxresults"))
    prefixes = "<BlobPrefix><Name>{}</Name></BlobPrefix>"
    blobs = "".join(item.xml or prefixes.format(escape(item.name)) for item in items)
    next_marker = base64.urlsafe_b64encode(rest.encode()).decode()
    inside = f"<Prefix>{escape(query.get('prefix', ''))}</Prefix><Blobs>{blobs}</Blobs>"
    return xml("EnumerationResults", f"{inside}<NextMarker>{next_marker}</NextMarker>")


def _listed(name: str, written: float, etag: str, kind: str, size: int) -> Listed:
    properties = f"<Last-Modified>{formatdate(written, usegmt=True)}</Last-Modified><Etag>{escape(etag)}</Etag>"
    properties += f"<Content-Length>{size}</Content-Length><Content-Type>{escape(kind)}</Content-Type>"
    properties += "<BlobType>BlockBlob</BlobType>"
    return Listed(name, f"<Blob><Name>{escape(name)}</Name><Properties>{properties}</Properties></Blob>")


if __name__ == "__main__":
    serve(_ask, _TABLES)
