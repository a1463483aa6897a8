"""A Hugging Face Hub on loopback, and the cache that huggingface_hub would have filled from it.

A ``Hub`` keeps commits of repositories in a folder; a commit's name is a hash of its files, and ``main`` is the newest
one. ``served`` answers, over HTTP, what huggingface_hub, transformers and datasets ask: what a repository is, its tree,
and its files, whole or by range; or fails, as ``fault`` says. ``fill_cache`` lays one commit out as the client's own
cache, for work offline.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.parse import unquote

Kind = Literal["models", "datasets"]
Fault = Literal["cut", "elsewhere"] | int | None
"""A status instead of an answer; a file's first bytes, and the end of the connection; its signed address elsewhere."""

SIGNATURE = "Signature=topsecret"

_ABOUT = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)")
_PATHS = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories in a folder.

    Args:
        folder: where they are kept.

    Attributes:
        requests: all so far.
        fault: given a path, the fault that a request for it meets.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.requests: list[str] = []
        self.fault: Callable[[str], Fault] = lambda _: None

    def commit(self, repository: str, files: Mapping[str, Path | bytes], kind: Kind = "models") -> str:
        """Makes a commit of exactly these files, and ``main`` to be it; returns its name, 40 hexadecimal digits."""
        contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(contents.items()):
            digest.update(f"{repository}/{name}: {len(content)}\n".encode() + content)
        commit = digest.hexdigest()
        for name, content in contents.items():
            path = self._folder / kind / repository / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (self._folder / kind / repository / "main").write_text(commit)
        return commit

    def resolve(self, kind: Kind, repository: str, revision: str) -> str | None:
        """The commit that a revision means; None if there is none."""
        folder = self._folder / kind / repository
        commit = (folder / "main").read_text() if revision == "main" and folder.is_dir() else revision
        return commit if (folder / commit).is_dir() else None

    def files(self, kind: Kind, repository: str, commit: str) -> dict[str, Path]:
        """The files of a commit by name."""
        folder = self._folder / kind / repository / commit
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def fill_cache(self, cache: Path, repository: str, kind: Kind = "models") -> None:
        """Lays ``main`` out as huggingface_hub's cache would have it, in the folder HF_HUB_CACHE."""
        commit = self.resolve(kind, repository, "main")
        assert commit is not None
        folder = cache / f"{kind}--{repository.replace('/', '--')}"
        for name, file in self.files(kind, repository, commit).items():
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                os.link(file, path)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    @contextmanager
    def served(self) -> Generator[dict[str, str]]:
        """Serves it; gives the environment of a client, which reads it when it starts."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
            }
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        self.hub.requests.append(format % args)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if isinstance(status := self.hub.fault(path), int):
            self._send(status, b"{}")
        elif found := _FILE.fullmatch(path):
            self._file("datasets" if found[1] else "models", found[2], found[3], found[4])
        elif found := _TREE.fullmatch(path):
            self._tree(found[1], found[2], found[3], found[4])  # type: ignore[arg-type]
        elif found := _ABOUT.fullmatch(path):
            self._about(found[1], found[2], found[3] or "main")  # type: ignore[arg-type]
        else:
            self._send(404, b"{}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = _PATHS.fullmatch(unquote(self.path.partition("?")[0]))
        if found is None:
            self._send(404, b"{}")
            return
        entries = self._entries(found[1], found[2], found[3])  # type: ignore[arg-type]
        wanted = set(json.loads(asked)["paths"])
        self._send(200, json.dumps([entry for entry in entries or [] if entry["path"] in wanted]).encode())

    def _about(self, kind: Kind, repository: str, revision: str) -> None:
        commit = self.hub.resolve(kind, repository, revision)
        if commit is None:
            self._missing()
            return
        names = self.hub.files(kind, repository, commit)
        about = {
            "_id": "0", "id": repository, "sha": commit, "private": False, "gated": False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in names],
        }  # fmt: skip
        self._send(200, json.dumps(about).encode())

    def _tree(self, kind: Kind, repository: str, revision: str, under: str) -> None:
        entries = self._entries(kind, repository, revision)
        if entries is None:
            self._missing()
            return
        inside = [entry for entry in entries if not under or str(entry["path"]).startswith(f"{under}/")]
        self._send(200, json.dumps(inside).encode())

    def _entries(self, kind: Kind, repository: str, revision: str) -> list[dict[str, object]] | None:
        commit = self.hub.resolve(kind, repository, revision)
        if commit is None:
            return None
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
            for name, path in self.hub.files(kind, repository, commit).items()
        ]

    def _file(self, kind: Kind, repository: str, revision: str, name: str) -> None:
        commit = self.hub.resolve(kind, repository, revision)
        if commit is None:
            self._missing()
            return
        path = self.hub.files(kind, repository, commit).get(name)
        if path is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        fault = self.hub.fault(f"/{repository}/{name}")
        if fault == "elsewhere":
            place = f"http://{self.headers['Host']}/elsewhere/{name}?{SIGNATURE}"
            self._send(302, b"", headers | {"Location": place, "X-Linked-Size": str(len(content))})
            return
        if fault == "cut" and self.command == "GET":
            self.send_response(200)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:3])
            self.close_connection = True
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, content, headers)
            return
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        self._send(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _missing(self) -> None:
        self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
