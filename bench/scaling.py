"""What grows with what: ``python -m bench.scaling``; ``--plots`` draws the results into docs/images instead.

Cost against one size at a time, beside what theory expects (a line through the middle point):

- *rows*: synthetic rows of 64 values, in windows of 1,024 prompts of 128: encoded, shuffled and written; the
  certificate, of all batches; one shuffled epoch read. Linear is expected of each.
- *d_sae*: a training step at d_in 512, batch 4,096, L0 32, ours and the dense loop's (``bench.train``). Linear.
- *prompts a window*: a window shuffled and written, a row; sorting makes it log P, and pages of memory that the
  kernel must provide more than that. With it the mixing, at the smallest pool that the reader takes: just under 1.
- *workers*: a harvest of ``bench.harvesting``'s model by that many workers of this machine, of one thread each: what
  six windows more cost. One over their number, as long as there are cores.

A projection multiplies what ``bench.harvesting``, ``bench.reading`` and ``bench.train`` measured at gelu-1l's size by
the rows of 2e9 and 1e12 tokens. Writes ``bench/results/scaling.json``, for docs/scaling.md.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from bench import harvesting, train
from bench.machine import RESULTS, interleave, say, write_results
from bench.tables import DOCS, markdown
from pipeline import tokens
from pipeline.config import Runtime, load_preset
from pipeline.planning.sizes import planned_batches
from pipeline.workspace import Workspace
from storage import atomic
from storage.certificate import certify
from storage.reader import BatchOrder, ShardReader
from storage.shards import Layout, WindowBuffer, create_group

D_IN, POSITIONS, WINDOW_PROMPTS, CHUNK_ROWS, BATCH_ROWS = 64, 128, 1024, 64, 4096
WINDOWS = (1, 2, 8, 24, 76)
D_SAE = (1024, 2048, 4096, 8192, 16384)
PROMPTS = (256, 512, 1024, 2048, 4096, 8192)
WORKERS, SHORT_HARVEST, LONG_HARVEST = (1, 2), 2, 8  # windows
ORDER = BatchOrder(seed=0, batch_rows=BATCH_ROWS, pool_rows=65_536)
TOKENS = (2 * 10**9, 10**12)


def layout_of(windows: int, prompts: int = WINDOW_PROMPTS) -> Layout:
    return Layout(windows, prompts, POSITIONS, D_IN, CHUNK_ROWS, "float16", 0, windows * prompts)


def write_store(folder: Path, layout: Layout) -> None:
    """Synthetic rows, encoded, shuffled, written and made durable; a window's memory is used for the next."""
    random = np.random.default_rng(0).standard_normal((64, POSITIONS, D_IN), dtype=np.float32)
    create_group(folder, layout)
    buffer: WindowBuffer | None = None
    for window in range(layout.n_windows):
        prompts = np.arange(window * layout.window_prompts, (window + 1) * layout.window_prompts)
        buffer = WindowBuffer(layout, window, prompts, reuse=buffer)
        for first in range(0, layout.window_prompts, len(random)):
            buffer.add(first, random)
        atomic.sync_files([folder / name for name in buffer.write(folder)], top=folder)


def against_rows(folder: Path, windows: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in windows:
        layout = layout_of(number)
        place = folder / f"rows-{number}"

        def write(place: Path = place, layout: Layout = layout) -> None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_store(place, layout)

        def read(place: Path = place) -> None:
            with ShardReader(place, "bench").epoch(ORDER) as batches:
                for _ in batches:
                    pass

        def certificate(place: Path = place) -> None:
            certify(ShardReader(place, "bench"), ORDER)

        found.append(_point(layout.n_rows, {"write": write, "certificate": certificate, "read": read}, rounds))
        shutil.rmtree(place)
    return found


def against_prompts(folder: Path, prompts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for size in prompts:
        layout = layout_of(max(1, max(prompts) // size), size)
        place = folder / f"prompts-{size}"

        def write(place: Path = place, layout: Layout = layout) -> None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_store(place, layout)

        point = _point(size, {"write": write}, rounds)
        smallest = BatchOrder(seed=0, batch_rows=1024, pool_rows=20 * CHUNK_ROWS)
        mixing = certify(planned_batches(layout), smallest)
        found.append(
            point | {"rows": layout.n_rows, "pair_ratio": mixing.pair_ratio, "standard_error": mixing.standard_error}
        )
        shutil.rmtree(place)
    return found


def against_d_sae(sizes: Sequence[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for d_sae in sizes:
        say(f"d_sae {d_sae:,}")
        point = train.measure(512, d_sae, 32, [train.PLAIN, train.OURS], rounds=rounds, threads=threads, device="cpu")
        found.append({"size": d_sae, "l0": point["l0"], "seconds": point["seconds"], "load": point["load"]})
    return found


def against_workers(folder: Path, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds a window of 1,024 prompts of 128 tokens: what more windows cost, so that no start or end counts."""
    harvesting.write_model(folder)
    long = harvesting.write_preset(folder, LONG_HARVEST)
    short = long.with_name("short.toml")
    short.write_text(long.read_text().replace("[harvest]", f"[harvest]\nn_windows = {SHORT_HARVEST}"))
    tokens.tokenize(load_preset(str(long)).tokenize, Workspace.open(Runtime(root=folder / "prompts")))
    found: list[dict[str, Any]] = []
    for size in sizes:
        say(f"{size} workers")
        load, took = os.getloadavg()[0], []
        for _ in range(rounds):
            seconds = [
                harvesting.in_a_process(preset, folder, "cpu", threads=size, workers=size)["seconds"]
                for preset in (short, long)
            ]
            took.append((seconds[1] - seconds[0]) / (LONG_HARVEST - SHORT_HARVEST))
        cost = {"median": median(took), "low": min(took), "high": max(took)}
        found.append({"size": size, "load": (load, os.getloadavg()[0]), "seconds": {"harvest": cost}})
    return found


def projection() -> dict[str, Any] | None:
    """Rates at gelu-1l's size from the other benchmarks' results, with where they come from."""
    rates: dict[str, Any] = {}
    try:
        harvesting = json.loads((RESULTS / "harvesting-cpu.json").read_text())
        rates["harvest"] = harvesting["tokens_per_second"]["harvest"]["median"]
        step = json.loads((RESULTS / "train.json").read_text())["sizes"]["2048-16384"]["at_60"]["seconds"]
        rates["train"] = train.BATCH_ROWS / step[train.OURS]["median"]
    except FileNotFoundError:
        return None
    return rates


def _point(size: int, things: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    say(f"{size:,}: {', '.join(things)}")
    timed = interleave(things, rounds)
    seconds = {
        name: {"median": 1 / rate["median"], "low": 1 / rate["high"], "high": 1 / rate["low"]}
        for name, rate in ((name, runs.rates(1)) for name, runs in timed.runs.items())
    }
    return {"size": size, "seconds": seconds, "load": timed.load}


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/scaling.md."""

    def microseconds(point: Mapping[str, Any], name: str, rows: int) -> str:
        took = point["seconds"][name]
        return f"{1e6 * took['median'] / rows:.2f} ({1e6 * took['low'] / rows:.2f}-{1e6 * took['high'] / rows:.2f})"

    by_rows = [
        [f"{point['size']:,}", *(microseconds(point, name, point["size"]) for name in ("write", "certificate", "read"))]
        for point in figures["rows"]
    ]
    by_prompts = [
        [
            f"{point['size']:,}",
            microseconds(point, "write", point["rows"]),
            f"{point['pair_ratio']:.3f} ± {point['standard_error']:.3f}",
        ]
        for point in figures["prompts"]
    ]
    by_d_sae = [
        [
            f"{point['size']:,}",
            f"{point['l0']:.0f}",
            *(f"{point['seconds'][name]['median']:.3f}" for name in (train.OURS, train.PLAIN)),
        ]
        for point in figures["d_sae"]
    ]
    tokens_a_window = harvesting.WINDOW_PROMPTS * harvesting.PROMPT_TOKENS
    by_workers = [
        [
            f"{point['size']}",
            *(f"{tokens_a_window / point['seconds']['harvest'][key]:,.0f}" for key in ("median", "high", "low")),
        ]
        for point in figures["workers"]
    ]
    machine = figures["machine"]
    loads = [
        load for kind in ("rows", "prompts", "d_sae", "workers") for point in figures[kind] for load in point["load"]
    ]
    blocks = {
        "rows": markdown(["rows", "write, µs a row", "certificate, µs a row", "read, µs a row"], by_rows),
        "prompts": markdown(["prompts a window", "write, µs a row", "same-prompt pairs, uniform = 1"], by_prompts),
        "d_sae": markdown(["d_sae", "L0", "ours, s a step", "dense loop, s a step"], by_d_sae),
        "workers": markdown(["workers", "harvested tokens a second", "least", "greatest"], by_workers),
        "machine": (
            f"{machine['cpu']}, {figures['threads']} threads; numpy {machine['versions']['numpy']}, torch "
            f"{machine['versions']['torch']}. Medians of {figures['rounds']} rounds; load average {min(loads):.1f} to "
            f"{max(loads):.1f}."
        ),
    }
    if figures["projection"]:
        work = {"harvest": "harvest, one machine", "train": "one pass of training at L0 60"}
        blocks["projection"] = markdown(
            ["on the machine measured", "rows a second", *(f"{tokens:.0e} tokens, days" for tokens in TOKENS)],
            ([work[name], f"{rate:,.0f}", *(f"{tokens / rate / 86_400:,.1f}" for tokens in TOKENS)]
             for name, rate in figures["projection"].items()),
        )  # fmt: skip
    return blocks


def plots(figures: Mapping[str, Any]) -> dict[str, go.Figure]:
    """A figure a size: measured with least and greatest, and what theory expects through the middle point."""
    kinds = {
        "rows": ("rows", ("write", "certificate", "read"), 1),
        "d_sae": ("features", (train.OURS, train.PLAIN), 1),
        "prompts": ("prompts a window", ("write",), 0),
        "workers": ("workers", ("harvest",), -1),
    }
    return {kind: _plot(figures[kind], *how) for kind, how in kinds.items()}


def _plot(points: Sequence[Mapping[str, Any]], size: str, names: Sequence[str], power: int) -> go.Figure:
    figure = go.Figure()
    sizes = np.array([point["size"] for point in points])
    for name in names:
        median, low, high = (
            np.array([point["seconds"][name][key] for point in points]) for key in ("median", "low", "high")
        )
        errors = {"type": "data", "symmetric": False, "array": high - median, "arrayminus": median - low}
        figure.add_scatter(x=sizes, y=median, error_y=errors, name=name, mode="lines+markers")
        middle = len(sizes) // 2
        expected = median[middle] * (sizes / sizes[middle]) ** power
        figure.add_scatter(
            x=sizes, y=expected, name=f"{name}, expected", mode="lines", line={"dash": "dot", "width": 1}
        )
    figure.update_xaxes(type="log", title=size)
    figure.update_yaxes(type="log", title="seconds")
    return figure


def draw() -> None:
    """Draws bench/results/scaling.json into docs/images."""
    from pipeline.report.images import Image, write_images

    figures = plots(json.loads((RESULTS / "scaling.json").read_text()))
    write_images([Image(figure, DOCS / "images" / f"scaling-{kind}.svg") for kind, figure in figures.items()], "svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, help="leave out sizes above this; nothing is written")
    parser.add_argument("--folder", type=Path, help="where the stores are written for the while")
    parser.add_argument("--plots", action="store_true", help="draw the results that are there, and measure nothing")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    if options.plots:
        draw()
        return
    torch.set_num_threads(options.threads)
    largest = options.largest or 10**9
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = against_rows(Path(folder), [n for n in WINDOWS if layout_of(n).n_rows <= largest], options.rounds)
        prompts = against_prompts(Path(folder), [n for n in PROMPTS if n <= largest], options.rounds)
        workers = against_workers(Path(folder), WORKERS, options.rounds)
    d_sae = against_d_sae([n for n in D_SAE if n <= largest], options.rounds, options.threads)
    figures = {
        "load": os.getloadavg()[0], "threads": options.threads, "rounds": options.rounds, "seed": 0, "d_in": D_IN,
        "rows": rows, "prompts": prompts, "d_sae": d_sae, "workers": workers, "projection": projection(),
    }  # fmt: skip
    print(json.dumps(figures) if options.no_write or options.largest else write_results("scaling", figures))


if __name__ == "__main__":
    main()
