"""``sparsemill study``: questions that take several autoencoders, trained where they are missing."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pipeline.cli.options import DEFAULTS, STAGES, Run, finish, print_table
from pipeline.workspace import facts

if TYPE_CHECKING:
    from pipeline.studies import Study

study = App(
    name="study",
    group=STAGES,
    sort_key=6,
    help="""Train variations of an autoencoder where they are missing, compare them with it, and write its report.

    A variation is trained from the autoencoder's own recorded config on its own activations, and is an artifact like
    any other: what is there is found, and after Ctrl-C the same command goes on in the middle of the training it was
    in. --dry-run tells what would be trained, and roughly for how long.

    The preset says with which options things are analysed, and which other analyses the report has; without --sae it
    also says which autoencoder is varied. To compare autoencoders that are there already, imported ones among them,
    use 'sparsemill analyze SAE --only cross_seed --with OTHER'.
    """,
)

Sae = Annotated[
    str | None,
    Parameter(help="id, unique prefix or tag; 'latest' is the newest that no study trained; the preset's by default"),
]
DryRun = Annotated[bool, Parameter(negative=(), help="only tell what would be trained")]


@study.command
def cross_seed(
    *,
    sae: Sae = None,
    seeds: Annotated[int, Parameter(help="autoencoders in all, this one counted; the post compares 2")] = 2,
    dry_run: DryRun = False,
    run: Run = DEFAULTS,
) -> None:
    """Does another random start find the same features, and the same ultra-low direction?

    Each further autoencoder has the trainer's seed (initial weights, resampling) and the reader's (order of rows) one
    higher, and the same activations.
    """
    from pipeline import studies

    _run(studies.cross_seed(seeds), sae, run, dry_run=dry_run)


@study.command
def orthogonal_rerun(
    *,
    sae: Sae = None,
    features: Annotated[
        tuple[int, ...],
        Parameter(consume_multiple=True, negative=(), help="features whose mean encoder it is; the ultra-low ones"),
    ] = (),
    dry_run: DryRun = False,
    run: Run = DEFAULTS,
) -> None:
    """Does an autoencoder that may not use the ultra-low direction have an ultra-low cluster all the same?

    One more training, in which every encoder is kept orthogonal to the mean encoder of the ultra-low features, or of
    those named. An autoencoder without a cluster is refused.
    """
    from pipeline import studies

    _run(studies.orthogonal_rerun(features), sae, run, dry_run=dry_run)


@study.command
def encoder_sparsity(
    *,
    sae: Sae = None,
    l1: Annotated[
        tuple[float, ...],
        Parameter(consume_multiple=True, negative=(), help="coefficients of the sum of |W_enc|, such as 1e-5 1e-4"),
    ] = (),
    l2: Annotated[
        tuple[float, ...],
        Parameter(consume_multiple=True, negative=(), help="coefficients of the sum of W_enc squared"),
    ] = (),
    dry_run: DryRun = False,
    run: Run = DEFAULTS,
) -> None:
    """Does a penalty on encoder weights remove the ultra-low cluster, or give neuron-sparse features for free?

    One training a coefficient. Without any, three of each kind: those that would add 1, 3 and 10 % to the loss that the
    first training ended with, were its encoder to stay as it is.
    """
    from pipeline import studies

    _run(studies.encoder_sparsity(l1, l2), sae, run, dry_run=dry_run)


@study.command
def site_comparison(
    *,
    sae: Sae = None,
    sites: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, negative=(), help="hooks ('sparsemill hooks'); hook_mlp_out for hook_post"),
    ] = (),
    l1_factors: Annotated[
        tuple[float, ...], Parameter(consume_multiple=True, negative=(), help="of l1_coeff: the sweep at each site")
    ] = (0.5, 1.0, 2.0),
    dry_run: DryRun = False,
    run: Run = DEFAULTS,
) -> None:
    """Is an autoencoder better placed at another site of the model?

    Harvests the same prompts at the other sites and sweeps l1_coeff at each, this one's included, so that loss
    recovered can be compared at equal L0, by interpolation. At another site l1_coeff is scaled with the spread of its
    activations.
    """
    from pipeline import studies

    _run(studies.site_comparison(sites, l1_factors), sae, run, dry_run=dry_run)


def _run(found: "Study", sae: str | None, run: Run, *, dry_run: bool) -> None:
    from pipeline.analysis import ANALYSES
    from pipeline.analysis.display import show
    from pipeline.studies import look_ahead

    chain = run.chain()
    if dry_run:
        print("\n".join(look_ahead(found, chain, sae)))
        return
    report = found.run(chain, sae)
    comparison = chain.workspace.store.parent(report, found.analysis)
    numbers = facts(comparison)["numbers"]
    rows = [[one.label, show(numbers.get(one.key), one.unit)] for one in ANALYSES[found.analysis].numbers]
    print_table([ANALYSES[found.analysis].title, ""], rows)
    finish(report)
