"""The sweep that chose the demo's autoencoder: ``python -m bench.demo_sweep``.

Trains variants of the demo's preset for 600 steps at learning rate 3e-3 (the base), through the artifact store, on the
demo's activations, and writes ``bench/results/demo-sweep.json`` (variants, figures, machine). Loss recovered is that of
the training log: 64 held-out prompts. docs/demo.md shows the table.
"""

import json
import os
import platform
import sys
from pathlib import Path

import torch

from pipeline.config import Runtime, load_preset
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts

RESULTS = Path(__file__).parent / "results" / "demo-sweep.json"
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


def measure(overrides: list[str], workspace: Workspace) -> dict[str, float]:
    """The closing figures of one variant's training; what is there already is found."""
    sae = Chain(load_preset("demo", [*BASE, *overrides]), workspace, run_directly).train()
    figures = facts(sae)
    wanted = ("l0", "fve", "loss_recovered", "dead_fraction", "below_1e-4")
    return {name: figures[name] for name in wanted}


def main() -> None:
    workspace = Workspace.open(Runtime(), for_stderr())
    rows = []
    for name, overrides in VARIANTS.items():
        rows.append({"variant": name, "overrides": overrides, **measure(overrides, workspace)})
        print(json.dumps(rows[-1]))
    machine = {
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "torch": str(torch.__version__),
        "python": sys.version.split()[0],
    }  # fmt: skip
    RESULTS.write_text(json.dumps({"machine": machine, "preset": load_preset("demo").model_dump(mode="json")["train"],
                                   "variants": rows}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
