"""What happens to features that do not fire: counting, sampling of inputs, and the two published schemes.

Firing is counted on every training row of the window before a resampling, so the weights move while they are counted
(at these learning rates, little); the post's code counts in a separate pass with frozen weights. Anthropic's inputs
are drawn by a stream of independent weighted reservoirs of one row, one a feature: exactly proportional to squared
loss over all rows of the sample, in memory of d_sae rows instead of the sample's 819,200; the loss is that of the step
that saw the row.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .collective import Alone, Collective
from .config import AnthropicResampling, NoResampling, ReinitResampling, TrainerConfig
from .constraints import remove_components_, unit_rows
from .generators import generator
from .initialisation import kaiming_decoder, kaiming_encoder
from .kernels.interface import Forward, Moments, Objective, Weights
from .metrics import ResamplingEvent


@dataclass
class ResamplingState:
    """What must be saved for a resumed run to resample alike.

    Attributes:
        counts: (d_sae,) int64, rows on which each feature fired since the window opened.
        rows: rows counted.
        candidates: None, or (d_sae, d_in) the input that each feature would restart at.
        weight: total weight of the rows that candidates were drawn from.
    """

    counts: Tensor
    rows: int = 0
    candidates: Tensor | None = None
    weight: float = 0.0


@dataclass
class Resampler:
    """Counts, samples, and resamples when due."""

    config: TrainerConfig
    state: ResamplingState
    encoder_basis: Tensor | None
    collective: Collective = field(default_factory=Alone)
    _exempt: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Derives the exempt features from the seed."""
        self._exempt = exempt_features(self.config).to(self.state.counts.device)

    def observe(self, step: int, rows: Tensor, forward: Forward, objective: Objective) -> None:
        """Counts one step's firing, and draws candidates from its rows while the sample lasts.

        Args:
            step: the step's number.
            rows: (b, d_in) this rank's rows of the batch.
            forward: of the whole batch, all ranks' rows one after another.
            objective: of the step.
        """
        scheme = self.config.resampling
        if isinstance(scheme, NoResampling):
            return
        self.state.counts += forward.fired
        self.state.rows += forward.l2.shape[0]
        if isinstance(scheme, AnthropicResampling) and self._due_within(
            step, self.config.steps_for_rows(scheme.sample_rows)
        ):
            self._draw_candidates(step, rows, (forward.l2 + objective.l1_coeff * forward.l1).double().square())

    def resample_if_due(self, step: int, weights: Weights, moments: Moments) -> ResamplingEvent | None:
        """Resamples in place after the step if its time has come; opens the next window when that is due."""
        scheme = self.config.resampling
        if isinstance(scheme, NoResampling):
            return None
        event = None
        if scheme.is_due(step, self.config.steps):
            features = self.select()
            if isinstance(scheme, ReinitResampling):
                self._reinitialise(scheme, step, features, weights, moments)
            elif self.state.candidates is None:  # no row of the sample had a loss: there is nothing to restart at
                features = features[:0]
            else:
                self._restart_at_inputs(scheme, features, self.state.candidates[features], weights, moments)
            if self.config.tie_weights:
                self._tie(features, weights, moments)
            event = ResamplingEvent(step, scheme.scheme, tuple(features.tolist()), self.state.rows)
            self.state.candidates, self.state.weight = None, 0.0
        if scheme.is_due(step + self.config.steps_for_rows(scheme.window_rows), self.config.steps):
            self.state.counts.zero_()
            self.state.rows = 0
        return event

    def _tie(self, features: Tensor, weights: Weights, moments: Moments) -> None:
        rows = weights.dec[features]
        remove_components_(rows, self.encoder_basis)
        weights.dec[features] = rows
        for tensors in (weights, *moments):
            tensors.enc[features] = tensors.dec[features]

    def select(self) -> Tensor:
        """Numbers of the features that would be resampled now, ascending."""
        scheme = self.config.resampling
        if isinstance(scheme, ReinitResampling):
            rare = self.state.counts < scheme.threshold * self.state.rows
        else:
            rare = self.state.counts == 0
        return (rare & ~self._exempt).nonzero().flatten()

    def _due_within(self, step: int, steps: int) -> bool:
        scheme = self.config.resampling
        if isinstance(scheme, NoResampling):
            return False
        if scheme.interval_steps is not None:
            upcoming = -(-step // scheme.interval_steps) * scheme.interval_steps
        else:
            upcoming = min((due for due in scheme.steps if due >= step), default=0)
        return upcoming - step < steps and scheme.is_due(upcoming, self.config.steps)

    def _draw_candidates(self, step: int, rows: Tensor, weights: Tensor) -> None:
        total = float(weights.sum())
        if total == 0:
            return
        state, random = self.state, generator(self.config.seed, "resampling inputs", step)
        if state.candidates is None:
            state.candidates, state.weight = rows.new_zeros(self.config.d_sae, rows.shape[1]), 0.0
        state.weight += total
        replaced = torch.rand(self.config.d_sae, generator=random, dtype=torch.float64) * state.weight < total
        draws = torch.rand(int(replaced.sum()), generator=random, dtype=torch.float64).to(rows.device) * total
        chosen = torch.searchsorted(weights.cumsum(dim=0), draws, right=True).clamp_max(weights.shape[0] - 1)
        state.candidates[replaced.to(rows.device)] = self._rows_of_all_ranks(rows, chosen)

    def _rows_of_all_ranks(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Rows of the whole batch by their numbers; each is on the rank that it was dealt to."""
        if self.collective.world == 1:
            return rows[chosen]
        counts = torch.zeros(self.collective.world, dtype=torch.int64, device=rows.device)
        counts[self.collective.rank] = rows.shape[0]
        self.collective.sum_([counts])
        own = chosen - counts[: self.collective.rank].sum()
        here = (own >= 0) & (own < rows.shape[0])
        found = rows.new_zeros(len(chosen), rows.shape[1])
        found[here] = rows[own[here]]
        self.collective.sum_([found])
        return found

    def _reinitialise(
        self, scheme: ReinitResampling, step: int, features: Tensor, weights: Weights, moments: Moments
    ) -> None:
        d_sae, d_in = weights.dec.shape
        random = generator(self.config.seed, "reinit", step)
        enc = kaiming_encoder(len(features), d_in, d_sae, random).to(weights.enc.device)
        dec = kaiming_decoder(len(features), d_in, random).to(weights.dec.device)
        remove_components_(enc, self.encoder_basis)
        weights.enc[features] = enc
        weights.dec[features] = unit_rows(dec) if scheme.normalise_rows else dec
        weights.b_enc[features] = 0
        if scheme.reset_moments:
            _zero_moments(moments, features)

    def _restart_at_inputs(
        self, scheme: AnthropicResampling, features: Tensor, inputs: Tensor, weights: Weights, moments: Moments
    ) -> None:
        directions = unit_rows(inputs - weights.b_dec if scheme.centre_inputs else inputs)
        live = self.state.counts > 0
        norm = weights.enc[live].norm(dim=1).mean() if bool(live.any()) else weights.enc.norm(dim=1).mean()
        enc = directions * (scheme.encoder_scale * norm)
        remove_components_(enc, self.encoder_basis)
        weights.dec[features], weights.enc[features], weights.b_enc[features] = directions, enc, 0
        _zero_moments(moments, features)


def exempt_features(config: TrainerConfig) -> Tensor:
    """(d_sae,) bool: the random subset, a function of the seed, that is never resampled."""
    exempt = torch.zeros(config.d_sae, dtype=torch.bool)
    if not isinstance(config.resampling, NoResampling):
        count = round(config.resampling.exempt_fraction * config.d_sae)
        exempt[torch.randperm(config.d_sae, generator=generator(config.seed, "exempt"))[:count]] = True
    return exempt


def _zero_moments(moments: Moments, features: Tensor) -> None:
    for moment in moments:
        for per_feature in (moment.enc, moment.b_enc, moment.dec):
            per_feature[features] = 0
