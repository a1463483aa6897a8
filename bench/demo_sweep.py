"""The sweep that chose the demo's autoencoder: ``python -m bench.demo_sweep``.

Trains variants of the demo's preset for 600 steps at learning rate 3e-3 (the base), through the artifact store, on the
demo's activations. Loss recovered is that of the training log: 64 held-out prompts. Writes
``bench/results/demo_sweep.json``, for docs/demo.md.
"""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from bench.machine import say, write_results
from bench.tables import markdown
from pipeline.config import Runtime, load_preset
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts

SAE = "train.autoencoder."
BASE = [SAE + "steps=600", SAE + "learning_rate=3e-3"]
VARIANTS: dict[str, list[str]] = {
    "base": [],
    "l1_coeff 0.5": [SAE + "l1_coeff=0.5"],
    "l1_coeff 1.0": [SAE + "l1_coeff=1.0"],
    "learning rate 1e-3": [SAE + "learning_rate=1e-3"],
    "learning rate 5e-3": [SAE + "learning_rate=5e-3"],
    "2048 features": [SAE + "d_sae=2048"],
    "decay over the last half": [SAE + "lr_decay_fraction=0.5"],
    "kaiming, zero biases": [
        SAE + 'init="kaiming"', SAE + 'b_dec_init="zero"', SAE + 'b_enc_init="zero"', SAE + "target_l0=null",
    ],
}  # fmt: skip
MEASURED = ("l0", "fve", "loss_recovered", "dead_fraction", "below_1e-4")


def measure(overrides: list[str], workspace: Workspace) -> dict[str, float]:
    """The closing figures of one variant's training; what is there already is found."""
    figures = facts(Chain(load_preset("demo", [*BASE, *overrides]), workspace, run_directly).train())
    return {name: figures[name] for name in MEASURED}


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/demo.md."""
    base = figures["base"]["autoencoder"]
    told = {
        "base": (
            f"base: {base['d_sae']} features, l1_coeff {base['l1_coeff']:g}, learning rate {base['learning_rate']:g}, "
            f"decay over the last {base['lr_decay_fraction']:.0%}"
        )
    }
    rows = [
        [
            told.get(row["variant"], row["variant"]),
            f"{row['l0']:.1f}",
            f"{row['fve']:.3f}",
            f"{row['loss_recovered']:.1%}",
            f"{row['dead_fraction']:.2%}",
            f"{row['below_1e-4']:.2%}",
        ]
        for row in figures["variants"]
    ]
    machine, loads = figures["machine"], figures["load"]
    header = [f"variant, {base['steps']:,} steps", "L0", "explained variance", "loss recovered", "dead", "ultra-low"]
    return {
        "variants": markdown(header, rows),
        "machine": (
            f"{machine['machine']}, {machine['cores']} cores, torch {machine['versions']['torch']}, Python "
            f"{machine['python']}; load average {' and '.join(f'{load:.1f}' for load in loads)}."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-write", action="store_true", help="print the figures only")
    options = parser.parse_args()
    load, workspace = os.getloadavg()[0], Workspace.open(Runtime(threads=options.threads), for_stderr())
    rows: list[dict[str, Any]] = []
    for name, overrides in VARIANTS.items():
        rows.append({"variant": name, "overrides": overrides, **measure(overrides, workspace)})
        say(json.dumps(rows[-1]))
    base = load_preset("demo", BASE).model_dump(mode="json")["train"]
    figures = {
        "load": (load, os.getloadavg()[0]), "seed": base["autoencoder"]["seed"], "base": base, "variants": rows,
    }  # fmt: skip
    print(json.dumps(figures) if options.no_write else write_results("demo_sweep", figures))


if __name__ == "__main__":
    main()
