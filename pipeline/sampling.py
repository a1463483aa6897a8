"""A sample of a harvest: some of its windows, an artifact of its own id that records what it was sampled from.

Any fixed set of windows is an unbiased sample, since a window is a uniform choice of the corpus's prompts: the seed
permuted all prompts before they were cut into windows. The first ones are taken, because a store of the windows 0..k-1
is a store like any other: rows are found by token, a larger sample has all of a smaller one's files (linked, not
fetched again), and a damaged window can be computed again. It is a harvest whose config has fewer ``n_windows`` and
whose parents name, beside the tokens, the harvest it was sampled from; so it is not mistaken for that harvest, nor for
a shorter one computed here, and nothing made from it is found for either. Cost: the windows' bytes, and the statistics
folded anew. Rejected: the id of the shorter harvest (its manifest could not say where the bytes came from).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline import harvest
from pipeline.windows import file_names
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import CorruptArtifact, InputError
from storage.shards import Layout, create_group

SAMPLED_FROM = "sampled_from"


def sample(activations: Artifact, windows: int, workspace: Workspace) -> Made:
    """Makes, or finds, the sample of a harvest's first windows; of one in a remote, only they are fetched.

    Args:
        activations: the harvest, here or in a remote; not a sample itself.
        windows: how many.
        workspace: where it is made.

    Raises:
        InputError: no harvest, or not as many windows.
        CorruptArtifact: a window's files are not as they were committed.
    """
    _check(activations, windows)
    layout = replace(harvest.recorded_layout(activations), n_windows=windows)
    spec = Spec(
        "harvest",
        activations.spec.version,
        {**activations.config, "n_windows": windows},
        {**activations.parents, SAMPLED_FROM: activations.as_parent()},
    )

    def produce(staging: Staging) -> Result:
        create_group(staging.folder, layout)
        missing = [window for window in range(windows) if harvest.unit_name(window) not in staging.finished]
        activations.fetch([name for window in missing for name in file_names(layout, window)])
        for window in missing:
            _take(activations, layout, window, staging)
        return harvest.finish(staging, layout, activations.stats)

    return workspace.make(spec, produce, provenance=activations.manifest.provenance)


def count_windows(text: str, activations: Artifact) -> int:
    """A number of windows from ``12``, or from ``1%`` of all, rounded up.

    Raises:
        InputError: neither.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    whole = harvest.recorded_layout(activations).n_windows
    count = math.ceil(value / 100 * whole - 1e-9) if percent and value > 0 else value
    if rest or not 0 < count <= whole or count != int(count):
        raise InputError(
            "not a number of windows", found=repr(text), expected=f"1 to {whole}, or such as 1% of the {whole}",
            where=activations.id,
        )  # fmt: skip
    return int(count)


def _take(activations: Artifact, layout: Layout, window: int, staging: Staging) -> None:
    names: Sequence[str] = file_names(layout, window)
    if not staging.adopt(harvest.unit_name(window), names, activations):
        raise CorruptArtifact(
            f"window {window} of {activations.id} is not as it was committed", where=activations.folder,
            remedy=f"'sparsemill verify {activations.id}' tells which file",
        )  # fmt: skip


def _check(activations: Artifact, windows: int) -> None:
    if activations.stage != "harvest" or SAMPLED_FROM in activations.parents:
        raise InputError("only a whole harvest can be sampled", found=activations.id)
    whole = harvest.recorded_layout(activations).n_windows
    if not 0 < windows <= whole:
        raise InputError("not as many windows", where=activations.id, found=windows, expected=f"1 to {whole}")
