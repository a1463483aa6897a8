"""Environments of other programs, each of its own, made on first use and kept outside of this repository.

They cannot share ours: SAELens and dictionary_learning need transformer-lens below 4. They lie in
``$SPARSEMILL_BENCH_CACHE``, by default ``~/.cache/sparsemill-bench``; torch is of our version, so that a figure
compares programs and not builds of torch. None of their code is imported here or copied.
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
    "dictionary_learning": ["dictionary-learning"],
    "sparsify": ["eai-sparsify"],
}
PACKAGES = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}
"""The package that a version is told of."""


def cache() -> Path:
    return Path(os.environ.get("SPARSEMILL_BENCH_CACHE", Path.home() / ".cache" / "sparsemill-bench"))


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, made if it is not there."""
    folder = cache() / peer
    python = folder / "bin" / "python"
    if not (folder / "bin").is_dir():
        say(f"making {folder}, once")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        subprocess.run([*pip, *REQUIREMENTS[peer]], check=True)
    return python


def version_of(peer: str) -> str:
    code = f"import importlib.metadata, json; print(json.dumps(importlib.metadata.version({PACKAGES[peer]!r})))"
    done = subprocess.run([str(python_of(peer)), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
