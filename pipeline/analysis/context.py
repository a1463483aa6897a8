"""What an analysis may read, and how the kinds of things it needs are declared.

An analysis module lists what it cannot do without in ``REQUIRES`` and what it uses where it is there in ``OPTIONAL``:

- ``model``: the language model (weights, and forward passes);
- ``store``: the rows of the activations artifact, through ``reader``;
- ``statistics``: what was kept of them when they were harvested, through ``mean_activation`` and ``moments``, so that
  who reads these alone needs no shard;
- ``tokens``: the tokens artifact, for held-out prompts and for the text around a row;
- ``survey``: what one pass of the encoder over the store found (``pipeline.analysis.survey``), in place of the store;
- ``density``: what the density analysis found; without it there is no "frequent" and no "ultra-low";
- ``loss_recovered``: the numbers of that analysis;
- ``companions``: other autoencoders to compare with, each with what the analysis reads of the first;
- ``training_log``: the metrics and densities logged while the autoencoder was trained.

The language model, the store and the tokens are protocols here, so that an analysis runs on anything of that shape, and
an imported checkpoint with neither store nor tokens has its pure weight analyses.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.analysis.passes import Here, Passes
from pipeline.analysis.result import Number
from pipeline.analysis.survey import Survey
from pipeline.statistics import Moments
from sae.autoencoder import Autoencoder
from sae.metrics import ResamplingEvent
from storage.errors import InputError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Edit = Callable[[torch.Tensor], torch.Tensor]
Split = Literal["train", "held_out"]
Need = Literal[
    "model", "store", "statistics", "tokens", "survey", "density", "loss_recovered", "companions", "training_log"
]
EVERYTHING: frozenset[Need] = frozenset(get_args(Need))
"""All that an analysis may read."""


class LanguageModel(Protocol):
    """The language model that the activations come from."""

    @property
    def W_U(self) -> torch.Tensor:
        """Unembedding, (d_model, d_vocab)."""
        ...

    def W_out(self, layer: int) -> torch.Tensor:
        """Output weights of a layer's MLP, (d_mlp, d_model)."""
        ...

    def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        """Activations (n, T, d) of tokens (n, T) at a hook."""
        ...

    def logits(self, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None) -> torch.Tensor:
        """Logits (n, T, d_vocab) of tokens (n, T), with activations at the hooks named replaced."""
        ...

    def loss_gradient(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        """Gradient (n, T, d) of the summed next-token cross-entropy of tokens (n, T), by the activations at a hook."""
        ...


class RowBatch(Protocol):
    """Rows of the store with their places."""

    @property
    def rows(self) -> Any:
        """float32 (b, d_in), numpy or torch."""
        ...

    @property
    def prompt(self) -> Any:
        """Training prompt of each row, (b,)."""
        ...

    @property
    def position(self) -> Any:
        """Position of each row in its prompt, (b,)."""
        ...


class RowSource(Protocol):
    """The store, read from front to back."""

    @property
    def n_rows(self) -> int:
        """Rows there are."""
        ...

    def sequential(self, batch_rows: int, *, start: int = 0, prefetch: int = 2) -> Iterator[RowBatch]:
        """Rows in the order they lie in, from a batch on, some batches read ahead."""
        ...


class TokenSource(Protocol):
    """The prompts."""

    def n_prompts(self, split: Split) -> int:
        """Prompts of a split."""
        ...

    def prompts(self, split: Split, numbers: Sequence[int] | None = None) -> npt.NDArray[np.int32]:
        """Token ids (n, T) of the prompts named, or of all."""
        ...


class FeatureGroups(NamedTuple):
    """A division of the features by density.

    Attributes:
        frequent: density at or above the threshold, (d_sae,).
        rare: density below it, dead features included, (d_sae,).
    """

    frequent: Mask
    rare: Mask


@dataclass(frozen=True)
class FeatureDensities:
    """How often each feature fires.

    Attributes:
        counts: rows on which each feature fired, int64 (d_sae,).
        n_rows: rows looked at.
    """

    counts: Integers
    n_rows: int

    @property
    def density(self) -> Floats:
        """Fraction of rows on which each feature fired, float64 (d_sae,)."""
        return self.counts / self.n_rows

    def groups(self, rare_below: float) -> FeatureGroups:
        """Frequent and rare features; a rare one fires on less than ``rare_below`` of the rows."""
        rare = self.density < rare_below
        return FeatureGroups(~rare, rare)

    @staticmethod
    def from_table(features: pa.Table, n_rows: int) -> "FeatureDensities":
        """From the density analysis' table ``features`` and its number ``n_rows``."""
        return FeatureDensities(features["count"].to_numpy().astype(np.int64), n_rows)


class TrainingDensities(NamedTuple):
    """How often each feature fired while the autoencoder was trained.

    Attributes:
        counts: rows of each window on which each feature fired, int64 (n_windows, d_sae).
        rows: training rows of each window; the first begins with the training, each where the one before ends, int64
            (n_windows,).
        resamplings: what was resampled, and after which step.
        exempt: the features that are never resampled, (d_sae,).
    """

    counts: Integers
    rows: Integers
    resamplings: Sequence[ResamplingEvent]
    exempt: Mask


@dataclass(frozen=True)
class Context:
    """Everything an analysis may read.

    Attributes:
        sae: the autoencoder.
        hook_name: where in the model its inputs were harvested.
        sae_config: its training config, as JSON.
        model: the language model.
        reader: the activation store.
        tokens: the prompts.
        token_strings: text of each token id.
        survey: what a pass of the encoder over the store found.
        densities: what the density analysis found.
        training_log: the metrics of the training.
        training_densities: how often each feature fired while it was trained.
        mean_activation: mean of the whole dataset, float32 (d_in,), from the store's statistics.
        moments: the store's statistics.
        first_position: first harvested position of a prompt: 1 where BOS was left out, 0 where it was kept.
        encoder_directions: unit directions that the encoder was kept orthogonal to in training, float64 (k, d_in).
        numbers: of the analyses read, by analysis.
        label: what tells the autoencoder from the first one of a comparison.
        site: the language model's name and the hook.
        companions: the autoencoders that this one is compared with.
        seed: seed of everything random.
        passes: where the analysis' long loops are computed.
    """

    sae: Autoencoder
    hook_name: str
    sae_config: Mapping[str, object] = field(default_factory=dict[str, object])
    model: LanguageModel | None = None
    reader: RowSource | None = None
    tokens: TokenSource | None = None
    token_strings: Sequence[str] | None = None
    survey: Survey | None = None
    densities: FeatureDensities | None = None
    training_log: pa.Table | None = None
    training_densities: TrainingDensities | None = None
    mean_activation: torch.Tensor | None = None
    moments: Moments | None = None
    first_position: int = 1
    encoder_directions: Floats | None = None
    numbers: Mapping[str, Mapping[str, Number]] = field(default_factory=dict[str, Mapping[str, Number]])
    label: str = "this one"
    site: str = ""
    companions: "tuple[Context, ...]" = ()
    seed: int = 0
    passes: Passes = field(default_factory=Here)

    @property
    def layer(self) -> int:
        """Layer of the hook: the 0 of ``blocks.0.mlp.hook_post``."""
        part = self.hook_name.split(".")
        if len(part) > 1 and part[0] == "blocks" and part[1].isdigit():
            return int(part[1])
        raise InputError("the hook names no layer", found=self.hook_name, expected="blocks.<layer>...")

    def rng(self, name: str) -> np.random.Generator:
        """A generator of its own for a purpose, derived from the seed."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def groups(self, rare_below: float) -> FeatureGroups | None:
        """Frequent and rare features, or None where densities were not measured."""
        return None if self.densities is None else self.densities.groups(rare_below)

    def need_model(self) -> LanguageModel:
        """The language model, or a clear error."""
        return _needed(self.model, "the language model")

    def need_reader(self) -> RowSource:
        """The store, or a clear error."""
        return _needed(self.reader, "an activation store")

    def need_tokens(self) -> TokenSource:
        """The prompts, or a clear error."""
        return _needed(self.tokens, "a tokens artifact")

    def need_survey(self) -> Survey:
        """The survey, or a clear error."""
        return _needed(self.survey, "a survey of the activation store")

    def need_densities(self) -> FeatureDensities:
        """The densities, or a clear error."""
        return _needed(self.densities, "the density analysis of the same autoencoder")

    def need_companions(self) -> "tuple[Context, ...]":
        """The autoencoders to compare with, or a clear error."""
        return _needed(self.companions or None, "other autoencoders to compare with")

    def need_moments(self) -> Moments:
        """The statistics of the store, or a clear error."""
        return _needed(self.moments, "an activation store")

    def need_training(self) -> tuple[pa.Table, TrainingDensities]:
        """The training's log and its densities, or a clear error."""
        what = "the log of a training made here"
        return _needed(self.training_log, what), _needed(self.training_densities, what)


def _needed(value: Any, what: str) -> Any:
    if value is None:
        raise InputError(
            f"this analysis needs {what}",
            expected=what,
            remedy="name the artifacts it should read, or choose the analyses that read weights alone",
        )
    return value
