"""The features of one autoencoder at hand, for notebooks: what fires on a text, what one does, and where it fires most.

Everything is what the case studies (``pipeline.analysis.case_studies``) measure, for one feature at a time, so that an
answer takes as long as one feature does: firings on a text one pass of the model over it, logits and neurons a product
with the feature's decoder, examples a pass over the few prompts that they are from. Which prompts these are the survey
of the store tells, which is made when examples are first asked for and there is none. Without activations, as for a
checkpoint that was imported with a language model alone, there is all but the examples.

Rejected: reading the tables of a case studies' artifact (it has the features and examples that its options name).
"""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import surveying
from pipeline.analysis import examples, feature_table, logit_effects, statistics
from pipeline.analysis.context import Context
from pipeline.analyzing import Inputs, available
from pipeline.config import SurveyConfig
from pipeline.texts import Highlighted, highlight
from pipeline.tokens import TokenTable
from sae.autoencoder import Autoencoder
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError

_PROMPTS_AT_ONCE = 8


class Example(NamedTuple):
    """A place where a feature fires.

    Attributes:
        activation: at the place.
        quantile: of the activation among the feature's firings; None for one of the largest.
        prompt: training prompt.
        position: of the token in the prompt.
        text: around it, with the feature's activation on every token.
    """

    activation: float
    quantile: float | None
    prompt: int
    position: int
    text: Highlighted

    def __str__(self) -> str:
        return f"{self.activation:.3g}  {self.text}"


class Examples(tuple[Example, ...]):
    """Examples of a feature, the largest first; a notebook shows their texts."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        rows = "".join(f"<dt>{one.activation:.3g}</dt><dd>{one.text.to_html()}</dd>" for one in self)
        return f"<dl>{rows}</dl>" if rows else "<p>It fired on no token that was looked at.</p>"


class Features:
    """The features of an autoencoder, beside the language model that it belongs to.

    Args:
        inputs: the autoencoder and what there is beside it.

    Examples:
        >>> features = sparsemill.open_features("latest")
        >>> firing = features.firing("word_3 word_5 word_8")
        >>> firing.column_names
        ['position', 'token', 'feature', 'activation']
        >>> feature = firing["feature"][0].as_py()
        >>> highlighted = features.highlight("word_3 word_5 word_8", feature)  # in a notebook: the text, marked
        >>> logits, neurons = features.logits(feature), features.neurons(feature)
        >>> [example.text for example in features.examples(feature, top=2)] != []
        True
    """

    def __init__(self, inputs: Inputs):
        self._inputs = inputs
        self._context = inputs.read(frozenset({"model"}))
        self._tokenizer = inputs.model.tokenizer

    @property
    def artifact(self) -> Artifact:
        """Its artifact."""
        return self._inputs.sae

    @property
    def sae(self) -> Autoencoder:
        """The autoencoder."""
        return self._context.sae

    @property
    def hook_name(self) -> str:
        """Its site."""
        return self._context.hook_name

    def firing(self, text: str) -> pa.Table:
        """The features that fire on a text, token by token, on each the strongest first.

        Args:
            text: no longer than a prompt of the model. BOS is put in front where the training's prompts have it.

        Returns:
            A row a token and feature: ``position`` in the prompt, ``token`` (its text), ``feature``, ``activation``.

        Raises:
            InputError: no text, or too much of it.
        """
        ids, acts = self._encode(text)
        position, feature = np.nonzero(acts)
        activation = acts[position, feature]
        order = np.lexsort((feature, -activation, position))
        return pa.table(
            {
                "position": pa.array(position[order].astype(np.int32)),
                "token": pa.array([self._token(ids[place]) for place in position[order]], pa.string()),
                "feature": pa.array(feature[order].astype(np.int32)),
                "activation": pa.array(activation[order]),
            }
        )

    def highlight(self, text: str, feature: int) -> Highlighted:
        """A text with a feature's activation on every token; arguments and errors as of :meth:`firing`."""
        self._check(feature)
        ids, acts = self._encode(text)
        first = 0 if self._bos_id is None else 1
        return highlight(self._tokenizer, ids[first:], acts[first:, feature])

    def logits(self, feature: int, kept: int = logit_effects.KEPT) -> pa.Table:
        """The tokens whose logits a unit of a feature raises most, and lowers most.

        Args:
            feature: which.
            kept: tokens each way.

        Returns:
            ``direction`` (``raised`` or ``lowered``), ``rank`` from 1, ``token_id``, ``token``, ``effect``.

        Raises:
            InputError: no such feature, or its site has no direct path to the logits.
        """
        self._check(feature)
        effects = logit_effects.logit_weights(self._context, self._decoder(feature))
        if effects is None:
            raise InputError("the site has no direct path to the logits", found=self.hook_name)
        kept = min(kept, effects.size)
        ids = np.concatenate([statistics.largest(sign * effects[None], kept)[0] for sign in (1, -1)])
        return pa.table(
            {
                "direction": pa.array(["raised"] * kept + ["lowered"] * kept, pa.string()),
                "rank": pa.array(np.tile(np.arange(1, kept + 1, dtype=np.int32), 2)),
                "token_id": pa.array(ids.astype(np.int32)),
                "token": pa.array([self._token(token) for token in ids], pa.string()),
                "effect": pa.array(effects[ids]),
            }
        )

    def neurons(self, feature: int, kept: int = feature_table.NEURONS) -> pa.Table:
        """The neurons of largest share in a feature's decoder; at a site other than an MLP's, basis directions.

        Args:
            feature: which.
            kept: neurons wanted.

        Returns:
            ``feature``, ``rank`` from 1, ``neuron``, ``weight``, and ``share`` of the decoder's squared norm.
        """
        self._check(feature)
        decoder = statistics.weights64(self.sae.W_dec)
        return feature_table.neuron_table(
            self._context, feature_table.largest_neurons(decoder, np.array([feature]), kept)
        )

    def examples(self, feature: int, *, top: int = 8, quantiles: int = 0, before: int = 16, after: int = 8) -> Examples:
        """Where a feature fires in the activation store.

        Args:
            feature: which.
            top: its largest firings, as far as the survey kept so many.
            quantiles: firings spread over the range of its activations.
            before: tokens shown before each.
            after: tokens shown after each.

        Raises:
            ConfigError: the autoencoder came without activations.
        """
        self._check(feature)
        context = self._surveyed
        choice = examples.choose_examples(context.need_survey(), np.array([feature]), top, quantiles)
        windows = examples.read_windows(context, choice, before=before, after=after, batch=_PROMPTS_AT_ONCE)
        scale = float(context.need_survey().largest[feature])
        return Examples(
            Example(
                activation,
                None if np.isnan(quantile) else quantile,
                prompt,
                position,
                highlight(self._tokenizer, tokens[inside].tolist(), acts[inside], scale),
            )
            for activation, quantile, prompt, position, inside, tokens, acts in zip(
                choice.activation.tolist(),
                choice.quantile.tolist(),
                choice.prompt.tolist(),
                choice.position.tolist(),
                windows.inside,
                windows.tokens,
                windows.activations,
                strict=True,
            )
        )

    def _encode(self, text: str) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Token ids of a text, BOS included, and activations (T, d_sae), 0 where nothing is harvested."""
        beginning = [] if self._bos_id is None else [self._bos_id]
        ids = beginning + self._tokenizer.encode(text, add_special_tokens=False).ids
        if not len(beginning) < len(ids) <= self._inputs.model.n_ctx:
            raise InputError(
                "a text of another length than the model reads", found=f"{len(ids)} tokens",
                expected=f"{len(beginning) + 1} to {self._inputs.model.n_ctx}",
            )  # fmt: skip
        rows = self._context.need_model().activations(torch.tensor([ids]), self.hook_name)[0].cpu()
        acts = self.sae.encode(rows).numpy()
        acts[: self._context.first_position] = 0
        return ids, acts

    def _token(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _decoder(self, feature: int) -> npt.NDArray[np.float64]:
        return statistics.weights64(self.sae.W_dec[feature])

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.sae.d_sae:
            raise InputError("no such feature", found=feature, expected=f"0 to {self.sae.d_sae - 1}")

    @cached_property
    def _bos_id(self) -> int | None:
        """What prompts begin with: as in the training's own prompts, where they are at hand."""
        if "tokens" in available(self._inputs.sae):
            return TokenTable(self._inputs.tokens).bos_id
        return self._inputs.model.bos_id

    @cached_property
    def _surveyed(self) -> Context:
        """With the newest survey of the autoencoder, or a new one, and the prompts."""
        sae, workspace = self._inputs.sae, self._inputs.workspace
        if "survey" not in available(sae):
            raise ConfigError(
                "examples are looked for in stored activations, and this autoencoder came without", where=sae.id,
                remedy="import it with activations",
            )  # fmt: skip
        made = [one for one in workspace.store.list("survey") if one.parents["sae"] == sae.as_parent()]
        survey = made[0] if made else surveying.survey(SurveyConfig(), sae, workspace).artifact
        return replace(self._context, survey=surveying.load_survey(survey), tokens=TokenTable(self._inputs.tokens))
