"""Quality at equal tokens: ours and other programs' trainers on the same batches: ``python -m bench.peer_quality``.

The demo's store is read once, shuffled, into a file of ``--steps`` batches; SAELens, dictionary_learning, sparsify and
ours train on them in that order, with the preset's number of features. Each trains at L1 coefficients of its own (of
sparsify, which is TopK, at several k), chosen so that the curves of explained variance and loss recovered lie over the
same L0s, at the preset's learning rate; and the others once more at the learning rate that they come with. What a curve
has at one L0 is interpolated between the two points beside it, linearly in the logarithm of L0, and never extrapolated.
Ours is the demo preset's autoencoder without its schedules; theirs are their standard trainers (sparsify's loop:
``bench.peers.peer_sparsify``), warm-up and resampling off as in ours, everything else (start, decoder norm, clipping)
as they have it. All are measured by the same code on all held-out prompts.

``--points`` trains those alone, and puts them among the results that are there, of the same setting; ``--plots`` draws
the results into docs/images, and trains nothing. Writes ``bench/results/peer_quality.json``; makes the demo's harvest
where it is missing.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from bench.encodings import HeldOutQuality
from bench.machine import RESULTS, say, write_results
from bench.peers.environments import version_of
from bench.peers.process import Peer
from bench.tables import DOCS, markdown
from pipeline.config import Runtime, load_preset
from pipeline.harvest import mean_activation
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage.artifact import Artifact
from storage.reader import BatchOrder, ShardReader

OURS = "sparsemill"
PEERS = {"SAELens": "saelens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
POINTS = (
    "sparsemill=0.5,0.7,1,1.4,2", "SAELens=0.5,0.7,1", "dictionary_learning=0.2,0.5,1",
    "sparsify=20,40", "SAELens@3e-4=1", "dictionary_learning@1e-3=0.5", "sparsify@4e-4=40",
)  # fmt: skip
"""Coefficients of each, and after an @ the learning rate that it comes with (of sparsify, for so many features)."""
AT_L0S = (20, 40)
START_ROWS = 8192
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
QUALITIES = {"fve": "explained variance", "loss_recovered": "loss recovered"}
SETTING = ("activations", "preset", "steps", "seed", "batch_rows", "d_in", "d_sae", "held_out_prompts", "peers")


class Point(NamedTuple):
    """One training: whose, at which L1 coefficient (per token; of sparsify, k) and learning rate."""

    program: str
    l1_coeff: float
    learning_rate: float

    @classmethod
    def read(cls, texts: Iterable[str], learning_rate: float) -> list[Self]:
        """From ``PROGRAM=L1,L1`` or ``PROGRAM@RATE=L1``; at the rate given where none is named."""
        found: list[Self] = []
        for text in texts:
            name, _, coefficients = text.partition("=")
            program, _, rate = name.partition("@")
            if program not in (OURS, *PEERS) or not coefficients:
                raise ValueError(f"{text!r} is not PROGRAM[@RATE]=L1,L1 with one of {', '.join((OURS, *PEERS))}")
            found += [cls(program, float(l1), float(rate or learning_rate)) for l1 in coefficients.split(",")]
        return found


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


@dataclass(frozen=True)
class TopK(Autoencoder):
    """An autoencoder of which a row's k largest features count."""

    k: int = 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        feature_acts = super().encode(x)
        values, places = feature_acts.topk(self.k, dim=-1)
        return torch.zeros_like(feature_acts).scatter(-1, places, values)


def theirs(program: str, config: TrainerConfig, d_in: int, rows: Path, threads: int) -> Autoencoder:
    k = int(config.l1_coeff) if program == "sparsify" else None
    own = {"l1": config.l1_coeff, "steps": config.steps} if k is None else {"k": k}
    weights = rows.with_name("weights.npz")
    with Peer(PEERS[program], threads) as peer:
        peer.ask(
            "start", d_in=d_in, d_sae=config.d_sae, learning_rate=config.learning_rate, batch_rows=config.batch_rows,
            rows=str(rows), threads=threads, **own,
        )  # fmt: skip
        peer.ask("step", times=config.steps)
        peer.ask("save", path=str(weights))
    found = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    tensors = (found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"])
    return Autoencoder(*tensors) if k is None else TopK(*tensors, k=k)


def train(points: Sequence[Point], base: TrainerConfig, activations: Artifact, order: BatchOrder,
          quality: HeldOutQuality, threads: int) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and measures each point on the same batches."""
    reader = ShardReader.of(activations)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_batches(reader, order, base.steps, path)
        rows, mean = np.load(path, mmap_mode="r"), torch.from_numpy(mean_activation(activations))
        for point in points:
            say(f"{point.program}, L1 coefficient (or k) {point.l1_coeff:g}, learning rate {point.learning_rate:g}")
            load = os.getloadavg()[0]
            config = base.model_copy(update={"l1_coeff": point.l1_coeff, "learning_rate": point.learning_rate})
            if point.program == OURS:
                sae = ours(config, rows, mean, threads)
            else:
                sae = theirs(point.program, config, reader.d_in, path, threads)
            runs.append(point._asdict() | quality.of(sae) | {"load": (load, os.getloadavg()[0])})
            say(f"  {runs[-1]}")
    return runs


def among(earlier: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Runs just made, and those that are there of other points.

    Raises:
        ValueError: those that are there are of another setting.
    """
    other = [key for key in SETTING if earlier[key] != figures[key]]
    if other:
        told = "; ".join(f"{key} {earlier[key]} there, {figures[key]} here" for key in other)
        raise ValueError(f"the results that are there are of another setting ({told}): train all points anew")
    return {**figures, "runs": in_order([*earlier["runs"], *figures["runs"]])}


def in_order(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By point, of several of one point the last."""
    return [dict(run) for _, run in sorted({_point(run): run for run in runs}.items())]


def _point(run: Mapping[str, Any]) -> tuple[str, float, float]:
    return run["program"], -run["learning_rate"], run["l1_coeff"]


def curves(figures: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs at the preset's learning rate by program, ours first, with rising L0."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in (OURS, *PEERS):
        runs = [
            run
            for run in figures["runs"]
            if run["program"] == name and run["learning_rate"] == figures["learning_rate"]
        ]
        found[name] = sorted(runs, key=lambda run: run["l0"])
    return found


def at_l0(runs: Sequence[Mapping[str, Any]], l0: float, quality: str) -> float | None:
    """Interpolated between the two runs beside an L0; None where there is none on one of the sides.

    Args:
        runs: with rising L0.
        l0: where.
        quality: which of a run's figures.
    """
    for below, above in pairwise(runs):
        if below["l0"] <= l0 <= above["l0"]:
            share = math.log(l0 / below["l0"]) / math.log(above["l0"] / below["l0"])
            return below[quality] + share * (above[quality] - below[quality])
    return None


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    rows = [
        [
            run["program"],
            f"{run['learning_rate']:g}",
            f"{run['l1_coeff']:g}",
            f"{run['l0']:.1f}",
            f"{run['fve']:.4f}",
            f"{run['loss_recovered']:.2%}",
            f"{run['cross_entropy']:.4f}",
        ]
        for run in figures["runs"]
    ]
    header = ["", "learning rate", "L1 coefficient, or k", "L0", *QUALITIES.values(), "cross-entropy"]
    at_one = [
        [name]
        + [
            "not reached" if found is None else f"{found:.4f}" if quality == "fve" else f"{found:.2%}"
            for quality in QUALITIES
            for l0 in AT_L0S
            for found in [at_l0(runs, l0, quality)]
        ]
        for name, runs in curves(figures).items()
    ]
    machine = figures["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in figures["peers"].items())
    loads = [load for run in figures["runs"] for load in run["load"]]
    return {
        "curves": markdown(header, rows),
        "at-one-l0": markdown(
            [f"interpolated, learning rate {figures['learning_rate']:g}"]
            + [f"{label} at L0 {l0}" for label in QUALITIES.values() for l0 in AT_L0S],
            at_one,
        ),
        "setting": (
            f"{figures['steps']:,} steps of {figures['batch_rows']:,} rows, {figures['d_in']} -> {figures['d_sae']:,}; "
            f"{figures['held_out_prompts']:,} held-out prompts; torch {machine['versions']['torch']}, {versions}. Load "
            f"average {min(loads):.1f} to {max(loads):.1f}."
        ),
    }


def plot(figures: Mapping[str, Any]) -> go.Figure:
    """Both qualities against L0, a line a program."""
    figure = make_subplots(rows=1, cols=2)
    for number, (name, runs) in enumerate(curves(figures).items()):
        for column, quality in enumerate(QUALITIES, start=1):
            figure.add_scatter(
                x=[run["l0"] for run in runs], y=[run[quality] for run in runs], name=name, mode="lines+markers",
                line={"color": COLOURS[number]}, showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    for column, label in enumerate(QUALITIES.values(), start=1):
        figure.update_yaxes(title=label, col=column)
    figure.update_xaxes(type="log", title="L0")
    return figure


def draw() -> None:
    """Draws bench/results/peer_quality.json into docs/images."""
    from pipeline.report.images import Image, write_images

    figures = json.loads((RESULTS / "peer_quality.json").read_text())
    write_images([Image(plot(figures), DOCS / "images" / "peer-quality.svg")], "svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a shipped preset or a TOML file")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--points", nargs="+", metavar="PROGRAM[@RATE]=L1,L1", help=f"by default {' '.join(POINTS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plots", action="store_true", help="draw the results that are there, and train nothing")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    if options.plots:
        draw()
        return
    torch.set_num_threads(options.threads)
    workspace, preset = Workspace.open(Runtime(threads=options.threads), for_stderr()), load_preset(options.preset)
    base = preset.train.autoencoder.model_copy(
        update={"steps": options.steps, "lr_warmup_steps": 0, "lr_decay_fraction": 0.0, "l1_warmup_steps": 0}
    )
    points = Point.read(options.points or POINTS, base.learning_rate)
    activations = Chain(preset, workspace, run_directly).harvest()
    quality = HeldOutQuality(activations, workspace)
    order = BatchOrder(0, base.batch_rows, preset.train.pool_rows, preset.train.lanes)
    figures: dict[str, Any] = {
        "activations": activations.id, "preset": options.preset, "steps": options.steps, "seed": base.seed,
        "batch_rows": base.batch_rows, "d_in": ShardReader.of(activations).d_in, "d_sae": base.d_sae,
        "learning_rate": base.learning_rate, "held_out_prompts": quality.prompts,
        "peers": {peer: version_of(peer) for peer in PEERS.values()},
        "runs": in_order(train(points, base, activations, order, quality, options.threads)),
    }  # fmt: skip
    path = RESULTS / "peer_quality.json"
    if options.points and path.exists():
        figures = among(json.loads(path.read_text()), figures)
    print(figures if options.no_write else write_results("peer_quality", figures))


if __name__ == "__main__":
    main()
