"""Quality at equal tokens: ours and other programs' trainers on the same batches: ``python -m bench.peer_quality``.

The demo's store is read once, shuffled, into a file of ``--steps`` batches; SAELens, dictionary_learning and ours
train on them in that order, with the preset's number of features and learning rate, at several L1 coefficients, so that
each is a curve of explained variance and loss recovered against L0. Ours is the demo preset's autoencoder without its
schedules; theirs are their standard trainers, warm-up and resampling off as in ours, everything else (start, decoder
norm, clipping) as they have it. All are measured by the same code on all held-out prompts. Writes
``bench/results/peer_quality.json``; makes the demo's harvest where it is missing.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.encodings import HeldOutQuality
from bench.machine import say, write_results
from bench.peers.environments import version_of
from bench.peers.process import Peer
from bench.tables import markdown
from pipeline.config import Runtime, load_preset
from pipeline.harvest import mean_activation
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage.reader import BatchOrder, ShardReader

OURS = "sparsemill"
PEERS = {"SAELens": "saelens", "dictionary_learning": "dictionary_learning"}
START_ROWS = 8192


def write_batches(reader: ShardReader, order: BatchOrder, steps: int, path: Path) -> None:
    """The rows of so many full batches, float16, one after the other."""
    size = order.batch_rows
    out = np.lib.format.open_memmap(path, "w+", np.float16, (steps * size, reader.d_in))
    with reader.batches(order) as batches:
        full = (batch.rows for batch in batches if len(batch.rows) == size)
        for number, rows in enumerate(islice(full, steps)):
            out[number * size : (number + 1) * size] = rows
    out.flush()


def ours(config: TrainerConfig, rows: npt.NDArray[np.float16], mean: torch.Tensor, threads: int) -> Autoencoder:
    def float32(first: int, count: int) -> torch.Tensor:
        return torch.from_numpy(rows[first : first + count].astype(np.float32))

    trainer = Trainer.start(config, rows.shape[1], float32(0, START_ROWS), mean, threads=threads)
    for step in range(config.steps):
        trainer.step(float32(step * config.batch_rows, config.batch_rows))
    return trainer.autoencoder


def theirs(peer: Peer, config: TrainerConfig, d_in: int, rows: Path, threads: int) -> Autoencoder:
    peer.ask(
        "start", d_in=d_in, d_sae=config.d_sae, l1=config.l1_coeff, learning_rate=config.learning_rate,
        batch_rows=config.batch_rows, steps=config.steps, rows=str(rows), threads=threads,
    )  # fmt: skip
    peer.ask("step", times=config.steps)
    weights = rows.with_name("weights.npz")
    peer.ask("save", path=str(weights))
    found = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    return Autoencoder(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"])


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    rows = [
        [
            run["program"],
            f"{run['l1_coeff']:g}",
            f"{run['l0']:.1f}",
            f"{run['fve']:.4f}",
            f"{run['loss_recovered']:.2%}",
            f"{run['cross_entropy']:.4f}",
        ]
        for run in figures["runs"]
    ]
    machine = figures["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in figures["peers"].items())
    return {
        "curves": markdown(["", "L1 coefficient", "L0", "explained variance", "loss recovered", "cross-entropy"], rows),
        "setting": (
            f"{figures['steps']:,} steps of {figures['batch_rows']:,} rows, {figures['d_in']} -> {figures['d_sae']:,}, "
            f"learning rate {figures['learning_rate']:g}; {figures['held_out_prompts']:,} held-out prompts; torch "
            f"{machine['versions']['torch']}, {versions}."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a shipped preset or a TOML file")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--l1", type=float, nargs="+", default=[0.5, 1.0], help="coefficients, per token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load, workspace = os.getloadavg()[0], Workspace.open(Runtime(threads=options.threads), for_stderr())
    preset = load_preset(options.preset)
    activations = Chain(preset, workspace, run_directly).harvest()
    reader, quality = ShardReader.of(activations), HeldOutQuality(activations, workspace)
    base = preset.train.autoencoder.model_copy(
        update={"steps": options.steps, "lr_warmup_steps": 0, "lr_decay_fraction": 0.0, "l1_warmup_steps": 0}
    )
    order = BatchOrder(0, base.batch_rows, preset.train.pool_rows, preset.train.lanes)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_batches(reader, order, options.steps, path)
        rows, mean = np.load(path, mmap_mode="r"), torch.from_numpy(mean_activation(activations))
        for l1 in options.l1:
            config = base.model_copy(update={"l1_coeff": l1})
            for program in (OURS, *PEERS):
                say(f"{program}, L1 coefficient {l1:g}")
                if program == OURS:
                    sae = ours(config, rows, mean, options.threads)
                else:
                    with Peer(PEERS[program], options.threads) as peer:
                        sae = theirs(peer, config, reader.d_in, path, options.threads)
                runs.append({"program": program, "l1_coeff": l1, **quality.of(sae)})
                say(f"  {runs[-1]}")
    figures = {
        "load": (load, os.getloadavg()[0]), "preset": options.preset, "steps": options.steps, "seed": base.seed,
        "batch_rows": base.batch_rows, "d_in": reader.d_in, "d_sae": base.d_sae, "learning_rate": base.learning_rate,
        "held_out_prompts": quality.prompts, "peers": {peer: version_of(peer) for peer in PEERS.values()},
        "runs": sorted(runs, key=lambda run: (run["program"], run["l1_coeff"])),
    }  # fmt: skip
    print(figures if options.no_write else write_results("peer_quality", figures))


if __name__ == "__main__":
    main()
