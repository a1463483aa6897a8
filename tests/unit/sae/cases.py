"""Small weights, batches and configurations that the autoencoder's tests share."""

import torch
from torch import Tensor

from sae.config import TrainerConfig
from sae.kernels.interface import Moments, Objective, Update, Weights
from sae.trainer import Trainer


def random_weights(d_in: int, d_sae: int, *, bias: float = -0.5, seed: int = 0) -> Weights:
    random = torch.Generator().manual_seed(seed)
    dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=random), dim=1)
    enc = torch.randn(d_sae, d_in, generator=random) / d_in**0.5
    b_enc = bias + 0.1 * torch.randn(d_sae, generator=random)
    return Weights(enc, b_enc, dec, 0.1 * torch.randn(d_in, generator=random))


def random_rows(count: int, d_in: int, *, seed: int = 1) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed))


def zero_moments(weights: Weights) -> Moments:
    first, second = (Weights(*(torch.zeros_like(tensor) for tensor in weights)) for _ in range(2))
    return Moments(first, second)


def copy_moments(moments: Moments) -> Moments:
    return Moments(moments.first.clone(), moments.second.clone())


def double(weights: Weights) -> Weights:
    return Weights(*(tensor.double() for tensor in weights))


def objective(d_in: int, *, l1_coeff: float = 0.1, **options: float) -> Objective:
    return Objective(mean=torch.zeros(d_in), l1_coeff=l1_coeff, **options)


def update(step: int = 1, **options: object) -> Update:
    fields: dict[str, object] = {
        "step": step,
        "learning_rate": 1e-2,
        "betas": (0.9, 0.99),
        "epsilon": 1e-8,
        "decoder_norm": "fixed",
    }
    return Update(**(fields | options))


def config(**options: object) -> TrainerConfig:
    fields: dict[str, object] = {
        "d_sae": 40,
        "l1_coeff": 0.05,
        "steps": 50,
        "batch_rows": 32,
        "learning_rate": 1e-2,
        "engine": "sparse",
        "density_window_rows": 128,
    }
    return TrainerConfig.model_validate(fields | options)


def start(settings: TrainerConfig, *, d_in: int = 12, threads: int = 1) -> Trainer:
    sample = random_rows(256, d_in, seed=99)
    return Trainer.start(settings, d_in, sample, sample.mean(dim=0), threads=threads)


def batch(step: int, *, d_in: int = 12, rows: int = 32) -> Tensor:
    return random_rows(rows, d_in, seed=1000 + step)
