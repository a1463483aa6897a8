"""The post's numbers, and a run's beside them: what was measured, what was published, and whether the two compare.

A run compares with the post when it is the same measurement on the same subject: gelu-1l's MLP activations, 16,384
features, about 2e9 training tokens. Anything else is the same measurement on another subject, and the row says which
part differs. Random baselines depend on shapes alone and compare whenever the shapes agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.analysis.display import show, show_large
from pipeline.analysis.post import POST, POST_RANK, POST_TRAINING, PUBLISHED, Published, RunFacts
from pipeline.analysis.result import Number

Numbers = Mapping[str, Number]


@dataclass(frozen=True)
class HeadlineRow:
    """A quantity, here and in the post.

    Attributes:
        quantity: what was measured.
        here: this run's value, as text.
        post: the post's value, as text.
        comparable: whether the two are the same measurement on the same subject.
        why: what differs, or what agrees.
        analysis: the analysis it comes from, or ``run`` for a fact of the run itself.
        source: where the post says so.
    """

    quantity: str
    here: str
    post: str
    comparable: bool
    why: str
    analysis: str
    source: str


@dataclass(frozen=True)
class Highlight:
    """One figure of the strip at the top of a report."""

    label: str
    value: str
    note: str = ""


def headline_rows(results: Mapping[str, Numbers], run: RunFacts) -> list[HeadlineRow]:
    """The post's quantities that a run measured, beside the post.

    Args:
        results: numbers of the analyses made, by analysis.
        run: what was run.
    """
    rows: list[HeadlineRow] = []
    for item in PUBLISHED:
        if item.analysis not in results:
            continue
        numbers = results[item.analysis]
        here, missing = _show(item, numbers), _why_missing(item, numbers)
        differs = differences(run) if item.rule == "run" else _other_shapes(run, numbers)
        comparable = not differs and missing is None
        same = "same shapes" if item.rule == "shape" else "same model and size"
        rows.append(
            HeadlineRow(
                item.quantity,
                missing or here,
                item.post,
                comparable,
                same if comparable else _why_not(differs),
                item.analysis,
                item.source,
            )
        )
    return [*rows, _training_row(run)] if rows else rows


def differences(run: RunFacts) -> list[str]:
    """What differs between a run and the post: model, site, size (features or tokens); empty if nothing does."""
    found: list[str] = []
    if run.model.rpartition("/")[2].lower() not in {"gelu-1l", "gelu_1l512w_c4_code"}:
        found.append("model")
    if run.hook_name != POST.hook_name:
        found.append("site")
    if run.d_sae != POST.d_sae or not 0.5 <= run.train_tokens / POST.train_tokens <= 2:
        found.append("size")
    return found


def comparison_note(run: RunFacts) -> str:
    """A sentence or two on what the comparison with the post means for this run."""
    differs = differences(run)
    if not differs:
        return "Same model, site and size as the post: the two columns are one experiment, done twice."
    return (
        f"The post trained {POST.d_sae:,} features on {show_large(POST.train_tokens)} activations of {POST.model} "
        f"({POST.d_in:,} wide, {POST.hook_name}); this run {run.d_sae:,} on {show_large(run.train_tokens)} of "
        f"{run.model} ({run.d_in:,} wide, {run.hook_name}). Where the last column says no, the two figures are one "
        "measurement of two different subjects: read them for kind, not for size."
    )


def highlights(results: Mapping[str, Numbers]) -> list[Highlight]:
    """The few figures that say how good an autoencoder is, for the top of a report."""
    loss, density = results.get("loss_recovered", {}), results.get("density", {})
    found = [
        Highlight("loss recovered", show(loss.get("loss_recovered"), "fraction"), _interval(loss)),
        Highlight("explained variance", show(loss.get("fve"), "fraction"), _norm_ratio(loss)),
        Highlight("L0", show(density.get("l0")), "features firing on a token"),
        Highlight("ultra-low", show(density.get("ultra_low_fraction"), "fraction"), "density < 1e-4"),
        Highlight("dead", show(density.get("dead_fraction"), "fraction"), _counted(density)),
    ]
    return [item for item, source in zip(found, (loss, loss, density, density, density), strict=True) if source]


def _training_row(run: RunFacts) -> HeadlineRow:
    differs = differences(run)
    return HeadlineRow(
        "Training activations",
        show_large(run.train_tokens) if run.train_tokens else "unknown",
        POST_TRAINING,
        not differs,
        _why_not(differs) if differs else "same model and size",
        "run",
        "Implementation Details",
    )


def _other_shapes(run: RunFacts, numbers: Numbers) -> list[str]:
    return [] if (run.d_in, numbers.get("rank", POST_RANK)) == (POST.d_in, POST_RANK) else ["shapes"]


def _show(item: Published, numbers: Numbers) -> str:
    there = [part for part in item.parts if numbers.get(part.key) is not None]
    return "".join(part.form.format(show(numbers[part.key], part.unit)) for part in there)


def _why_missing(item: Published, numbers: Numbers) -> str | None:
    if any(numbers.get(part.key) is not None for part in item.parts):
        return None
    if numbers.get("cluster") == "no cluster":
        return "no cluster"
    applies = numbers.get("applies", "yes")
    return "does not apply" if applies != "yes" else "not measured"


def _why_not(differs: list[str]) -> str:
    if not differs:
        return "nothing was measured here"
    return f"other {', '.join(differs[:-1])} and {differs[-1]}" if len(differs) > 1 else f"other {differs[0]}"


def _interval(loss: Numbers) -> str:
    low, high = loss.get("loss_recovered_low"), loss.get("loss_recovered_high")
    if not (isinstance(low, float) and isinstance(high, float)):
        return "of the loss under zero ablation"
    return f"{100 * low:.1f} to {show(high, 'fraction')}"


def _norm_ratio(loss: Numbers) -> str:
    return f"norm ratio {show(loss.get('norm_ratio'))}"


def _counted(density: Numbers) -> str:
    rows = density.get("n_rows")
    return f"over {show_large(rows)} tokens" if isinstance(rows, int) else ""
