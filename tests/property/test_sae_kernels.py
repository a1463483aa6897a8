"""Each engine of the sparse step against float64, on random and adversarial inputs.

Where a pre-activation is smaller than float32's rounding, no float32 engine can tell its sign: there the engine's own
choice of active entries is taken over, checked against the rounding bound, and gradients are compared given that
choice.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels.dense import DenseEngine
from sae.kernels.interface import Engine, Moments, Objective, Update, Weights
from sae.kernels.reference import ReferenceEngine
from sae.kernels.screen import ROW_BLOCK
from sae.kernels.sparse_cpu import SparseEngine

ENGINES = [SparseEngine(threads=threads, bfloat16=bfloat16) for threads in (1, 2) for bfloat16 in (True, False)]
DENSE = DenseEngine()
KINDS = (
    "random",
    "all dead",
    "all alive",
    "one row active",
    "duplicated rows",
    "near zero",
    "badly scaled",
    "coherent",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products only lose by being shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    weights: Weights
    rows: Tensor
    objective: Objective


COUNTS = st.one_of(st.integers(1, 40), st.sampled_from([ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1]))


@st.composite
def cases(
    draw: st.DrawFn, counts: st.SearchStrategy[int] = COUNTS, most_in: int = 48, most_features: int = 140
) -> Case:
    kind = draw(st.sampled_from(KINDS))
    count = draw(counts)
    d_in, d_sae = draw(st.integers(1, most_in)), draw(st.integers(1, most_features))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    rows, enc, dec = normal(count, d_in), normal(d_sae, d_in) / d_in**0.5, normal(d_sae, d_in) / d_in**0.5
    b_enc, b_dec = normal(d_sae) - draw(st.floats(-1, 2)), 0.1 * normal(d_in)
    if kind == "all dead":
        b_enc = b_enc - 1e3
    if kind == "all alive":
        b_enc = b_enc + 1e3
    if kind == "one row active":
        b_enc, rows = b_enc - 1e3, rows.clone()
        rows[draw(st.integers(0, count - 1))] *= 1e5
    if kind == "duplicated rows":
        rows = rows[torch.randint(0, max(1, count // 4), (count,), generator=random)]
    if kind == "badly scaled":
        enc = enc * 10 ** (10 * torch.rand(d_sae, 1, generator=random) - 7)
        rows = rows * 10 ** (4 * torch.rand(count, 1, generator=random) - 2)
    if kind == "coherent":  # rounding residuals of one sign, as in the counterexample to the naive bound
        ties = 1 + 2.0**-8 * (1 + 2 * torch.randint(0, 2, (d_in,), generator=random))
        sign = torch.where(ties > 1.01, -1.0, 1.0)
        rows, enc = 1024 * ties.expand(count, d_in).contiguous(), (sign * ties).expand(d_sae, d_in).contiguous()
    subtract = draw(st.booleans())
    if kind in ("near zero", "coherent"):  # some row's pre-activation is zero up to rounding
        sae_in = rows - b_dec if subtract else rows
        chosen = torch.randint(0, count, (d_sae,), generator=random)
        b_enc = -(sae_in[chosen] * enc).sum(dim=1)
    objective = Objective(
        mean=0.1 * normal(d_in),
        l1_coeff=draw(st.floats(0, 2)),
        l1_by_decoder_norm=draw(st.booleans()),
        subtract_b_dec=subtract,
        encoder_l1=draw(st.sampled_from([0.0, 0.01])),
        encoder_l2=draw(st.sampled_from([0.0, 0.01])),
    )
    return Case(Weights(enc, b_enc, dec, b_dec), rows, objective)


def double(weights: Weights) -> Weights:
    return Weights(*(tensor.double() for tensor in weights))


def active_entries(engine: SparseEngine, case: Case) -> Tensor:
    """(B, d_sae) bool: which entries the engine takes to be active."""
    entries, _ = engine._forward(case.weights, case.rows, case.objective, fresh_view(engine, case.weights))
    features = np.repeat(np.arange(case.weights.enc.shape[0]), np.diff(entries.column))
    active = torch.zeros(case.rows.shape[0], case.weights.enc.shape[0], dtype=torch.bool)
    active[torch.from_numpy(entries.tokens).long(), torch.from_numpy(features)] = True
    return active


def fresh_view(engine: SparseEngine, weights: Weights) -> Any:
    engine.invalidate()
    return engine._current_view(weights)


class Reference(NamedTuple):
    """Float64 gradients given the active entries; sizes: what their rounding errors are relative to."""

    grads: Weights
    sizes: list[float]
    l2: Tensor
    l1: Tensor


def reference(case: Case, active: Tensor) -> Reference:
    weights, rows, objective = double(case.weights), case.rows.double(), case.objective
    leaves = Weights(*(tensor.requires_grad_() for tensor in weights))
    sae_in = rows - leaves.b_dec if objective.subtract_b_dec else rows
    acts = (sae_in @ leaves.enc.T + leaves.b_enc) * active
    error = acts @ leaves.dec + leaves.b_dec - rows
    l2 = error.square().sum(dim=1)
    l1 = (acts * (leaves.dec.norm(dim=1) if objective.l1_by_decoder_norm else 1)).sum(dim=1)
    penalty = objective.encoder_l1 * leaves.enc.abs().sum() + objective.encoder_l2 * leaves.enc.square().sum()
    total = l2.mean() + objective.l1_coeff * l1.mean() + penalty
    grads = Weights(*torch.autograd.grad(total, tuple(leaves)))
    return Reference(grads, sizes(leaves, rows, sae_in, acts, active, objective), l2.detach(), l1.detach())


def sizes(
    weights: Weights, rows: Tensor, sae_in: Tensor, acts: Tensor, active: Tensor, objective: Objective
) -> list[float]:
    """Norms of the gradients with every term taken absolutely, so that nothing cancels: rounding is of this size."""
    with torch.no_grad():
        enc, dec = weights.enc.abs(), weights.dec.abs()
        pre = (sae_in.abs() @ enc.T + weights.b_enc.abs()) * active
        slope = 2 * (pre @ dec + weights.b_dec.abs() + rows.abs())
        weight = weights.dec.norm(dim=1) if objective.l1_by_decoder_norm else torch.ones(len(dec)).double()
        back = (slope @ dec.T + objective.l1_coeff * weight) * active
        shrink = objective.encoder_l1 + 2 * objective.encoder_l2 * enc
        count = len(rows)
        grads = (
            back.T @ sae_in.abs() / count + shrink,
            back.sum(dim=0) / count,
            pre.T @ slope / count + objective.l1_coeff * pre.mean(dim=0)[:, None],
            slope.mean(dim=0) + (back @ enc).mean(dim=0),
        )
        return [float(grad.norm()) for grad in grads]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), engine=st.sampled_from(ENGINES))
def test_active_entries_are_those_above_zero_up_to_float32_rounding(case: Case, engine: SparseEngine):
    weights = double(case.weights)
    sae_in = (case.rows - case.weights.b_dec if case.objective.subtract_b_dec else case.rows).double()
    exact = sae_in @ weights.enc.T + weights.b_enc
    d_in = sae_in.shape[1]
    rounding = 2.0**-23 * (d_in + 1) * (sae_in.abs() @ weights.enc.abs().T) + 2.0**-23 * weights.b_enc.abs()
    active = active_entries(engine, case)
    assert not bool((active & (exact < -rounding)).any())
    assert not bool((~active & (exact > rounding)).any())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), engine=st.sampled_from(ENGINES))
def test_gradients_equal_float64_autograd(case: Case, engine: SparseEngine):
    assert_gradients_are_autograds(engine, case, active_entries(engine, case))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_dense_gradients_equal_float64_autograd_in_memory_that_is_used_again(case: Case):
    sae_in = case.rows - case.weights.b_dec if case.objective.subtract_b_dec else case.rows
    assert_gradients_are_autograds(DENSE, case, (sae_in @ case.weights.enc.T).add_(case.weights.b_enc) > 0)


def assert_gradients_are_autograds(engine: Engine, case: Case, active: Tensor) -> None:
    truth = reference(case, active)
    grads, forward = engine.gradients(case.weights, case.rows, case.objective)
    for name, grad, expected, size in zip(Weights._fields, grads, truth.grads, truth.sizes, strict=True):
        error = float((grad.double() - expected).norm())
        assert error <= 1e-5 * float(expected.norm()) + 2e-6 * size, name
    scale = float(case.rows.abs().max()) + 1
    assert float((forward.l2.double() - truth.l2).abs().max()) <= 1e-4 * (float(truth.l2.max()) + scale**2)
    assert float((forward.l1.double() - truth.l1).abs().max()) <= 1e-4 * (float(truth.l1.max()) + scale)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=cases(),
    engine=st.sampled_from(ENGINES),
    decoder_norm=st.sampled_from(["fixed", "as-published", "renormalise-before", "free"]),
    step=st.integers(1, 10_000),
)
def test_a_step_equals_the_dense_step_given_the_same_gradients(
    case: Case, engine: SparseEngine, decoder_norm: str, step: int
):
    change = Update(step, 1e-2, (0.9, 0.99), 1e-8, decoder_norm)
    written, _ = engine.gradients(case.weights, case.rows, case.objective)
    random = torch.Generator().manual_seed(step)
    moments = Moments(  # as large as the gradients: projection leaves rounding noise, which Adam would else magnify
        Weights(*(torch.randn(grad.shape, generator=random) * (1 + grad.abs().max()) for grad in written)),
        Weights(*((torch.rand(grad.shape, generator=random) + 1) * (1 + grad.abs().max()) ** 2 for grad in written)),
    )
    fused, fused_moments = case.weights.clone(), Moments(moments.first.clone(), moments.second.clone())
    engine.invalidate()
    stepped = engine.step(fused, fused_moments, case.rows, case.objective, change)
    plain = case.weights.clone()
    unprojected = math.hypot(*(float(grad.double().norm()) for grad in written))
    dense = WithGradients(written).step(plain, moments, case.rows, case.objective, change)
    assert abs(stepped.grad_norm - dense.grad_norm) <= 1e-4 * dense.grad_norm + 1e-5 * unprojected
    for new, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(new, other, rtol=1e-4, atol=1e-5)
    engine.invalidate()


class WithGradients(ReferenceEngine):
    """The dense step from given gradients: what is left is projection, Adam and constraints."""

    def __init__(self, grads: Weights) -> None:
        super().__init__()
        self._grads = grads

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective):
        _, forward = super().gradients(weights, rows, objective)
        return self._grads, forward
