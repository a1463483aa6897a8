"""The trainer finds a dictionary that it is known to be there: sparse features in superposition, four a dimension."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from sae.config import TrainerConfig
from sae.trainer import Trainer

D_IN, FEATURES, STEPS, BATCH = 64, 256, 1500, 1024


def draw(dictionary: torch.Tensor, active: float, seed: int) -> torch.Tensor:
    """Sums of the features that happen to be on, ``active`` on average, each 0.5 to 1.5 strong."""
    random = torch.Generator().manual_seed(seed)
    on = torch.rand(BATCH, FEATURES, generator=random) < active / FEATURES
    return (on * (0.5 + torch.rand(BATCH, FEATURES, generator=random))) @ dictionary


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("active", "l1_coeff"), [(2, 0.15), (4, 0.2), (8, 0.25)])
def test_a_true_dictionary_is_recovered(active: float, l1_coeff: float):
    dictionary = F.normalize(torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    every = STEPS // 5
    config = TrainerConfig(
        d_sae=FEATURES, l1_coeff=l1_coeff, steps=STEPS, batch_rows=BATCH, learning_rate=4e-3, lr_warmup_steps=100,
        lr_decay_fraction=0.3, l1_warmup_steps=100, init="tied", engine="dense",
        resampling={
            "scheme": "anthropic", "interval_steps": every, "last_step": 3 * every,
            "window_rows": 100 * BATCH, "sample_rows": 50 * BATCH,
        },
    )  # fmt: skip
    sample = torch.cat([draw(dictionary, active, -seed) for seed in range(1, 5)])
    trainer = Trainer.start(config, D_IN, sample, sample.mean(dim=0), threads=1)
    before = F.normalize(trainer.autoencoder.W_dec, dim=1)
    for step in range(STEPS):
        trainer.step(draw(dictionary, active, step + 1))
    learned = F.normalize(trainer.autoencoder.W_dec, dim=1)

    def recovered(directions: torch.Tensor) -> float:
        return float((dictionary @ directions.T).max(dim=1).values.mean())

    assert recovered(before) < 0.5
    assert recovered(learned) > 0.95
