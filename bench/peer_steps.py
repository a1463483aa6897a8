"""A training step beside those of other programs: ``python -m bench.peer_steps``.

SAELens (float32 and with its autocast, each also compiled), dictionary_learning and sparsify, each in a process and
environment of its own (``bench.peers``), and the plain dense loop of ``bench.train`` and ours, which share this
process, take a step each in turn, round after round, on the same batch from the same weights, with the same number of
threads. Biases are calibrated to the L0 named, and the learning rate is so small that it stays there. sparsify is TopK
with k the L0: its work is another's, and it is there for scale.

Writes ``bench/results/peer_steps.json``. One size alone (``--size``) takes its place among the sizes that are there,
each with its own machine, threads, rounds and load; with peers left out (``--without``) figures are only printed.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import train
from bench.machine import RESULTS, describe, interleave, say, write_results
from bench.peers.environments import version_of
from bench.peers.process import Peer
from bench.tables import markdown
from sae.trainer import Trainer

OURS, PLAIN = "sparsemill", "plain dense loop"
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SAELens": ("saelens", {}),
    "SAELens, compiled": ("saelens", {"compiled": True}),
    "SAELens, autocast": ("saelens", {"autocast": True}),
    "SAELens, autocast, compiled": ("saelens", {"autocast": True, "compiled": True}),
    "dictionary_learning": ("dictionary_learning", {}),
    "sparsify (TopK)": ("sparsify", {}),
}


def measure(
    width: int, d_sae: int, l0: float, names: list[str], rounds: int, threads: int, batch_rows: int, folder: Path
) -> dict[str, Any]:
    """Seconds a step of each at one size."""
    rows = train.activations(batch_rows, width)
    settings = train.config(d_sae, l0, "auto").model_copy(update={"batch_rows": batch_rows})
    ours = Trainer.start(settings, width, rows, rows.mean(dim=0), threads=threads)
    plain = train.DenseLoop(ours, 0.5, autocast=False, compiled=False)
    sae = ours.autoencoder
    weights, data = folder / f"{width}.npz", folder / f"{width}.npy"
    np.savez(
        weights, W_enc=sae.W_enc.numpy(), b_enc=sae.b_enc.numpy(), W_dec=sae.W_dec.numpy(), b_dec=sae.b_dec.numpy()
    )
    np.save(data, rows.numpy())
    things: dict[str, Callable[[], object]] = {OURS: lambda: ours.step(rows), PLAIN: lambda: plain.step(rows)}
    with ExitStack() as stack:
        for name in names:
            peer, options = PEERS[name]
            process = stack.enter_context(Peer(peer, threads))
            process.ask(
                "start", d_in=width, d_sae=d_sae, learning_rate=train.LEARNING_RATE, batch_rows=batch_rows,
                rows=str(data), weights=str(weights), threads=threads, **options,
                **({"k": round(l0)} if peer == "sparsify" else {"l1": 0.5, "steps": 10**6}),
            )  # fmt: skip
            things[name] = lambda process=process: process.ask("step")
        for name, step in things.items():
            say(f"{width} -> {d_sae}: {name}, first step")
            step()
        timed = interleave(things, rounds)
    metrics = ours.step(rows)
    rates = {name: runs.rates(1) for name, runs in timed.runs.items()}
    seconds = {n: {"median": 1 / r["median"], "low": 1 / r["high"], "high": 1 / r["low"]} for n, r in rates.items()}
    return {
        "l0": metrics.l0, "engine": metrics.engine, "batch_rows": batch_rows, "seconds": seconds, "load": timed.load,
        "ratios": {name: timed.ratio(OURS, name) for name in things if name != OURS},
    }  # fmt: skip


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    blocks: dict[str, str] = {}
    for size, found in figures["sizes"].items():
        rows = [
            [
                name,
                f"{s['median']:.3f}",
                f"{s['low']:.3f} to {s['high']:.3f}",
                "" if name == OURS else f"{found['ratios'][name]:.1f} x",
            ]
            for name, s in found["seconds"].items()
        ]
        header = [f"at L0 {found['l0']:.0f}", "step, s", "least to greatest", "ours is faster by"]
        blocks[size] = markdown(header, rows)
    blocks["machine"] = "\n\n".join(_settings(figures["sizes"]))
    return blocks


def _settings(sizes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Machine, versions and load; of each size where they were not measured alike."""
    alike: dict[str, list[str]] = {}
    for size, found in sizes.items():
        machine = found["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in found["peers"].items())
        text = (
            f"{machine['cpu']}, {found['threads']} threads, torch {machine['versions']['torch']}; {versions}. "
            f"{found['rounds']} rounds; load average"
        )
        alike.setdefault(text, []).append(size)
    loads = {text: [load for size in named for load in sizes[size]["load"]] for text, named in alike.items()}
    return [
        (f"{', '.join(named)}: " if len(alike) > 1 else "")
        + f"{text} {min(loads[text]):.1f} to {max(loads[text]):.1f}."
        for text, named in alike.items()
    ]


def among(earlier: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes just measured, and those that are there of other sizes."""
    return {**figures, "sizes": {**earlier["sizes"], **figures["sizes"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--l0", type=float, default=60)
    parser.add_argument("--batch-rows", type=int, default=train.BATCH_ROWS)
    parser.add_argument("--size", help="one size alone, such as 512-4096; the others' results stay")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for name, (peer, _) in PEERS.items() if peer not in options.without]
    chosen = [tuple(map(int, options.size.split("-")))] if options.size else train.SIZES
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            f"{width}-{d_sae}": measure(
                width, d_sae, options.l0, names, options.rounds, options.threads, options.batch_rows, Path(folder)
            )
            for width, d_sae in chosen
        }
    setting = {
        "machine": describe(), "threads": options.threads, "rounds": options.rounds,
        "peers": {peer: version_of(peer) for peer in dict.fromkeys(PEERS[name][0] for name in names)},
    }  # fmt: skip
    figures: dict[str, Any] = {"seed": 0, "sizes": {size: found | setting for size, found in sizes.items()}}
    path = RESULTS / "peer_steps.json"
    if options.size and path.exists():
        figures = among(json.loads(path.read_text()), figures)
    print(json.dumps(figures) if options.no_write or options.without else write_results("peer_steps", figures))


if __name__ == "__main__":
    main()
