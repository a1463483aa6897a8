"""Training, one batch at a time: a state, an engine, and what is measured.

The caller owns the data, the loop, evaluation and checkpoints; ``step`` takes a batch and returns its metrics. A run
is a function of its configuration, its starting sample and its batches: a state saved after any step and restored
continues with the same bits (CPU, same instruction set and torch; the dense engine also asks for the same thread
count).

Which engine takes a step follows the previous step's L0, which is part of the state, against a fixed share of d_sae. A
crossover timed on the spot was rejected: two runs of one configuration would then differ in their last bits.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal, Self

import torch
from torch import Tensor

from . import state as states
from .autoencoder import Autoencoder
from .collective import Alone, Collective
from .config import TrainerConfig
from .constraints import orthonormal_basis
from .errors import InvalidTensor, TrainingDiverged
from .initialisation import initial_weights
from .kernels.dense import DenseEngine
from .kernels.interface import Engine, Forward, Moments, Objective, Update, Weights
from .kernels.shared import SharedEngine
from .metrics import DensityWindow, StepMetrics
from .resampling import Resampler, ResamplingState
from .state import Json, TrainingState

DENSE_ABOVE_SHARE = 0.15
"""Share of d_sae that must be active for a dense step to be the faster one, at d_in up to ``_NARROW``.

From there it falls with the root of d_in, to 0.075 at 2048: gathers of long rows miss the caches that a matrix product
blocks for.
"""
_NARROW = 512

CUDA_DENSE_ABOVE_SHARE = 0.05
"""The same on a CUDA device, whose dense step gathers nothing: reckoned from traffic (docs/training-cuda.md)."""

START_ROWS = 1024
"""Rows of the starting sample whose L0 chooses the first step's engine."""


class Trainer:
    """A training run in progress."""

    def __init__(
        self,
        config: TrainerConfig,
        state: TrainingState,
        *,
        threads: int | None = None,
        collective: Collective | None = None,
    ) -> None:
        """Continues from a state; ``start`` and ``restore`` make one.

        Args:
            config: the run's configuration.
            state: taken over, and changed in place.
            threads: worker threads of the sparse engine; None: torch's number of threads. Does not change results,
                but for the last bits of a clipped gradient's norm.
            collective: ranks that train together; None: this process alone.
        """
        self.config = config
        self._state = state
        self._collective = Alone() if collective is None else collective
        self._resampler = Resampler(config, state.resampling, state.encoder_basis, self._collective)
        self._dense = self._shared(DenseEngine(bfloat16=config.precision == "bfloat16"))
        self._sparse: Engine | None = None
        self._threads = threads or torch.get_num_threads()

    @classmethod
    def start(
        cls,
        config: TrainerConfig,
        d_in: int,
        sample: Tensor,
        mean: Tensor,
        *,
        encoder_directions: Tensor | None = None,
        threads: int | None = None,
        collective: Collective | None = None,
    ) -> Self:
        """Starts a run.

        Args:
            config: the run's configuration.
            d_in: width of the activations.
            sample: (n, d_in) float32 activations, a few thousand: b_dec's median, calibrated biases, the starting L0.
            mean: (d_in,) mean activation of the dataset: b_dec's start and the reference of explained variance.
            encoder_directions: None, or (k, d_in) unit directions that encoder columns are kept orthogonal to.
            threads: worker threads of the sparse engine; None: torch's number of threads. Does not change results.
            collective: ranks that train together, each given the same sample; None: this process alone.

        Raises:
            InvalidTensor: a shape, type or value is not as documented.
        """
        sample, mean = _checked(sample, "sample", d_in), _checked(mean[None], "mean", d_in)[0]
        basis = orthonormal_basis(encoder_directions, d_in)
        basis = None if basis is None else basis.to(sample.device)
        weights = initial_weights(config, sample, mean, basis)
        first, second = (Weights(*(torch.zeros_like(tensor) for tensor in weights)) for _ in range(2))
        counts = torch.zeros(config.d_sae, dtype=torch.int64, device=sample.device)
        acts = states.autoencoder_of(weights, config).encode(sample[:START_ROWS])
        state = TrainingState(
            weights=weights,
            moments=Moments(first, second),
            mean=mean.clone(),
            encoder_basis=basis,
            resampling=ResamplingState(counts.clone()),
            window=DensityWindow(counts, 0, complete=False),
            completed=None,
            step=0,
            rows_seen=0,
            last_l0=float((acts > 0).sum(dim=1).double().mean()),
        )
        return cls(config, state, threads=threads, collective=collective)

    @classmethod
    def restore(
        cls,
        config: TrainerConfig,
        tensors: Mapping[str, Tensor],
        json: Mapping[str, Json],
        *,
        threads: int | None = None,
        collective: Collective | None = None,
    ) -> Self:
        """Continues a run from ``state_tensors()`` and ``state_json()``, to the same bits.

        Raises:
            StateMismatch: the state is incomplete or belongs to another configuration.
        """
        return cls(config, states.state_from(config, tensors, json), threads=threads, collective=collective)

    def state_tensors(self) -> dict[str, Tensor]:
        """Independent copies of every tensor of the state, contiguous, by name."""
        return states.state_tensors(self._state)

    def state_json(self) -> dict[str, Json]:
        """Everything else of the state."""
        return states.state_json(self._state, self.config)

    @property
    def autoencoder(self) -> Autoencoder:
        """An independent copy of the current weights."""
        return states.autoencoder_of(self._state.weights, self.config)

    @property
    def steps_taken(self) -> int:
        """Steps taken so far."""
        return self._state.step

    def density_window(self) -> DensityWindow:
        """Firing counts over the last complete window of training rows, or those so far while there is none."""
        window = self._state.completed or self._state.window
        return DensityWindow(window.counts.clone(), window.rows, window.complete)

    def step(self, batch: Tensor) -> StepMetrics:
        """Takes one step.

        Args:
            batch: (B, d_in) float32 activations, B at least 1; of several ranks each one's part, which may be empty.

        Raises:
            InvalidTensor: the batch's shape or type is wrong.
            TrainingDiverged: the loss is not finite; the state is still that before the step.
        """
        state = self._state
        rows = _checked(batch, "batch", state.mean.shape[0], least=1 if self._collective.world == 1 else 0)
        step = state.step + 1
        objective, update = self._objective(step), self._update(step)
        name = self._engine_name()
        stepped = self._engine(name).step(state.weights, state.moments, rows, objective, update)
        if not math.isfinite(stepped.loss):
            raise TrainingDiverged(step, loss=stepped.loss)
        count = stepped.forward.l2.shape[0]
        state.step, state.rows_seen = step, state.rows_seen + count
        state.last_l0 = float(stepped.forward.l0.double().mean())
        self._count(stepped.forward, count)
        self._resampler.observe(step, rows, stepped.forward, objective)
        resampled = self._resampler.resample_if_due(step, state.weights, state.moments)
        if self._sparse is not None and (name == "dense" or resampled is not None):
            self._sparse.invalidate()
        return StepMetrics(
            step=step,
            rows=count,
            rows_seen=state.rows_seen,
            loss=stepped.loss,
            l2=float(stepped.forward.l2.double().mean()),
            l1=float(stepped.forward.l1.double().mean()),
            l0=state.last_l0,
            fve=_explained(stepped.forward),
            learning_rate=update.learning_rate,
            l1_coeff=objective.l1_coeff,
            grad_norm=stepped.grad_norm,
            decoder_norm_min=float(stepped.dec_norms.min()),
            decoder_norm_max=float(stepped.dec_norms.max()),
            engine=name,
            resampled=resampled,
        )

    def _objective(self, step: int) -> Objective:
        return Objective(
            mean=self._state.mean,
            l1_coeff=self.config.l1_coeff_at(step),
            l1_by_decoder_norm=self.config.l1_weighting == "decoder-norm",
            subtract_b_dec=self.config.subtract_b_dec,
            encoder_l1=self.config.encoder_l1,
            encoder_l2=self.config.encoder_l2,
        )

    def _update(self, step: int) -> Update:
        return Update(
            step=step,
            learning_rate=self.config.learning_rate_at(step),
            betas=self.config.betas,
            epsilon=self.config.epsilon,
            decoder_norm=self.config.decoder_norm,
            encoder_basis=self._state.encoder_basis,
            clip_norm=self.config.gradient_clip_norm,
            tied=self.config.tie_weights,
        )

    def _engine_name(self) -> Literal["dense", "sparse"]:
        device = self._state.mean.device.type
        if self.config.engine == "sparse" and device not in ("cpu", "cuda"):
            raise InvalidTensor("device of the sparse engine", found=device, expected="cpu or cuda")
        if self.config.engine != "auto":
            return self.config.engine
        if device not in ("cpu", "cuda") or (device == "cuda" and find_spec("triton") is None):
            return "dense"
        narrow = min(1.0, math.sqrt(_NARROW / self._state.mean.shape[0]))
        share = DENSE_ABOVE_SHARE * narrow if device == "cpu" else CUDA_DENSE_ABOVE_SHARE
        limit = self.config.dense_above_l0 or share * self.config.d_sae
        return "dense" if self._state.last_l0 > limit else "sparse"

    def _engine(self, name: Literal["dense", "sparse"]) -> Engine:
        if name == "dense":
            return self._dense
        if self._sparse is None:
            self._sparse = self._shared(self._new_sparse())
        return self._sparse

    def _new_sparse(self) -> Engine:
        """The device's own; compilers take a second to import."""
        if self._state.mean.device.type == "cuda":
            from .kernels.triton_sparse import TritonEngine

            return TritonEngine()
        from .kernels.sparse_cpu import SparseEngine

        return SparseEngine(threads=self._threads)

    def _shared(self, engine: Engine) -> Engine:
        return engine if self._collective.world == 1 else SharedEngine(engine, self._collective)

    def _count(self, forward: Forward, rows: int) -> None:
        window = self._state.window
        counts, counted = window.counts + forward.fired, window.rows + rows
        if counted >= self.config.density_window_rows:
            self._state.completed = DensityWindow(counts, counted, complete=True)
            counts, counted = torch.zeros_like(counts), 0
        self._state.window = DensityWindow(counts, counted, complete=False)


def _explained(forward: Forward) -> float:
    deviation = float(forward.deviation.double().sum())
    return 1 - float(forward.l2.double().sum()) / deviation if deviation else math.nan


def _checked(rows: Tensor, name: str, d_in: int, *, least: int = 1) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] != d_in or rows.shape[0] < least:
        raise InvalidTensor(name, found=tuple(rows.shape), expected=f"(n, {d_in}) with n at least {least}")
    if rows.dtype != torch.float32:
        raise InvalidTensor(name, found=rows.dtype, expected=torch.float32)
    return rows.detach().contiguous()
