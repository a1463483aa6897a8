"""What lies in folders, by its hashes: nothing of the product has a part in it."""

import hashlib
from pathlib import Path

Files = dict[str, str]
"""sha256 by name."""


def hashed(folder: Path) -> Files:
    """sha256 of every file of an artifact but ``run.json``, by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / "run.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def artifacts(root: Path) -> dict[str, Path]:
    """Folders of committed artifacts by id."""
    return {path.parent.name: path.parent for path in root.glob("[a-z]*/*/manifest.json")}


def different(one: Files, other: Files) -> set[str]:
    """Names of files that are not the same in both."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
