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

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.analysis import statistics
from pipeline.analysis.context import Context, Floats, Integers
from pipeline.analysis.direction_pass import projection_stds
from sae.config import TrainerConfig

WEIGHTS: tuple[str, ...] = ("all", "firing", "flip")


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
    context: Context, features: Integers, tokens: torch.Tensor, *, within: float, micro_batch_prompts: int
) -> MeanGradients:
    """Averages the gradients over prompts; see the module.

    Args:
        context: the autoencoder, the language model and the store's statistics.
        features: the rare features, (n,).
        tokens: prompts, int64 (n, T).
        within: half the width of the band around a feature's threshold, in standard deviations of its pre-activation.
        micro_batch_prompts: prompts a forward pass.
    """
    sae, model, first = context.sae, context.need_model(), context.first_position
    index = torch.from_numpy(features)
    penalty = _l1_coefficients(context, index)
    encoder = statistics.weights64(sae.W_enc).T[features]
    band = torch.from_numpy(within * projection_stds(context.need_moments(), encoder))
    by_weight = {name: (np.zeros(sae.d_in), np.zeros(sae.d_in)) for name in WEIGHTS}
    pairs, rows = dict.fromkeys(WEIGHTS, 0), 0
    for part in tokens.split(micro_batch_prompts):
        x = model.activations(part, context.hook_name)[:, first:-1].flatten(0, 1)
        gradient = model.loss_gradient(part, context.hook_name)[:, first:-1].flatten(0, 1).double()
        with torch.inference_mode():
            out = sae(x)
            pre = out.hidden_pre[:, index]
            slope = 2 * (out.sae_out - x) @ sae.W_dec[index].T + (0 if penalty is None else penalty)
            sae_in = (x - sae.b_dec if sae.subtract_b_dec else x).double()
            for name, weight in _weights(pre, band).items():
                autoencoder, of_model = by_weight[name]
                autoencoder += ((slope * weight).sum(dim=1, dtype=torch.float64) @ sae_in).numpy()
                per_token = weight.sum(dim=1, dtype=torch.float64)
                of_model += (per_token @ gradient).numpy()
                pairs[name] += int(per_token.sum())
        rows += len(x)
    counted = {name: max(count, 1) for name, count in pairs.items()}
    known = WEIGHTS if penalty is not None else ()
    return MeanGradients(
        rows,
        pairs,
        {name: by_weight[name][0] / counted[name] for name in known},
        {name: by_weight[name][1] / counted[name] for name in WEIGHTS},
    )


def _weights(pre: torch.Tensor, band: torch.Tensor) -> dict[str, torch.Tensor]:
    near = pre.abs() <= band.to(pre.dtype)
    return {"all": torch.ones_like(pre), "firing": (pre > 0).to(pre.dtype), "flip": near.to(pre.dtype)}


def _l1_coefficients(context: Context, features: torch.Tensor) -> torch.Tensor | None:
    settings = context.sae_config.get("autoencoder")
    if settings is None:
        return None
    config = TrainerConfig.model_validate(settings)
    norms = context.sae.W_dec[features].norm(dim=1)
    return config.l1_coeff * (norms if config.l1_weighting == "decoder-norm" else torch.ones_like(norms))
