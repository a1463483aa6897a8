"""What an autoencoder's reconstruction costs the language model, on held-out prompts.

For a micro-batch of prompts the activations at the hook are computed once, every replacement is made from them, and the
model then runs once a condition with the activations of harvested positions swapped; cross-entropy is averaged over the
predictions made from these positions, prompt by prompt, so that a bootstrap over prompts costs nothing more. The clean
model gets the activations back as they were: computed by two ways they could differ in the last bits, and an
autoencoder that changes nothing would not recover exactly everything. A density floor's reconstructions share one
encode, and one decode in total: features are decoded in groups between floors and added up. Loss recovered is (zero -
reconstruction) / (zero - clean): 1 is no loss at all, 0 is no better than zeros.

Cost: one forward pass with unembedding a condition and prompt; at a vocabulary of 4,096 and 400 prompts of 128 tokens
one to two seconds a condition on two cores. Micro-batches keep the logits small (8 x 128 x 4,096 floats are 17 MB).
Rejected: all conditions as one long batch (memory), and editing inside the model's hook function (an encode each).

Loss recovered alone flatters: a final layer norm hides uniform shrinkage, and where mean ablation is worse than zero
ablation the denominator is generous. So explained variance, norm ratio and the cross-entropies stand beside it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from sae.autoencoder import Autoencoder
from storage.errors import InputError

Losses = npt.NDArray[np.float64]
Replace = Callable[[Tensor], Mapping[str, Tensor]]

MICRO_BATCH_PROMPTS = 8


class HookedModel(Protocol):
    """What is needed of a language model: activations at a hook, and logits with activations replaced."""

    def activations(self, tokens: Tensor, hook_name: str) -> Tensor:
        """Activations (n, T, d) of tokens int64 (n, T)."""
        ...

    def logits(self, tokens: Tensor, edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Logits (n, T, d_vocab), with the activations (n, T, d) at the hooks named replaced."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Where an evaluation takes place.

    Attributes:
        model: the language model.
        tokens: held-out prompts, int64 (n, T).
        hook_name: the autoencoder's site.
        first_position: first harvested position: 1 where BOS was left out, 0 where it was kept.
        mean: mean activation of the whole dataset, (d_in,), for mean ablation; left out where None.
        micro_batch_prompts: prompts a forward pass.
    """

    model: HookedModel
    tokens: Tensor
    hook_name: str
    first_position: int = 1
    mean: Tensor | None = None
    micro_batch_prompts: int = MICRO_BATCH_PROMPTS


class Fit(NamedTuple):
    """How well reconstructions match activations.

    Attributes:
        fve: explained variance: 1 - squared error over the squared distance from the rows' own mean.
        norm_ratio: mean over rows of |reconstruction| / |activation|; below 1 is shrinkage.
        l0: features firing on a row, mean.
    """

    fve: float
    norm_ratio: float
    l0: float


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """An autoencoder's quality on held-out prompts.

    Attributes:
        cross_entropy: nats per token and condition (``clean``, ``zero``, ``mean``, ``reconstruction``).
        recovered: loss recovered against zero ablation; None where zero ablation costs nothing.
        recovered_from_mean: the same against mean ablation.
        fit: how well reconstructions match.
    """

    cross_entropy: Mapping[str, float]
    recovered: float | None
    recovered_from_mean: float | None
    fit: Fit


def baseline_losses(held_out: HeldOut) -> dict[str, Losses]:
    """Cross-entropy of every prompt without the autoencoder: ``clean``, ``zero`` and, with a mean, ``mean``.

    These do not depend on the autoencoder: a training run computes them once.

    Returns:
        Nats per token, float64 (n,), a condition.
    """
    return cross_entropies(held_out, partial(_baselines, held_out))


def reconstruction_losses(
    sae: Autoencoder,
    held_out: HeldOut,
    *,
    density: Losses | None = None,
    floors: Sequence[float] = (),
) -> tuple[dict[str, Losses], Fit]:
    """Cross-entropy of every prompt with activations replaced by their reconstruction.

    Args:
        sae: the autoencoder.
        held_out: where to evaluate.
        density: density of each feature, (d_sae,); needed for floors.
        floors: for each, a condition of that name (``floor_name``) that keeps features of density >= floor only.

    Returns:
        Nats per token, float64 (n,), for ``reconstruction`` and each floor; and the fit of the full reconstruction.

    Raises:
        InputError: there are no prompts.
    """
    return collect(micro_batches(sae, held_out, density=density, floors=floors))


def micro_batches(
    sae: Autoencoder,
    held_out: HeldOut,
    *,
    density: Losses | None = None,
    floors: Sequence[float] = (),
    baselines: bool = False,
) -> "Iterator[MicroBatch]":
    """What :func:`reconstruction_losses` is collected from, a micro-batch at a time.

    Args:
        sae: the autoencoder.
        held_out: where to evaluate.
        density: see :func:`reconstruction_losses`.
        floors: see :func:`reconstruction_losses`.
        baselines: whether the conditions of :func:`baseline_losses` are computed beside.
    """
    groups = _groups_between(density, floors)
    for tokens in held_out.tokens.split(held_out.micro_batch_prompts):
        yield _micro_batch(sae, held_out, tokens, groups, baselines=baselines)


def collect(parts: "Iterable[MicroBatch]") -> tuple[dict[str, Losses], Fit]:
    """Losses of all prompts and the fit over them, from micro-batches in the order of the prompts.

    Raises:
        InputError: there are no prompts.
    """
    losses: dict[str, list[Losses]] = {}
    fit: FitSums | None = None
    for part in parts:
        for name, values in part.losses.items():
            losses.setdefault(name, []).append(values)
        fit = part.fit if fit is None else fit.plus(part.fit)
    if fit is None or not fit.rows:
        raise InputError("no held-out prompts to evaluate on", found="0 prompts", expected="at least one")
    return {name: np.concatenate(values) for name, values in losses.items()}, fit.fit()


def measure_quality(sae: Autoencoder, held_out: HeldOut, baselines: Mapping[str, Losses] | None = None) -> Quality:
    """Loss recovered and fit of an autoencoder: what training logs as it goes.

    Args:
        sae: the autoencoder.
        held_out: where to evaluate.
        baselines: of ``baseline_losses`` on the same prompts; computed where None.
    """
    losses, fit = reconstruction_losses(sae, held_out)
    losses = dict(baseline_losses(held_out) if baselines is None else baselines) | losses
    means = {name: float(values.mean()) for name, values in losses.items()}
    against_mean = recovered(losses["mean"], losses["reconstruction"], losses["clean"]) if "mean" in losses else None
    return Quality(means, recovered(losses["zero"], losses["reconstruction"], losses["clean"]), against_mean, fit)


def recovered(ablated: Losses, replaced: Losses, clean: Losses) -> float | None:
    """Loss recovered: (ablated - replaced) / (ablated - clean) of the mean losses; None where the latter is zero."""
    gap = float(ablated.mean() - clean.mean())
    return None if gap == 0 else float(ablated.mean() - replaced.mean()) / gap


def bootstrap_recovered(
    ablated: Losses,
    replaced: Losses,
    clean: Losses,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval | None:
    """Percentile bootstrap interval of loss recovered, prompts drawn with replacement.

    Args:
        ablated: losses under ablation, (n,).
        replaced: losses under replacement, (n,).
        clean: losses of the unedited model, (n,).
        rng: draws the resamples.
        resamples: how many.
        confidence: of the interval.

    Returns:
        The interval, or None where a resample has no gap between ablated and clean.
    """
    n = len(clean)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    gaps = drawn @ (ablated - clean)
    if (gaps == 0).any():
        return None
    ratios = drawn @ (ablated - replaced) / gaps
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def floor_name(floor: float) -> str:
    """Name of the condition that keeps features of density at or above a floor."""
    return f"density>={floor:g}"


def cross_entropies(held_out: HeldOut, replace: Replace) -> dict[str, Losses]:
    """Cross-entropy of every prompt under each of several replacements.

    Args:
        held_out: where.
        replace: from the harvested activations (m, L, d_in) of a micro-batch to replacements of that shape by
            condition.

    Returns:
        Mean nats per token over the predictions made from harvested positions, float64 (n,), by condition.
    """
    losses: dict[str, list[Losses]] = {}
    for tokens in held_out.tokens.split(held_out.micro_batch_prompts):
        for name, values in _cross_entropies(held_out, tokens, replace).items():
            losses.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in losses.items()}


@torch.inference_mode()
def _cross_entropies(held_out: HeldOut, tokens: Tensor, replace: Replace) -> dict[str, Losses]:
    first = held_out.first_position
    acts = held_out.model.activations(tokens, held_out.hook_name)[:, first:]
    losses: dict[str, Losses] = {}
    for name, replacement in replace(acts).items():
        edits = {held_out.hook_name: partial(_put, replacement, first)}
        losses[name] = _prompt_losses(held_out.model.logits(tokens, edits), tokens, first).cpu().numpy()
    return losses


def _baselines(held_out: HeldOut, acts: Tensor) -> dict[str, Tensor]:
    conditions = {"clean": acts, "zero": torch.zeros_like(acts)}
    if held_out.mean is not None:
        conditions["mean"] = held_out.mean.to(acts).expand_as(acts)
    return conditions


def _micro_batch(
    sae: Autoencoder,
    held_out: HeldOut,
    tokens: Tensor,
    groups: Sequence[tuple[float, Tensor]],
    *,
    baselines: bool,
) -> "MicroBatch":
    fits: list[FitSums] = []

    def replace(acts: Tensor) -> dict[str, Tensor]:
        feature_acts = sae.encode(acts)
        full = sae.decode(feature_acts)
        fits.append(FitSums.of(acts, full, feature_acts))
        conditions = {"reconstruction": full}
        partial_sum = sae.b_dec.expand_as(acts)
        for floor, features in groups:
            partial_sum = partial_sum + feature_acts[..., features] @ sae.W_dec[features]
            conditions[floor_name(floor)] = partial_sum
        return conditions | (_baselines(held_out, acts) if baselines else {})

    return MicroBatch(_cross_entropies(held_out, tokens, replace), fits[0])


def _put(replacement: Tensor, first: int, activation: Tensor) -> Tensor:
    return torch.cat([activation[:, :first], replacement.to(activation.dtype)], dim=1)


def _prompt_losses(logits: Tensor, tokens: Tensor, first: int) -> Tensor:
    # All positions, the last with a target of no meaning: slicing the logits first would copy them.
    targets = tokens.roll(-1, dims=1).to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), reduction="none")
    return losses.view(targets.shape)[:, first:-1].double().mean(dim=1)


def _groups_between(density: Losses | None, floors: Sequence[float]) -> list[tuple[float, Tensor]]:
    if density is None:
        return []
    groups: list[tuple[float, Tensor]] = []
    above = np.inf
    for floor in sorted(set(floors), reverse=True):
        groups.append((floor, torch.from_numpy(np.flatnonzero((density >= floor) & (density < above)))))
        above = floor
    return groups


class FitSums(NamedTuple):
    """Sums over rows from which ``Fit`` follows, in float64.

    Attributes:
        rows: how many.
        error: of squared errors.
        squares: of squared norms.
        ratio: of norm ratios.
        active: of features firing.
        total: of the rows, (d_in,).
    """

    rows: int
    error: float
    squares: float
    ratio: float
    active: float
    total: npt.NDArray[np.float64]

    @staticmethod
    def of(acts: Tensor, reconstruction: Tensor, feature_acts: Tensor) -> "FitSums":
        """Over the rows of a micro-batch."""
        x, x_hat = acts.flatten(0, -2).double(), reconstruction.flatten(0, -2).double()
        norm = x.norm(dim=1)
        return FitSums(
            rows=len(x),
            error=float((x - x_hat).square().sum()),
            squares=float(x.square().sum()),
            ratio=float(torch.where(norm > 0, x_hat.norm(dim=1) / norm, 1.0).sum()),
            active=float(torch.sign(feature_acts).sum(dtype=torch.float64)),
            total=x.sum(dim=0).cpu().numpy(),
        )

    def plus(self, later: "FitSums") -> "FitSums":
        """Over these rows and some that come after them."""
        return FitSums(
            self.rows + later.rows,
            self.error + later.error,
            self.squares + later.squares,
            self.ratio + later.ratio,
            self.active + later.active,
            self.total + later.total,
        )

    def fit(self) -> Fit:
        """What follows; there must be rows."""
        spread = self.squares - float(torch.tensor(self.total).square().sum()) / self.rows
        fve = 1 - self.error / spread if spread > 0 else float(self.error == 0)
        return Fit(fve, self.ratio / self.rows, self.active / self.rows)


class MicroBatch(NamedTuple):
    """What some prompts give.

    Attributes:
        losses: nats per token, float64 (m,), by condition.
        fit: sums over their rows.
    """

    losses: Mapping[str, Losses]
    fit: FitSums
