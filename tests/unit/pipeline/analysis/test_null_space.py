from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.analysis import Context, FeatureDensities, null_space


def planted(world: SimpleNamespace, fractions: np.ndarray, d: int = 48, r: int = 12) -> Context:
    """Encoders with these fractions of their squared norm in the null space of W_out, decoders with one minus them."""
    rng = np.random.default_rng(0)
    W_out = rng.standard_normal((d, r))
    U = np.linalg.svd(W_out)[0]
    n = len(fractions)

    def mix(share: np.ndarray) -> np.ndarray:
        inside, outside = rng.standard_normal((n, d - r)) @ U[:, r:].T, rng.standard_normal((n, r)) @ U[:, :r].T
        inside /= np.linalg.norm(inside, axis=1, keepdims=True)
        outside /= np.linalg.norm(outside, axis=1, keepdims=True)
        return np.sqrt(share)[:, None] * inside + np.sqrt(1 - share)[:, None] * outside

    sae = world.autoencoder(3 * mix(fractions).T, np.zeros(n), mix(1 - fractions), np.zeros(d))
    model = world.model()
    model.W = torch.from_numpy(W_out).float()
    return Context(sae=sae, hook_name=world.HOOK, model=model)


FRACTIONS = np.linspace(0, 1, 21)


def test_planted_fractions_are_found(world: SimpleNamespace) -> None:
    result = null_space.run(planted(world, FRACTIONS), null_space.OPTIONS())
    table = result.tables["features"]
    np.testing.assert_allclose(table["encoder_null_fraction"].to_numpy(), FRACTIONS, atol=1e-6)
    np.testing.assert_allclose(table["decoder_null_fraction"].to_numpy(), 1 - FRACTIONS, atol=1e-6)
    np.testing.assert_allclose(table["encoder_fixed_null_fraction"].to_numpy(), FRACTIONS, atol=1e-6)
    assert result.numbers["encoder_mean_all"] == pytest.approx(0.5)
    assert result.numbers["rank"] == 12
    assert result.numbers["rank_centred"] == 11
    assert result.numbers["w_out_is_centred"] == "no"


def test_frequent_and_rare_features_are_apart(world: SimpleNamespace) -> None:
    context = planted(world, FRACTIONS)
    counts = np.where(np.arange(21) < 11, 0, 9)
    context = Context(
        sae=context.sae, hook_name=world.HOOK, model=context.model, densities=FeatureDensities(counts, 10)
    )
    numbers = null_space.run(context, null_space.OPTIONS()).numbers
    assert numbers["encoder_mean_rare"] == pytest.approx(FRACTIONS[:11].mean(), abs=1e-6)
    assert numbers["encoder_mean_frequent"] == pytest.approx(FRACTIONS[11:].mean(), abs=1e-6)
    assert numbers["decoder_std_frequent"] == pytest.approx(FRACTIONS[11:].std(), abs=1e-6)


def test_a_direction_only_the_mean_sees_is_null_once_centred(world: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    W_out = rng.standard_normal((20, 5))
    W_out -= W_out.mean(axis=1, keepdims=True)
    W_out[0] = 7.0  # neuron 0 writes the all-ones direction and nothing else
    sae = world.autoencoder(np.eye(20)[:, :1], np.zeros(1), np.eye(20)[:1], np.zeros(20))
    model = world.model()
    model.W = torch.from_numpy(W_out).float()
    numbers = null_space.run(Context(sae=sae, hook_name=world.HOOK, model=model), null_space.OPTIONS()).numbers
    assert numbers["encoder_mean_all"] == pytest.approx(0, abs=1e-6)
    assert numbers["encoder_mean_all_centred"] == pytest.approx(1, abs=1e-6)


def test_a_centred_w_out_is_noticed_and_its_author_null_space_is_one_short(world: SimpleNamespace) -> None:
    context = planted(world, FRACTIONS)
    assert context.model is not None
    W_out = context.model.W_out(0)
    model = world.model()
    model.W = W_out - W_out.mean(dim=1, keepdim=True)
    numbers = null_space.run(Context(sae=context.sae, hook_name=world.HOOK, model=model), null_space.OPTIONS()).numbers
    assert numbers["w_out_is_centred"] == "yes"
    assert numbers["rank"] == 11
    assert float(numbers["encoder_mean_all_fixed"] or 0) < float(numbers["encoder_mean_all"] or 0)


def test_the_baseline_of_the_post_in_closed_form_and_by_beta_distribution() -> None:
    mean, std = null_space.random_fraction(2048, 512)
    assert mean == 0.75
    assert std == pytest.approx(0.0135, abs=5e-5)
    assert (mean, std) == pytest.approx((stats.beta(768, 256).mean(), stats.beta(768, 256).std()))


def test_random_directions_follow_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((512, 128)))[0]
    found = null_space.null_fraction(rng.standard_normal((8000, 512)), basis)
    mean, std = null_space.random_fraction(512, 128)
    assert found.mean() == pytest.approx(mean, abs=4 * std / 8000**0.5)
    assert found.std() == pytest.approx(std, rel=0.04)


def test_the_tolerance_decides_the_rank() -> None:
    W_out = np.diag([1.0, 1e-2, 1e-5])[:, :3]
    assert null_space.column_space(W_out, 1e-3).rank == 2
    assert null_space.column_space(W_out, 1e-6).rank == 3
    assert null_space.column_space(W_out).tolerance == 3 * 2.0**-23


def test_a_zero_row_has_no_fraction() -> None:
    assert np.isnan(null_space.null_fraction(np.zeros((1, 4)), np.eye(4)[:, :2])[0])


def test_another_site_than_the_neurons_has_no_null_space(world: SimpleNamespace) -> None:
    context = planted(world, FRACTIONS)
    elsewhere = Context(sae=context.sae, hook_name="blocks.0.hook_mlp_out", model=context.model)
    result = null_space.run(elsewhere, null_space.OPTIONS())
    assert result.numbers["applies"] == "no: the site is blocks.0.hook_mlp_out"
    assert not result.figures
