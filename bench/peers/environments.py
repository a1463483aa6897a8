"""Environments of other programs, each of its own, made on first use and kept outside of this repository.

They cannot share ours: SAELens and dictionary_learning need transformer-lens below 4. They lie in
``$SPARSEMILL_BENCH_CACHE``, by default ``~/.cache/sparsemill-bench``; torch is of our version, so that a figure
compares programs and not builds of torch. None of their code is imported here or copied.

The last thing that an environment gets is a file that says what is installed. Without it, or with another list in it,
the environment is made anew: an installation that broke off is none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.machine import say

REQUIREMENTS = {
    "saelens": ["sae-lens>=6,<7", "transformer-lens<4"],
    "dictionary_learning": ["dictionary-learning>=0.1,<0.2"],
    "sparsify": ["eai-sparsify>=1.3,<2"],
}
PACKAGES = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}
"""The package that a version is told of."""
STAMP = "installed.txt"


def cache() -> Path:
    return Path(os.environ.get("SPARSEMILL_BENCH_CACHE", Path.home() / ".cache" / "sparsemill-bench"))


def python_of(peer: str, home: Path | None = None) -> Path:
    """The Python of a peer's environment, made if it is not there whole.

    Args:
        peer: whose.
        home: the folder of all environments; :func:`cache` by default.
    """
    folder = (home or cache()) / peer
    python, stamp = folder / "bin" / "python", folder / STAMP
    first = f"torch=={torch.__version__.partition('+')[0]}"
    wanted = "".join(f"{requirement}\n" for requirement in (first, *REQUIREMENTS[peer]))
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"making {folder}, once")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, first], check=True)
        subprocess.run([*pip, *REQUIREMENTS[peer]], check=True)
        stamp.write_text(wanted)
    return python


def version_of(peer: str) -> str:
    code = f"import importlib.metadata, json; print(json.dumps(importlib.metadata.version({PACKAGES[peer]!r})))"
    done = subprocess.run([str(python_of(peer)), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
