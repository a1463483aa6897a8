"""What a training run is a function of: one frozen model, every option of the recipe a field.

Defaults are the post's training with its decoder bug fixed; what has no published value is required. Facts are those of
the post's public code unless a source is named. Where the post and its code disagree, both can be expressed.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Engine = Literal["auto", "dense", "sparse"]
DecoderNorm = Literal["fixed", "as-published", "renormalise-before", "free"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NoResampling(_Frozen):
    """Features live or die by gradient descent alone."""

    scheme: Literal["none"] = "none"


class _Scheduled(_Frozen):
    interval_steps: PositiveInt | None = None
    """Resample after every multiple of this many steps; the post: 30,000 steps (122.88M tokens)."""

    steps: tuple[PositiveInt, ...] = ()
    """Resample after exactly these steps instead; Anthropic: 25k, 50k, 75k, 100k."""

    last_step: PositiveInt | None = None
    """No resampling after this step. The last step of a run never resamples: nothing would train what is new."""

    window_rows: PositiveInt
    """Training rows counted, immediately before the resampling, to tell which features are dead.

    The post counts 50 x 512 x 128 = 3,276,800 tokens, in a pass with frozen weights; Anthropic the last 12,500 steps.
    """

    exempt_fraction: Fraction = 0.0
    """A random subset of features that is never resampled (an experiment proposed in the post's comments)."""

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if (self.interval_steps is None) == (not self.steps):
            raise ValueError("give either interval_steps or steps")
        return self

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the resampling happens after this step (counted from 1)."""
        if step <= 0 or step >= total_steps or (self.last_step is not None and step > self.last_step):
            return False
        return step in self.steps if self.interval_steps is None else step % self.interval_steps == 0

    def shortest_gap(self) -> int:
        """Fewest steps between two resamplings; of a single one, the steps before it."""
        if self.interval_steps is not None:
            return self.interval_steps
        ordered = sorted(self.steps)
        return min((later - earlier for earlier, later in pairwise(ordered)), default=ordered[0])


class ReinitResampling(_Scheduled):
    """The post's scheme: rare features get fresh kaiming weights and a zero bias; Adam's moments and b_dec stay."""

    scheme: Literal["reinit"] = "reinit"

    threshold: Fraction = 1e-5
    """Features that fired on less than this fraction of the window are resampled; the post 1e-5, its code 10^-5.5."""

    normalise_rows: bool = False
    """Give new decoder rows unit norm. The post's code does not (their norm is about 1.41)."""

    reset_moments: bool = False
    """Zero Adam's moments of what is resampled. The post's code keeps them."""


class AnthropicResampling(_Scheduled):
    """Dead features restart at badly reconstructed inputs (Towards Monosemanticity, appendix, neuron resampling)."""

    scheme: Literal["anthropic"] = "anthropic"

    sample_rows: PositiveInt = 819_200
    """Training rows, the last before the resampling, from which inputs are drawn in proportion to squared loss."""

    encoder_scale: NonNegative = 0.2
    """Norm of a new encoder column over the mean norm of the live ones."""

    centre_inputs: bool = False
    """Subtract b_dec from an input before it becomes a direction; the source does not."""


Resampling = Annotated[NoResampling | ReinitResampling | AnthropicResampling, Field(discriminator="scheme")]


class TrainerConfig(_Frozen):
    """An autoencoder's training, without its data."""

    d_sae: PositiveInt
    """Number of features; the post 16,384."""

    l1_coeff: NonNegative
    """Coefficient of the per-token L1 norm of the features, mean over the batch.

    The post's code sums the L1 over the batch while its squared error is a mean: its 3e-4 at batch 4096 is
    3e-4 x 4096 = 1.23 here. (The post's text says 3e-3, which is its first prototype's value.)
    """

    steps: PositiveInt
    """Training steps, on which the schedules depend; the post 2e9 / 4096 = 488,281."""

    batch_rows: PositiveInt = 4096
    """Rows of a full batch: turns windows of rows into steps. A batch may be shorter."""

    learning_rate: PositiveFloat = 1e-4
    """Adam's learning rate before warm-up and decay; the post 1e-4."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Adam's betas; the post (0.9, 0.99)."""

    epsilon: PositiveFloat = 1e-8
    """Adam's epsilon; torch's default, as in the post."""

    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0; the post has none."""

    lr_decay_fraction: Fraction = 0.0
    """The learning rate falls linearly towards 0 over this last fraction of the steps; the post has no decay."""

    l1_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which l1_coeff rises linearly from 0; the post has none."""

    gradient_clip_norm: PositiveFloat | None = None
    """Largest global norm of the (projected) gradient; None, as in the post, leaves it alone."""

    decoder_norm: DecoderNorm = "fixed"
    """How decoder rows keep their norm.

    ``fixed``: the gradient's component along each row is removed, and rows are renormalised after the step.
    ``as-published``: removal alone, the bug that the post reports; norms drift upwards. ``renormalise-before``:
    removal, and rows renormalised before the step (the code's later version). ``free``: neither.
    """

    l1_weighting: Literal["plain", "decoder-norm"] = "plain"
    """Weight each feature's L1 by its decoder row's norm, so that ``free`` cannot cheat the penalty."""

    subtract_b_dec: bool = True
    """Subtract b_dec from the input before encoding, as the post does."""

    init: Literal["kaiming", "tied"] = "kaiming"
    """``kaiming``: W_enc and W_dec independent kaiming-uniform, W_dec rows then of unit norm (the post).

    ``tied``: the same W_dec, and W_enc starts as its transpose; they train independently.
    """

    tie_weights: bool = False
    """Keep W_enc = W_dec.T throughout: one matrix, moved by the sum of both gradients. Asks for init ``tied``."""

    b_dec_init: Literal["zero", "mean", "geometric-median"] = "zero"
    """Start of b_dec: the post zero; Anthropic the geometric median; the mean is that of the dataset."""

    b_enc_init: Literal["zero", "calibrated"] = "zero"
    """``calibrated``: each feature's bias is set so that it fires on target_l0 / d_sae of the starting sample.

    Zero biases start at an L0 of d_sae / 2, where nothing is sparse and every step is a dense one.
    """

    target_l0: PositiveFloat | None = None
    """L0 that calibrated biases start from."""

    encoder_l1: NonNegative = 0.0
    """Coefficient of the sum of absolute encoder weights, added to the loss."""

    encoder_l2: NonNegative = 0.0
    """Coefficient of the sum of squared encoder weights, added to the loss."""

    resampling: Resampling = NoResampling()
    """What happens to features that do not fire."""

    density_window_rows: PositiveInt = 1_638_400
    """Training rows over which firing counts are gathered for densities; every row is counted."""

    engine: Engine = "auto"
    """``dense`` multiplies matrices; ``sparse`` visits active entries only; ``auto`` follows the previous step's L0."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products: ``bfloat16`` rounds their factors and results, and asks for engine ``dense``.

    Sparse steps, weights and Adam are float32 always; ``auto`` chooses by L0 alone, so that none of its steps rounds.
    """

    dense_above_l0: PositiveFloat | None = None
    """``auto`` takes a dense step where the previous step's L0 was above this; None: a fixed share of d_sae."""

    seed: int = 0
    """Seed of initial weights and resampling."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.b_enc_init == "calibrated") != (self.target_l0 is not None):
            raise ValueError("target_l0 belongs to b_enc_init='calibrated', and is required by it")
        if self.tie_weights and self.init != "tied":
            raise ValueError("tie_weights asks for init='tied'")
        if self.precision == "bfloat16" and self.engine != "dense":
            raise ValueError(
                f"precision='bfloat16' asks for engine='dense', not {self.engine!r}: sparse steps are float32"
            )
        if self.target_l0 is not None and self.target_l0 >= self.d_sae:
            raise ValueError(f"target_l0 {self.target_l0} must be below d_sae {self.d_sae}")
        if max(self.betas) >= 1:
            raise ValueError(f"betas {self.betas} must be below 1")
        if not isinstance(self.resampling, NoResampling):
            for name in ("window_rows", "sample_rows"):
                steps = self.steps_for_rows(getattr(self.resampling, name, 0))
                if steps > self.resampling.shortest_gap():
                    gap = self.resampling.shortest_gap()
                    raise ValueError(f"{name} is {steps} steps, more than the {gap} between two resamplings")
        return self

    def steps_for_rows(self, rows: int) -> int:
        """Full batches that hold at least this many rows."""
        return math.ceil(rows / self.batch_rows)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of one step, counted from 1."""
        rate = self.learning_rate * _ramp(step, self.lr_warmup_steps)
        decay_steps = self.lr_decay_fraction * self.steps
        return rate if decay_steps == 0 else rate * min(1.0, max(0.0, (self.steps - step + 1) / decay_steps))

    def l1_coeff_at(self, step: int) -> float:
        """L1 coefficient of one step, counted from 1."""
        return self.l1_coeff * _ramp(step, self.l1_warmup_steps)


def _ramp(step: int, warmup_steps: int) -> float:
    return 1.0 if warmup_steps == 0 else min(1.0, step / warmup_steps)
