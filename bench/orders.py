"""Does the quality of the shuffle change the autoencoder? ``python -m bench.orders``.

The demo's autoencoder trained on the very same rows in three orders, equal steps, start and schedules:

- *exact*: the store's own batches, shuffled uniformly as the certificate says; once more with another seed of the
  order, as a yardstick for what chance does;
- *half-refilled*: prompts in a random order through a buffer of ``--pool-rows`` rows, shuffled whole, half used,
  refilled: the published run's design, without its bug. (Its 1,572,864 rows would hold all of the demo's store.)
- *unshuffled*: prompts in a random order, their rows as they come: a batch is 32 whole prompts.

Measured of each: certificate of the batches it was trained on, L0, explained variance and loss recovered on all
held-out prompts, and dead and ultra-low fractions over the same ``--density-rows`` rows of the store. Trainings are of
``--steps`` steps, fewer than the preset's. Writes ``bench/results/orders.json``; makes the demo's harvest where it is
missing.
"""

import argparse
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bench.encodings import HeldOutQuality
from bench.machine import say, write_results
from bench.tables import markdown
from pipeline.config import Runtime, load_preset
from pipeline.harvest import mean_activation
from pipeline.planning.mixing import half_refilled
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage.certificate import Certificate, measure
from storage.reader import BatchOrder, ShardReader
from storage.shuffle import permutations

Rows = npt.NDArray[np.int64]
START_ROWS = 8192
BLOCK_ROWS = 8192


class Natural(NamedTuple):
    """A store's rows in memory, prompt by prompt.

    Attributes:
        rows: float16 (n_prompts x positions, d_in); row p x positions + t is of the p-th prompt of ``prompts``.
        prompts: prompt numbers, rising.
        positions: rows a prompt.
        first_position: of the first of them.
    """

    rows: npt.NDArray[np.float16]
    prompts: Rows
    positions: int
    first_position: int

    def numbers(self, prompt: npt.NDArray[np.int32], position: npt.NDArray[np.int32]) -> Rows:
        """Numbers of rows by their token."""
        return np.searchsorted(self.prompts, prompt) * self.positions + position - self.first_position


def natural(reader: ShardReader) -> Natural:
    layout = reader.layout
    with reader.sequential(BLOCK_ROWS) as blocks:
        prompts = np.unique(np.concatenate([block.prompt for block in blocks])).astype(np.int64)
    rows = np.empty((reader.n_rows, reader.d_in), np.float16)
    found = Natural(rows, prompts, layout.positions, layout.first_position)
    with reader.sequential(BLOCK_ROWS) as blocks:
        for block in blocks:
            rows[found.numbers(block.prompt, block.position)] = block.rows
    return found


def exact(reader: ShardReader, rows: Natural, order: BatchOrder) -> Generator[Rows]:
    with reader.batches(order) as batches:
        for batch in batches:
            yield rows.numbers(batch.prompt, batch.position)


def passes(rows: Natural, order: BatchOrder, pool_rows: int | None) -> Generator[Rows]:
    """Batches of row numbers, epoch after epoch of prompts in an order of their own; unshuffled without a pool."""
    n, L = len(rows.prompts), rows.positions
    for epoch in count():
        prompts = permutations((n,), order.seed, "orders", epoch)
        in_turn = (prompts[:, None] * L + np.arange(L)).reshape(-1)
        if pool_rows is None:
            places: Iterator[Rows] = iter(
                np.arange(n * L)[: n * L // order.batch_rows * order.batch_rows].reshape(-1, order.batch_rows)
            )
        else:  # of "prompts" of one row each, so that what it names are rows
            places = half_refilled(n * L, 1, pool_rows, order.batch_rows, seed=epoch)
        for batch in places:
            yield in_turn[batch]


def train(config: TrainerConfig, rows: Natural, start: torch.Tensor, mean: torch.Tensor, batches: Iterator[Rows],
          threads: int | None) -> tuple[Trainer, list[Rows]]:  # fmt: skip
    """Trains, and returns the trainer with the prompt numbers of every batch."""
    trainer = Trainer.start(config, rows.rows.shape[1], start, mean, threads=threads)
    seen: list[Rows] = []
    for batch in islice(batches, config.steps):
        metrics = trainer.step(torch.from_numpy(rows.rows[batch].astype(np.float32)))
        seen.append(batch // rows.positions)
        if metrics.step % 100 == 0:
            say(f"  step {metrics.step}: L0 {metrics.l0:.1f}, explained variance {metrics.fve:.3f}")
    return trainer, seen


def densities(trainer: Trainer, rows: Natural, n_rows: int) -> npt.NDArray[np.float64]:
    """Share of evenly spread rows on which each feature fires."""
    chosen = np.arange(n_rows) * len(rows.rows) // n_rows
    sae = trainer.autoencoder
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for first in range(0, n_rows, BLOCK_ROWS):
        block = torch.from_numpy(rows.rows[chosen[first : first + BLOCK_ROWS]].astype(np.float32))
        fired += (sae.encode(block) > 0).sum(0)
    return fired.double().numpy() / n_rows


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The block of docs/performance.md."""
    rows = [
        [
            name,
            f"{found['pair_ratio']:.2f}",
            f"{found['distinct_prompts']:,.0f}",
            f"{found['l0']:.2f}",
            f"{found['fve']:.4f}",
            f"{found['loss_recovered']:.2%}",
            f"{found['cross_entropy']:.4f}",
            f"{found['dead']:.2%}",
            f"{found['ultra_low']:.2%}",
        ]
        for name, found in figures["orders"].items()
    ]
    header = [
        f"order, {figures['steps']:,} steps",
        "same-prompt pairs, uniform = 1",
        "prompts a batch",
        "L0",
        "explained variance",
        "loss recovered",
        "cross-entropy",
        "dead",
        "ultra-low",
    ]
    machine, load = figures["machine"], figures["load"]
    return {
        "orders": markdown(header, rows),
        "setting": (
            f"{figures['rows']:,} rows of {figures['d_in']}, batches of {figures['batch_rows']:,}, a buffer of "
            f"{figures['pool_rows']:,} rows; {figures['held_out_prompts']:,} held-out prompts; densities over "
            f"{figures['density_rows']:,} rows; torch {machine['versions']['torch']}; load average {load[0]:.1f} "
            f"before and {load[1]:.1f} after."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a shipped preset or a TOML file")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pool-rows", type=int, default=65_536)
    parser.add_argument("--density-rows", type=int, default=262_144)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    load, workspace = os.getloadavg()[0], Workspace.open(Runtime(threads=options.threads), for_stderr())
    preset = load_preset(options.preset, [f"train.autoencoder.steps={options.steps}"])
    activations = Chain(preset, workspace, run_directly).harvest()
    reader, config = ShardReader.of(activations), preset.train.autoencoder
    rows, quality = natural(reader), HeldOutQuality(activations, workspace)
    start, mean = (
        torch.from_numpy(reader.read(0, min(START_ROWS, reader.n_rows)).rows),
        torch.from_numpy(mean_activation(activations)),
    )
    orders = [BatchOrder(seed, config.batch_rows, preset.train.pool_rows, preset.train.lanes) for seed in (0, 1)]
    contenders = {
        "exact": exact(reader, rows, orders[0]),
        "exact, another seed": exact(reader, rows, orders[1]),
        "half-refilled buffer": passes(rows, orders[0], options.pool_rows),
        "unshuffled": passes(rows, orders[0], None),
    }
    density_rows = min(options.density_rows, reader.n_rows)
    found: dict[str, dict[str, float | None]] = {}
    for name, batches in contenders.items():
        say(name)
        with ExitStack() as stack:
            stack.callback(batches.close)
            trainer, seen = train(config, rows, start, mean, batches, workspace.threads)
        mixing: Certificate = measure(seen, order=orders[0], n_rows=reader.n_rows, positions=rows.positions)
        fired = densities(trainer, rows, density_rows)
        found[name] = quality.of(trainer.autoencoder) | {
            "pair_ratio": mixing.pair_ratio, "standard_error": mixing.standard_error,
            "distinct_prompts": mixing.distinct_prompts, "dead": float((fired == 0).mean()),
            "ultra_low": float(((fired > 0) & (fired < 1e-4)).mean()),
        }  # fmt: skip
        say(f"  {found[name]}")
    figures = {
        "load": (load, os.getloadavg()[0]), "preset": options.preset, "steps": options.steps, "seed": config.seed,
        "rows": reader.n_rows, "d_in": reader.d_in, "batch_rows": config.batch_rows, "pool_rows": options.pool_rows,
        "density_rows": density_rows, "held_out_prompts": quality.prompts, "orders": found,
    }  # fmt: skip
    print(figures if options.no_write else write_results("orders", figures))


if __name__ == "__main__":
    main()
