import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sae.config import TrainerConfig
from sae.errors import InvalidTensor, TrainingDiverged
from sae.metrics import StepMetrics
from sae.trainer import Trainer

from .cases import batch, config, random_rows, start

REINIT = {"scheme": "reinit", "interval_steps": 8, "window_rows": 96, "threshold": 0.05}
ANTHROPIC = {"scheme": "anthropic", "steps": (8, 20), "window_rows": 96, "sample_rows": 128}
RARE = {"b_enc_init": "calibrated", "target_l0": 0.3}
VARIANTS: list[dict[str, Any]] = [
    {"engine": "dense"},
    {"engine": "sparse"},
    {"engine": "auto", "dense_above_l0": 12.0, "b_enc_init": "calibrated", "target_l0": 11.0},
    {"resampling": REINIT, "decoder_norm": "as-published", "b_enc_init": "calibrated", "target_l0": 2.0},
    {"resampling": ANTHROPIC, **RARE, "lr_warmup_steps": 5, "lr_decay_fraction": 0.5, "l1_warmup_steps": 7},
    {"resampling": ANTHROPIC, **RARE, "engine": "dense"},
    {"engine": "dense", "precision": "bfloat16"},
    {"gradient_clip_norm": 0.1, "decoder_norm": "renormalise-before", "encoder_l1": 1e-3},
]


def restored(trainer: Trainer, settings: TrainerConfig, threads: int = 1) -> Trainer:
    text = json.loads(json.dumps(trainer.state_json()))
    return Trainer.restore(settings, trainer.state_tensors(), text, threads=threads)


def final(trainer: Trainer) -> tuple[dict[str, bytes], object]:
    return {name: tensor.numpy().tobytes() for name, tensor in trainer.state_tensors().items()}, trainer.state_json()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("every", [1, 7])
def test_saved_and_restored_training_equals_uninterrupted_training_to_the_bit(options: dict[str, Any], every: int):
    settings = config(steps=30, **options)
    whole, pieces = start(settings), start(settings)
    reference = [whole.step(batch(step)) for step in range(30)]
    metrics: list[StepMetrics] = []
    for step in range(30):
        if step % every == 0:
            pieces = restored(pieces, settings)
        metrics.append(pieces.step(batch(step)))
    assert metrics == reference
    assert final(pieces) == final(whole)
    resamplings = [metric.step for metric in metrics if metric.resampled and metric.resampled.features]
    assert bool(resamplings) == ("resampling" in options)


def test_sparse_results_do_not_depend_on_threads():
    settings = config(d_sae=300, steps=5)
    runs = [start(settings, threads=threads) for threads in (1, 2, 3)]
    for step in range(5):
        one, two, three = (run.step(batch(step, rows=700)) for run in runs)
        assert one == two == three
    assert final(runs[0]) == final(runs[1]) == final(runs[2])


def test_engines_agree_over_many_steps():
    runs = [start(config(engine=engine, b_enc_init="calibrated", target_l0=6.0)) for engine in ("dense", "sparse")]
    for step in range(30):
        dense, sparse = (run.step(batch(step)) for run in runs)
        assert (dense.engine, sparse.engine) == ("dense", "sparse")
        for name in ("loss", "l2", "l1", "l0", "fve", "grad_norm", "decoder_norm_min", "decoder_norm_max"):
            assert getattr(sparse, name) == pytest.approx(getattr(dense, name), rel=1e-4), name
    dense, sparse = (run.autoencoder for run in runs)
    torch.testing.assert_close(sparse.W_enc, dense.W_enc, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sparse.W_dec, dense.W_dec, atol=1e-4, rtol=1e-3)


def test_auto_follows_the_previous_steps_l0():
    settings = config(engine="auto", l1_coeff=9.0, learning_rate=0.05, steps=40)
    trainer = start(settings)  # zero biases: half of all features start active
    metrics = [trainer.step(batch(step)) for step in range(40)]
    assert metrics[0].engine == "dense"
    assert metrics[-1].engine == "sparse"
    for before, after in pairwise(metrics):
        assert after.engine == ("dense" if before.l0 > 0.15 * 40 else "sparse")


def test_metrics_equal_a_float64_recomputation():
    settings = config()
    sample = random_rows(256, 12, seed=99) + 1
    trainer = Trainer.start(settings, 12, sample, sample.mean(dim=0), threads=1)
    trainer.step(batch(0) + 1)
    sae, x = trainer.autoencoder.to(torch.float64), (batch(1) + 1).double()
    metrics = trainer.step(batch(1) + 1)
    output = sae(x)
    l2 = float((output.sae_out - x).square().sum(dim=1).mean())
    l1 = float(output.feature_acts.sum(dim=1).mean())
    deviation = float((x - sample.double().mean(dim=0)).square().sum(dim=1).mean())
    assert metrics.l2 == pytest.approx(l2, rel=1e-5)
    assert metrics.l1 == pytest.approx(l1, rel=1e-5)
    assert metrics.loss == pytest.approx(l2 + 0.05 * l1, rel=1e-5)
    assert metrics.l0 == float((output.feature_acts > 0).sum(dim=1).double().mean())
    assert metrics.fve == pytest.approx(1 - l2 / deviation, rel=1e-5)
    assert (metrics.step, metrics.rows, metrics.rows_seen) == (2, 32, 64)
    assert (metrics.learning_rate, metrics.l1_coeff) == (1e-2, 0.05)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("decoder_norm", "unit", "grows"),
    [
        ("fixed", True, False),
        ("as-published", False, True),
        ("renormalise-before", False, False),
        ("free", False, None),
    ],
)
def test_decoder_norms(engine: str, decoder_norm: str, unit: bool, grows: bool | None):
    trainer = start(config(engine=engine, decoder_norm=decoder_norm, steps=100))
    metrics = [trainer.step(batch(step)) for step in range(60)]
    norms = trainer.autoencoder.W_dec.norm(dim=1)
    assert metrics[-1].decoder_norm_min == pytest.approx(float(norms.min()), rel=1e-6)
    assert metrics[-1].decoder_norm_max == pytest.approx(float(norms.max()), rel=1e-6)
    assert (float((norms - 1).abs().max()) < 1e-6) == unit
    if grows is not None:  # steps orthogonal to a row only lengthen it; renormalising first leaves one step's worth
        assert (metrics[-1].decoder_norm_max > 1.01) == grows


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_encoder_stays_orthogonal_to_given_directions(engine: str):
    settings = config(engine=engine, resampling=REINIT)
    directions = torch.nn.functional.normalize(random_rows(2, 12), dim=1)
    sample = random_rows(256, 12)
    trainer = Trainer.start(settings, 12, sample, sample[0], encoder_directions=directions, threads=1)
    for step in range(20):
        trainer.step(batch(step))
        assert float((directions @ trainer.autoencoder.W_enc).abs().max()) < 1e-6
    again = restored(trainer, settings)
    assert again.step(batch(20)) == trainer.step(batch(20))
    assert final(again) == final(trainer)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_non_finite_batch_stops_with_its_step_and_changes_nothing(engine: str):
    trainer = start(config(engine=engine))
    trainer.step(batch(0))
    before = final(trainer)
    for value in (float("nan"), float("inf"), 3e38):
        broken = batch(1)
        broken[3, 4] = value
        with pytest.raises(TrainingDiverged, match="step 2") as raised:
            trainer.step(broken)
        assert raised.value.step == 2
        assert raised.value.kind == "diverged"
    assert final(trainer) == before
    assert trainer.step(batch(1)).step == 2


def test_densities_count_every_row_of_complete_windows():
    trainer = start(config(density_window_rows=96))
    fired = torch.zeros(40, dtype=torch.int64)
    for step in range(3):
        assert not trainer.density_window().complete
        fired += (trainer.autoencoder.encode(batch(step)) > 0).sum(dim=0)
        trainer.step(batch(step))
        assert (trainer.density_window().rows) == 32 * (step + 1)
    window = trainer.density_window()
    assert window.complete
    assert torch.equal(window.counts, fired)
    trainer.step(batch(3))
    assert torch.equal(trainer.density_window().counts, fired)  # until the next window is complete


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_short_batch_is_a_batch(engine: str):
    trainer = start(config(engine=engine))
    metrics = trainer.step(batch(0, rows=1))
    assert (metrics.rows, metrics.rows_seen) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "name"),
    [(torch.zeros(0, 12), "batch"), (torch.zeros(3, 11), "batch"), (torch.zeros(12), "batch")],
)
def test_a_batch_of_the_wrong_shape_is_refused(rows: torch.Tensor, name: str):
    with pytest.raises(InvalidTensor, match=name):
        start(config()).step(rows)
    with pytest.raises(InvalidTensor, match="float32"):
        start(config()).step(torch.zeros(3, 12, dtype=torch.float64))


def test_strided_and_inference_mode_batches_are_accepted():
    trainer, again = start(config()), start(config())
    with torch.inference_mode():
        rows = batch(0)
    wide = torch.zeros(32, 24)
    wide[:, ::2] = batch(0)
    assert trainer.step(rows) == again.step(wide[:, ::2])


def test_the_sparse_engine_refuses_another_device():
    trainer = start(config(engine="sparse"))
    trainer._state.mean = trainer._state.mean.to("meta")
    with pytest.raises(InvalidTensor, match="cpu"):
        trainer.step(batch(0))


def test_torchs_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    trainer = start(config(resampling=REINIT))
    for step in range(10):
        trainer.step(batch(step))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_synthetic_features_in_superposition_are_recovered():
    random = np.random.default_rng(0)
    true = random.standard_normal((96, 32))
    true /= np.linalg.norm(true, axis=1, keepdims=True)

    def rows(count: int) -> torch.Tensor:
        active = random.random((count, 96)) < 0.02
        return torch.from_numpy((active * random.uniform(0.5, 1.5, (count, 96)) @ true).astype(np.float32))

    settings = TrainerConfig(
        d_sae=192,
        l1_coeff=0.3,
        steps=500,
        batch_rows=256,
        learning_rate=5e-3,
        lr_decay_fraction=0.3,
        init="tied",
        b_enc_init="calibrated",
        target_l0=8,
    )
    sample = rows(2048)
    trainer = Trainer.start(settings, 32, sample, sample.mean(dim=0), threads=1)
    for _ in range(500):
        trainer.step(rows(256))
    decoder = trainer.autoencoder.W_dec.numpy()
    recovered = (true @ decoder.T / np.linalg.norm(decoder, axis=1)).max(axis=1)
    assert recovered.mean() > 0.95


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("scheme", ["reinit", "anthropic"])
def test_tied_weights_stay_one_matrix_through_training_and_resampling(engine: str, scheme: str):
    resampling = {"scheme": scheme, "interval_steps": 8, "window_rows": 128}
    resampling |= {"threshold": 0.5} if scheme == "reinit" else {"sample_rows": 128}
    tied = {"init": "tied", "tie_weights": True, **RARE}  # few fire, so that some are dead
    trainer = start(config(engine=engine, steps=20, resampling=resampling, **tied))
    resampled = 0
    for step in range(1, 18):
        metrics = trainer.step(batch(step))
        resampled += 0 if metrics.resampled is None else len(metrics.resampled.features)
        assert torch.equal(trainer.autoencoder.W_enc, trainer.autoencoder.W_dec.T)
    assert resampled


def test_tied_weights_ask_for_a_tied_start():
    with pytest.raises(ValueError, match="init='tied'"):
        config(tie_weights=True)
