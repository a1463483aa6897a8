"""A proxy before a server that fails as a test asks: refuses, is too busy, breaks off, or kills what is behind it."""

import http.client
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[500, 503, 429, "cut", None]
"""A status instead of an answer; or the answer's first half, and the end of the connection; or none."""

Choose = Callable[[str, str, int], Fault]
"""Given method, path with query, and how often that was asked for before, the fault to show."""


def no_fault(method: str, path: str, before: int) -> Fault:
    """Lets a request through."""
    return None


class Proxy:
    """Forwards requests, and counts them.

    Attributes:
        endpoint: its own address.
        choose: which fault each request meets.
        log: (method, path, fault) of all requests so far.
    """

    def __init__(self, endpoint: str, server: str):
        self.endpoint = endpoint
        self.server = urlsplit(server).netloc
        self.choose: Choose = no_fault
        self.log: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()

    def next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            before = sum(entry[:2] == (method, path) for entry in self.log)
            fault = self.choose(method, path, before)
            self.log.append((method, path, fault))
        return fault


@contextmanager
def faulty(server: str) -> Generator[Proxy]:
    """Runs a proxy before a server's endpoint."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http_server:
        proxy = Proxy(f"http://127.0.0.1:{http_server.server_port}", server)
        http_server.RequestHandlerClass = partial(_Handler, proxy)  # type: ignore[assignment]
        http_server.daemon_threads = True
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy
        finally:
            http_server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: Proxy, *arguments: object):
        self.proxy = proxy
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.next_fault(self.command, self.path)
        if isinstance(fault, int):
            self._answer(fault, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        connection = http.client.HTTPConnection(self.proxy.server, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        except OSError:
            self.close_connection = True  # nobody is behind it
            return
        finally:
            connection.close()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        self._answer(answer.status, headers, data, cut=fault == "cut")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - its name there


_OWN = frozenset({"content-length", "connection", "transfer-encoding"})
