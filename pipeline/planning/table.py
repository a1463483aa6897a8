"""A plan as tables for a person, on stdout."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from pipeline.memory import size
from pipeline.planning.plan import Plan
from pipeline.planning.sizes import RunPlan, StorePlan
from storage.encoding import ENCODINGS

_STAGES = frozenset({"tokenize", "harvest", "train"})


def print_plan(plan: Plan) -> None:
    """Prints the run beside the full one, store sizes by site and encoding, mixing, and what times rest on."""
    console = Console(highlight=False)
    columns = ("", f"this run ({plan.preset})", f"at {plan.full_tokens:,} tokens")
    for table in (_runs(plan, columns), _sizes(plan), _mixing(plan)):
        console.print(table)
        console.print()
    for line in _notes(plan):
        console.print(line, markup=False, soft_wrap=True)


def _runs(plan: Plan, columns: tuple[str, ...]) -> Table:
    table = _table(*columns)
    both = ((plan.run, plan.memory, plan.seconds), (plan.full, plan.full_memory, plan.full_seconds))
    sides = [_rows(plan, *one) for one in both]
    for label in dict.fromkeys([*sides[0], *sides[1]]):
        table.add_row(label, *(side.get(label, "") for side in sides))
    return table


def _rows(
    plan: Plan, run: RunPlan, memory: Mapping[str, Mapping[str, int]], seconds: Mapping[str, float]
) -> dict[str, str]:
    store, stages = run.stores[0], run.bytes_by_stage
    left = f"{store.prompts_left_out:,} prompts ({store.tokens_left_out:,} tokens)"
    training = run.training
    rows = {
        "training tokens": f"{run.tokens.train_tokens:,}" + ("" if run.tokens.exact else " at most"),
        "rows": f"{store.rows:,} of {store.site.d_in:,}",
        "windows": f"{store.windows:,} of {store.window_prompts:,} prompts",
        "left out": left,
        "files": f"{sum(one.files for one in run.stores):,} ({sum(one.shards for one in run.stores):,} shards)",
        "disk: tokenize": _made(run, "tokenize", size(stages["tokenize"])),
        "disk: harvest": _made(run, "harvest", f"{size(stages['harvest'])} ({_per_row(store)})"),
        "disk: train": _made(run, "train", f"{size(stages['train'])} ({size(training.bytes)} kept)"),
        "disk in all": f"{size(run.disk_bytes)}{_verdict(run.disk_bytes, plan.machine.free_bytes)}",
    }
    for stage, parts in memory.items():
        total, held = sum(parts.values()), plan.machine.resident_bytes
        verdict = "" if stage in run.made else _verdict(total + held, plan.machine.room_bytes + held)
        rows[f"memory: {stage}"] = f"{size(total + held)}{verdict}"
    for stage, parts in plan.device_memory.items():
        needed = sum(parts.values())
        verdict = "" if stage in run.made else _verdict(needed, plan.machine.device_room_bytes or 0)
        rows[f"device memory: {stage}"] = f"{size(needed)}{verdict}"
    rows["steps"] = f"{training.steps:,} ({training.passes:.2f} passes)"
    rows |= {f"time: {stage}": _time_made(plan, stage) for stage in run.made}
    rows |= {f"time: {stage}": duration(value) for stage, value in seconds.items()}
    return rows


def _time_made(plan: Plan, stage: str) -> str:
    """Of a stage that is there."""
    seconds = plan.made_seconds.get(stage)
    return "none: made already" if seconds is None else f"none: made already, in {duration(seconds)}"


def _sizes(plan: Plan) -> Table:
    table = _table("size of the store", *ENCODINGS)
    for row in plan.sizes:
        name = f"{row.site.hook_name.removeprefix('blocks.')} ({row.site.d_in:,})"
        for sizes, label in ((row.run, name), (row.full, f"  at {plan.full_tokens:,}")):
            table.add_row(label, *(size(sizes[encoding]) for encoding in ENCODINGS))
    return table


def _mixing(plan: Plan) -> Table:
    table = _table("same-prompt pairs, uniform = 1", "this run", "full", "prompts a batch")
    for one in plan.mixing:
        error = f"{one.pair_ratio:,.3f} ± {one.standard_error:.3f}"
        table.add_row(one.source, error, f"{one.full_pair_ratio:,.2f}", f"{one.distinct_prompts:,.0f}")
    return table


def _notes(plan: Plan) -> list[str]:
    machine, rates = plan.machine, plan.calibration
    held = f"and {size(machine.resident_bytes)} that a process with the model holds"
    notes = [
        f"memory for {stage}: {', '.join(f'{name} {size(part)}' for name, part in parts.items() if part)}, {held}"
        for stage, parts in plan.memory.items()
    ]
    notes += [f"warning: {warning}" for warning in plan.warnings]
    if _STAGES.issubset(plan.run.made):
        notes.append(
            "tokens, activations and autoencoder are made already: a run finds them, and makes what analyses lack"
        )
    notes += [
        f"device memory for {stage}: {', '.join(f'{name} {size(part)}' for name, part in parts.items() if part)}, "
        "beside the model; counted, never compared with a device"
        for stage, parts in plan.device_memory.items()
    ]
    if rates is None:
        return [*notes, "times: not calibrated"]
    load = "" if rates.load is None else f", load average {rates.load:.1f}"
    times = (
        f"times: calibrated for {rates.seconds:.0f} s on {rates.threads} threads{load}; "
        f"{rates.harvest_rows_per_second:,.0f} rows/s harvested and written, {rates.step_seconds:.3f} s a step at L0 "
        f"{rates.step_l0:.0f} by the {rates.engine} engine over {rates.steps} steps, read from {rates.read_from}. They "
        "are as good as those seconds were typical: another load on the machine, another L0, or dense first steps "
        "change them. Tokenizing, evaluations, checkpoints and analyses are not in them."
    )
    return [*notes, times]


def duration(seconds: float) -> str:
    """A time for people, to two or three figures."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def _per_row(store: StorePlan) -> str:
    return f"{store.bytes / store.rows:,.0f} B a row"


def _verdict(needed: int, there: int) -> str:
    return f" of {size(there)}" if needed <= there else f" of {size(there)}: too much"


def _made(run: RunPlan, stage: str, text: str) -> str:
    return f"{text}, made already" if stage in run.made else text


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
