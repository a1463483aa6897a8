"""What every engine of a training step agrees on: feature-major weights, an objective, an update, and measurements.

Weights are kept with one contiguous row a feature on both sides, because every per-feature operation (gradient,
projection, Adam, renormalisation, resampling) then touches contiguous memory; ``W_enc`` is the transpose of ``enc``.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..config import DecoderNorm


class Weights(NamedTuple):
    """Trainable tensors, float32; also the shape of gradients and of Adam's moments.

    Attributes:
        enc: (d_sae, d_in) encoder, transposed: row i is what feature i reads.
        b_enc: (d_sae,) encoder bias.
        dec: (d_sae, d_in) decoder: row i is what feature i writes.
        b_dec: (d_in,) decoder bias.
    """

    enc: Tensor
    b_enc: Tensor
    dec: Tensor
    b_dec: Tensor

    def clone(self) -> "Weights":
        """An independent copy."""
        return Weights(*(tensor.clone() for tensor in self))


class Moments(NamedTuple):
    """Adam's running means of gradients and of their squares."""

    first: Weights
    second: Weights


@dataclass(frozen=True)
class Objective:
    """What a step minimises.

    The mean over rows of (squared error, summed over d_in, + l1_coeff x L1), + encoder_l1 x sum of |W_enc|
    + encoder_l2 x sum of W_enc^2.

    Attributes:
        mean: (d_in,) the dataset mean; only measured against, not minimised.
        l1_coeff: coefficient of the per-token L1 norm, at this step.
        l1_by_decoder_norm: whether each feature's L1 is multiplied by its decoder row's norm.
        subtract_b_dec: whether b_dec is subtracted from the input.
        encoder_l1: coefficient of the sum of absolute encoder weights.
        encoder_l2: coefficient of the sum of squared encoder weights.
    """

    mean: Tensor
    l1_coeff: float
    l1_by_decoder_norm: bool = False
    subtract_b_dec: bool = True
    encoder_l1: float = 0.0
    encoder_l2: float = 0.0


@dataclass(frozen=True)
class Update:
    """How gradients change weights: torch.optim.Adam between the decoder's and the encoder's constraints.

    Attributes:
        step: number of this step, counted from 1 (Adam's bias correction).
        learning_rate: at this step.
        betas: Adam's.
        epsilon: Adam's.
        decoder_norm: see ``TrainerConfig.decoder_norm``.
        encoder_basis: None, or (k, d_in) orthonormal directions that encoder rows are kept orthogonal to.
        clip_norm: None, or the largest global norm of the projected gradient.
        tied: whether encoder rows are the decoder's: both move by the sum of the two gradients.
    """

    step: int
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    decoder_norm: DecoderNorm
    encoder_basis: Tensor | None = None
    clip_norm: float | None = None
    tied: bool = False


class Forward(NamedTuple):
    """What a forward pass measured; B rows.

    Attributes:
        l2: (B,) squared error, summed over d_in.
        l1: (B,) L1 norm of the features (weighted if the objective says so).
        l0: (B,) number of active features.
        deviation: (B,) squared distance of each row from the dataset mean.
        fired: (d_sae,) int64, rows on which each feature was active.
    """

    l2: Tensor
    l1: Tensor
    l0: Tensor
    deviation: Tensor
    fired: Tensor


class Stepped(NamedTuple):
    """What a whole step measured.

    Attributes:
        forward: the forward pass, with the weights before the step.
        loss: the objective; where it is not finite, nothing was changed.
        grad_norm: global norm of the projected gradient, before clipping; NaN where nothing was changed.
        dec_norms: (d_sae,) norms of decoder rows after the step.
    """

    forward: Forward
    loss: float
    grad_norm: float
    dec_norms: Tensor


class Engine(Protocol):
    """One exact training step. Engines agree up to fp32 rounding and differ in cost."""

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective, unprojected, without changing anything."""
        ...

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place."""
        ...

    def invalidate(self) -> None:
        """Tells the engine that something else changed the weights since its last step."""
        ...
