"""What small object stores on loopback have in common: a process over SQLite, requests and answers, ranges, listings.

A service's own module says what it answers (:func:`serve`) and what sets it apart for a client (:class:`Cloud`). A
request is one transaction. ``kill`` is a power cut; ``start`` brings a server up again over the same objects, and over
uploads that were begun.
"""

import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

_ROOT = Path(__file__).parents[2]
_PAGE = 10  # names in a listing at most; the services' own have 1,000 or 5,000


class Cloud(NamedTuple):
    """A service, as a client meets it.

    Attributes:
        module: the server's.
        url: of the bucket or container.
        variables: beginnings of the names of all environment variables that the client reads.
        environment: what a client's environment holds, given the server's endpoint.
        secret: which of them is the secret, and another one that is refused.
        sends_part: whether what is asked of a path with query is to take a part of a large file.
        ends_upload: whether a method and a path ask to put its parts together.
        uploads: an SQL query for the names of what has parts and was not put together.
        keeps_abandoned: whether parts of a killed push stay when the next one has put its own together.
    """

    module: str
    url: str
    variables: tuple[str, ...]
    environment: Callable[[str], dict[str, str]]
    secret: tuple[str, str]
    sends_part: Callable[[str], bool]
    ends_upload: Callable[[str, str], bool]
    uploads: str
    keeps_abandoned: bool


class ObjectServer:
    """A server; ``root`` keeps all objects."""

    def __init__(self, cloud: Cloud, root: Path):
        self.cloud, self.root = cloud, root
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port: int = one.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        command = [sys.executable, "-m", self.cloud.module, str(self.root / "objects.sqlite"), str(self._port)]
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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

    def uploads(self) -> list[str]:
        """Names of objects of which parts have come, and were neither put together nor given up."""
        with _opened(self.root / "objects.sqlite") as database:
            return [name for (name,) in database.execute(self.cloud.uploads)]

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


class Request(NamedTuple):
    """What a client asks: ``path`` as it was sent, ``query`` decoded."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes


class Answer(NamedTuple):
    """What the server says: a status, its own headers, and a body."""

    status: int
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    body: bytes = b""


class Listed(NamedTuple):
    """A row of a listing: a name with its XML, or a common prefix with none."""

    name: str
    xml: str | None


def serve(ask: Callable[[sqlite3.Connection, Request], Answer], tables: str) -> None:
    """Answers requests until it is killed, with the database and the port that the command line names."""
    path, port = Path(sys.argv[1]), int(sys.argv[2])
    with _opened(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(tables)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            if len(body) < size:
                self.close_connection = True  # the client has gone
                return
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, keep_blank_values=True))
            try:
                with _opened(path) as database, database:
                    database.execute("BEGIN" if self.command in ("GET", "HEAD") else "BEGIN IMMEDIATE")
                    answer = ask(database, Request(self.command, url.path, query, self.headers, body))
            except RefusalError as error:
                answer = Answer(error.status, {}, xml("Error", f"<Code>{error.code}</Code><Message>refused</Message>"))
            self._send(answer)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

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

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def xml(tag: str, inside: str, attributes: str = "") -> bytes:
    """A document."""
    return f"<?xml version='1.0' encoding='UTF-8'?><{tag}{attributes}>{inside}</{tag}>".encode()


def data_of(database: sqlite3.Connection, name: str, size: int, asked: str | None, headers: dict[str, str]) -> Answer:
    """An object's answer: its data, or the range of them that is asked for; ``size`` is that of the object."""
    start, end = 0, size
    if asked is not None and (span := re.fullmatch(r"bytes=(\d*)-(\d*)", asked)):
        start = int(span[1]) if span[1] else max(0, size - int(span[2]))
        end = min(size, int(span[2]) + 1) if span[1] and span[2] else size
        if start >= end:
            raise RefusalError(416, "InvalidRange")
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
    query = "SELECT substr(data, ?, ?) FROM objects WHERE name = ?"
    (data,) = database.execute(query, (start + 1, end - start, name)).fetchone()
    return Answer(206 if "Content-Range" in headers else 200, headers, data or b"")  # of nothing, SQLite gives none


def page(rows: Iterable[Listed], query: dict[str, str], token: str, limit: str | None) -> tuple[list[Listed], str]:
    """A page of a listing, and the token of the next one; '' where there is none.

    Args:
        rows: all names after the token, in order.
        query: of the request; its prefix and delimiter count.
        token: what the page before this one ended with, a name or a common prefix.
        limit: how many the client wants at most.
    """
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items: list[Listed] = []
    for row in rows:
        if not row.name.startswith(prefix):
            continue
        inside, mark, _ = row.name[len(prefix) :].partition(delimiter) if delimiter else (row.name, "", "")
        item = Listed(f"{prefix}{inside}{mark}", None) if mark else row
        if mark and (item.name == token or item in items[-1:]):
            continue
        if len(items) == min(int(limit or _PAGE), _PAGE):
            return items, items[-1].name
        items.append(item)
    return items, ""


@contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")  # what a process wrote outlives it
    try:
        yield database
    finally:
        database.close()
