"""The closing table of a run: what was made, how good it is, how long it took, and where the report lies."""

import resource
import sys

from rich.console import Console
from rich.table import Table

from pipeline.planning.held_out import few_held_out
from pipeline.stages import Chain
from pipeline.workspace import facts


def print_summary(chain: Chain) -> None:
    """Prints stages with ids and times, then figures, then the path of the report that was made last, to stdout."""
    console = Console()
    stages = Table("stage", "artifact", "", "time", box=None, header_style="bold", pad_edge=False, title_justify="left")
    for run in chain.runs:
        stages.add_row(run.name, run.made.artifact.id, run.made.status, f"{run.seconds:.1f} s")
    console.print()
    console.print(stages)
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in figures(chain).items():
        table.add_row(label, value)
    console.print()
    console.print(table)
    for warning in warnings(chain):
        console.print(f"\nwarning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print("\nOpen the report in a browser:", highlight=False)
    print(chain.runs[-1].made.artifact.folder.resolve() / "index.html")


def warnings(chain: Chain) -> list[str]:
    """What a reader of the figures should know of them."""
    return [
        warning
        for run in chain.runs
        if run.name == "tokenize" and (warning := few_held_out(facts(run.made.artifact)["held_out"]["prompts"]))
    ]


def figures(chain: Chain) -> dict[str, str]:
    """The key figures of a run, of as many stages as it had, by label."""
    made = {run.name: facts(run.made.artifact) for run in chain.runs}
    rows: dict[str, str] = {}
    if tokens := made.get("tokenize"):
        rows["tokens"] = f"{tokens['train']['tokens']:,} training, {tokens['held_out']['tokens']:,} held out"
        mix = (f"{source['share_of_tokens']:.0%} {name}" for name, source in tokens["train"]["sources"].items())
        rows["mix by tokens"] = ", ".join(mix)
    if store := made.get("harvest"):
        rows["activations"] = (
            f"{store['rows']:,} rows of {store['d_in']}, {store['activation_bytes'] / 2**20:,.0f} MiB"
            f" in {store['shards']:,} shards"
        )
    if trained := made.get("train"):
        rows["autoencoder"] = f"{trained['d_in']} -> {trained['d_sae']:,}, {trained['steps']:,} steps"
    if "density" in made:
        density = made["density"]["numbers"]
        rows["L0"] = f"{density['l0']:.1f}"
        rows["dead"] = _share(density["dead_fraction"])
        rows["ultra-low (< 1e-4)"] = _share(density["ultra_low_fraction"])
    if "loss_recovered" in made:
        recovered = made["loss_recovered"]["numbers"]
        rows["explained variance"] = f"{recovered['fve']:.3f} (norm ratio {recovered['norm_ratio']:.3f})"
        rows["loss recovered"] = (
            f"{recovered['loss_recovered']:.1%} of zero ablation, {recovered['loss_recovered_from_mean']:.1%} of mean"
        )
        rows["cross-entropy"] = (
            f"{recovered['ce_clean']:.3f} clean, {recovered['ce_reconstruction']:.3f} reconstructed,"
            f" {recovered['ce_mean']:.3f} mean-ablated, {recovered['ce_zero']:.3f} zero-ablated"
        )
    rows["peak memory"] = f"{_peak_bytes() / 2**30:.2f} GiB"
    return rows


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2%}"


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
