"""What precision and site do to the demo's autoencoder at equal steps: ``python -m bench.choices``.

*Precision*: the preset, the same by the dense engine, by the dense engine in bfloat16 products, and, as a yardstick for
what chance does, with the rows in another order. *Site*: the MLP's neurons (the preset's), the MLP's output and the
residual stream after it, harvested in one pass, with the preset's number of features and coefficient; what each loses
when it is replaced by its reconstruction is not the same thing, so loss recovered compares within a site alone.

All are measured on the same held-out prompts. Everything goes through the artifact store in SPARSEMILL_HOME, so an
interrupted benchmark continues. Writes ``bench/results/choices.json``.
"""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from bench.encodings import HeldOutQuality
from bench.machine import say, write_results
from bench.tables import markdown
from pipeline.config import Runtime, load_preset
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.reader import ShardReader

PRECISIONS = {
    "the preset": (),
    "dense engine": ("train.autoencoder.engine=dense",),
    "dense engine, bfloat16 products": ("train.autoencoder.engine=dense", "train.autoencoder.precision=bfloat16"),
    "rows in another order": ("train.reader_seed=1",),
}
SITES = ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post")


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/training.md."""

    def cells(name: str, row: Mapping[str, float]) -> list[str]:
        return [name, f"{row['l0']:.2f}", f"{row['fve']:.4f}", f"{row['loss_recovered']:.2%}"]

    header = [f"{figures['steps']:,} steps", "L0", "explained variance", "loss recovered"]
    sites = [[*cells(f"`{site}`", row), str(row["d_in"])] for site, row in figures["sites"].items()]
    return {
        "precision": markdown(header, [cells(name, row) for name, row in figures["precisions"].items()]),
        "site": markdown([*header, "width"], sites),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a shipped preset or a TOML file")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    load, workspace = os.getloadavg()[0], Workspace.open(Runtime(threads=options.threads), for_stderr())

    def quality(*overrides: str) -> dict[str, Any]:
        preset = load_preset(options.preset, [f"train.autoencoder.steps={options.steps}", *overrides])
        run = Chain(preset, workspace, run_directly)
        activations = run.harvest()
        found = HeldOutQuality(activations, workspace)(run.train()) | {"d_in": ShardReader.of(activations).d_in}
        say(f"{' '.join(overrides)}: {found}")
        return found

    precisions = {name: quality(*overrides) for name, overrides in PRECISIONS.items()}
    together = f"harvest.also_hook_names={json.dumps(SITES[1:])}"  # found in the store when their turn comes
    sites = {SITES[0]: quality(together)} | {site: quality(f"harvest.hook_name={site}") for site in SITES[1:]}
    figures = {
        "load": (load, os.getloadavg()[0]), "preset": options.preset, "steps": options.steps, "seed": 0,
        "precisions": precisions, "sites": sites,
    }  # fmt: skip
    print(figures if options.no_write else write_results("choices", figures))


if __name__ == "__main__":
    main()
