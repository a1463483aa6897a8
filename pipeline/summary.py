"""The closing table of a run: what was made, how good it is, how long it took, and where the report lies."""

import resource
import sys

from rich.console import Console
from rich.table import Table

from pipeline.stages import Chain, StageRun
from pipeline.workspace import facts
from storage.errors import ConfigError


def print_summary(chain: Chain) -> None:
    """Prints stages with ids and times, then the run's figures, then the report's path, to stdout."""
    console = Console()
    stages = Table("stage", "artifact", "", "time", box=None, header_style="bold", pad_edge=False, title_justify="left")
    for run in chain.runs:
        stages.add_row(run.name, run.made.artifact.id, run.made.status, f"{run.seconds:.1f} s")
    console.print()
    console.print(stages)
    figures = Table(box=None, show_header=False, pad_edge=False)
    for label, value in _figures(chain).items():
        figures.add_row(label, value)
    console.print()
    console.print(figures)
    console.print("\nOpen the report in a browser:", highlight=False)
    print(_run(chain, "report").made.artifact.folder.resolve() / "index.html")


def _figures(chain: Chain) -> dict[str, str]:
    tokens = facts(_run(chain, "tokenize").made.artifact)
    store = facts(_run(chain, "harvest").made.artifact)
    trained = facts(_run(chain, "train").made.artifact)
    rows = {
        "tokens": f"{tokens['train']['tokens']:,} training, {tokens['held_out']['tokens']:,} held out",
        "mix by tokens": ", ".join(
            f"{source['share_of_tokens']:.0%} {name}" for name, source in tokens["train"]["sources"].items()
        ),
        "activations": (
            f"{store['rows']:,} rows of {store['d_in']}, {store['activation_bytes'] / 2**20:,.0f} MiB"
            f" in {store['shards']:,} shards"
        ),
        "autoencoder": f"{trained['d_in']} -> {trained['d_sae']:,}, {trained['steps']:,} steps",
    }
    found = {
        run.name: facts(run.made.artifact)["numbers"] for run in chain.runs if run.made.artifact.stage == "analyze"
    }
    if "density" in found:
        density = found["density"]
        rows["L0"] = f"{density['l0']:.1f}"
        rows["dead"] = _share(density["dead_fraction"])
        rows["ultra-low (< 1e-4)"] = _share(density["ultra_low_fraction"])
    if "loss_recovered" in found:
        recovered = found["loss_recovered"]
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


def _run(chain: Chain, name: str) -> StageRun:
    for run in chain.runs:
        if run.name == name:
            return run
    raise ConfigError("the run has no such stage", found=name, expected=", ".join(run.name for run in chain.runs))


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2%}"


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
