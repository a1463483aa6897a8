"""Puts figures into the documentation: ``python -m bench.tables``; with ``--check`` it only names what is stale.

A document says where by a pair of comments, ``<!-- table: RESULTS NAME -->`` and ``<!-- end of table -->``; what is
between them is written anew from ``bench/results/RESULTS.json``. The benchmark's module (RESULTS up to a hyphen) makes
the text: its function ``tables(figures)`` returns all its blocks by name.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from bench.machine import RESULTS, say

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, the first column to the left and all others, which are numbers, to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_tables(text: str) -> str:
    """A document with its blocks written anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{_blocks(block[2])[block[3]]}\n\n{block[4]}", text)


@cache
def _blocks(results: str) -> dict[str, str]:
    figures = json.loads((RESULTS / f"{results}.json").read_text())
    return import_module(f"bench.{results.split('-')[0]}").tables(figures)


def main() -> None:
    stale = [path for path in sorted(DOCS.glob("*.md")) if (old := path.read_text()) != with_tables(old)]
    for path in stale:
        say(str(path))
        if "--check" not in sys.argv:
            path.write_text(with_tables(path.read_text()))
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
