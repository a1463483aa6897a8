"""The CUDA engine at the size that it is for, on a device: 2048 -> 16384, batch 4096, L0 about 60."""

import pytest
import torch
from torch import Tensor

from sae.config import TrainerConfig
from sae.kernels.interface import Moments, Objective, Update, Weights
from sae.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

D_IN, D_SAE, ROWS = 2048, 16384, 4096
UPDATE = Update(1, 1e-4, (0.9, 0.99), 1e-8, "fixed")


@pytest.fixture(scope="module")
def rows() -> Tensor:
    random = torch.Generator("cuda").manual_seed(0)
    spectrum = (1 + torch.arange(D_IN, device="cuda") / 16).rsqrt()
    mixing = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=random, device="cuda")).Q * spectrum[:, None]
    normal = torch.randn(ROWS, D_IN, generator=random, device="cuda")
    return torch.nn.functional.gelu(2 * normal.double() @ mixing.double()).float()


def start(rows: Tensor, engine: str = "auto") -> Trainer:
    config = TrainerConfig(
        d_sae=D_SAE, l1_coeff=0.5, steps=100, init="tied", b_dec_init="mean", b_enc_init="calibrated", target_l0=60.0,
        engine=engine,
    )  # fmt: skip
    return Trainer.start(config, D_IN, rows, rows.mean(dim=0))


def weights_of(trainer: Trainer) -> Weights:
    return trainer._state.weights.clone()


def objective(rows: Tensor) -> Objective:
    return Objective(rows.mean(dim=0), 0.5)


def zeros(weights: Weights) -> Moments:
    return Moments(*(Weights(*(torch.zeros_like(tensor) for tensor in weights)) for _ in range(2)))


def test_gradients_equal_float64_autograd_given_the_active_entries(rows: Tensor):
    from sae.kernels.triton_sparse import TritonEngine

    weights, engine = weights_of(start(rows)), TritonEngine()
    found = engine.forward(weights, rows, objective(rows))
    assert found is not None
    entries, forward = found
    active = torch.zeros(ROWS, D_SAE, dtype=torch.bool, device="cuda")
    active[entries.tokens.long(), torch.arange(D_SAE, device="cuda").repeat_interleave(forward.fired)] = True
    assert 30 < float(forward.l0.double().mean()) < 120
    totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in weights]
    for part in torch.arange(ROWS, device="cuda").chunk(8):  # of float64, so that it fits
        leaves = Weights(*(tensor.double().requires_grad_() for tensor in weights))
        x = rows[part].double()
        pre = (x - leaves.b_dec) @ leaves.enc.T + leaves.b_enc
        assert float(pre.detach().abs()[(pre > 0) != active[part]].sum()) < 1e-2  # float32's rounding of a few
        acts = pre * active[part]
        error = acts @ leaves.dec + leaves.b_dec - x
        loss = (error.square().sum() + 0.5 * acts.sum()) / ROWS
        for total, grad in zip(totals, torch.autograd.grad(loss, tuple(leaves)), strict=True):
            total += grad
    grads, _ = engine.gradients(weights, rows, objective(rows))
    for name, grad, expected in zip(Weights._fields, grads, totals, strict=True):
        assert float((grad.double() - expected).norm()) <= 1e-5 * float(expected.norm()), name


def test_no_active_entry_is_lost_where_rounding_residuals_have_one_sign():
    from sae.kernels import triton_screen
    from sae.kernels.triton_screen import Tiles

    random = torch.Generator("cuda").manual_seed(0)
    high = torch.randint(0, 2, (D_IN,), generator=random, device="cuda")
    ties = 1 + 2.0**-8 * (1 + 2 * high)
    x = 1024 * ties.expand(256, D_IN).contiguous()
    enc = (torch.where(high > 0, -1.0, 1.0) * ties).expand(D_SAE, D_IN).contiguous()
    exact = (x[0].double() @ enc[0].double()).float()
    b_enc = -exact + exact.abs() * torch.linspace(-1e-5, 1e-5, D_SAE, device="cuda")
    tiles = Tiles.of(D_IN)
    inputs = triton_screen.centre(x, None, x[0].contiguous(), tiles)
    found = triton_screen.candidates(inputs, b_enc, triton_screen.look_at(enc, enc, tiles), D_SAE)
    assert bool((found.counts == D_SAE).all())


def test_copies_are_rounded_as_torch_rounds(rows: Tensor):
    from sae.kernels import triton_screen
    from sae.kernels.triton_screen import Tiles

    inputs = triton_screen.centre(rows, None, rows.mean(dim=0), Tiles.of(D_IN))
    assert torch.equal(inputs.copies, rows.to(torch.bfloat16))


@pytest.mark.parametrize("decoder_norm", ["fixed", "as-published", "renormalise-before", "free"])
def test_steps_equal_dense_ones(rows: Tensor, decoder_norm: str):
    from sae.kernels.dense import DenseEngine
    from sae.kernels.triton_sparse import TritonEngine

    start_weights = weights_of(start(rows))
    results: list[tuple[Weights, Moments]] = []
    for engine in (DenseEngine(), TritonEngine()):
        weights, moments = start_weights.clone(), zeros(start_weights)
        for step in (1, 2, 3):
            engine.step(weights, moments, rows, objective(rows), Update(step, 1e-4, (0.9, 0.99), 1e-8, decoder_norm))
        results.append((weights, moments))
    (dense, dense_moments), (sparse, sparse_moments) = results
    before = (*start_weights, *zeros(start_weights).first)
    for old, one, other in zip(
        before, (*sparse, *sparse_moments.first), (*dense, *dense_moments.first), strict=True
    ):  # of 246,000 entries a few change sides between two float32 sums, and Adam magnifies vanishing gradients
        assert float((one - other).double().norm()) <= 2e-2 * float((other - old).double().norm()) + 1e-12


def test_a_step_gives_equal_bits_each_time(rows: Tensor):
    from sae.kernels.triton_sparse import TritonEngine

    results: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        weights = weights_of(start(rows))
        moments = zeros(weights)
        TritonEngine().step(weights, moments, rows, objective(rows), UPDATE)
        results.append((*weights, *moments.first, *moments.second))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_trainer_on_the_device_takes_the_sparse_step_and_learns(rows: Tensor):
    trainer = start(rows)
    metrics = [trainer.step(rows) for _ in range(20)]
    assert {step.engine for step in metrics} == {"sparse"}
    assert metrics[-1].l2 < metrics[0].l2
