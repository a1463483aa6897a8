from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.analysis import Context, FeatureDensities, loss_recovered
from pipeline.analysis.passes import Here
from pipeline.progress import Advance, Quiet
from storage.errors import InputError


class Watched(Quiet):
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.tracked: list[tuple[str, int, str]] = []
        self.done: list[int] = []

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:
        assert start == 0
        self.tracked.append((label, total, unit))

        def advance(done: int = 1, *, note: str = "") -> None:
            self.done.append(done)

        yield advance


@pytest.fixture
def context(world: SimpleNamespace) -> Context:
    rng = np.random.default_rng(0)
    model = world.model()
    d, d_sae = 24, 60
    directions = rng.standard_normal((d_sae, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sae = world.autoencoder(directions.T, np.full(d_sae, -0.1), directions, np.zeros(d))
    tokens = rng.integers(0, 40, (30, 10), dtype=np.int32)
    counts = np.where(np.arange(d_sae) < 10, 5, 4000)
    return Context(
        sae=sae,
        hook_name=world.HOOK,
        model=model,
        tokens=world.Prompts(tokens, tokens),
        densities=FeatureDensities(counts, 100_000),
        mean_activation=model.activations(torch.from_numpy(tokens).long(), world.HOOK)[:, 1:].mean(dim=(0, 1)),
    )


OPTIONS = loss_recovered.OPTIONS(prompts=20, resamples=200, floors=(1e-3, 1e-1))


def test_numbers_are_those_of_the_evaluation(context: Context) -> None:
    numbers = loss_recovered.run(context, OPTIONS).numbers
    zero, recon, clean, mean = (float(numbers[f"ce_{key}"]) for key in ("zero", "reconstruction", "clean", "mean"))  # type: ignore[arg-type]
    assert numbers["loss_recovered"] == pytest.approx((zero - recon) / (zero - clean))
    assert numbers["loss_recovered_from_mean"] == pytest.approx((mean - recon) / (mean - clean))
    assert numbers["mean_ablation_recovered"] == pytest.approx((zero - mean) / (zero - clean))
    assert float(numbers["loss_recovered_low"] or 0) < float(numbers["loss_recovered"] or 0)
    assert numbers["n_prompts"] == 20


def test_without_ultra_low_features_is_an_autoencoder_without_them(context: Context, world: SimpleNamespace) -> None:
    numbers = loss_recovered.run(context, OPTIONS).numbers
    sae = context.sae
    without = world.autoencoder(
        sae.W_enc[:, 10:].numpy(), sae.b_enc[10:].numpy(), sae.W_dec[10:].numpy(), sae.b_dec.numpy()
    )
    smaller = replace(context, sae=without, densities=FeatureDensities(np.full(50, 4000), 100_000))
    expected = loss_recovered.run(smaller, OPTIONS).numbers["ce_reconstruction"]
    assert numbers["ce_without_ultra_low"] == pytest.approx(expected, rel=1e-5)


def test_the_curve_has_a_row_a_floor_and_ends_with_nothing_kept(context: Context) -> None:
    curve = loss_recovered.run(context, OPTIONS).tables["density_floor"]
    assert curve["density_floor"].to_pylist() == [1e-4, 1e-3, 1e-1]
    assert curve["features_kept"].to_pylist() == [50, 50, 0]


def test_the_same_seed_gives_the_same_numbers(context: Context) -> None:
    assert loss_recovered.run(context, OPTIONS).numbers == loss_recovered.run(context, OPTIONS).numbers


def test_without_a_mean_there_is_no_mean_ablation(context: Context) -> None:
    numbers = loss_recovered.run(replace(context, mean_activation=None), OPTIONS).numbers
    assert numbers["ce_mean"] is None
    assert numbers["mean_ablation_recovered"] is None


def test_what_is_missing_is_named(context: Context) -> None:
    with pytest.raises(InputError, match="the language model"):
        loss_recovered.run(replace(context, model=None), OPTIONS)


def test_the_losses_are_the_same_bits_whoever_computes_a_micro_batch(context: Context, world: SimpleNamespace) -> None:
    options = OPTIONS.model_copy(update={"micro_batch_prompts": 3})
    elsewhere = world.assert_same_elsewhere(lambda where: loss_recovered.run(where, options), context)
    assert elsewhere.computed == {"loss_recovered": 7}


def test_prompts_done_are_shown(context: Context) -> None:
    watched = Watched()
    loss_recovered.run(replace(context, passes=Here(watched)), OPTIONS)
    assert watched.tracked == [("loss_recovered", 20, "prompts")]
    assert watched.done == [8, 8, 4]
