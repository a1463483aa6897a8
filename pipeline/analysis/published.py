"""The post's numbers, and a run's beside them: what was measured, what was published, and whether the two compare.

A run compares with the post when it is the same measurement on the same subject: gelu-1l's MLP activations, 16,384
features, about 2e9 training tokens. Anything else is the same measurement on another subject, and the row says which
part differs. Random baselines depend on shapes alone and compare whenever the shapes agree.

Source: the post, and the author's code where the post leaves a number implicit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.analysis.display import Unit, show, show_large
from pipeline.analysis.result import Number

Numbers = Mapping[str, Number]
Rule = Literal["run", "shape"]


@dataclass(frozen=True)
class RunFacts:
    """What decides whether a run compares with the post.

    Attributes:
        model: the language model's name.
        hook_name: the autoencoder's site.
        d_in: width of the activations.
        d_sae: number of features.
        train_tokens: activations that the autoencoder was trained on, repeats included.
    """

    model: str
    hook_name: str
    d_in: int
    d_sae: int
    train_tokens: int


POST = RunFacts("gelu-1l", "blocks.0.mlp.hook_post", 2048, 16384, 2_000_000_000)
"""The post's run."""
POST_RANK = 512
"""Rank of its W_out."""


@dataclass(frozen=True)
class Part:
    """One number of a published quantity.

    Attributes:
        key: of the analysis' numbers.
        unit: how it is shown.
        form: text around it.
    """

    key: str
    unit: Unit = "plain"
    form: str = "{}"


@dataclass(frozen=True)
class Published:
    """One row of the post's findings.

    Attributes:
        quantity: what was measured.
        analysis: which analysis measures it here.
        parts: its numbers here.
        post: what the post says.
        source: where it says so.
        rule: what has to agree for the two to compare.
    """

    quantity: str
    analysis: str
    parts: tuple[Part, ...]
    post: str
    source: str
    rule: Rule = "run"


@dataclass(frozen=True)
class HeadlineRow:
    """A quantity, here and in the post.

    Attributes:
        quantity: what was measured.
        here: this run's value, as text.
        post: the post's value, as text.
        comparable: whether the two are the same measurement on the same subject.
        why: what differs, or what agrees.
        analysis: the analysis it comes from.
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


_RARE = "Ultra Low Frequency Features"
PUBLISHED = (
    Published(
        "Loss recovered by the reconstruction (0 = zero ablation)",
        "loss_recovered",
        (Part("loss_recovered", "fraction"),),
        "92 %",
        "Implementation Details",
    ),
    Published(
        "Loss recovered without ultra-low features",
        "loss_recovered",
        (Part("loss_recovered_without_ultra_low", "fraction"),),
        "91 %",
        _RARE,
    ),
    Published(
        "Loss recovered by mean ablation",
        "loss_recovered",
        (Part("mean_ablation_recovered", "fraction"),),
        "25 %",
        "Implementation Details",
    ),
    Published(
        "Ultra-low features, density < 1e-4",
        "density",
        (Part("ultra_low_fraction", "fraction"),),
        "about 60 %",
        _RARE,
    ),
    Published(
        "Two modes in log density (Ashman’s D, above 2: two)",
        "density",
        (Part("ashman_d"),),
        "“clearly bimodal”",
        _RARE,
    ),
    Published("Dead features", "density", (Part("dead_fraction", "fraction"),), "none", "TLDR"),
    Published(
        "Ultra-low encoders within cosine 0.95 of their mean",
        "rare_cluster",
        (Part("aligned_fraction", "fraction"),),
        "97.5 %",
        _RARE,
    ),
    Published(
        "Ultra-low features firing together on one token, at most",
        "rare_cluster",
        (Part("cofiring_max", "fraction"),),
        "95 %",
        _RARE,
    ),
    Published(
        "Ultra-low decoders along one direction",
        "rare_cluster",
        (Part("decoder_top_share", "fraction"),),
        "“very little”",
        _RARE,
    ),
    Published(
        "Rare direction’s ten largest neurons",
        "rare_direction",
        (Part("fve_top_10", "fraction"),),
        "“not sparse in the neuron basis”",
        _RARE,
    ),
    Published(
        "Rare direction’s logits over the vocabulary",
        "rare_direction",
        (
            Part("logit_kurtosis", "plain", "kurtosis {}"),
            Part("space_correlation", "plain", ", correlation with “begins with a space” {}"),
        ),
        "“aren’t sparse”, “correlates”",
        _RARE,
    ),
    Published(
        "Rare direction’s cosine with the mean activation, largest with a singular vector; correlation with the norm",
        "rare_direction",
        (Part("cosine_mean"), Part("cosine_singular", "plain", ", {}"), Part("norm_correlation", "plain", "; {}")),
        "“nothing to do with”",
        _RARE,
    ),
    Published(
        "Mean ultra-low encoder directions of two seeds, cosine",
        "cross_seed",
        (Part("direction_cosine"),),
        "0.96",
        _RARE,
    ),
    Published(
        "Encoder kept orthogonal to the ultra-low direction: ultra-low features, median cosine with their mean",
        "orthogonal_rerun",
        (
            Part("rare_fraction", "fraction"),
            Part("cosine_median", "plain", ", cosine with their own {}"),
            Part("direction_cosine", "plain", ", with the old {}"),
        ),
        "a cluster again, along “a different direction”",
        _RARE,
    ),
    Published(
        "Decoders dense, 1-sparse, 10-ish-sparse",
        "neuron_sparsity",
        (
            Part("dense_fraction", "fraction"),
            Part("one_sparse_fraction", "fraction", ", {}"),
            Part("ten_sparse_fraction", "fraction", ", {}"),
        ),
        "92.1 %, 3.9 %, 4.0 %",
        "Exploring Neuron Sparsity",
    ),
    Published(
        "Kurtosis of decoders in the neuron basis",
        "kurtosis",
        (Part("decoder_median", "plain", "median {}"), Part("decoder_max", "plain", ", largest {}")),
        "far above 0 for nearly all, largest 1700",
        "Exploring Neuron Sparsity",
    ),
    Published(
        "Cosine of encoder and decoder, frequent features",
        "enc_dec",
        (
            Part("cosine_median_frequent", "plain", "median {}"),
            Part("lower_mode", "plain", ", modes {}"),
            Part("upper_mode", "plain", " and {}"),
        ),
        "median 0.5, modes 0.5 and 0.75",
        "Should encoder and decoder weights be tied?",
    ),
    Published(
        "Cosine of distinct frequent decoders",
        "geometry",
        (Part("cosine_mean", "plain", "mean {}"), Part("cosine_variance", "plain", ", variance {}")),
        "mean 0.0026, variance 0.002",
        "comment",
    ),
    Published(
        "Encoder in the null space of W_out, frequent features",
        "null_space",
        (Part("encoder_mean_frequent", "fraction", "mean {}"), Part("encoder_std_frequent", "plain", ", std {}")),
        "wider than random",
        "Should we train autoencoders on the MLP output?",
    ),
    Published(
        "Random direction in the null space of W_out",
        "null_space",
        (Part("random_mean_theory", "fraction", "mean {}"), Part("random_std_theory", "plain", ", std {}")),
        "mean 75 %, std 0.013",
        "Should we train autoencoders on the MLP output?",
        "shape",
    ),
    Published(
        "Features of density < 1e-5 in training",
        "training_dynamics",
        (
            Part("below_1e-5_peak", "fraction", "at most {}"),
            Part("below_1e-5_peak_tokens", "count", ", after {} tokens"),
            Part("below_1e-5_final", "fraction", "; {} at the end"),
        ),
        "reset every 120M tokens; from about 1.6B they drift past 1e-5",
        _RARE,
    ),
)
"""What the post says, in the order of the report."""


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
    return rows


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


def _other_shapes(run: RunFacts, numbers: Numbers) -> list[str]:
    return [] if (run.d_in, numbers.get("rank")) == (POST.d_in, POST_RANK) else ["shapes"]


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
