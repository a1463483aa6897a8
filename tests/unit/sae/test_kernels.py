"""Both engines against float64 autograd, torch.optim.Adam and plain constraints; hypothesis widens this elsewhere."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae import losses
from sae.constraints import orthonormal_basis, unit_rows
from sae.kernels import compiled, screen
from sae.kernels.dense import DenseEngine
from sae.kernels.interface import Engine, Forward, Moments, Objective, Stepped, Update, Weights
from sae.kernels.reference import ReferenceEngine
from sae.kernels.screen import bfloat16_is_faster
from sae.kernels.sparse_cpu import SparseEngine
from tests.property.test_sae_kernels import Case, active_entries

from .cases import copy_moments, double, objective, random_rows, random_weights, update, zero_moments

ENGINES: dict[str, Any] = {
    "dense": DenseEngine,
    "sparse": lambda: SparseEngine(threads=2, bfloat16=True),
    "sparse, float32 screen": lambda: SparseEngine(threads=1, bfloat16=False),
}
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"l1_by_decoder_norm": True},
    {"subtract_b_dec": False},
    {"encoder_l1": 0.02, "encoder_l2": 0.03},
    {"l1_by_decoder_norm": True, "subtract_b_dec": False, "encoder_l1": 0.02, "encoder_l2": 0.03},
]


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


def in_float64(goal: Objective) -> Objective:
    fields = {name: getattr(goal, name) for name in goal.__dataclass_fields__}
    return Objective(**(fields | {"mean": goal.mean.double()}))


def reference(weights: Weights, rows: Tensor, goal: Objective) -> tuple[Weights, Forward]:
    return ReferenceEngine().gradients(double(weights), rows.double(), in_float64(goal))


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("shape", [(300, 33, 77), (5, 16, 64), (1, 1, 1)])
def test_gradients_and_measurements_equal_float64_autograd(
    engine: Engine, options: dict[str, Any], shape: tuple[int, int, int]
):
    count, d_in, d_sae = shape
    weights, rows = random_weights(d_in, d_sae), random_rows(count, d_in)
    weights.dec.mul_(1.3)
    goal = objective(d_in, **options)
    grads, forward = engine.gradients(weights, rows, goal)
    expected, exact = reference(weights, rows, goal)
    for name, grad, truth in zip(Weights._fields, grads, expected, strict=True):
        assert float((grad - truth).norm()) <= 1e-5 * float(truth.norm()) + 1e-9, name
    assert torch.equal(forward.fired, exact.fired)
    assert torch.equal(forward.l0.double(), exact.l0.double())
    for name in ("l2", "l1", "deviation"):
        torch.testing.assert_close(getattr(forward, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-5)


def test_bfloat16_products_give_gradients_of_their_precision_and_leave_weights_in_float32():
    weights, rows = random_weights(64, 200), random_rows(300, 64)
    goal = objective(64)
    grads, forward = DenseEngine(bfloat16=True).gradients(weights, rows, goal)
    expected, _ = reference(weights, rows, goal)
    for name, grad, truth in zip(Weights._fields, grads, expected, strict=True):
        error = float((grad - truth).norm() / truth.norm())
        assert 1e-6 < error < 5e-2, name
        assert grad.dtype == torch.float32
    acts = torch.relu((rows - weights.b_dec).bfloat16() @ weights.enc.bfloat16().T + weights.b_enc)
    torch.testing.assert_close(forward.l1, acts.sum(dim=1), rtol=1e-3, atol=1e-3)
    moments = zero_moments(weights)
    DenseEngine(bfloat16=True).step(weights, moments, rows, goal, update())
    assert {tensor.dtype for tensors in (weights, *moments) for tensor in tensors} == {torch.float32}


def torch_step(
    weights: Weights, moments: Moments, rows: Tensor, goal: Objective, change: Update
) -> tuple[Weights, Moments, float]:
    """The recipe with torch.optim.Adam itself, in float64."""
    leaves = [tensor.double().clone().requires_grad_() for tensor in weights]
    adam = torch.optim.Adam(leaves, lr=change.learning_rate, betas=change.betas, eps=change.epsilon)
    for leaf, first, second in zip(leaves, moments.first, moments.second, strict=True):
        adam.state[leaf] = {
            "step": torch.tensor(float(change.step - 1)),
            "exp_avg": first.double().clone(),
            "exp_avg_sq": second.double().clone(),
        }
    grads, _ = reference(weights, rows, goal)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    enc, _, dec, _ = leaves
    basis = torch.zeros(0, enc.shape[1]) if change.encoder_basis is None else change.encoder_basis
    away = torch.eye(enc.shape[1]).double() - (basis.T @ basis).double()
    enc.grad = enc.grad @ away
    unit = unit_rows(dec.detach())
    if change.decoder_norm != "free":
        dec.grad = dec.grad - (dec.grad * unit).sum(1, keepdim=True) * unit
    norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
    if change.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(leaves, change.clip_norm)
    with torch.no_grad():
        if change.decoder_norm == "renormalise-before":
            dec.copy_(unit)
        adam.step()
        enc.copy_(enc @ away)
        if change.decoder_norm == "fixed":
            dec.copy_(unit_rows(dec))
    states = [adam.state[leaf] for leaf in leaves]
    first, second = (Weights(*(state[name] for state in states)) for name in ("exp_avg", "exp_avg_sq"))
    return Weights(*(leaf.detach() for leaf in leaves)), Moments(first, second), norm


@pytest.mark.parametrize("decoder_norm", ["fixed", "as-published", "renormalise-before", "free"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"clip_norm": 1e6}, {"directions": 2}])
@pytest.mark.parametrize("step", [1, 1000])
def test_a_step_equals_torch_adam_between_the_constraints(
    engine: Engine, decoder_norm: str, options: dict[str, Any], step: int
):
    d_in, d_sae = 24, 70
    weights, rows, goal = random_weights(d_in, d_sae), random_rows(300, d_in), objective(d_in)
    weights.b_enc[:3] = -100  # never active: only the past moves these
    weights.dec.mul_(torch.linspace(0.8, 1.2, d_sae)[:, None])
    basis = orthonormal_basis(unit_rows(random_rows(2, d_in, seed=5)), d_in) if "directions" in options else None
    change = update(step, decoder_norm=decoder_norm, encoder_basis=basis, clip_norm=options.get("clip_norm"))
    moments = zero_moments(weights)
    if step > 1:
        for number, (first, second) in enumerate(zip(*moments, strict=True)):
            random = torch.Generator().manual_seed(number)
            first.copy_(torch.randn(first.shape, generator=random) * 1e-3)
            second.copy_(torch.rand(second.shape, generator=random) * 1e-4 + 1e-6)
    expected, expected_moments, norm = torch_step(weights, moments, rows, goal, change)
    before = weights.clone()
    stepped = engine.step(weights, moments, rows, goal, change)
    assert stepped.grad_norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(stepped.dec_norms.double(), expected.dec.norm(dim=1), rtol=1e-4, atol=1e-6)
    for new, truth in zip(moments.first, expected_moments.first, strict=True):
        torch.testing.assert_close(new.double(), truth, rtol=1e-4, atol=2e-7)
    for new, truth in zip(moments.second, expected_moments.second, strict=True):
        torch.testing.assert_close(new.double(), truth, rtol=1e-4, atol=1e-8)
    for name, new, truth, old in zip(Weights._fields, weights, expected, before, strict=True):
        # where a gradient is rounding noise, Adam's first step takes only its sign: exclude what no precision decides
        decided = (truth - old.double()).abs() > 1e-4 * change.learning_rate
        agree = (new.double() - truth).abs() < 2e-3 * change.learning_rate
        assert float((agree | ~decided).double().mean()) > 0.999, name
    if step > 1:
        assert not torch.equal(weights.enc[:3], before.enc[:3])


@pytest.mark.parametrize("decoder_norm", ["fixed", "as-published", "renormalise-before", "free"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"directions": 2}])
def test_tied_weights_step_as_one_matrix(engine: Engine, decoder_norm: str, options: dict[str, Any]):
    d_in, d_sae, step = 24, 70, 500
    weights, rows, goal = random_weights(d_in, d_sae), random_rows(300, d_in), objective(d_in)
    basis = orthonormal_basis(unit_rows(random_rows(2, d_in, seed=5)), d_in) if "directions" in options else None
    change = update(step, decoder_norm=decoder_norm, encoder_basis=basis, clip_norm=options.get("clip_norm"), tied=True)
    moments = zero_moments(weights)
    for tensors, scale in ((moments.first, 1e-3), (moments.second, 1e-4)):
        for number, tensor in enumerate(tensors):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number)) * scale + 1e-6)
    for tensors in (weights, *moments):
        tensors.enc.copy_(tensors.dec)
    leaves = [tensor.double().clone().requires_grad_() for tensor in weights[1:]]
    b_enc, dec, b_dec = leaves
    loss = losses.autoencoder_loss(Weights(dec, b_enc, dec, b_dec), rows.double(), in_float64(goal))
    for leaf, grad in zip(leaves, torch.autograd.grad(loss.total, leaves), strict=True):
        leaf.grad = grad
    away = torch.eye(d_in).double() - (0 if basis is None else (basis.T @ basis).double())
    if decoder_norm != "free":
        unit = unit_rows(dec.detach())
        dec.grad = dec.grad - (dec.grad * unit).sum(1, keepdim=True) * unit
    dec.grad = dec.grad @ away
    norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
    if change.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(leaves, change.clip_norm)
    adam = torch.optim.Adam(leaves, lr=change.learning_rate, betas=change.betas, eps=change.epsilon)
    for leaf, first, second in zip(leaves, moments.first[1:], moments.second[1:], strict=True):
        kept = {"exp_avg": first.double().clone(), "exp_avg_sq": second.double().clone()}
        adam.state[leaf] = {"step": torch.tensor(float(step - 1)), **kept}
    with torch.no_grad():
        if decoder_norm == "renormalise-before":
            dec.copy_(unit_rows(dec))
        adam.step()
        dec.copy_(dec @ away)
        if decoder_norm == "fixed":
            dec.copy_(unit_rows(dec))
    stepped = engine.step(weights, moments, rows, goal, change)
    assert stepped.grad_norm == pytest.approx(norm, rel=1e-4)
    for new, truth in zip(weights[1:], leaves, strict=True):
        torch.testing.assert_close(new.double(), truth.detach(), rtol=1e-4, atol=2e-5)
    for tensors in (weights, *moments):
        assert torch.equal(tensors.enc, tensors.dec)


def test_adam_row_equals_torch_adam_over_many_steps():
    random = np.random.default_rng(0)
    row = random.standard_normal(100).astype(np.float32)
    leaf = torch.from_numpy(row.copy()).double().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    first, second = np.zeros_like(row), np.zeros_like(row)
    for step in range(1, 51):
        grad = (random.standard_normal(100) * 10.0 ** random.uniform(-9, 3, 100)).astype(np.float32)
        grad[:: step % 7 + 1] = 0
        scalars = (0.01 / (1 - 0.9**step), 0.9, 0.99, math.sqrt(1 - 0.99**step), 1e-8)
        compiled.adam_row(row, grad, first, second, tuple(np.float32(value) for value in scalars))
        leaf.grad = torch.from_numpy(grad).double()
        adam.step()
    np.testing.assert_allclose(row, leaf.detach().numpy(), rtol=1e-5, atol=1e-6)


def stepped_by(engine: Engine, weights: Weights, moments: Moments, rows: Tensor) -> tuple[Stepped, Weights, Moments]:
    weights, moments = weights.clone(), copy_moments(moments)
    return engine.step(weights, moments, rows, objective(rows.shape[1]), update()), weights, moments


def test_screens_threads_and_buffers_leave_no_trace_in_the_result():
    weights, rows = random_weights(40, 300), random_rows(600, 40)
    used = SparseEngine(threads=2, bfloat16=True)
    stepped_by(used, random_weights(40, 300, seed=7), zero_moments(weights), random_rows(900, 40, seed=8))
    used.invalidate()
    results = [
        stepped_by(engine, weights, zero_moments(weights), rows)
        for engine in (
            SparseEngine(threads=1, bfloat16=True),
            SparseEngine(threads=3, bfloat16=False),
            SparseEngine(threads=2),
            used,
        )
    ]
    (first, first_weights, first_moments), *others = results
    for stepped, other_weights, other_moments in others:
        assert stepped.loss == first.loss
        assert stepped.grad_norm == first.grad_norm
        for one, other in zip(first.forward, stepped.forward, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(
            (*first_weights, *first_moments.first, *first_moments.second),
            (*other_weights, *other_moments.first, *other_moments.second),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_the_view_of_the_weights_is_current_after_every_kind_of_step():
    weights, rows = random_weights(20, 50), random_rows(100, 20)
    engine, moments = SparseEngine(threads=1), zero_moments(weights)
    for clip_norm in (None, 0.1, None):
        engine.step(weights, moments, rows, objective(20), update(clip_norm=clip_norm, decoder_norm="free"))
        kept, fresh = engine._view, SparseEngine(threads=1)._look_at(weights)
        if kept is not None:
            np.testing.assert_array_equal(kept.encoder.rounded, fresh.encoder.rounded)
            np.testing.assert_array_equal(kept.encoder.norms, fresh.encoder.norms)
            np.testing.assert_array_equal(kept.dec_norms, fresh.dec_norms)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["rows", "enc", "b_enc", "dec", "b_dec"])
def test_a_non_finite_loss_changes_nothing(engine: Engine, value: float, where: str):
    weights, rows = random_weights(12, 30, bias=0.5), random_rows(40, 12)
    broken = rows if where == "rows" else getattr(weights, where)
    broken.view(-1)[5] = value
    before, moments = weights.clone(), zero_moments(weights)
    stepped = engine.step(weights, moments, rows, objective(12), update())
    if where == "b_enc" and value == -math.inf:  # a feature that can never fire is no divergence
        assert math.isfinite(stepped.loss)
        return
    assert not math.isfinite(stepped.loss)
    assert math.isnan(stepped.grad_norm)
    for new, old in zip((*weights, *moments.first), (*before, *zero_moments(weights).first), strict=True):
        assert new.numpy().tobytes() == old.numpy().tobytes()


def test_the_naive_bound_would_lose_a_feature_that_the_screen_keeps():
    n = 512
    half = torch.full((n // 2,), 1 + 2.0**-8), torch.full((n // 2,), 1 + 3 * 2.0**-8)
    x = 1024 * torch.cat(half)
    w = 1024 * torch.cat((half[0], -half[1]))  # every rounding residual of x.w has one sign
    exact = float(x.double() @ w.double())
    b_enc = torch.tensor([-exact * 1.02])  # the pre-activation is above zero, well beyond float32 rounding
    rounded = float(x.bfloat16().double() @ w.bfloat16().double())
    naive = 2.0**-8 * float(x.double().norm() * w.double().norm())
    assert rounded + float(b_enc) < -naive
    assert exact + float(b_enc) > n * 2.0**-22 * float(x.double().norm() * w.double().norm())
    weights = Weights(w[None], b_enc, unit_rows(torch.ones(1, n)), torch.zeros(n))
    for bfloat16 in (True, False):
        _, forward = SparseEngine(threads=1, bfloat16=bfloat16).gradients(weights, x[None], objective(n))
        assert forward.fired.tolist() == [1]


def test_at_full_width_the_active_entries_are_float64s_up_to_the_rounding_of_float32():
    d_in, d_sae, count = 2048, 256, 300
    weights, rows = random_weights(d_in, d_sae), random_rows(count, d_in)
    sae_in = rows - weights.b_dec
    at_zero = (torch.arange(d_sae) % count, torch.arange(d_sae))  # one row's pre-activation of each feature is nothing
    weights = weights._replace(b_enc=-(sae_in[at_zero[0]] * weights.enc).sum(dim=1))
    exact = sae_in.double() @ weights.enc.double().T + weights.b_enc.double()
    sizes = sae_in.double().abs() @ weights.enc.double().abs().T
    rounding = 2.0**-23 * (d_in + 1) * sizes + 2.0**-23 * weights.b_enc.double().abs()
    assert bool((exact[at_zero].abs() < rounding[at_zero]).all())
    assert 0.4 < float((exact > 0).double().mean()) < 0.6
    found = [
        active_entries(SparseEngine(threads=1, bfloat16=bfloat16), Case(weights, rows, objective(d_in)))
        for bfloat16 in (True, False)
    ]
    assert torch.equal(*found)
    assert not bool((found[0] & (exact < -rounding)).any())
    assert not bool((~found[0] & (exact > rounding)).any())


COMPILE_ONE = """
import numpy as np
from sae.kernels import compiled

compiled.screen_rows(0, 1, np.ones((1, 4), np.float32), np.empty((1, 4), np.uint16), np.empty((3, 1), np.float32))
stats = compiled.screen_rows.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_kernel_that_one_process_compiled_is_found_by_the_next(tmp_path: Path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    counts = [
        subprocess.run(
            [sys.executable, "-c", COMPILE_ONE], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert counts == [["0", "1"], ["1", "0"]]


def test_bfloat16_copies_round_to_nearest_even_as_torch_does():
    values = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.ascontiguousarray(values[np.isfinite(values)][:19_000])[None]
    rounded, norms = np.empty(values.shape, np.uint16), np.empty((3, 1), np.float32)
    compiled.screen_rows(0, 1, values, rounded, norms)
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(rounded, expected)


def test_screen_norms_are_rounded_up():
    rows = random_rows(200, 37).numpy() * np.float32(10) ** np.arange(-100, 100, dtype=np.float32)[:, None].clip(
        -25, 18
    )
    rounded, norms = np.empty(rows.shape, np.uint16), np.empty((3, 200), np.float32)
    compiled.screen_rows(0, 200, rows, rounded, norms)
    exact = rows.astype(np.float64)
    copies = torch.from_numpy(rounded).view(torch.bfloat16).double().numpy()
    for found, truth in zip(norms, (exact, copies, copies - exact), strict=True):
        expected = np.linalg.norm(truth, axis=1)
        assert bool((found >= expected).all())
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_where_torch_may_round_float32_products_the_bfloat16_bound_is_used():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert bfloat16_is_faster(8, 8)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_precision_set_by_torchs_newer_names_counts_too():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert bfloat16_is_faster(8, 8)
    finally:
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dropped_bits", [16, 13])
def test_a_product_that_rounds_its_factors_unasked_is_found_out(monkeypatch: pytest.MonkeyPatch, dropped_bits: int):
    def rounded(tensor: Tensor) -> Tensor:
        return (tensor.view(torch.int32) >> dropped_bits << dropped_bits).view(torch.float32)

    def product(rows: Tensor, features: Tensor, *_: object) -> Tensor:
        return rounded(rows) @ rounded(features).T

    monkeypatch.setattr(screen, "_ONEDNN", product)
    monkeypatch.setattr(screen, "_seconds", lambda product, *_: 1.0 if product is screen._float32_product else 2.0)
    assert bfloat16_is_faster(300, 40)
    monkeypatch.setattr(screen, "_ONEDNN", None)
    assert not bfloat16_is_faster(300, 40)


def test_a_torch_without_onednn_screens_by_its_own_product(monkeypatch: pytest.MonkeyPatch):
    weights, rows = random_weights(40, 300), random_rows(600, 40)
    with_onednn = stepped_by(SparseEngine(threads=1, bfloat16=False), weights, zero_moments(weights), rows)
    monkeypatch.setattr(screen, "_ONEDNN", None)
    without = stepped_by(SparseEngine(threads=1, bfloat16=False), weights, zero_moments(weights), rows)
    assert with_onednn[0].loss == without[0].loss
    for one, other in zip(with_onednn[1], without[1], strict=True):
        assert torch.equal(one, other)
