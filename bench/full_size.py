"""How long the published run would take here, by ``sparsemill plan``'s own calibration: ``python -m bench.full_size``.

``plan`` calibrates only what fits, so the preset ``post`` is planned with one window and a pool of 65,536 rows, and the
rates it measures are applied to all 2e9 tokens, stored in float16 and in uint8. The model is of gelu-1l's shape with
random weights and the corpus a stand-in, since neither changes sizes or times; no network is asked for. Writes
``bench/results/full_size.json``, for docs/full-size.md.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harvesting import write_model
from bench.machine import say, write_results
from bench.tables import markdown
from pipeline.config import Runtime, load_preset
from pipeline.planning.plan import plan
from pipeline.progress import for_stderr
from pipeline.workspace import Workspace

ONE_WINDOW = [
    "train.source=store", "harvest.n_windows=1", "harvest.window_prompts=4096", "train.pool_rows=65536",
    "train.autoencoder.steps=128",  # one pass of a window's 524,288 rows, as the published run is one of its tokens
]  # fmt: skip
TOKENS = 2 * 10**9


def measure(folder: Path, threads: int | None) -> dict[str, Any]:
    write_model(folder)
    (folder / "text.jsonl").write_text('{"text": "stand-in"}\n')
    source = {"name": "stand-in", "kind": "files", "files": [str(folder / "text.jsonl")]}
    local = [f"{stage}.language_model={folder}" for stage in ("tokenize", "harvest")]
    local.append(f"tokenize.sources={json.dumps([source])}")
    found: dict[str, Any] = {}
    for encoding in ("float16", "uint8"):
        say(encoding)
        workspace = Workspace.open(Runtime(root=folder / "artifacts", threads=threads), for_stderr())
        preset = load_preset("post", [*local, *ONE_WINDOW, f"harvest.encoding={encoding}"])
        planned, refusal = plan(preset, workspace, full_tokens=TOKENS, calibrated=True)
        if planned.calibration is None:
            raise RuntimeError(f"one window does not fit this machine: {refusal}")
        found[encoding] = planned.calibration.model_dump(mode="json") | {
            "harvest_seconds": planned.calibration.harvest_seconds(planned.full),
            "train_seconds": planned.calibration.train_seconds(planned.full),
            "live_seconds": planned.calibration.train_seconds(planned.full)
            + TOKENS / planned.calibration.compute_rows_per_second,
        }
    return found


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/full-size.md."""
    rows = [
        [
            encoding,
            f"{one['harvest_rows_per_second']:,.0f}",
            f"{one['harvest_seconds'] / 3600:,.1f}",
            f"{one['step_seconds']:.2f} at L0 {one['step_l0']:.0f}",
            f"{one['train_seconds'] / 86_400:,.1f}",
            f"{one['live_seconds'] / 86_400:,.1f}",
        ]
        for encoding, one in figures["encodings"].items()
    ]
    machine = figures["machine"]
    header = ["", "rows harvested a second", "harvest, hours", "a step, s", "training, days", "training live, days"]
    return {
        "times": markdown(header, rows),
        "machine": f"{machine['cpu']}, {machine['cores']} cores; load average {figures['load']:.1f} before it began.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--folder", type=Path, help="where files are written for the while")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = {"load": load, "seed": 0, "encodings": measure(Path(folder), options.threads)}
    print(json.dumps(figures) if options.no_write else write_results("full_size", figures))


if __name__ == "__main__":
    main()
