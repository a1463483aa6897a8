"""Example texts of features: which firings are shown, and a feature's activation on every token around them.

Of each feature there are two kinds. *Top*: its largest firings, as the survey kept them. *Quantile*: the firings in the
survey's uniform sample are put in order of activation, largest first, and cut into as many equal parts as examples are
asked for (no more than there are firings). The example of a part is the firing nearest to its middle whose prompt is
not shown for that feature yet; where all prompts are, the nearest that is not an example of this kind yet. The firing
at place r of m, from 0, is at quantile 1 - (r + 1/2) / m: six parts of a large sample give 11/12, 9/12, ..., 1/12.

The store holds shuffled rows, not texts, so the language model runs again, once over every prompt that some example is
from; each example takes its own feature's product alone. Cost: the model's pass over those prompts, no more than the
survey read rows of, which is most of it; memory: a batch of activations and the windows of tokens. Rejected: encoding
the windows with all features (a thousand times the products), and gathering the neighbours' rows from the store (every
one in another chunk).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.analysis.context import Context, Floats, Integers, Mask
from pipeline.analysis.passes import Parts, Pass, model_needs
from pipeline.analysis.survey import Firings, Survey

_ROWS_AT_ONCE = 256
_COPIES = 3  # of a batch's activations at once
_ENCODER_BYTES = 8 + 4  # of an entry: transposed, and in float64 while biases are computed


class Choice(NamedTuple):
    """The firings to show, feature by feature: top ones first, each kind largest first.

    Attributes:
        feature: int64 (n,).
        quantile: of the activation in the feature's sample, float64 (n,); NaN for a top firing.
        rank: from 1, within the feature's examples of that kind, int64 (n,).
        prompt: training prompt, int64 (n,).
        position: of the firing token in the prompt, int64 (n,).
        activation: as the survey found it, float32 (n,).
    """

    feature: Integers
    quantile: Floats
    rank: Integers
    prompt: Integers
    position: Integers
    activation: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Windows:
    """The tokens around each firing; places outside the harvested part of a prompt are not ``inside``.

    Attributes:
        first: position of the first token inside, int64 (n,).
        inside: (n, width).
        tokens: int64 (n, width).
        following: the token that really came next, -1 after a prompt's last, int64 (n, width).
        activations: of the example's own feature, float32 (n, width).
    """

    first: Integers
    inside: Mask
    tokens: Integers
    following: Integers
    activations: npt.NDArray[np.float32]


def choose_examples(survey: Survey, features: Integers, n_top: int, n_quantiles: int) -> Choice:
    """Chooses the firings to show; see the module.

    Args:
        survey: what a pass over the store found.
        features: the features studied, ascending, (m,).
        n_top: top firings a feature, as far as the survey kept so many.
        n_quantiles: quantile examples a feature, as far as it fired so often.
    """
    top = _each(survey.top, lambda column: column[features, :n_top])
    sample, spread = _spread(_each(survey.sample, lambda column: column[features]), top.prompt, n_quantiles)
    fired = top.prompt >= 0
    row, place = np.nonzero(np.concatenate([fired, spread], axis=1))
    rank = np.concatenate([np.cumsum(kind, axis=1, dtype=np.int64) for kind in (fired, spread)], axis=1)
    pairs: Any = zip(top, sample, strict=True)
    shown = Firings(*(np.concatenate(pair, axis=1)[row, place] for pair in pairs))
    below = 1 - (place - fired.shape[1] + 0.5) / np.maximum((sample.prompt >= 0).sum(axis=1), 1)[row]
    return Choice(
        features[row],
        np.where(place < fired.shape[1], np.nan, below),
        rank[row, place],
        shown.prompt.astype(np.int64),
        shown.position.astype(np.int64),
        shown.activation,
    )


def read_windows(context: Context, choice: Choice, *, before: int, after: int, batch: int) -> Windows:
    """Runs the language model over the prompts chosen.

    Args:
        context: the autoencoder, the language model and the prompts.
        choice: the firings, n.
        before: tokens shown before each, as far as they were harvested.
        after: tokens shown after each, as far as there are any.
        batch: prompts a forward pass.
    """
    where = choice.position[:, None] + np.arange(-before, after + 1)
    found = Windows(
        first=np.maximum(choice.position - before, context.first_position),
        inside=where >= context.first_position,
        tokens=np.zeros(where.shape, np.int64),
        following=np.full(where.shape, -1, np.int64),
        activations=np.zeros(where.shape, np.float32),
    )
    batches, rows_of = _batches(choice, batch)
    encoder_bytes = _ENCODER_BYTES * context.sae.d_in * context.sae.d_sae
    work = Pass(
        label="example texts",
        unit="prompts",
        batches=batches,
        reads=frozenset({"model", "tokens"}),
        needs=model_needs(context, "train", batch, copies=_COPIES) | {"encoder": encoder_bytes},
        opening=_Encoding(before, after),
    )
    for rows, part in zip(rows_of, context.passes.in_order(work, context), strict=True):
        found.inside[rows] &= part.inside
        found.tokens[rows], found.following[rows] = part.tokens, part.following
        found.activations[rows] = np.where(found.inside[rows], part.activations, 0)
    return found


@dataclass(frozen=True)
class _Batch:
    """Prompts, and the firings in them; its length is the number of prompts.

    Attributes:
        prompts: ascending, int64 (b,).
        own: which of these each firing is in, int64 (r,).
        position: of the firing, int64 (r,).
        feature: int64 (r,).
    """

    prompts: Integers
    own: Integers
    position: Integers
    feature: Integers

    def __len__(self) -> int:
        return len(self.prompts)


class _Around(NamedTuple):
    """What is around the firings of a batch, (r, width) each; ``inside`` is before the end of the prompt."""

    inside: Mask
    tokens: Integers
    following: Integers
    activations: npt.NDArray[np.float32]


def _batches(choice: Choice, size: int) -> tuple[list[_Batch], list[Integers]]:
    """Batches of prompts, and the firings of the choice that each has."""
    order = np.argsort(choice.prompt, kind="stable")
    prompts, starts = np.unique(choice.prompt[order], return_index=True)
    ends = np.append(starts, order.size)
    batches: list[_Batch] = []
    rows_of: list[Integers] = []
    for first in range(0, prompts.size, size):
        numbers = prompts[first : first + size]
        rows = order[ends[first] : ends[first + numbers.size]]
        own = np.searchsorted(numbers, choice.prompt[rows])
        batches.append(_Batch(numbers, own, choice.position[rows], choice.feature[rows]))
        rows_of.append(rows)
    return batches, rows_of


@dataclass(frozen=True)
class _Encoding:
    """Opens a pass over prompts: tokens shown before each firing, and after it."""

    before: int
    after: int

    def __call__(self, context: Context) -> Parts[_Batch, _Around]:
        encoder, bias = _encoder(context)

        def encode(batches: Sequence[_Batch]) -> Iterator[_Around]:
            for batch in batches:
                yield self._around(context, batch, encoder, bias)

        return encode

    def _around(self, context: Context, batch: _Batch, encoder: torch.Tensor, bias: torch.Tensor) -> _Around:
        ids = context.need_tokens().prompts("train", batch.prompts.tolist()).astype(np.int64)
        acts = context.need_model().activations(torch.from_numpy(ids), context.hook_name).float().cpu()
        next_ids = np.append(ids[:, 1:], np.full((len(ids), 1), -1), axis=1)
        where = batch.position[:, None] + np.arange(-self.before, self.after + 1)
        own, at = batch.own[:, None], np.clip(where, 0, ids.shape[1] - 1)
        activations = np.zeros(where.shape, np.float32)
        for part in np.split(np.arange(len(where)), range(_ROWS_AT_ONCE, len(where), _ROWS_AT_ONCE)):
            x = acts[torch.from_numpy(own[part]), torch.from_numpy(at[part])]
            feature = torch.tensor(batch.feature[part])
            pre = (x @ encoder[feature][:, :, None])[:, :, 0] + bias[feature][:, None]
            activations[part] = torch.relu(pre).numpy()
        return _Around(where < ids.shape[1], ids[own, at], next_ids[own, at], activations)


def example_table(choice: Choice, windows: Windows, effects: npt.NDArray[np.float32]) -> pa.Table:
    """The table ``examples``.

    Args:
        choice: the firings, n.
        windows: around them.
        effects: on the logit of the token that came next, (n, width).
    """
    offsets = np.concatenate([[0], np.cumsum(windows.inside.sum(axis=1))]).astype(np.int32)

    def lists(values: npt.NDArray[np.generic]) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[windows.inside]))

    kinds = np.where(np.isnan(choice.quantile), "top", "quantile")
    return pa.table(
        {
            "feature": pa.array(choice.feature.astype(np.int32)),
            "kind": pa.array(kinds.tolist(), pa.string()),
            "quantile": pa.array(choice.quantile, from_pandas=True),
            "rank": pa.array(choice.rank.astype(np.int32)),
            "prompt": pa.array(choice.prompt.astype(np.int32)),
            "position": pa.array(choice.position.astype(np.int32)),
            "activation": pa.array(choice.activation),
            "first_position": pa.array(windows.first.astype(np.int32)),
            "tokens": lists(windows.tokens.astype(np.int32)),
            "activations": lists(windows.activations),
            "effects": lists(effects),
        }
    )


def _spread(sample: Firings, shown: npt.NDArray[np.int32], parts: int) -> tuple[Firings, Mask]:
    """Chooses firings spread evenly over the order of their activations.

    Args:
        sample: (m, k).
        shown: prompts of each feature's examples so far, (m, any).
        parts: firings wanted.

    Returns:
        The sample in order of activation, largest first, and which of it are chosen, (m, k).
    """
    order = np.lexsort((sample.position, sample.prompt, -sample.activation), axis=1)
    ordered = _each(sample, lambda column: np.take_along_axis(column, order, axis=1))
    prompt, fired = ordered.prompt, ordered.prompt >= 0
    rows, places, count = np.arange(len(prompt)), np.arange(prompt.shape[1]), fired.sum(axis=1)
    wanted = np.minimum(count, parts)
    seen = (prompt[:, :, None] == shown[:, None, :]).any(axis=2)
    chosen = np.zeros(fired.shape, np.bool_)
    for part in range(parts):
        middle = (part + 0.5) / np.maximum(wanted, 1) * count - 0.5
        distance = np.abs(places - middle[:, None]) + np.where(seen, places.size, 0)
        best = np.argmin(np.where(fired & ~chosen, distance, np.inf), axis=1)
        chosen[rows, best] |= part < wanted
        seen |= (part < wanted)[:, None] & (prompt == prompt[rows, best][:, None])
    return ordered, chosen


def _each(firings: Firings, change: Callable[[Any], Any]) -> Firings:
    return Firings(*(change(column) for column in firings))


def _encoder(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder directions (d_sae, d_in), and the biases (d_sae,) of their products with an activation itself."""
    sae = context.sae.to("cpu").to(torch.float32)
    encoder = sae.W_enc.T.contiguous()
    if not sae.subtract_b_dec:
        return encoder, sae.b_enc
    return encoder, (sae.b_enc.double() - encoder.double() @ sae.b_dec.double()).float()
