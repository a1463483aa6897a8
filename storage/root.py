"""A store's folder and its marker, so that no folder of something else is taken for a store."""

import json
from contextlib import suppress
from pathlib import Path
from typing import cast

from storage import atomic
from storage.errors import NotAStore, UnsupportedFormat
from storage.fingerprint import Json, canonical_json
from storage.manifest import FORMAT_VERSION

MARKER_NAME = "sparsemill-store.json"


def check_root(root: Path) -> None:
    """Looks whether a folder is a store, or may become one.

    Raises:
        NotAStore: it holds something else, or is a file.
        UnsupportedFormat: a store of another format version.
    """
    # Looked at before the marker: a process that creates the store at this moment writes the marker first.
    foreign = root.exists() and (not root.is_dir() or any(map(_is_foreign, root.iterdir())))
    marker = root / MARKER_NAME
    if marker.is_file():
        try:
            found = cast("dict[str, Json]", json.loads(marker.read_bytes()))["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise NotAStore("the store's marker cannot be read", where=marker) from error
        if found != FORMAT_VERSION:
            raise UnsupportedFormat(
                "store of another format", where=root, found=f"version {found}", expected=FORMAT_VERSION
            )
    elif foreign:
        raise NotAStore(
            "not an artifact store",
            where=root,
            found="other files" if root.is_dir() else "a file",
            expected=f"an empty or missing folder, or one with {MARKER_NAME}",
            remedy="choose another folder",
        )


def create_root(root: Path) -> None:
    """Makes a folder a store, if it is not one; raises as :func:`check_root` does."""
    if not (root / MARKER_NAME).is_file():
        check_root(root)
        atomic.make_folder(root)
        with suppress(PermissionError):  # it may be a killed process's, its name not durable yet
            atomic.sync_folder(root.parent)
        atomic.replace_file(root / MARKER_NAME, canonical_json({"format_version": FORMAT_VERSION}))


def make_durable_folder(root: Path, folder: Path) -> None:
    """Makes a folder of a root's durable, also one that a process made which was killed before it was."""
    atomic.make_folder(folder)
    atomic.sync_folder(root)


def _is_foreign(path: Path) -> bool:
    # The marker's own temporary file is not, as two processes may create one store at once; nor is a disk's lost+found.
    return path.name != "lost+found" and not path.name.startswith(f".{MARKER_NAME}.")
