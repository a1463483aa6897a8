"""Storing activations, and how well they are mixed, beside SAELens: ``python -m bench.peer_stores``.

*Storing.* SAELens's CacheActivationsRunner and our harvest, each in its own process, and our bare forward pass, batches
shared out over threads, in turn: of the same model (gelu-1l's shape, random weights), the same prompts of random words,
float16; the runner and the pass of fewer of them, as rates are a token's. The runner is timed whole with its model made
(it writes Arrow files, and an index that shuffles *prompts*); the harvest from its first row to its last file, with its
shuffle of rows, checksums and statistics.

*Mixing.* Certificates (same-prompt pairs of a batch over those of a uniform shuffle) of batches of 4,096 from the
same prompts, on prompt numbers alone: our store, SAELens's own mixing buffer of 64 contexts (its default of 20 is less
than a batch), the published buffer of 1,572,864 rows, refilled when half used, and no shuffle at all. A buffer's ratio
grows with the corpus: it stands for the number of prompts named. Writes ``bench/results/peer_stores.json``.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import harvesting
from bench.machine import interleave, say, write_results
from bench.peers.environments import version_of
from bench.peers.process import Peer
from bench.tables import markdown
from pipeline import language_model, tokens
from pipeline.config import Runtime, load_preset
from pipeline.planning.mixing import half_refilled
from pipeline.planning.sizes import planned_batches
from pipeline.windows import single_threaded
from pipeline.workspace import Workspace
from storage.certificate import Certificate, certify, measure
from storage.reader import BatchOrder
from storage.shards import Layout

POSITIONS, BATCH_ROWS, PUBLISHED_ROWS, CONTEXTS = 128, 4096, 1_572_864, 64
OURS, THEIRS, FORWARD = "sparsemill, harvest", "SAELens, CacheActivationsRunner", "bare forward pass, nothing stored"


def storing(folder: Path, windows: int, peer_prompts: int, rounds: int, threads: int) -> dict[str, Any]:
    """Tokens a second and bytes a row of those that store, and of the bare pass."""
    harvesting.write_model(folder)
    preset = harvesting.write_preset(folder, windows)
    config = load_preset(str(preset))
    parent = tokens.tokenize(config.tokenize, Workspace.open(Runtime(root=folder / "prompts"))).artifact
    table = tokens.TokenTable(parent)
    prompts = folder / "tokens.npy"
    np.save(prompts, table.ids("train", range(peer_prompts)).numpy().astype(np.int32))
    passes = table.ids("train", range(harvesting.FORWARD_PROMPTS)).split(harvesting.BATCH)
    model = language_model.load(str(folder), device="cpu")
    harvests: list[dict[str, float]] = []
    caches: list[dict[str, Any]] = []

    def ours() -> None:
        harvests.append(harvesting.in_a_process(preset, folder, "cpu", threads))

    def theirs() -> None:
        with Peer("saelens", threads) as peer, tempfile.TemporaryDirectory(dir=folder) as place:
            caches.append(
                peer.ask(
                    "cache", model=str(folder), tokens=str(prompts), hook_name=harvesting.SITE, shuffle=True,
                    d_in=harvesting.SHAPE["d_mlp"], prompts_a_pass=harvesting.BATCH, dtype="float16", path=place,
                )
            )  # fmt: skip

    def forward() -> None:
        with single_threaded(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda batch: model.activations(batch, harvesting.SITE) is None, passes))

    forward()  # warm
    timed = interleave({OURS: ours, THEIRS: theirs, FORWARD: forward}, rounds)
    seconds = {
        OURS: [one["seconds"] for one in harvests], THEIRS: [one["seconds"] for one in caches],
        FORWARD: timed.runs[FORWARD].seconds,
    }  # fmt: skip
    n_tokens = {
        OURS: windows * harvesting.WINDOW_PROMPTS * harvesting.PROMPT_TOKENS,
        THEIRS: caches[0]["prompts"] * harvesting.PROMPT_TOKENS,  # it fills its last buffer from the beginning
        FORWARD: harvesting.FORWARD_PROMPTS * harvesting.PROMPT_TOKENS,
    }
    bytes_per_row = {
        OURS: harvests[0]["bytes"] / harvests[0]["rows"],
        THEIRS: caches[0]["bytes"] / (caches[0]["prompts"] * harvesting.PROMPT_TOKENS),
    }
    rates = {name: [n_tokens[name] / took for took in seconds[name]] for name in seconds}
    return {
        name: {
            "tokens_per_second": {"median": median(found), "low": min(found), "high": max(found)},
            "ratio": median(ours / other for ours, other in zip(rates[OURS], found, strict=True)),
        }
        | ({"bytes_per_row": bytes_per_row[name]} if name in bytes_per_row else {})
        for name, found in rates.items()
    } | {"load": timed.load}


def mixing(n_prompts: int, folder: Path) -> dict[str, Certificate]:
    """Certificates of all orders over so many prompts, all positions of each."""
    order = BatchOrder(seed=0, batch_rows=BATCH_ROWS, pool_rows=65_536)
    size = min(8192, n_prompts)
    layout = Layout(n_prompts // size, size, POSITIONS, 64, 256, "float16", 0, n_prompts, first_position=0)

    def measured(batches: Iterator[npt.NDArray[np.integer]]) -> Certificate:
        return measure(batches, order=order, n_rows=n_prompts * POSITIONS, positions=POSITIONS)

    say("mixing: ours")
    found = {"our store": certify(planned_batches(layout), order)}
    say("mixing: SAELens's buffer")
    with Peer("saelens", 1) as peer:
        path = folder / "mixed.npy"
        peer.ask(
            "mix", n_prompts=n_prompts, positions=POSITIONS, prompts_a_pass=8, buffer_rows=CONTEXTS * POSITIONS,
            batch_rows=BATCH_ROWS, path=str(path),
        )  # fmt: skip
        found[f"SAELens's mixing buffer, {CONTEXTS * POSITIONS:,} rows"] = measured(iter(np.load(path)))
    say("mixing: half-refilled buffer")
    pool = min(PUBLISHED_ROWS, n_prompts * POSITIONS // 2)
    found[f"half-refilled buffer, {pool:,} rows"] = measured(half_refilled(n_prompts, POSITIONS, pool, BATCH_ROWS))
    whole = n_prompts * POSITIONS // BATCH_ROWS * BATCH_ROWS
    in_order = np.repeat(np.arange(n_prompts), POSITIONS)[:whole].reshape(-1, BATCH_ROWS)
    return found | {"none: rows as they come": measured(iter(in_order))}


def ratio(storing: Mapping[str, Any], name: str) -> float:
    """How many times as fast as another ours stores: median over the rounds, or of medians where no rounds are kept."""
    kept = storing[name].get("ratio")
    medians = [storing[one]["tokens_per_second"]["median"] for one in (OURS, name)]
    return medians[0] / medians[1] if kept is None else kept


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    storing = {name: one for name, one in figures["storing"].items() if name != "load"}
    stored = [
        [
            name,
            "" if name == OURS else f"{ratio(storing, name):.1f} x",
            *(f"{one['tokens_per_second'][key]:,.0f}" for key in ("median", "low", "high")),
            f"{one['bytes_per_row']:,.0f}" if "bytes_per_row" in one else "",
        ]
        for name, one in storing.items()
    ]
    faster = "ours is faster by" if "ratio" in storing[OURS] else "ours is faster by (ratio of medians)"
    mixed = [
        [name, f"{one['pair_ratio']:,.2f} ± {one['standard_error']:.2f}", f"{one['distinct_prompts']:,.0f}"]
        for name, one in figures["mixing"].items()
    ]
    machine, load = figures["machine"], figures["storing"]["load"]
    return {
        "storing": markdown(["", faster, "tokens a second", "least", "greatest", "bytes a row"], stored),
        "mixing": markdown(
            [f"{figures['prompts']:,} prompts", "same-prompt pairs, uniform = 1", "prompts a batch"], mixed
        ),
        "machine": (
            f"{machine['cpu']}, {figures['threads']} threads, torch {machine['versions']['torch']}; sae-lens "
            f"{figures['peers']['saelens']}. {figures['rounds']} rounds; load average {load[0]:.1f} before and "
            f"{load[1]:.1f} after."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=3, help="of 1,024 prompts, that the harvest stores")
    parser.add_argument("--peer-prompts", type=int, default=1024, help="that SAELens stores, which takes it longer")
    parser.add_argument("--prompts", type=int, default=65_536, help="to mix")
    parser.add_argument("--folder", type=Path, help="where the stores are written for the while")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mixed = mixing(options.prompts, Path(folder))
        stored = storing(Path(folder), options.windows, options.peer_prompts, options.rounds, options.threads)
    figures = {
        "threads": options.threads, "rounds": options.rounds, "seed": 0, "prompts": options.prompts,
        "peers": {"saelens": version_of("saelens")}, "storing": stored,
        "mixing": {name: one.to_json() for name, one in mixed.items()},
    }  # fmt: skip
    print(json.dumps(figures) if options.no_write else write_results("peer_stores", figures))


if __name__ == "__main__":
    main()
