from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis import Context, site_comparison
from storage.errors import InputError

POST, OUT = "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"
OPTIONS = site_comparison.OPTIONS()


def one(world: SimpleNamespace, site: str, l0: float, recovered: float, *, rare: int = 0) -> Context:
    rng = np.random.default_rng(0)
    d = 12 if site == POST else 4
    quality = {"l0_held_out": l0, "loss_recovered": recovered, "ce_reconstruction": 5 - recovered, "fve": 0.5}
    return world.context(
        world.units(rng, 30, d),
        world.units(rng, 30, d),
        rare=rare,
        trainer={"l1_coeff": 0.1},
        site=site,
        label=f"{site} {l0}",
        numbers={"loss_recovered": quality | {"ce_zero": 9.0, "ce_clean": 3.0}},
    )


def test_sites_are_compared_at_equal_l0_by_interpolation(world: SimpleNamespace) -> None:
    others = (one(world, POST, 40, 0.9), one(world, OUT, 10, 0.5, rare=3), one(world, OUT, 30, 0.7, rare=6))
    numbers = site_comparison.run(replace(one(world, POST, 20, 0.8, rare=1), companions=others), OPTIONS).numbers
    assert numbers["equal_l0"] == 20
    assert numbers["loss_recovered"] == pytest.approx(0.8)
    assert numbers["loss_recovered_other"] == pytest.approx(0.6)
    assert numbers["ce_reconstruction_other"] == pytest.approx(4.4)
    assert (numbers["site"], numbers["other_site"]) == (POST, OUT)
    assert (numbers["parameters"], numbers["parameters_other"]) == (2 * 12 * 30 + 42, 2 * 4 * 30 + 34)
    assert numbers["rare_fraction_other"] in (3 / 30, 6 / 30)


def test_the_l0_is_moved_into_the_range_that_both_cover(world: SimpleNamespace) -> None:
    others = (one(world, POST, 20, 0.9), one(world, OUT, 15, 0.5), one(world, OUT, 30, 0.8))
    numbers = site_comparison.run(replace(one(world, POST, 10, 0.7), companions=others), OPTIONS).numbers
    assert numbers["equal_l0"] == 15
    assert numbers["loss_recovered"] == pytest.approx(0.8)
    assert numbers["loss_recovered_other"] == pytest.approx(0.5)


def test_ranges_that_do_not_meet_are_not_compared(world: SimpleNamespace) -> None:
    result = site_comparison.run(replace(one(world, POST, 10, 0.7), companions=(one(world, OUT, 11, 0.7),)), OPTIONS)
    assert result.numbers["equal_l0"] is None
    assert result.numbers["loss_recovered_other"] is None
    assert "no L0 in common" in result.reading
    assert result.tables["runs"]["l0"].to_pylist() == [10, 11]


def test_each_further_site_has_its_own_pair_of_rows(world: SimpleNamespace) -> None:
    third = one(world, "gelu-2l blocks.1.hook_mlp_out", 10, 0.3)
    context = replace(one(world, POST, 10, 0.7), companions=(one(world, OUT, 10, 0.6), third))
    rows = site_comparison.run(context, OPTIONS).tables["sites"].to_pylist()
    assert [(row["site"], row["loss_recovered"]) for row in rows] == [
        (POST, 0.7),
        (OUT, 0.6),
        (POST, 0.7),
        (third.site, 0.3),
    ]


def test_interpolation_sorts_and_never_extrapolates() -> None:
    assert site_comparison.at_l0([30, 10], [3, 1], 20) == 2
    assert site_comparison.at_l0([30, 10], [3, 1], 31) is None


def test_one_site_is_refused(world: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="all of one site"):
        site_comparison.run(replace(one(world, POST, 10, 0.7), companions=(one(world, POST, 20, 0.7),)), OPTIONS)
