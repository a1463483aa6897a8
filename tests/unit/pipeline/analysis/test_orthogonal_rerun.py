from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis import Context, orthogonal_rerun
from storage.errors import InputError

D, N, RARE = 32, 60, 24
OPTIONS = orthogonal_rerun.OPTIONS()
ANGLE = np.pi / 4


def reruns(world: SimpleNamespace, *, rare: int = RARE, excluded: np.ndarray | None = None) -> Context:
    """Before: ultra-low encoders along axis 0. The rerun: axis 0 excluded, ultra-low encoders around axis 1."""
    rng = np.random.default_rng(0)
    encoder, again = world.units(rng, N, D), world.units(rng, N, D)
    encoder[:RARE] = np.eye(D)[0] + 0.01 * world.units(rng, RARE, D)
    again[:RARE] = 2 * (np.eye(D)[1] + 0.3 * world.units(rng, RARE, D))
    direction = np.eye(D)[:1] if excluded is None else excluded
    again -= again @ direction.T @ direction
    decoder = world.units(rng, N, D)
    found = {"density": {"l0": 12.0}, "loss_recovered": {"loss_recovered": 0.9}}
    rerun = world.context(
        again, decoder, rare=rare, label="orthogonal encoder", encoder_directions=direction, numbers=found
    )
    return world.context(encoder, decoder, rare=RARE, companions=(rerun,))


def test_the_new_cluster_is_measured_beside_the_old(world: SimpleNamespace) -> None:
    context = reruns(world)
    numbers = orthogonal_rerun.run(context, OPTIONS).numbers
    encoder = context.companions[0].sae.W_enc.double().numpy().T[:RARE]
    mean = encoder.mean(axis=0)
    cosines = encoder @ mean / np.linalg.norm(encoder, axis=1) / np.linalg.norm(mean)
    assert numbers["aligned_fraction"] == pytest.approx((cosines > 0.95).mean())
    assert numbers["cosine_median"] == pytest.approx(np.median(cosines))
    assert numbers["cosine_median_before"] == pytest.approx(1, abs=1e-3)
    assert numbers["aligned_fraction_before"] == 1
    assert numbers["rare_fraction"] == pytest.approx(RARE / N)
    assert numbers["excluded_cosine_max"] == pytest.approx(0, abs=1e-7)
    assert numbers["direction_cosine"] == pytest.approx(0, abs=0.01)
    assert (numbers["l0"], numbers["loss_recovered"], numbers["l0_before"]) == (12.0, 0.9, None)


def test_what_the_constraint_leaves_room_for_is_the_sine(world: SimpleNamespace) -> None:
    excluded = (np.cos(ANGLE) * np.eye(D)[0] + np.sin(ANGLE) * np.eye(D)[2])[None]
    numbers = orthogonal_rerun.run(reruns(world, excluded=excluded), OPTIONS).numbers
    assert numbers["direction_cosine_possible"] == pytest.approx(np.sin(ANGLE), abs=0.01)


def test_an_encoder_that_has_the_direction_all_the_same_shows(world: SimpleNamespace) -> None:
    context = reruns(world)
    broken = replace(context.companions[0], encoder_directions=np.eye(D)[1:2])
    numbers = orthogonal_rerun.run(replace(context, companions=(broken,)), OPTIONS).numbers
    assert float(numbers["excluded_cosine_max"] or 0) > 0.9


def test_a_rerun_without_a_cluster_says_so(world: SimpleNamespace) -> None:
    result = orthogonal_rerun.run(reruns(world, rare=1), OPTIONS)
    assert result.numbers["cluster"] == "no cluster"
    assert result.numbers["aligned_fraction"] is None
    assert result.numbers["direction_cosine"] is None
    assert "was enough" in result.reading


def test_an_ordinary_autoencoder_is_refused(world: SimpleNamespace) -> None:
    context = reruns(world)
    plain = replace(context.companions[0], encoder_directions=None, label="seed 1")
    with pytest.raises(InputError, match="seed 1"):
        orthogonal_rerun.run(replace(context, companions=(plain,)), OPTIONS)
    with pytest.raises(InputError, match="one rerun"):
        orthogonal_rerun.run(replace(context, companions=(*context.companions, plain)), OPTIONS)
