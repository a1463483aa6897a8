"""What storage/atomic.py does to a disk, by its own source: a new operation is then tried without anybody's doing."""

import ast
import os
from pathlib import Path

from storage import atomic


def operations() -> frozenset[str]:
    """Every name that a fault hook may be called with."""
    calls = [node for node in ast.walk(ast.parse(Path(atomic.__file__).read_text())) if isinstance(node, ast.Call)]
    steps = [call for call in calls if ast.unparse(call.func) in {"_step", "_fsync_path"}]
    names = [call.args[0].value for call in steps if isinstance(call.args[0], ast.Constant)]
    assert "fsync" in names, "storage/atomic.py says otherwise what it does"
    return frozenset(str(name) for name in names)


def possible_in(folder: Path) -> frozenset[str]:
    """Those that a file system has; ``truncate`` ends a write past the page cache, which some refuse."""
    try:
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return operations() - {"truncate"}
    return operations()
