"""Peak memory of a process that tokenizes one long document, or many short ones: within what docs/corpora.md says.

Words in a .jsonl, so that reading, parsing, cutting into pieces, encoding, packing and writing are all in it. The
process begins with one of 5 MB, or with a quarter of the short ones, as libraries, buffers and what threads work on at
once are not what is counted.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from pipeline.corpus.documents import is_held_out_text
from pipeline.model_files import find_files
from tests.faults.lengths import times

ROOT = Path(__file__).parents[2]
CHARACTERS = times(30, 100) * 1_000_000
SLACK_BYTES = 64 * 2**20
CHILD = """
import json, sys
from pathlib import Path
from pipeline import tokens
from pipeline.config import Runtime, Source, TokenizeConfig
from pipeline.progress import Quiet
from pipeline.workspace import Workspace, facts
from tests.faults.peak import peak_bytes
folder = Path(sys.argv[1])
for name in ("short", "long"):
    before = peak_bytes()
    source = Source(name="words", kind="files", files=(str(folder / f"{name}.jsonl"),))
    config = TokenizeConfig(language_model="demo", sources=(source,), train_tokens=10**9, held_out_tokens=128)
    stats = facts(tokens.tokenize(config, Workspace.open(Runtime(root=folder / "store", threads=1), Quiet())).artifact)
print(json.dumps({"tokens": stats["train"]["tokens"], "cuts": stats["train"]["sources"]["words"]["inexact_cuts"],
                  "grown": peak_bytes() - before}))
"""


def write(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(("last", "width"), [("", 1), ("🤖", 4)])
def test_one_long_document_takes_its_line_its_text_and_its_ids(last: str, width: int, tmp_path: Path):
    vocabulary = find_files("demo").read_tokenizer().get_vocab()
    words = sorted(word.removeprefix("Ġ") for word in vocabulary if word.removeprefix("Ġ").isalpha() and word.isascii())
    rng = np.random.default_rng(0)
    part = " ".join(words[i] for i in rng.integers(0, len(words), 300_000))
    text, first = (" ".join([part] * (characters // len(part))) for characters in (CHARACTERS, 5_000_000))
    held_out = next(one for number in range(10_000) if is_held_out_text(one := f"{number} {part[:2000]}"))
    side = next(one for number in range(100) if not is_held_out_text(one := f"{number} {text} {last}"))
    write(tmp_path / "short.jsonl", [f"{first} {last}", held_out])
    write(tmp_path / "long.jsonl", [side, held_out])
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"characters": len(side), "width": width, **found}))
    assert found["tokens"] > len(side) / 10
    assert found["cuts"] == 0
    assert found["grown"] <= (1 + width) * len(side) + 4 * found["tokens"] + SLACK_BYTES


DOCUMENTS = times(75_000, 500_000)
MANY_SLACK_BYTES = 8 * 2**20
MANY = """
import json, sys
from pathlib import Path
from pipeline import tokenizing, tokens
from pipeline.config import Runtime, Source, TokenizeConfig
from pipeline.progress import Quiet
from pipeline.workspace import Workspace, facts
from tests.faults.peak import peak_bytes
tokenizing.PROMPTS_PER_ROUND, tokenizing._MOST_RECENT_DIGESTS = 512, 8192  # what a round holds is not counted either
folder = Path(sys.argv[1])
peaks = []
for name in ("few", "many"):
    source = Source(name="numbers", kind="files", files=(str(folder / f"{name}.jsonl"),))
    config = TokenizeConfig(
        language_model="demo", sources=(source,), prompt_tokens=64, train_tokens=10**9, held_out_tokens=128
    )
    stats = facts(tokens.tokenize(config, Workspace.open(Runtime(root=folder / "store", threads=1), Quiet())).artifact)
    peaks.append(peak_bytes())
print(json.dumps({"documents": stats["train"]["sources"]["numbers"]["documents_read"], "grown": peaks[1] - peaks[0]}))
"""


def test_many_short_documents_take_8_bytes_each(tmp_path: Path):
    for name, n in (("few", DOCUMENTS), ("many", 4 * DOCUMENTS)):
        write(tmp_path / f"{name}.jsonl", map(str, range(n)))
    command = [sys.executable, "-W", "ignore", "-c", MANY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert found["documents"] > 3.9 * DOCUMENTS  # the others are held out
    assert found["grown"] <= 8 * 3 * DOCUMENTS + MANY_SLACK_BYTES
