from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline import evaluation
from pipeline.evaluation import HeldOut
from sae.autoencoder import Autoencoder
from storage.errors import InputError

HOOK = "blocks.0.mlp.hook_post"
D, V, T, N = 12, 30, 9, 20


@dataclass
class Model:
    """activation = relu(embedding of the token and its predecessor); logits = tanh(activation) @ W_U."""

    W_E: torch.Tensor
    W_U: torch.Tensor
    passes: int = 0

    def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        assert hook_name == HOOK
        shifted = F.pad(tokens, (1, 0))[:, :-1]
        return torch.relu(self.W_E[tokens] - 0.5 * self.W_E[shifted])

    def logits(
        self, tokens: torch.Tensor, edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None
    ) -> torch.Tensor:
        self.passes += 1
        acts = self.activations(tokens, HOOK)
        return torch.tanh(edits[HOOK](acts) if edits else acts) @ self.W_U


@pytest.fixture
def model() -> Model:
    generator = torch.Generator().manual_seed(0)
    return Model(torch.randn(V, D, generator=generator), torch.randn(D, V, generator=generator))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))


def autoencoder(d_sae: int = 40, seed: int = 2) -> Autoencoder:
    generator = torch.Generator().manual_seed(seed)
    W_enc = 0.5 * torch.randn(D, d_sae, generator=generator)
    W_dec = F.normalize(torch.randn(d_sae, D, generator=generator), dim=1)
    return Autoencoder(W_enc, -0.2 * torch.rand(d_sae, generator=generator), W_dec, torch.full((D,), 0.1))


def identity() -> Autoencoder:
    return Autoencoder(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D))


def plain_loss(
    model: Model, tokens: torch.Tensor, first: int, replace: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """One prompt at a time, one position at a time, in float64: nothing shared with the code under test."""
    losses = []
    for prompt in tokens:
        acts = model.activations(prompt[None], HOOK)[0].double()
        edited = torch.stack([replace(row.float()).double() if i >= first else row for i, row in enumerate(acts)])
        logits = torch.tanh(edited) @ model.W_U.double()
        losses += [-torch.log_softmax(logits[i], 0)[prompt[i + 1]].item() for i in range(first, len(prompt) - 1)]
    return float(np.mean(losses))


@pytest.mark.parametrize("first", [0, 1])
def test_every_condition_equals_a_plain_computation(model: Model, tokens: torch.Tensor, first: int) -> None:
    sae, mean = autoencoder(), torch.rand(D)
    held_out = HeldOut(model, tokens, HOOK, first_position=first, mean=mean)
    losses = evaluation.baseline_losses(held_out) | evaluation.reconstruction_losses(sae, held_out)[0]
    plain = {
        "clean": lambda x: x,
        "zero": torch.zeros_like,
        "mean": lambda _: mean,
        "reconstruction": lambda x: sae(x).sae_out,
    }
    assert set(losses) == set(plain)
    for name, replace in plain.items():
        assert losses[name].shape == (N,)
        assert losses[name].mean() == pytest.approx(plain_loss(model, tokens, first, replace), rel=1e-5)


def test_the_identity_recovers_exactly_all_and_zeros_exactly_nothing(model: Model, tokens: torch.Tensor) -> None:
    nothing = Autoencoder(torch.zeros(D, 3), torch.zeros(3), torch.zeros(3, D), torch.zeros(D))
    held_out = HeldOut(model, tokens, HOOK)
    assert evaluation.measure_quality(identity(), held_out).recovered == 1.0
    assert evaluation.measure_quality(nothing, held_out).recovered == 0.0


def test_a_condition_without_effect_on_the_loss_has_no_ratio() -> None:
    same = np.ones(4)
    assert evaluation.recovered(same, same, same) is None
    assert evaluation.bootstrap_recovered(same, same, same, np.random.default_rng(0)) is None


def test_floors_keep_the_features_at_or_above_them(model: Model, tokens: torch.Tensor) -> None:
    sae = autoencoder()
    density = np.random.default_rng(0).uniform(0, 1, sae.d_sae)
    density[3] = 0.5
    held_out = HeldOut(model, tokens, HOOK)
    losses, _ = evaluation.reconstruction_losses(sae, held_out, density=density, floors=(0.2, 0.5, 2.0, 0.0))
    for floor in (0.0, 0.2, 0.5, 2.0):
        keep = torch.from_numpy(density >= floor)
        part = Autoencoder(sae.W_enc, sae.b_enc, sae.W_dec * keep[:, None], sae.b_dec)
        expected, _ = evaluation.reconstruction_losses(part, held_out)
        np.testing.assert_allclose(losses[evaluation.floor_name(floor)], expected["reconstruction"], rtol=1e-5)


def test_fit_equals_a_float64_computation(model: Model, tokens: torch.Tensor) -> None:
    sae = autoencoder()
    fit = evaluation.measure_quality(sae, HeldOut(model, tokens, HOOK, micro_batch_prompts=3)).fit
    x = model.activations(tokens, HOOK)[:, 1:].reshape(-1, D)
    out = sae(x)
    x, x_hat = x.double().numpy(), out.sae_out.double().numpy()
    assert fit.fve == pytest.approx(1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    ratio = np.linalg.norm(x_hat, axis=1) / np.linalg.norm(x, axis=1)
    assert fit.norm_ratio == pytest.approx(ratio.mean(), rel=1e-6)
    assert fit.l0 == pytest.approx(float((out.feature_acts > 0).sum(1).double().mean()))
    assert evaluation.measure_quality(identity(), HeldOut(model, tokens, HOOK)).fit[:2] == (1.0, 1.0)


def test_micro_batches_do_not_change_the_losses(model: Model, tokens: torch.Tensor) -> None:
    small = evaluation.baseline_losses(HeldOut(model, tokens, HOOK, micro_batch_prompts=3))
    large = evaluation.baseline_losses(HeldOut(model, tokens, HOOK, micro_batch_prompts=64))
    for name in small:
        np.testing.assert_allclose(small[name], large[name], rtol=1e-5)


def test_known_baselines_are_not_computed_again(model: Model, tokens: torch.Tensor) -> None:
    held_out = HeldOut(model, tokens, HOOK, mean=torch.zeros(D), micro_batch_prompts=N)
    baselines = evaluation.baseline_losses(held_out)
    model.passes = 0
    quality = evaluation.measure_quality(autoencoder(), held_out, baselines)
    assert model.passes == 1
    assert quality == evaluation.measure_quality(autoencoder(), held_out)
    assert quality.recovered_from_mean == pytest.approx(quality.recovered)  # here the mean is zero


def test_the_bootstrap_interval_has_the_width_of_the_ratio_estimator() -> None:
    rng = np.random.default_rng(0)
    n = 400
    clean, gap = rng.normal(3, 0.5, n), rng.normal(2, 0.3, n)
    zero, reconstruction = clean + gap, clean + 0.1 * gap + rng.normal(0, 0.2, n)
    interval = evaluation.bootstrap_recovered(zero, reconstruction, clean, np.random.default_rng(1), resamples=4000)
    ratio = evaluation.recovered(zero, reconstruction, clean)
    assert interval is not None
    assert ratio is not None
    residual = (zero - reconstruction) - ratio * (zero - clean)  # the delta method
    expected = 1.96 * residual.std() / n**0.5 / gap.mean()
    assert interval.high - ratio == pytest.approx(expected, rel=0.1)
    assert ratio - interval.low == pytest.approx(expected, rel=0.1)


def test_no_prompts_is_an_error(model: Model) -> None:
    with pytest.raises(InputError, match="no held-out prompts"):
        evaluation.reconstruction_losses(identity(), HeldOut(model, torch.zeros(0, T, dtype=torch.long), HOOK))
