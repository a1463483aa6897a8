"""A disk that may lose power: what was not fsynced may be lost, torn, full of zeros, or there without what came before.

It stands behind ``os`` and ``shutil`` for everything below a folder: calls act on real files, so that readers need not
know, and are written down. A model in memory keeps for each file what it held at its last fsync and what was written
since, and for each folder which of its changes an fsync of it made durable. Cutting the power lets chance choose
among the rest, change by change, and lays out what a restarted machine may find in a new folder. Any subset, in any
order, is harsher than a journalling file system; only a rename is all or nothing, as POSIX has it.
"""

import os
import random
import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


class Stopped(BaseException):
    """The process is no more: it ran into the end that :meth:`CrashDisk.stop_after` set."""


@dataclass(eq=False)
class File:
    """A file's bytes: what an fsync made durable, what is there, and how long each write since made it."""

    synced: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    cuts: list[int] = field(default_factory=list)

    def after_cut(self, rng: random.Random, kept: float) -> bytes:
        if bytes(self.now) == self.synced or rng.random() < kept:
            return bytes(self.now)
        fate = rng.randrange(3) if kept else 0
        torn = rng.choice([0, *self.cuts]) if self.cuts else 0
        return [self.synced, bytes(len(self.now)), bytes(self.now[: torn // 2])][fate]


@dataclass(eq=False)
class Folder:
    """A folder's entries: at the start, and now."""

    at_start: dict[str, "File | Folder"] = field(default_factory=dict)
    now: dict[str, "File | Folder"] = field(default_factory=dict)


Change = tuple[Folder, str, "File | Folder | None"]
"""A folder's name that stands for something from now on, or for nothing."""


@dataclass(eq=False)
class Operation:
    changes: tuple[Change, ...]
    durable: bool = False


class CrashDisk:
    """Watches all changes below ``root``, which must be there; see the module."""

    def __init__(self, root: Path):
        self.root = root
        self.changes = 0
        """How many changes were asked for."""
        self._last: int | None = None
        self._open: dict[int, tuple[File | Folder, bool]] = {}
        self._operations: list[Operation] = []
        self._top = _load(root)

    def stop_after(self, changes: int | None) -> None:
        """Lets so many more changes happen, then none: each raises. None: all happen."""
        self._last = None if changes is None else self.changes + changes

    def cut_power(self, root: Path, rng: random.Random, kept: float) -> "CrashDisk":
        """What a restarted machine may find, laid out in ``root``; ``kept`` is how likely what is not durable stays."""
        image: dict[Folder, dict[str, File | Folder]] = {}

        def entries(folder: Folder) -> dict[str, File | Folder]:
            return image.setdefault(folder, dict(folder.at_start))

        for operation in self._operations:
            if operation.durable or rng.random() < kept:
                for folder, name, node in operation.changes:
                    if isinstance(node, Folder):  # is in one place only
                        for other in image.values():
                            for old in [old for old, there in other.items() if there is node]:
                                del other[old]
                    if node is None:
                        entries(folder).pop(name, None)
                    else:
                        entries(folder)[name] = node

        def lay_out(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, node in entries(folder).items():
                if isinstance(node, Folder):
                    lay_out(node, path / name)
                else:
                    (path / name).write_bytes(node.after_cut(rng, kept))

        lay_out(self._top, root)
        return CrashDisk(root)

    @contextmanager
    def behind_os(self) -> Generator[None]:
        """Within it the disk is what ``os`` and ``shutil`` change."""
        with ExitStack() as patches:
            for name in ("open", "write", "ftruncate", "fsync", "close", "unlink", "mkdir", "rmdir", "rename", "link"):
                patches.enter_context(mock.patch.object(os, name, getattr(self, name)(getattr(os, name))))
            patches.enter_context(mock.patch.object(shutil, "rmtree", self._rmtree))
            yield

    def open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
            if rest or not self._has(path):
                return real(path, flags, mode, **rest)
            node = self._find(Path(path))
            if node is None and flags & os.O_CREAT:
                self._count()
            descriptor = real(path, flags, mode)
            if node is None:
                node = self._set(Path(path), File())
            self._open[descriptor] = (node, bool(flags & os.O_APPEND))
            return descriptor

        return call

    def write(self, real: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def call(descriptor: int, data: Any) -> int:
            if descriptor not in self._open:
                return real(descriptor, data)
            self._count()
            file, _ = self._open[descriptor]
            assert isinstance(file, File)
            file.now += bytes(data)  # all that storage.atomic does: a new file from its start, or an appended line
            file.cuts.append(len(file.now))
            return real(descriptor, data)

        return call

    def ftruncate(self, real: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def call(descriptor: int, size: int) -> None:
            if descriptor in self._open:
                self._count()
                file, _ = self._open[descriptor]
                assert isinstance(file, File)
                del file.now[size:]
            real(descriptor, size)

        return call

    def fsync(self, _real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            if descriptor not in self._open:  # of the test's own: nothing here needs it to be durable
                return
            self._count()
            node, _ = self._open[descriptor]
            if isinstance(node, File):
                node.synced, node.cuts = bytes(node.now), []
                return
            for operation in self._operations:
                operation.durable |= any(folder is node for folder, _, _ in operation.changes)

        return call

    def close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self._open.pop(descriptor, None)
            real(descriptor)

        return call

    def unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        return self._removal(real)

    def rmdir(self, real: Callable[..., None]) -> Callable[..., None]:
        return self._removal(real)

    def mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **more: Any) -> None:
            if self._has(path) and self._find(Path(path)) is None:
                self._count()
                real(path, *rest, **more)
                self._set(Path(path), Folder())
            else:
                real(path, *rest, **more)

        return call

    def rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **rest: Any) -> None:
            if not self._has(source):
                real(source, target, **rest)
                return
            self._count()
            real(source, target, **rest)
            node = self._find(Path(source))
            assert node is not None
            parent, name = self._parent(Path(source))
            onto, new = self._parent(Path(target))
            self._apply((parent, name, None), (onto, new, node))

        return call

    def link(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **rest: Any) -> None:
            self._count()
            real(source, target, **rest)
            node = self._find(Path(source))
            assert node is not None
            self._set(Path(target), node)

        return call

    def _removal(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, **rest: Any) -> None:
            if rest or not self._has(path) or self._find(Path(path)) is None:
                real(path, **rest)
                return
            self._count()
            real(path)
            self._apply((*self._parent(Path(path)), None))

        return call

    def _rmtree(self, path: Path) -> None:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink():
                self._rmtree(child)
            else:
                child.unlink()
        path.rmdir()

    def _count(self) -> None:
        self.changes += 1
        if self._last is not None and self.changes > self._last:
            raise Stopped

    def _has(self, path: Any) -> bool:
        return Path(path).is_relative_to(self.root)

    def _find(self, path: Path) -> File | Folder | None:
        node: File | Folder | None = self._top
        for part in path.relative_to(self.root).parts:
            node = node.now.get(part) if isinstance(node, Folder) else None
        return node

    def _parent(self, path: Path) -> tuple[Folder, str]:
        parent = self._find(path.parent)
        assert isinstance(parent, Folder)
        return parent, path.name

    def _set(self, path: Path, node: File | Folder) -> File | Folder:
        self._apply((*self._parent(path), node))
        return node

    def _apply(self, *changes: Change) -> None:
        for folder, name, node in changes:
            if node is None:
                del folder.now[name]
            else:
                folder.now[name] = node
        self._operations.append(Operation(changes))


def _load(path: Path) -> Folder:
    """A folder as it lies on a disk that has just been switched on: all of it durable."""
    found: dict[str, File | Folder] = {}
    for child in path.iterdir():
        if child.is_dir():
            found[child.name] = _load(child)
        else:
            data = child.read_bytes()
            found[child.name] = File(data, bytearray(data))
    return Folder(dict(found), found)
