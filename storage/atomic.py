"""The only module that changes the disk: write, fsync, rename, lock; each step can be watched or made to fail.

A *replaced* file is written under a temporary name, fsynced, renamed over the old one, and its folder fsynced: a
reader sees the old bytes or the new, also after a power cut. A *written* file is neither fsynced nor renamed: it is
for staging folders, whose files count only once a journal names their hashes, and :func:`sync_files` makes a batch of
them durable.
Rejected: a temporary name for every staged file (one more rename and directory entry a shard, and no gain).

Each step calls the fault hook, if one is set, with (operation, path) before it happens; a test's hook may raise or kill
the process. A full disk, quota or file-size limit becomes :class:`StorageFull`; other ``OSError`` name the file. An
fsync that failed is never retried: after it the kernel may already have dropped the dirty pages.
"""

import errno
import fcntl
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from storage.errors import StorageFull, naming

FaultHook: TypeAlias = Callable[[str, Path], None]
"""Called with (operation, path) before each change; the operations are named in this module's functions."""

Data: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[np.generic]"
"""Bytes, or a C-contiguous array written as its bytes."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_COPY_BYTES = 1 << 22
_LOCK = struct.Struct("hhqqi")  # Linux's struct flock: type, whence, start, length, process


class _Hook:
    """Holds the process's fault hook; a class so that setting it needs no ``global``."""

    current: FaultHook | None = None


def set_fault_hook(hook: FaultHook | None) -> FaultHook | None:
    """Sets the hook that sees every change of the disk before it happens, for tests; returns the one before."""
    previous, _Hook.current = _Hook.current, hook
    return previous


@contextmanager
def _step(operation: str, path: Path, needed_bytes: int = 0) -> Generator[None]:
    """Surrounds one change of the disk: the hook before it, a full disk's error made ours, any other's file named."""
    try:
        with naming(path):
            if _Hook.current is not None:
                _Hook.current(operation, path)
            yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull(
            f"writing failed: {os.strerror(error.errno)}",
            where=path,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes(path),
            remedy="free some space and run the same command again: it continues where it stopped",
        ) from error


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system that holds (or would hold) ``path``."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    stats = os.statvfs(existing)
    return stats.f_bavail * stats.f_frsize


def require_free(path: Path, needed_bytes: int) -> None:
    """Checks that the file system of ``path`` has room, before work starts; ``path`` need not exist.

    Raises:
        StorageFull: it has less than ``needed_bytes`` free.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        raise StorageFull(
            "not enough disk space",
            where=path,
            needed_bytes=needed_bytes,
            free_bytes=free,
            remedy="free some space, choose another folder, or store less (fewer tokens, or encoding uint8)",
        )


def make_folder(path: Path, *, durable: bool = True) -> None:
    """Creates a folder and its missing parents. Operations: ``mkdir`` and, where durable, ``fsync-folder``."""
    if path.is_dir():
        return
    make_folder(path.parent, durable=durable)
    with _step("mkdir", path):
        path.mkdir(exist_ok=True)
    if durable:
        sync_folder(path.parent)


def write_file(path: Path, pieces: Iterable[Data]) -> None:
    """Writes a file from its pieces in order, replacing what was there; not atomic, not yet durable.

    It is always a new file: what was there keeps its bytes under its other names (hard links), if it has any.
    Operations: ``open``, ``write``, ``close``.
    """
    _write_new(path, pieces)


def write_aligned(path: Path, image: memoryview, n_bytes: int) -> None:
    """As :func:`write_file`, past the page cache where the file system can: for large files that nobody reads soon.

    Operations: those of :func:`write_file`, and ``truncate``.

    Args:
        path: of the file.
        image: its contents, in memory that begins and ends at a page's boundary.
        n_bytes: how many of them are the file's; what follows is padding.
    """
    direct = getattr(os, "O_DIRECT", 0)  # Linux
    try:
        _write_new(path, [image], direct, n_bytes)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:  # what a file system says that cannot, or not so
            raise
        write_file(path, [image[:n_bytes]])


def replace_file(path: Path, data: Data) -> None:
    """Writes a file so that a reader, or a crash, finds the old bytes or the new ones, never a mixture.

    Operations: ``open``, ``write``, ``close``, ``fsync``, ``rename``, ``fsync-folder``.
    """
    stream_file(path, [data])


def stream_file(path: Path, pieces: Iterable[Data]) -> None:
    """As :func:`replace_file`, from pieces in order; an error of theirs, the last one's included, leaves the old bytes.

    So an iterator may check what passes through it, and refuse the whole at its end.
    """
    with _temporary(path, pieces) as temporary:
        rename(temporary, path)


def put_file(path: Path, pieces: Iterable[Data]) -> None:
    """As :func:`stream_file`, but for the file's name, which :func:`sync_names` makes durable, of many files at once.

    Operations: ``open``, ``write``, ``close``, ``fsync``, ``rename``.
    """
    with _temporary(path, pieces) as temporary:
        rename(temporary, path, durable=False)


def create_file(path: Path, data: Data) -> bool:
    """Writes a file unless there is one of its name, whole and durable or not at all; whether it did.

    Of several processes that try at once one does. The file system must have hard links.
    Operations: ``open``, ``write``, ``close``, ``fsync``, ``link``, ``unlink``, ``fsync-folder``.
    """
    with _temporary(path, [data]) as temporary:
        try:
            with _step("link", path):
                path.hardlink_to(temporary)
        except FileExistsError:
            created = False
        else:
            created = True
        remove_file(temporary)
    sync_folder(path.parent)  # also where another made it, whose folder may not be durable yet
    return created


def append_durably(path: Path, data: bytes) -> None:
    """Appends to a file, created where missing, and fsyncs it. Operations: ``append``, ``write``, ``fsync``, ``close``.

    A crash may leave a part of ``data`` at the end: the reader of the file must recognise a torn record.
    """
    created = not path.exists()
    with _step("append", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _write_all(descriptor, [data], path)
        with _step("fsync", path):
            os.fsync(descriptor)
    finally:
        _close(descriptor, path)
    if created:
        sync_folder(path.parent)


def sync_files(paths: Iterable[Path], *, top: Path) -> None:
    """Makes written files durable, with all folders from theirs up to ``top``, which contains them.

    Operations: ``fsync``, ``fsync-folder``.
    """
    paths = list(paths)
    for path in paths:
        _sync(path)
    sync_names(paths, top=top)


def sync_names(paths: Iterable[Path], *, top: Path) -> None:
    """Makes the names of files durable: all folders from theirs up to ``top``, which contains them.

    Operation: ``fsync-folder``.
    """
    folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(top)}
    for folder in sorted(folders):
        sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Makes a folder's entries durable. Operation: ``fsync-folder``."""
    _fsync_path("fsync-folder", path, os.O_RDONLY | os.O_DIRECTORY)


def rename(source: Path, target: Path, *, durable: bool = True) -> None:
    """Renames within one file system. Operations: ``rename`` and, where durable, ``fsync-folder``."""
    with _step("rename", source):
        source.rename(target)
    if not durable:
        return
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def stamp(path: Path, time_ns: int) -> None:
    """Sets the time at which a file says that it was written, durably. Operations: ``utime``, ``fsync``."""
    with _step("utime", path):
        os.utime(path, ns=(time_ns, time_ns))
    _sync(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, so that its bytes are kept once; copies it where the file system has no such links.

    Operations: ``link``, and for a copy those of :func:`write_file`. ``target`` must not exist.
    """
    try:
        with _step("link", target):
            target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with source.open("rb") as file:
            write_file(target, iter(lambda: file.read(_COPY_BYTES), b""))


def remove_file(path: Path) -> None:
    """Removes a file if it is there. Operation: ``unlink``."""
    with _step("unlink", path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder and all in it, if it is there. Operation: ``rmtree``, once for the whole tree."""
    with _step("rmtree", path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


@contextmanager
def exclusive_lock(path: Path, *, on_wait: Callable[[], None] | None = None) -> Generator[None]:
    """Holds the lock file ``path`` for the ``with`` block, waiting for whoever holds it. Operation: ``lock``.

    The kernel frees a dead holder's lock, whatever the file says, so nothing ever has to decide whether a lock is
    stale; the file itself stays behind, as removing it would let two processes lock two files of one name.

    Args:
        path: the lock file, created where missing; its folder must exist.
        on_wait: called once if the lock is held by another.
    """
    with _step("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _show_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether somebody holds a lock file; only asks: who wants the lock at this moment does not notice.

    A holder has a second lock on the file, of the kind that the kernel can be asked about. Rejected: trying to take the
    first (who starts meanwhile would be told that another process works), ``/proc/locks`` (it knows nothing of other
    machines and containers) and a process's number in the file (it may be another's by now).

    Returns:
        None where that cannot be told: elsewhere than on Linux, or where the file system has no such locks.
    """
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return False if error.errno == errno.ENOENT else None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return _LOCK.unpack(answer)[0] != fcntl.F_UNLCK


def _show_lock(descriptor: int) -> None:
    """Lets :func:`is_locked` see that a lock file is held, until the descriptor is closed."""
    if sys.platform == "linux":
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


@contextmanager
def _temporary(path: Path, pieces: Iterable[Data]) -> Generator[Path]:
    """A durable file beside ``path`` that the block gives its name; removed where that, or the writing, fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        write_file(temporary, pieces)
        _sync(temporary)
        yield temporary
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def _write_new(path: Path, pieces: Iterable[Data], flags: int = 0, n_bytes: int | None = None) -> None:
    with _step("open", path):
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o666)
    try:
        _write_all(descriptor, pieces, path)
        if n_bytes is not None:
            with _step("truncate", path):
                os.ftruncate(descriptor, n_bytes)
    finally:
        _close(descriptor, path)


def _write_all(descriptor: int, pieces: Iterable[Data], path: Path) -> None:
    for piece in pieces:
        view = memoryview(cast("bytes", piece))  # numpy 2.2's types do not say that an array is a buffer
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with _step("write", path, view.nbytes):
            while view:
                view = view[os.write(descriptor, view) :]


def _close(descriptor: int, path: Path) -> None:
    asked = False
    try:
        with _step("close", path):  # some file systems report a failed write only here
            asked = True
            os.close(descriptor)
    finally:
        if not asked:
            os.close(descriptor)


def _sync(path: Path) -> None:
    _fsync_path("fsync", path, os.O_RDONLY)


def _fsync_path(operation: str, path: Path, flags: int) -> None:
    with _step(operation, path):
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
