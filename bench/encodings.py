"""What each encoding does to activations, and to an autoencoder trained on them: ``python -m bench.encodings``.

The demo's activations, harvested once an encoding, so that row i of each store is the same token's. The float32 store
holds what the model computed; each other store's decoded rows are compared with it, all of them. Then the demo's
autoencoder is trained from each store, equal in all else (steps, seeds, order of the rows), and measured on the same
held-out prompts, on activations that the model computes there. How far two runs differ for other reasons is shown by
one more from the float32 store with its rows in another order.

Everything goes through the artifact store in SPARSEMILL_HOME, so an interrupted benchmark continues. Writes
``bench/results/encodings.json``; ``python -m bench.tables`` puts it into docs/encodings.md.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from bench.machine import say, write_results
from bench.tables import markdown
from pipeline import language_model
from pipeline.config import Runtime, load_preset
from pipeline.evaluation import HeldOut, Losses, baseline_losses, measure_quality
from pipeline.harvest import mean_activation
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.tokens import TokenTable
from pipeline.training import load_autoencoder
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from storage.artifact import Artifact
from storage.encoding import ENCODINGS, Encoding
from storage.reader import ShardReader
from storage.shards import GROUP_NAME

BLOCK_ROWS = 16_384
Wide = npt.NDArray[np.float64]


def bound(rows: Wide, encoding: Encoding, step: Wide) -> Wide:
    """The most that a value may be off by: half a unit in the last place, or what storage.encoding derives for uint8.

    Args:
        rows: exact activations, (n, d).
        encoding: how they are kept.
        step: for uint8 the first column of each row's scale, (n, 1).
    """
    size = np.abs(rows)
    if encoding == "float16":
        return np.maximum(size * 2.0**-11, 2.0**-25)
    if encoding == "bfloat16":
        return np.maximum(size * 2.0**-8, 2.0**-134)
    if encoding == "uint8":
        # float32 arithmetic while encoding and decoding adds up to a few units in its last place of the value.
        return step * np.sqrt(size) + step**2 / 4 + size * 2.0**-20
    return np.zeros_like(size)


def round_trip(exact: Artifact, stored: Artifact, encoding: Encoding) -> dict[str, float]:
    """How far the decoded rows of a store are from the exact ones, over all rows."""
    reference, reader = ShardReader.of(exact), ShardReader.of(stored)
    group = zarr.open_group(stored.folder / GROUP_NAME, mode="r")
    mean = mean_activation(exact).astype(np.float64)
    error_squares = squares = variance = largest = worst_row = worst_of_bound = 0.0
    with reference.sequential(BLOCK_ROWS) as blocks, reader.sequential(BLOCK_ROWS) as decoded:
        for number, (x, y) in enumerate(zip(blocks, decoded, strict=True)):
            if not (np.array_equal(x.prompt, y.prompt) and np.array_equal(x.position, y.position)):
                raise RuntimeError("the stores' rows are not of the same tokens")
            rows = x.rows.astype(np.float64)
            error = np.abs(y.rows - rows)
            here = slice(number * BLOCK_ROWS, number * BLOCK_ROWS + len(rows))
            step = np.asarray(group["scale"][here, :1], np.float64) if encoding == "uint8" else np.zeros((1, 1))
            of_bound = np.divide(error, bound(rows, encoding, step), out=np.zeros_like(error), where=error > 0)
            by_row, row_squares = (error**2).sum(1), (rows**2).sum(1)
            error_squares, squares = error_squares + by_row.sum(), squares + row_squares.sum()
            variance += ((rows - mean) ** 2).sum()
            largest, worst_of_bound = max(largest, error.max()), max(worst_of_bound, of_bound.max())
            worst_row = max(worst_row, np.sqrt(by_row / row_squares).max())
    return {
        "largest_error": float(largest),
        "largest_error_over_bound": float(worst_of_bound),
        "rms_relative_error": float(np.sqrt(error_squares / squares)),
        "largest_relative_error_of_a_row": float(worst_row),
        "one_minus_ev": float(error_squares / variance),
    }


class HeldOutQuality:
    """L0, explained variance and loss recovered on the held-out prompts, without what the store does to activations."""

    def __init__(self, activations: Artifact, workspace: Workspace):
        table = TokenTable(workspace.store.parent(activations, "tokens"))
        self._held_out = HeldOut(
            model=language_model.load_recorded(activations),
            tokens=table.ids("held_out"),
            hook_name=str(activations.config["hook_name"]),
            first_position=0 if activations.config["include_bos"] else 1,
        )
        self._baselines: dict[str, Losses] = baseline_losses(self._held_out)
        self.prompts = len(self._held_out.tokens)

    def __call__(self, sae: Artifact) -> dict[str, float | None]:
        """The figures of a train artifact."""
        return self.of(load_autoencoder(sae))

    def of(self, sae: Autoencoder) -> dict[str, float | None]:
        """The figures of an autoencoder."""
        quality = measure_quality(sae, self._held_out, self._baselines)
        figures = {name: float(value) for name, value in quality.fit._asdict().items()}
        return figures | {
            "loss_recovered": quality.recovered,
            "cross_entropy": quality.cross_entropy["reconstruction"],
            "clean_cross_entropy": quality.cross_entropy["clean"],
        }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/encodings.md, from the results."""
    whole = next(row["bytes_per_row"] for row in figures["encodings"] if row["encoding"] == "float32")
    stored = [
        (
            row["encoding"],
            f"{row['bytes_per_row']:.1f}",
            f"{row['bytes_per_row'] / whole:.1%}",
            f"{row['round_trip']['largest_error']:.2g}",
            f"{row['round_trip']['largest_error_over_bound']:.4f}",
            f"{row['round_trip']['rms_relative_error']:.2g}",
            f"{row['round_trip']['largest_relative_error_of_a_row']:.2g}",
            f"{row['round_trip']['one_minus_ev']:.2g}",
        )
        for row in figures["encodings"]
    ]
    trained = [(row["encoding"], row["autoencoder"]) for row in figures["encodings"]]
    trained.append(("float32, rows in another order", figures["float32_in_another_order"]))
    header = (
        "encoding", "bytes a row", "of float32", "largest error", "largest error over its bound", "rms relative error",
        "largest relative error of a row", "1 - explained variance",
    )  # fmt: skip
    clean = figures["float32_in_another_order"]["clean_cross_entropy"]
    machine, load = figures["machine"], figures["load"]
    return {
        "machine": (
            f"{machine['cpu']}, torch {machine['versions']['torch']}; load average {load[0]:.1f} before and "
            f"{load[1]:.1f} after."
        ),
        "round-trip": markdown(header, stored),
        "autoencoder": markdown(
            (
                f"trained from, {figures['steps']:,} steps",
                "L0",
                "explained variance",
                "norm ratio",
                "loss recovered",
                f"cross-entropy ({clean:.4f} clean)",
            ),
            [
                (
                    name,
                    f"{row['l0']:.2f}",
                    f"{row['fve']:.4f}",
                    f"{row['norm_ratio']:.4f}",
                    f"{row['loss_recovered']:.2%}",
                    f"{row['cross_entropy']:.4f}",
                )
                for name, row in trained
            ],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps; the preset's by default")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    load, workspace = os.getloadavg()[0], Workspace.open(Runtime(threads=options.threads), for_stderr())
    preset = load_preset("demo")
    steps = options.steps or preset.train.autoencoder.steps

    def chain(encoding: Encoding, *overrides: str) -> Chain:
        settings = (f"harvest.encoding={encoding}", f"train.autoencoder.steps={steps}", *overrides)
        return Chain(load_preset("demo", settings), workspace, run_directly)

    exact = chain("float32").harvest()
    measure = HeldOutQuality(exact, workspace)
    rows: list[dict[str, Any]] = []
    for encoding in ENCODINGS:
        run = chain(encoding)
        stored = run.harvest()
        layout = ShardReader.of(stored).layout
        figures = {"encoding": encoding, "bytes_per_row": layout.bytes / layout.n_rows}
        figures["round_trip"] = round_trip(exact, stored, encoding)
        figures["autoencoder"] = measure(run.train())
        rows.append(figures)
        say(str(figures))
    results = {
        "load": (load, os.getloadavg()[0]),
        "preset": "demo",
        "rows": ShardReader.of(exact).n_rows,
        "d_in": ShardReader.of(exact).d_in,
        "steps": steps,
        "seed": preset.train.autoencoder.seed,
        "held_out_prompts": measure.prompts,
        "encodings": rows,
        "float32_in_another_order": measure(chain("float32", "train.reader_seed=1").train()),
    }
    print(write_results("encodings", results) if not options.no_write else results)


if __name__ == "__main__":
    main()
