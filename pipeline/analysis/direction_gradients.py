"""Mean loss gradients in the space of activations, to set beside the rare direction.

The comment's hypothesis: features that try to fire as seldom as possible are all pushed along one direction, the mean
gradient that reaches the encoder through their pre-activations, "weighted by how often does this cause a feature to
flip from on to off". Two losses have such a gradient, and each is averaged three ways, over the harvested positions of
held-out prompts from which a token is predicted:

- *autoencoder*: of the training loss |x - x_hat|^2 + sum_i l_i f_i, the gradient by encoder column e_i is c_i(x) (x -
  b_dec), where c_i(x) = 2 d_i . (x_hat - x) + l_i is the gradient by f_i, and by the pre-activation h_i where it is
  positive; l_i is l1_coeff (times |d_i| where the training weighted it so). The mean is over rare features and tokens.
- *model*: of the language model's cross-entropy, the gradient by the activation x itself.

The three weights of a (token, rare feature) pair: *all* 1, so the gate of the ReLU is left out; *firing* 1 where h_i >
0, so this is the gradient that training follows; *flip* 1 where |h_i| is at most ``within`` standard deviations of h_i,
so a small step turns the feature on or off. The model's gradient at a token is weighted by its pairs. A training that
followed a gradient moved along its negative. The deviations come from the store's mean and second moment.

Cost: forward and half a backward pass of the model, and the encoder, a prompt. Rejected: a mean over the whole store
for the autoencoder's (a second kind of pass, at a hundred times the cost, for a mean that a sample gives).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.analysis import statistics
from pipeline.analysis.context import Context, Floats, Integers
from pipeline.analysis.direction_pass import projection_stds
from pipeline.analysis.passes import Parts, Pass, in_batches, model_needs
from sae.config import TrainerConfig

WEIGHTS: tuple[str, ...] = ("all", "firing", "flip")
_COPIES = 4  # of a batch's activations at once: themselves, their gradients, reconstructions and inputs


@dataclass(frozen=True)
class MeanGradients:
    """What the prompts give; directions matter here, not lengths.

    Attributes:
        rows: tokens looked at.
        pairs: (token, feature) pairs by weight.
        autoencoder: (d_in,) by weight; empty where the training's L1 coefficient is not known.
        model: (d_in,) by weight.
    """

    rows: int
    pairs: Mapping[str, int]
    autoencoder: Mapping[str, Floats]
    model: Mapping[str, Floats]


def mean_gradients(
    context: Context, features: Integers, prompts: Sequence[int], *, within: float, micro_batch_prompts: int
) -> MeanGradients:
    """Averages the gradients over prompts; see the module.

    Args:
        context: the autoencoder, the language model, the prompts and the store's statistics.
        features: the rare features, (n,).
        prompts: numbers of held-out prompts.
        within: half the width of the band around a feature's threshold, in standard deviations of its pre-activation.
        micro_batch_prompts: prompts a forward pass.
    """
    encoder = statistics.weights64(context.sae.W_enc).T[features]
    band = within * projection_stds(context.need_moments(), encoder)
    work = Pass(
        label="gradients",
        unit="prompts",
        batches=in_batches(prompts, micro_batch_prompts),
        reads=frozenset({"model", "tokens"}),
        needs=model_needs(context, "held_out", micro_batch_prompts, copies=_COPIES),
        opening=_Summing(features, band),
    )
    by_weight = {name: (np.zeros(context.sae.d_in), np.zeros(context.sae.d_in)) for name in WEIGHTS}
    pairs, rows = dict.fromkeys(WEIGHTS, 0), 0
    for part in context.passes.in_order(work, context):
        for name in WEIGHTS:
            autoencoder, of_model = by_weight[name]
            autoencoder += part.autoencoder[name]
            of_model += part.model[name]
            pairs[name] += part.pairs[name]
        rows += part.rows
    counted = {name: max(count, 1) for name, count in pairs.items()}
    known = () if _l1_coefficients(context, features) is None else WEIGHTS
    return MeanGradients(
        rows,
        pairs,
        {name: by_weight[name][0] / counted[name] for name in known},
        {name: by_weight[name][1] / counted[name] for name in WEIGHTS},
    )


@dataclass(frozen=True)
class _Summing:
    """Opens a pass over held-out prompts, each batch a micro-batch; its parts are sums, not means.

    Attributes:
        features: the rare features, (n,).
        band: of each, half the width around its threshold, (n,).
    """

    features: Integers
    band: Floats

    def __call__(self, context: Context) -> Parts[Sequence[int], MeanGradients]:
        penalty, band = _l1_coefficients(context, self.features), torch.tensor(self.band)

        def add_up(batches: Sequence[Sequence[int]]) -> Iterator[MeanGradients]:
            for prompts in batches:
                ids = context.need_tokens().prompts("held_out", prompts).astype(np.int64)
                yield self._sums(context, torch.from_numpy(ids), penalty, band)

        return add_up

    def _sums(
        self, context: Context, tokens: torch.Tensor, penalty: torch.Tensor | None, band: torch.Tensor
    ) -> MeanGradients:
        sae, model, first = context.sae, context.need_model(), context.first_position
        index = torch.tensor(self.features)
        x = model.activations(tokens, context.hook_name)[:, first:-1].flatten(0, 1)
        gradient = model.loss_gradient(tokens, context.hook_name)[:, first:-1].flatten(0, 1).double()
        pairs = dict[str, int]()
        autoencoder, of_model = dict[str, Floats](), dict[str, Floats]()
        with torch.inference_mode():
            out = sae(x)
            pre = out.hidden_pre[:, index]
            slope = 2 * (out.sae_out - x) @ sae.W_dec[index].T + (0 if penalty is None else penalty)
            sae_in = (x - sae.b_dec if sae.subtract_b_dec else x).double()
            for name, weight in _weights(pre, band).items():
                autoencoder[name] = ((slope * weight).sum(dim=1, dtype=torch.float64) @ sae_in).numpy()
                per_token = weight.sum(dim=1, dtype=torch.float64)
                of_model[name] = (per_token @ gradient).numpy()
                pairs[name] = int(per_token.sum())
        return MeanGradients(len(x), pairs, autoencoder, of_model)


def _weights(pre: torch.Tensor, band: torch.Tensor) -> dict[str, torch.Tensor]:
    near = pre.abs() <= band.to(pre.dtype)
    return {"all": torch.ones_like(pre), "firing": (pre > 0).to(pre.dtype), "flip": near.to(pre.dtype)}


def _l1_coefficients(context: Context, features: Integers) -> torch.Tensor | None:
    settings = context.sae_config.get("autoencoder")
    if settings is None:
        return None
    config = TrainerConfig.model_validate(settings)
    norms = context.sae.W_dec[torch.tensor(features)].norm(dim=1)
    return config.l1_coeff * (norms if config.l1_weighting == "decoder-norm" else torch.ones_like(norms))
