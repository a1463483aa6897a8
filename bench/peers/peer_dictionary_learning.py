"""dictionary_learning's own standard trainer, one step at a time."""

from itertools import count

import torch
from dictionary_learning.trainers.standard import StandardTrainer
from serving import Training, load, serve_training


def start(
    *, d_in: int, d_sae: int, l1: float, learning_rate: float, batch_rows: int, steps: int, rows: str,
    weights: str | None = None,
) -> Training:  # fmt: skip
    trainer = StandardTrainer(
        steps=steps, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="bench", lr=learning_rate, l1_penalty=l1,
        warmup_steps=0, sparsity_warmup_steps=None, seed=0, device="cpu",
    )  # fmt: skip
    ae = trainer.ae
    if weights:
        given = load(weights)
        with torch.no_grad():
            ae.encoder.weight.copy_(given["W_enc"].T)
            ae.encoder.bias.copy_(given["b_enc"])
            ae.decoder.weight.copy_(given["W_dec"].T)
            ae.bias.copy_(given["b_dec"])
    steps_taken = count(1)

    def out() -> dict[str, torch.Tensor]:
        return {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight.T, "b_dec": ae.bias}

    return Training(lambda batch: trainer.update(next(steps_taken), batch), out, rows, batch_rows)


serve_training(start)
