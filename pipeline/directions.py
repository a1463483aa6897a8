"""The directions stage: from features of an autoencoder, the unit direction that another one's encoder is to avoid.

An artifact of its own, so that which direction it was is part of the identity of what is trained without it. The
direction is the mean of raw encoder columns, as the author's; of the ultra-low features, or of those named. Layout of
the artifact: ``directions.safetensors`` (``directions``, float64 (1, d_in)).
"""

from collections.abc import Sequence

import numpy as np
import safetensors.numpy

from pipeline import analyzing
from pipeline.analysis import statistics
from pipeline.analysis.rare_direction import mean_directions
from pipeline.training import DIRECTIONS, load_autoencoder
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import ConfigError, InputError

OUTPUT_VERSION = 1


def rare_direction(sae: Artifact, density: Artifact, ultra_low_below: float, workspace: Workspace) -> Made:
    """Makes, or finds, the mean encoder direction of the ultra-low features.

    Args:
        sae: the autoencoder.
        density: its density analysis.
        ultra_low_below: a feature of smaller density is ultra-low.
        workspace: where it happens.

    Raises:
        InputError: there are fewer than two ultra-low features: no cluster, no direction.
    """
    spec = Spec(
        "directions", OUTPUT_VERSION, {"ultra_low_below": ultra_low_below},
        {"sae": sae.as_parent(), "density": density.as_parent()},
    )  # fmt: skip

    def produce(staging: Staging) -> Result:
        rare = np.flatnonzero(analyzing.load_densities(density).groups(ultra_low_below).rare)
        if rare.size < 2:
            raise InputError(
                "no cluster, so no direction to avoid", where=sae.id,
                found=f"{rare.size} features of density below {ultra_low_below:g}", expected="at least 2",
                remedy="choose features with --features, or an autoencoder with ultra-low features",
            )  # fmt: skip
        return _write(staging, sae, rare.tolist())

    return workspace.make(spec, produce)


def mean_direction(sae: Artifact, features: Sequence[int], workspace: Workspace) -> Made:
    """Makes, or finds, the mean encoder direction of the features named.

    Args:
        sae: the autoencoder.
        features: their numbers.
        workspace: where it happens.

    Raises:
        ConfigError: it has no feature of that number.
    """
    chosen = sorted(set(features))
    last = load_autoencoder(sae).d_sae - 1
    if not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ConfigError("no such feature", where=sae.id, found=chosen, expected=f"0 to {last}")
    spec = Spec("directions", OUTPUT_VERSION, {"features": [*chosen]}, {"sae": sae.as_parent()})
    return workspace.make(spec, lambda staging: _write(staging, sae, chosen))


def _write(staging: Staging, sae: Artifact, features: Sequence[int]) -> Result:
    direction, _ = mean_directions(statistics.weights64(load_autoencoder(sae).W_enc).T[list(features)])
    if direction is None:
        raise InputError("the mean encoder is zero, so it has no direction", where=sae.id, found=list(features))
    staging.write_bytes(DIRECTIONS, safetensors.numpy.save({"directions": direction[None].copy()}))
    return Result({"features": len(features)})
