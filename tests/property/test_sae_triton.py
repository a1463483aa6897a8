"""The CUDA engine against float64 and the CPU's engines: on a device where there is one, else in Triton's interpreter.

The interpreter takes a tenth of a millisecond an operation, so sizes are tiny; ``tests/gpu`` has the real one.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.config import ReinitResampling, TrainerConfig
from sae.kernels.dense import DenseEngine
from sae.kernels.interface import Moments, Objective, Update, Weights
from sae.kernels.sparse_cpu import SparseEngine
from sae.trainer import Trainer
from tests.property.test_sae_kernels import Case, Reference, WithGradients, cases, double, reference

pytest.importorskip("triton", reason="the package triton is not installed")
from sae.kernels import triton_screen, triton_sparse
from sae.kernels.triton_screen import Tiles
from sae.kernels.triton_sparse import TritonEngine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = cases(counts=st.integers(1, 12), most_in=24, most_features=20)
SLOW: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


def moved(weights: Weights, device: str = DEVICE) -> Weights:
    return Weights(*(tensor.to(device, copy=True) for tensor in weights))


def on_device(case: Case) -> Case:
    objective = Objective(**{**vars(case.objective), "mean": case.objective.mean.to(DEVICE)})
    return Case(moved(case.weights), case.rows.to(DEVICE), objective)


def active_entries(engine: TritonEngine, case: Case) -> Tensor:
    """(B, d_sae) bool on the CPU: which entries the engine takes to be active."""
    engine.invalidate()
    found = engine.forward(*on_device(case))
    assert found is not None
    entries, forward = found
    features = torch.arange(case.weights.enc.shape[0]).repeat_interleave(forward.fired.cpu())
    active = torch.zeros(case.rows.shape[0], case.weights.enc.shape[0], dtype=torch.bool)
    active[entries.tokens.cpu().long(), features] = True
    assert torch.equal(forward.l0.cpu(), active.sum(dim=1))
    return active


@settings(max_examples=20, **SLOW)
@given(case=SMALL)
def test_active_entries_are_those_above_zero_up_to_float32_rounding(case: Case):
    weights = double(case.weights)
    sae_in = (case.rows - case.weights.b_dec if case.objective.subtract_b_dec else case.rows).double()
    exact = sae_in @ weights.enc.T + weights.b_enc
    rounding = 2.0**-23 * (sae_in.shape[1] + 1) * (sae_in.abs() @ weights.enc.abs().T) + 2.0**-23 * weights.b_enc.abs()
    active = active_entries(TritonEngine(), case)
    assert not bool((active & (exact < -rounding)).any())
    assert not bool((~active & (exact > rounding)).any())


@settings(max_examples=20, **SLOW)
@given(case=SMALL)
def test_gradients_equal_float64_autograd(case: Case):
    engine = TritonEngine()
    truth = reference(case, active_entries(engine, case))
    grads, forward = engine.gradients(*on_device(case))
    for name, grad, expected, size in zip(Weights._fields, grads, truth.grads, truth.sizes, strict=True):
        error = float((grad.cpu().double() - expected).norm())
        assert error <= 1e-5 * float(expected.norm()) + 2e-6 * size, name
    scale = float(case.rows.abs().max()) + 1
    assert float((forward.l2.cpu() - truth.l2).abs().max()) <= 1e-4 * (float(truth.l2.max()) + scale**2)
    assert float((forward.l1.cpu() - truth.l1).abs().max()) <= 1e-4 * (float(truth.l1.max()) + scale)


@settings(max_examples=10, **SLOW)
@given(case=SMALL, decoder_norm=st.sampled_from(["fixed", "as-published", "renormalise-before", "free"]))
def test_a_step_equals_the_dense_step_given_the_same_gradients(case: Case, decoder_norm: str):
    change = Update(7, 1e-2, (0.9, 0.99), 1e-8, decoder_norm)
    engine, there = TritonEngine(), on_device(case)
    written = moved(engine.gradients(*there)[0], "cpu")
    moments = moments_like(written)
    fused_moments = Moments(*(moved(moment) for moment in moments))
    stepped = engine.step(there.weights, fused_moments, there.rows, there.objective, change)
    plain, unprojected = case.weights.clone(), float(torch.cat([grad.flatten() for grad in written]).double().norm())
    dense = WithGradients(written).step(plain, moments, case.rows, case.objective, change)
    assert abs(stepped.grad_norm - dense.grad_norm) <= 1e-4 * dense.grad_norm + 1e-5 * unprojected
    for new, other in zip(there.weights, plain, strict=True):
        torch.testing.assert_close(new.cpu(), other, rtol=1e-4, atol=1e-5)


def moments_like(grads: Weights) -> Moments:
    """As large as the gradients: projection leaves rounding noise, which Adam would else magnify."""
    random = torch.Generator().manual_seed(0)
    size = Weights(*(1 + grad.abs().max() for grad in grads))
    first = Weights(*(torch.randn(grad.shape, generator=random) for grad in grads))
    second = Weights(*(torch.rand(grad.shape, generator=random) + 1 for grad in grads))
    return Moments(
        Weights(*(moment * by for moment, by in zip(first, size, strict=True))),
        Weights(*(moment * by**2 for moment, by in zip(second, size, strict=True))),
    )


def plain_case(*, count: int = 10, d_in: int = 20, d_sae: int = 18, alive: float = 1.0) -> Case:
    random = torch.Generator().manual_seed(0)
    enc, dec = (torch.randn(d_sae, d_in, generator=random) / d_in**0.5 for _ in range(2))
    b_enc, b_dec = torch.full((d_sae,), alive - 1), 0.1 * torch.randn(d_in, generator=random)
    rows = torch.randn(count, d_in, generator=random)
    return Case(Weights(enc, b_enc, dec, b_dec), rows, Objective(rows.mean(dim=0), 0.3, True, True, 1e-3, 1e-3))


@pytest.mark.parametrize(
    ("decoder_norm", "variant"),
    [
        ("fixed", {}),
        ("as-published", {"basis": True}),
        ("renormalise-before", {"basis": True}),
        ("free", {}),
        ("fixed", {"tied": True, "basis": True}),
        ("as-published", {"tied": True}),
        ("fixed", {"clip_norm": 0.5}),
    ],
)
def test_steps_equal_those_of_the_cpu_engine(decoder_norm: str, variant: dict[str, Any]):
    case, options = plain_case(), dict(variant)
    basis = torch.linalg.qr(torch.randn(20, 2, generator=torch.Generator().manual_seed(1))).Q.T.contiguous()
    basis = basis if options.pop("basis", False) else None
    if options.get("tied"):
        case = case._replace(weights=case.weights._replace(enc=case.weights.dec.clone()))
    there = on_device(case)
    moments = moments_like(case.weights)
    if options.get("tied"):
        moments = Moments(*(moment._replace(enc=moment.dec.clone()) for moment in moments))
    other, others = case.weights.clone(), Moments(*(moment.clone() for moment in moments))
    moments = Moments(*(moved(moment) for moment in moments))
    engine, cpu = TritonEngine(), SparseEngine(threads=1)
    for step in (1, 2):  # the second on what the first left of the weights
        settings = (step, 1e-2, (0.9, 0.99), 1e-8, decoder_norm)
        here = Update(*settings, encoder_basis=basis, **options)
        far = Update(*settings, encoder_basis=None if basis is None else basis.to(DEVICE), **options)
        ours = engine.step(there.weights, moments, there.rows, there.objective, far)
        theirs = cpu.step(other, others, case.rows, case.objective, here)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        for name, mine, reference_value in zip(ours.forward._fields, ours.forward, theirs.forward, strict=True):
            torch.testing.assert_close(mine.cpu(), reference_value, rtol=1e-4, atol=1e-5, check_dtype=False, msg=name)
        torch.testing.assert_close(ours.dec_norms.cpu(), theirs.dec_norms, rtol=1e-5, atol=1e-6)
    for mine, reference_value in zip(
        (*there.weights, *moments[0], *moments[1]), (*other, *others[0], *others[1]), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), reference_value, rtol=1e-4, atol=1e-5)


def test_a_step_leaves_the_view_that_a_fresh_look_gives():
    engine, case = TritonEngine(), plain_case()
    there, moments = on_device(case), Moments(*(moved(moment) for moment in moments_like(case.weights)))
    engine.step(there.weights, moments, there.rows, there.objective, Update(1, 1e-2, (0.9, 0.99), 1e-8, "fixed"))
    fresh = triton_screen.look_at(there.weights.enc, there.weights.dec, Tiles.of(20))
    assert engine._view is not None
    for kept, seen in zip(engine._view, fresh, strict=True):
        assert torch.equal(kept, seen)
    enc, copies = there.weights.enc.double(), fresh.copies.double()
    assert bool(((copies - enc).abs() <= 2.0**-7 * enc.abs()).all())  # the interpreter truncates
    for norms, of in zip(fresh.norms, (enc, copies, copies - enc), strict=True):
        assert bool((norms >= of.norm(dim=1)).all())
        torch.testing.assert_close(norms.double(), of.norm(dim=1), rtol=1e-6, atol=0)


def test_a_step_gives_equal_bits_each_time():
    change, results = Update(1, 1e-2, (0.9, 0.99), 1e-8, "fixed"), []
    for _ in range(2):
        there = on_device(plain_case())
        moments = Moments(*(Weights(*(torch.zeros_like(tensor) for tensor in there.weights)) for _ in range(2)))
        TritonEngine().step(there.weights, moments, there.rows, there.objective, change)
        results.append((*there.weights, *moments.first, *moments.second))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_training_with_resampling_equals_the_cpu_engine_s():
    case = plain_case(count=16)
    resampling = ReinitResampling(interval_steps=2, window_rows=16, threshold=0.7)
    config = TrainerConfig(
        d_sae=18, l1_coeff=0.3, steps=5, batch_rows=16, learning_rate=1e-2, engine="sparse", resampling=resampling
    )
    trainers = [Trainer.start(config, 20, rows, rows.mean(dim=0)) for rows in (case.rows, case.rows.to(DEVICE))]
    trainers[1]._sparse = TritonEngine()
    resampled: list[Any] = []
    for _ in range(4):
        here, there = (trainer.step(case.rows.to(trainer._state.mean.device)) for trainer in trainers)
        assert here.resampled == there.resampled
        resampled.append(there.resampled)
        assert there.loss == pytest.approx(here.loss, rel=1e-4)
    assert resampled[1].features
    for name, tensor in trainers[0].state_tensors().items():
        torch.testing.assert_close(trainers[1].state_tensors()[name].cpu(), tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_batch_with_a_row_of_too_many_candidates_takes_the_dense_step():
    case, change = plain_case(), Update(1, 1e-2, (0.9, 0.99), 1e-8, "fixed")
    engine, there = TritonEngine(capacity=3), on_device(case)
    assert engine.forward(*there) is None
    grads, _ = engine.gradients(*there)
    for grad, expected in zip(grads, DenseEngine().gradients(*there)[0], strict=True):
        assert torch.equal(grad, expected)
    moments, others = (moments_like(case.weights) for _ in range(2))
    expected = on_device(case)
    for weights, moment, taken in ((there.weights, moments, engine), (expected.weights, others, DenseEngine())):
        there_moments = Moments(*(moved(part) for part in moment))
        taken.step(weights, there_moments, there.rows, there.objective, change)
    assert all(torch.equal(one, other) for one, other in zip(there.weights, expected.weights, strict=True))


def test_rows_wider_than_a_program_holds_take_the_dense_step(monkeypatch: pytest.MonkeyPatch):
    there = on_device(plain_case())
    assert TritonEngine().forward(*there) is not None
    monkeypatch.setattr(triton_sparse, "WIDEST", 19)  # of 20
    engine = TritonEngine()
    assert engine.forward(*there) is None
    for grad, expected in zip(engine.gradients(*there)[0], DenseEngine().gradients(*there)[0], strict=True):
        assert torch.equal(grad, expected)


def test_a_row_of_more_active_entries_than_a_block_is_listed_whole():
    case = plain_case(count=2, d_in=40, d_sae=160, alive=9.0)  # blocks are of 128
    engine = TritonEngine(capacity=160)
    active = active_entries(engine, case)
    assert active.sum(dim=1).tolist() == [160, 160]
    truth, there = reference(case, active), on_device(case)
    found = engine.forward(*there)
    assert found is not None
    (column, tokens, acts, *_), _ = found
    assert column.tolist() == list(range(0, 321, 2))
    assert tokens.tolist() == [0, 1] * 160
    sae_in = case.rows - case.weights.b_dec
    torch.testing.assert_close(acts.cpu().view(160, 2), case.weights.enc @ sae_in.T + case.weights.b_enc[:, None])
    assert_close_to(truth, triton_sparse._write_gradients(there.weights, found[0], there.objective, engine._view))


@pytest.mark.parametrize(("width", "depth"), [(64, 1), (64, 2), (128, 4)])  # as of rows that leave less room
def test_any_tiling_gives_the_gradients(width: int, depth: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tiles, "of", classmethod(lambda cls, d_in: cls(width, depth, 4)))  # noqa: ARG005
    case, engine = plain_case(count=6, d_in=40, d_sae=10), TritonEngine()
    active = active_entries(engine, case)
    assert int(active.sum(dim=0).max()) > 4  # several turns of a feature's gathers
    truth, there = reference(case, active), on_device(case)
    assert_close_to(truth, engine.gradients(*there)[0])


def assert_close_to(truth: Reference, grads: Weights) -> None:
    for name, grad, expected in zip(Weights._fields, grads, truth.grads, strict=True):
        assert float((grad.cpu().double() - expected).norm()) <= 1e-5 * float(expected.norm()), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("capacity", [None, 3])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float, capacity: int | None):
    case = plain_case()
    case.rows[3, 5] = bad
    there, before = on_device(case), moved(case.weights)
    moments = Moments(*(Weights(*(torch.zeros_like(tensor) for tensor in before)) for _ in range(2)))
    stepped = TritonEngine(capacity=capacity).step(
        there.weights, moments, there.rows, there.objective, Update(1, 1e-2, (0.9, 0.99), 1e-8, "fixed")
    )
    assert not torch.isfinite(torch.tensor(stepped.loss))
    assert all(torch.equal(one, other) for one, other in zip(there.weights, before, strict=True))
    assert not any(bool(tensor.any()) for moment in moments for tensor in moment)


def test_a_long_list_of_features_is_screened_in_parts(monkeypatch: pytest.MonkeyPatch):
    d_sae, count = 40, 18  # three blocks of features, two parts of rows
    monkeypatch.setattr(triton_screen, "PRODUCT_BYTES", 2 * d_sae * 16)
    monkeypatch.setattr(triton_screen, "FEATURE_BLOCK", 16)
    (enc, _, _, b_dec), rows, _ = plain_case(count=count, d_in=16, d_sae=d_sae)
    pre = (rows - b_dec).double() @ enc.double().T
    b_enc = (1e-4 - pre[torch.arange(d_sae) % count, torch.arange(d_sae)]).float()  # one row is just above zero
    exact, tiles = pre + b_enc, Tiles.of(16)
    inputs = triton_screen.centre(rows.to(DEVICE), b_dec.to(DEVICE), b_dec.to(DEVICE), tiles)
    view = triton_screen.look_at(enc.to(DEVICE), enc.to(DEVICE), tiles)
    whole = triton_screen.candidates(inputs, b_enc.to(DEVICE), view, d_sae)
    for row, found, listed in zip(exact, whole.found.cpu(), whole.counts.tolist(), strict=True):
        features = found[:listed]
        assert bool((features.diff() > 0).all())
        assert set(row.gt(0).nonzero().flatten().tolist()) <= set(features.tolist())
        assert row[features].min() > -0.3  # and little else
    short = triton_screen.candidates(inputs, b_enc.to(DEVICE), view, 3)
    assert torch.equal(short.counts, whole.counts)
    for listed, few, all_of_them in zip(whole.counts.tolist(), short.found, whole.found, strict=True):
        assert torch.equal(few[:listed], all_of_them[: min(3, listed)])


def test_the_screen_keeps_what_a_naive_bound_loses():
    lost = 0
    for low, high in ((1 + 2.0**-8, 1 + 3 * 2.0**-8), (1.0, 1 + 2.0**-7 - 2.0**-20)):  # rounded; truncated
        half = torch.tensor([low, high]).repeat_interleave(64)
        sign = torch.tensor([1.0, -1.0] if low > 1 else [-1.0, 1.0]).repeat_interleave(64)
        x, w = 1024 * half[None], (half * sign)[None]
        size = float(x.norm() * w.norm())
        b_enc = -(x.double() @ w.double().T)[0].float() + 2.0**-20 * size
        inputs = triton_screen.centre(x.to(DEVICE), None, x[0].to(DEVICE), Tiles.of(128))
        view = triton_screen.look_at(w.to(DEVICE), w.to(DEVICE), Tiles.of(128))
        assert triton_screen.candidates(inputs, b_enc.to(DEVICE), view, 1).counts.tolist() == [1]
        approx = (inputs.copies.double() @ view.copies.double().T).cpu()[0]
        lost += bool(approx + b_enc < -(2.0**-8) * size)
    assert lost == 1  # 2^-8 |x| |w| would rule the feature out


COMPILE_ALL = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from sae.kernels.interface import Moments, Objective, Update, Weights

class NoDevice:
    architecture = 0
    get_current_device = get_current_stream = lambda self, *_: self.architecture
    get_current_target = lambda self: GPUTarget("cuda", self.architecture, 32)

run, compiled, variants, device = jit.JITFunction.run, set(), set(), NoDevice()

def only_compile(kernel, *arguments, grid, warmup, **settings):
    made = run(kernel, *arguments, grid=grid, warmup=True, **settings)
    assert made.asm["cubin"]
    compiled.add((device.architecture, kernel.__name__))
    if "CONSTRAINT" in settings:
        variants.add(tuple(int(settings[name]) for name in ("CONSTRAINT", "TIED", "BY_NORM", "PENALISED")))

driver.set_active(device)
jit.JITFunction.run = only_compile
torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros

from sae.kernels.triton_sparse import TritonEngine

def step(d_in, decoder_norm="fixed", of_objective={}, **of_update):
    w = Weights(torch.zeros(32, d_in), torch.zeros(32), torch.zeros(32, d_in), torch.zeros(d_in))
    update = Update(1, 1e-3, (0.9, 0.99), 1e-8, decoder_norm, **of_update)
    objective = Objective(torch.zeros(d_in), 0.1, **of_objective)
    TritonEngine().step(w, Moments(w, w), torch.zeros(16, d_in), objective, update)

for device.architecture in (80, 90):
    step(2048)
    step(2048, tied=True, encoder_basis=torch.zeros(2, 2048))
    step(2048, clip_norm=1.0)
step(64, "as-published", dict(l1_by_decoder_norm=True))
step(64, "renormalise-before", dict(encoder_l1=0.1, encoder_l2=0.1))
step(64, "free", dict(l1_by_decoder_norm=True, subtract_b_dec=False, encoder_l1=0.1))
step(64, "fixed", dict(l1_by_decoder_norm=True, encoder_l2=0.1), clip_norm=1.0)
for architecture, name in sorted(compiled):
    print(architecture, name)
print(sorted(variants))
"""


def test_every_kernel_compiles_for_devices_that_need_not_be_there(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ALL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = ["_centre_rows", "_list_candidates", "_look_at_rows"]
    kernels += ["activate", "compact", "step_features", "write_gradients"]
    *lines, variants = done.stdout.splitlines()
    assert lines == [f"{architecture} {name}" for architecture in (80, 90) for name in kernels]
    # Decoder norm, tied, L1 by norm, penalised: all four norms, and each of the others with and without.
    assert variants == "[(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 1, 0), (2, 0, 0, 1), (3, 0, 1, 1)]"
