"""Starting weights: kaiming or tied directions, a centre for b_dec, and biases that start at a chosen L0.

Cost: one product of the sample with the encoder for calibration, a few passes over the sample for the geometric median.
Rejected: biases calibrated by one number shared by all features, which starts features along the data's main directions
as dense and most others as dead.
"""

import math

import torch
from torch import Tensor

from .config import TrainerConfig
from .constraints import remove_components_, unit_rows
from .errors import InvalidTensor
from .generators import generator
from .kernels.interface import Weights

FEATURE_BLOCK = 1024


def initial_weights(config: TrainerConfig, sample: Tensor, mean: Tensor, encoder_basis: Tensor | None) -> Weights:
    """Makes the starting weights, on the sample's device.

    Args:
        config: what to start from.
        sample: (n, d_in) activations, used by the geometric median and by calibration.
        mean: (d_in,) mean activation of the dataset.
        encoder_basis: None, or (k, d_in) orthonormal directions that the encoder avoids.
    """
    d_in = sample.shape[1]
    random = generator(config.seed, "init")
    enc = kaiming_encoder(config.d_sae, d_in, config.d_sae, random)
    dec = unit_rows(kaiming_decoder(config.d_sae, d_in, random))
    if config.init == "tied":
        enc = dec.clone()
    remove_components_(enc, None if encoder_basis is None else encoder_basis.cpu())
    if config.tie_weights:
        dec = unit_rows(enc)
        enc = dec.clone()
    enc, dec = enc.to(sample.device), dec.to(sample.device)
    b_dec = _centre(config, sample, mean)
    b_enc = enc.new_zeros(config.d_sae)
    if config.target_l0 is not None:
        sae_in = sample - b_dec if config.subtract_b_dec else sample
        b_enc = calibrated_biases(enc, sae_in, config.target_l0)
    return Weights(enc, b_enc, dec, b_dec)


def kaiming_encoder(count: int, d_in: int, d_sae: int, random: torch.Generator) -> Tensor:
    """(count, d_in) encoder rows as kaiming_uniform_ gives for a (d_in, d_sae) matrix: fan-in d_sae."""
    return _uniform(count, d_in, math.sqrt(6 / d_sae), random)


def kaiming_decoder(count: int, d_in: int, random: torch.Generator) -> Tensor:
    """(count, d_in) decoder rows as kaiming_uniform_ gives for a (d_sae, d_in) matrix: norm about 1.41."""
    return _uniform(count, d_in, math.sqrt(6 / d_in), random)


def _uniform(rows: int, columns: int, bound: float, random: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=random) * 2 - 1) * bound


def _centre(config: TrainerConfig, sample: Tensor, mean: Tensor) -> Tensor:
    if config.b_dec_init == "zero":
        return torch.zeros_like(mean)
    if config.b_dec_init == "mean":
        return mean.clone()
    return geometric_median(sample)


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to (n, d_in) points, by Weiszfeld's iteration in float64."""
    exact = points.double()
    centre = exact.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (exact - centre).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * exact).sum(dim=0) / weights.sum()
        shift = float((moved - centre).norm())
        centre = moved
        if shift <= tolerance * float(centre.norm()):
            break
    return centre.to(points.dtype)


def calibrated_biases(enc: Tensor, sae_in: Tensor, target_l0: float) -> Tensor:
    """(d_sae,) biases with which each feature fires on target_l0 / d_sae of the sample, at least on one row.

    Args:
        enc: (d_sae, d_in) encoder rows.
        sae_in: (n, d_in) encoder inputs, centred if the autoencoder centres them.
        target_l0: wanted mean number of active features a row, below d_sae.
    """
    rows, d_sae = sae_in.shape[0], enc.shape[0]
    if rows < 2:
        raise InvalidTensor("sample", found=f"{rows} rows", expected="at least 2, to calibrate biases")
    firing = min(rows - 1, max(1, round(rows * target_l0 / d_sae)))
    thresholds = [
        (block @ sae_in.T).topk(firing + 1, dim=1).values[:, -2:].mean(dim=1) for block in enc.split(FEATURE_BLOCK)
    ]
    return -torch.cat(thresholds)
