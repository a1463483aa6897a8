import pytest
import torch
from torch import Tensor

from sae.config import TrainerConfig
from sae.constraints import orthonormal_basis
from sae.kernels.interface import Forward, Moments, Weights
from sae.metrics import ResamplingEvent
from sae.resampling import Resampler, ResamplingState, exempt_features

from .cases import config, objective, random_rows, random_weights

D_IN, D_SAE, ROWS = 12, 40, 32


def forward(fired: Tensor, l2: Tensor | None = None) -> Forward:
    zeros = torch.zeros(ROWS)
    return Forward(l2=zeros if l2 is None else l2, l1=zeros, l0=zeros, deviation=zeros, fired=fired)


def resampler(settings: TrainerConfig, basis: Tensor | None = None) -> Resampler:
    return Resampler(settings, ResamplingState(torch.zeros(D_SAE, dtype=torch.int64)), basis)


def ones(weights: Weights) -> Moments:
    first, second = (Weights(*(torch.ones_like(tensor) for tensor in weights)) for _ in range(2))
    return Moments(first, second)


def run(
    settings: TrainerConfig,
    fired: Tensor,
    *,
    weights: Weights,
    moments: Moments,
    rows: Tensor | None = None,
    l2: Tensor | None = None,
    basis: Tensor | None = None,
) -> list[ResamplingEvent]:
    """Runs all steps with the same firing; returns the events."""
    worker = resampler(settings, basis)
    events: list[ResamplingEvent | None] = []
    for step in range(1, settings.steps + 1):
        worker.observe(step, random_rows(ROWS, D_IN) if rows is None else rows, forward(fired, l2), objective(D_IN))
        events.append(worker.resample_if_due(step, weights, moments))
    return [event for event in events if event is not None]


def reinit(**options: object) -> TrainerConfig:
    scheme = {"scheme": "reinit", "interval_steps": 10, "window_rows": 4 * ROWS, "threshold": 0.01}
    return config(steps=25, resampling=scheme | options)


def anthropic(**options: object) -> TrainerConfig:
    scheme = {"scheme": "anthropic", "steps": (10,), "window_rows": 4 * ROWS, "sample_rows": 4 * ROWS}
    return config(steps=25, resampling=scheme | options)


def firing(*dead: int) -> Tensor:
    fired = torch.full((D_SAE,), 5, dtype=torch.int64)
    fired[list(dead)] = 0
    return fired


def test_only_the_window_before_a_resampling_is_counted():
    weights = random_weights(D_IN, D_SAE)
    events = run(reinit(), firing(3, 7), weights=weights, moments=ones(weights))
    assert [(event.step, event.features, event.window_rows) for event in events] == [
        (10, (3, 7), 4 * ROWS),
        (20, (3, 7), 4 * ROWS),
    ]


def test_firing_before_the_window_does_not_save_a_feature():
    settings, weights = reinit(), random_weights(D_IN, D_SAE)
    worker, rows = resampler(settings), random_rows(ROWS, D_IN)
    for step in range(1, 10):
        worker.observe(step, rows, forward(firing() if step <= 6 else firing(5)), objective(D_IN))
        assert worker.resample_if_due(step, weights, ones(weights)) is None
    worker.observe(10, rows, forward(firing(5)), objective(D_IN))
    event = worker.resample_if_due(10, weights, ones(weights))
    assert event is not None
    assert event.features == (5,)


def test_threshold_is_a_fraction_of_the_window():
    fired = firing()
    fired[2] = 1  # 4 firings in 128 rows: 3.1 %
    for threshold, expected in ((0.03, []), (0.032, [2])):
        worker = resampler(reinit(threshold=threshold))
        for step in range(7, 11):
            worker.observe(step, random_rows(ROWS, D_IN), forward(fired), objective(D_IN))
        assert worker.select().tolist() == expected


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_reinit_replaces_rare_features_and_nothing_else(normalise: bool, reset: bool):
    weights = random_weights(D_IN, D_SAE)
    before, moments = weights.clone(), ones(weights)
    run(
        reinit(normalise_rows=normalise, reset_moments=reset, last_step=10),
        firing(3, 7),
        weights=weights,
        moments=moments,
    )
    changed, kept = [3, 7], [i for i in range(D_SAE) if i not in (3, 7)]
    for new, old in zip(weights[:3], before[:3], strict=True):
        assert torch.equal(new[kept], old[kept])
        assert not torch.equal(new[changed], old[changed])
    assert torch.equal(weights.b_dec, before.b_dec)
    assert weights.b_enc[changed].tolist() == [0, 0]
    norms = weights.dec[changed].norm(dim=1)
    if normalise:
        torch.testing.assert_close(norms, torch.ones(2))
    else:  # uniform within sqrt(6 / d_in): root mean square norm sqrt(2)
        assert bool(((norms > 0.9) & (norms < 1.9)).all())
    assert float(weights.enc[changed].abs().max()) <= (6 / D_SAE) ** 0.5
    for moment in moments:
        assert moment.enc[changed].unique().tolist() == [0.0 if reset else 1.0]
        assert moment.b_dec.unique().tolist() == [1.0]
        assert moment.dec[kept].unique().tolist() == [1.0]


def test_successive_reinits_draw_different_weights():
    weights = random_weights(D_IN, D_SAE)
    run(reinit(last_step=10), firing(3), weights=weights, moments=ones(weights))
    first = weights.enc[3].clone()
    run(reinit(), firing(3), weights=weights, moments=ones(weights))
    assert not torch.equal(weights.enc[3], first)


def test_exempt_features_are_a_random_subset_and_never_resampled():
    settings = reinit(exempt_fraction=0.25)
    exempt = exempt_features(settings)
    assert int(exempt.sum()) == D_SAE // 4
    assert not torch.equal(exempt, exempt_features(settings.model_copy(update={"seed": 1})))
    weights = random_weights(D_IN, D_SAE)
    events = run(settings, torch.zeros(D_SAE, dtype=torch.int64), weights=weights, moments=ones(weights))
    assert events[0].features == tuple((~exempt).nonzero().flatten().tolist())


def test_anthropic_restarts_at_inputs_scaled_to_live_encoders_with_fresh_moments():
    weights = random_weights(D_IN, D_SAE)
    before, moments, rows = weights.clone(), ones(weights), random_rows(ROWS, D_IN)
    l2 = torch.zeros(ROWS)
    l2[11] = 4.0  # the only row with a loss
    (event,) = run(anthropic(), firing(3, 7), weights=weights, moments=moments, rows=rows, l2=l2)
    direction = torch.nn.functional.normalize(rows[11], dim=0)
    live = [i for i in range(D_SAE) if i not in (3, 7)]
    norm = 0.2 * before.enc[live].norm(dim=1).mean()
    assert event.features == (3, 7)
    for feature in (3, 7):
        torch.testing.assert_close(weights.dec[feature], direction)
        torch.testing.assert_close(weights.enc[feature], direction * norm)
        assert float(weights.b_enc[feature]) == 0
        for moment in moments:
            assert moment.enc[feature].unique().tolist() == moment.dec[feature].unique().tolist() == [0.0]
            assert float(moment.b_enc[feature]) == 0
    assert torch.equal(weights.dec[live], before.dec[live])
    assert torch.equal(weights.b_dec, before.b_dec)


def test_centred_inputs_subtract_the_decoder_bias():
    weights, rows = random_weights(D_IN, D_SAE), random_rows(ROWS, D_IN)
    l2 = torch.zeros(ROWS)
    l2[0] = 1.0
    settings = anthropic(centre_inputs=True)
    run(settings, firing(3), weights=weights, moments=ones(weights), rows=rows, l2=l2)
    expected = torch.nn.functional.normalize(rows[0] - weights.b_dec, dim=0)
    torch.testing.assert_close(weights.dec[3], expected)


def test_inputs_are_drawn_in_proportion_to_squared_loss_over_all_rows_of_the_sample():
    settings = config(
        d_sae=20_000,
        steps=25,
        resampling={"scheme": "anthropic", "steps": (10,), "window_rows": 4 * ROWS, "sample_rows": 3 * ROWS},
    )
    worker = Resampler(settings, ResamplingState(torch.zeros(20_000, dtype=torch.int64)), None)
    losses = {step: torch.full((ROWS,), float(step)) for step in range(1, 11)}
    for step in range(1, 11):
        rows = torch.full((ROWS, 1), float(step)) + torch.arange(ROWS)[:, None] / 100
        fired = torch.zeros(20_000, dtype=torch.int64)
        worker.observe(step, rows, forward(fired, losses[step]), objective(1))
    drawn = worker.state.candidates
    assert drawn is not None
    steps = drawn.floor().flatten()
    total = 8.0**2 + 9**2 + 10**2
    for step in (8, 9, 10):
        assert float((steps == step).double().mean()) == pytest.approx(step**2 / total, abs=0.02)
    within, counts = (drawn.flatten() - steps).mul(100).round().unique(return_counts=True)
    assert len(within) == ROWS
    assert float(counts.max()) < 1.3 * 20_000 / ROWS  # rows of equal loss are equally likely


@pytest.mark.parametrize("settings", [reinit(), anthropic()])
def test_new_encoders_stay_orthogonal_to_given_directions(settings: TrainerConfig):
    weights, basis = random_weights(D_IN, D_SAE), orthonormal_basis(torch.eye(D_IN)[:2], D_IN)
    run(settings, firing(3), weights=weights, moments=ones(weights), basis=basis, l2=torch.ones(ROWS))
    assert float(weights.enc[3, :2].abs().max()) < 1e-6


@pytest.mark.parametrize("settings", [reinit(), anthropic()])
def test_new_tied_rows_are_one_matrix_orthogonal_to_given_directions(settings: TrainerConfig):
    settings = settings.model_copy(update={"init": "tied", "tie_weights": True})
    weights, basis = random_weights(D_IN, D_SAE), orthonormal_basis(torch.eye(D_IN)[:2], D_IN)
    before, moments = weights.clone(), ones(weights)
    moments.first.dec.mul_(3)
    run(settings, firing(3, 7), weights=weights, moments=moments, basis=basis, l2=torch.ones(ROWS))
    changed, kept = [3, 7], [i for i in range(D_SAE) if i not in (3, 7)]
    assert torch.equal(weights.enc[changed], weights.dec[changed])
    assert float(weights.dec[changed, :2].abs().max()) < 1e-6
    assert float(weights.dec[changed].norm(dim=1).min()) > 0.1
    assert torch.equal(weights.dec[kept], before.dec[kept])
    assert torch.equal(weights.enc[kept], before.enc[kept])
    for moment in moments:
        assert torch.equal(moment.enc[changed], moment.dec[changed])


def test_without_a_row_to_restart_at_anthropics_scheme_resamples_none_and_says_so():
    weights = random_weights(D_IN, D_SAE)
    before = weights.clone()
    (event,) = run(anthropic(), firing(3, 7), weights=weights, moments=ones(weights))  # no row has a loss
    assert (event.step, event.features) == (10, ())
    assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))


def test_none_counts_and_changes_nothing():
    weights = random_weights(D_IN, D_SAE)
    before = weights.clone()
    assert run(config(), firing(3), weights=weights, moments=ones(weights)) == []
    assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))
