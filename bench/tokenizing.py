"""The tokenize stage beside ``tokenizers``' own ``encode_batch_fast``, same cores: ``python -m bench.tokenizing``.

The text is the standard library's, in documents of 3,000 characters (C4's mean is about 2,200), eight times over,
each time with another first line, so that no two are equal; in a .jsonl.gz. In turn, round after round, each with a
tokenizer of its own that has cached no words: ``encode_batch_fast`` over texts that lie in memory, with its own
threads, ids thrown away; the stage's encoder alone, ids as arrays; and the whole stage, which inflates, parses, hashes,
compares, encodes, packs and writes. The held-out side is one prompt. Encoder and stage run on threads, and again with
as many worker processes of one thread, which are there before the clock starts; the process that reads and packs, and
the scheduler in it, come on top of them, on the same cores.

Then one long document: the most memory of a process that runs the stage on 100 MB, beside one that hands a tenth of it
to ``encode_batch_fast`` whole (all of it took 12.5 GiB). Nine minutes on two cores. Writes
``bench/results/tokenizing.json``; ``python -m bench.tables`` puts it into docs/corpora.md.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

from dask import config as dask_config
from distributed import LocalCluster

from bench.machine import Rounds, interleave, say, write_results
from bench.tables import markdown
from pipeline import standard_library, tokens
from pipeline.cluster import LOCAL_SETTINGS
from pipeline.config import Runtime, Source, TokenizeConfig
from pipeline.corpus.documents import Document, Place, Row, text_document
from pipeline.model_files import find_files
from pipeline.progress import Quiet
from pipeline.text_work import encoder_for
from pipeline.workspace import Workspace, facts
from storage.errors import InputError
from storage.manifest import Spec
from storage.staging import Staging

BATCH = 1000  # documents, as datasets.map gives them
LENGTH, COPIES = 3000, 8
LONG_CHARACTERS = {"stage_alone": 100_000_000, "library_alone": 10_000_000}
NAMES = {
    "encode_batch_fast": "`encode_batch_fast`, texts in memory, ids thrown away",
    "encoder": "the stage's threads, texts in memory, ids as arrays",
    "encoder_workers": "the same in worker processes",
    "stage": "the whole stage, from .jsonl.gz to committed prompts",
    "stage_workers": "the same with worker processes",
}


def library_texts() -> list[str]:
    """The documents, no two alike."""
    modules = standard_library.read_modules()
    whole = [
        text for kind in ("code", "prose") for module in modules for _, text in standard_library.documents(module, kind)
    ]
    cut = [text[start : start + LENGTH] for text in whole for start in range(0, len(text), LENGTH)]
    return [f"# {copy}\n{text}" for copy in range(COPIES) for text in dict.fromkeys(cut)]


def config_of(file: Path) -> TokenizeConfig:
    source = Source(name="library", kind="files", files=(str(file),))
    return TokenizeConfig(language_model="demo", sources=(source,), train_tokens=10**9, held_out_tokens=128)


def run_stage(file: Path, root: Path, threads: int, dask: str | None = None) -> int:
    """Prompts' tokens of the stage on one file."""
    workspace = Workspace.open(Runtime(root=root, threads=threads, dask=dask), Quiet())
    return int(facts(tokens.tokenize(config_of(file), workspace).artifact)["train"]["tokens"])


def run_encoder(texts: list[str], file: Path, root: Path, threads: int, dask: str | None = None) -> None:
    """The stage's encoder alone."""
    workspace = Workspace.open(Runtime(root=root, threads=threads, dask=dask), Quiet())
    documents = (text_document(str(number), text) for number, text in enumerate(texts))
    rows = (Row(Place(0, 0), document) for document in documents if isinstance(document, Document))
    staging = Staging(workspace.store.root / ".staging" / "encoder", Spec("tokenize", 0, {}, {}), {})
    files = find_files("demo")
    with encoder_for(config_of(file), files, files.read_tokenizer(), workspace, staging) as encoder:
        for _ in encoder.encode(rows, frozenset[int]().__contains__):
            pass


@contextmanager
def worker_processes(n_workers: int) -> Generator[str]:
    """Workers of one thread each; gives their scheduler's address."""
    with (
        dask_config.set(LOCAL_SETTINGS),
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
    ):
        yield cast("Any", cluster).scheduler_address


def compare(texts: list[str], folder: Path, rounds: int, threads: int, dask: str) -> tuple[Rounds, int]:
    """Rounds of the ways, and how many tokens the texts have."""
    file = folder / "library.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), 6))
    counting = find_files("demo").read_tokenizer()
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    n_tokens = sum(
        len(one.ids) for batch in batches for one in counting.encode_batch_fast(batch, add_special_tokens=False)
    )
    roots = count()

    def library() -> None:
        tokenizer = find_files("demo").read_tokenizer()
        for batch in batches:
            tokenizer.encode_batch_fast(batch, add_special_tokens=False)

    def encoder(dask: str | None) -> None:
        run_encoder(texts, file, folder / str(next(roots)), threads, dask)

    def stage(dask: str | None) -> None:
        run_stage(file, folder / str(next(roots)), threads, dask)

    ways = {
        "encode_batch_fast": library,
        "encoder": partial(encoder, None),
        "encoder_workers": partial(encoder, dask),
        "stage": partial(stage, None),
        "stage_workers": partial(stage, dask),
    }
    return interleave(ways, rounds), n_tokens


def long_document(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Peak memory of processes on one long document, beside their memory before."""
    text = "\n\n".join(texts)
    file = folder / "long.jsonl"
    code = "import sys; from pathlib import Path; from bench import tokenizing; tokenizing.{}(*map(Path, sys.argv[1:]))"
    found: dict[str, Any] = {}
    for name, characters in LONG_CHARACTERS.items():
        file.write_text(json.dumps({"text": (text * (characters // len(text) + 1))[:characters]}) + "\n")
        out = subprocess.run(
            [sys.executable, "-c", code.format(name), str(file), str(folder / name)], check=True, capture_output=True
        )
        found[name] = json.loads(out.stdout.splitlines()[-1]) | {"characters": characters}
    return found


def stage_alone(file: Path, root: Path) -> None:
    before = _peak_bytes()
    try:
        run_stage(file, root, threads=len(os.sched_getaffinity(0)))
    except InputError as error:  # one document leaves one side of the split empty: known, after the work
        if "no usable tokens for the held_out side" not in str(error):
            raise
    print(json.dumps({"before_bytes": before, "peak_bytes": _peak_bytes()}))


def library_alone(file: Path, _root: Path) -> None:
    tokenizer, before = find_files("demo").read_tokenizer(), _peak_bytes()
    text = json.loads(file.open().readline())["text"]
    tokenizer.encode_batch_fast([text], add_special_tokens=False)
    print(json.dumps({"before_bytes": before, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the parent's peak
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/corpora.md."""
    rows = [
        (
            NAMES[name],
            f"{rate['median'] / 1e6:.2f} ({rate['low'] / 1e6:.2f} to {rate['high'] / 1e6:.2f})",
            f"{figures['of_encode_batch_fast'][name]:.1%}",
            f"{rate['high'] / figures['tokens_per_second']['encode_batch_fast']['high']:.1%}",
        )
        for name, rate in figures["tokens_per_second"].items()
    ]
    header = ("", "million tokens a second", "of the first, median of rounds", "of the first, fastest of each")
    long = figures["long_document"]
    memory = [
        (
            name,
            f"{long[key]['characters'] / 1e6:.0f} MB",
            *(f"{long[key][field] / 2**20:,.0f} MiB" for field in ("before_bytes", "peak_bytes")),
        )
        for name, key in (("the stage", "stage_alone"), ("`encode_batch_fast` on the whole text", "library_alone"))
    ]
    load = "load average {:.1f} before and {:.1f} after".format(*figures["load"])
    size = f"{figures['tokens'] / 1e6:.1f}M tokens"
    setting = f"{figures['threads']} threads, medians of {figures['rounds']} rounds over {size}; {load}."
    return {
        "setting": setting,
        "speed": markdown(header, rows),
        "memory": markdown(("one document", "of", "memory before", "at most"), memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = library_texts()
    with tempfile.TemporaryDirectory() as temporary:
        with worker_processes(options.threads) as dask:
            rounds, n_tokens = compare(texts, Path(temporary), options.rounds, options.threads, dask)
        rates = {name: runs.rates(n_tokens) for name, runs in rounds.runs.items()}
        for name in ("encoder_workers", "stage_workers"):
            del rates[name]["per_cpu_second"]  # which counts this process alone
        results = {
            "load": rounds.load,
            "rounds": options.rounds,
            "threads": options.threads,
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": n_tokens,
            "tokens_per_second": rates,
            "of_encode_batch_fast": {name: rounds.ratio(name, "encode_batch_fast") for name in rounds.runs},
            "long_document": long_document(Path(temporary), texts),
        }
    say(json.dumps(results, indent=1))
    if not options.no_write:
        print(write_results("tokenizing", results))


if __name__ == "__main__":
    main()
