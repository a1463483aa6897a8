"""The sweep that chose the demo's autoencoder: ``python -m bench.demo_sweep``.

Trains each variant through the artifact store on the demo's activations, analyses density and loss recovered, and
writes ``bench/results/demo-sweep.json`` (variants, figures, machine). docs/demo.md shows the table.
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
VARIANTS: dict[str, list[str]] = {
    "preset": [],
    "l1_coeff 0.5": [SAE + "l1_coeff=0.5"],
    "l1_coeff 1.0": [SAE + "l1_coeff=1.0"],
    "learning rate 1e-3": [SAE + "learning_rate=1e-3"],
    "learning rate 5e-3": [SAE + "learning_rate=5e-3"],
    "2048 features": [SAE + "d_sae=2048"],
    "900 steps": [SAE + "steps=900"],
    "decay over the last half": [SAE + "lr_decay_fraction=0.5"],
    "kaiming, zero biases": [
        SAE + 'init="kaiming"', SAE + 'b_dec_init="zero"', SAE + 'b_enc_init="zero"', SAE + "target_l0=null",
    ],
}  # fmt: skip


def measure(overrides: list[str], workspace: Workspace) -> dict[str, float]:
    """Figures of one variant; what is there already is found."""
    chain = Chain(load_preset("demo", overrides), workspace, run_directly)
    sae = chain.train()
    findings = chain.analyze(sae, ("density", "loss_recovered"))
    density, loss = (facts(findings[name])["numbers"] for name in ("density", "loss_recovered"))
    seconds = json.loads((sae.folder / "run.json").read_text())["seconds"]
    return {
        "l0": density["l0"],
        "dead_fraction": density["dead_fraction"],
        "ultra_low_fraction": density["ultra_low_fraction"],
        "fve": loss["fve"],
        "norm_ratio": loss["norm_ratio"],
        "loss_recovered": loss["loss_recovered"],
        "loss_recovered_from_mean": loss["loss_recovered_from_mean"],
        "ce_reconstruction": loss["ce_reconstruction"],
        "train_seconds": seconds,
    }


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
