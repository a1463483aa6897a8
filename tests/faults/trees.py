"""What lies in a folder, to compare before and after."""

import hashlib
from pathlib import Path


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder; of a link, where it leads; of an empty folder, nothing."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found
