"""EleutherAI's sparsify: its TopK coder and gradients, with torch's Adam, one step at a time.

Its own trainer wants a language model and a data set, so the loop is what its trainer does around the coder: loss
(its fraction of variance unexplained), projected gradients, optimizer, decoder rows back to unit norm.
"""

import torch
from serving import Training, load, serve_training
from sparsify import SparseCoder, SparseCoderConfig


def start(
    *, d_in: int, d_sae: int, k: int, learning_rate: float, batch_rows: int, rows: str, weights: str | None = None
) -> Training:  # fmt: skip
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device="cpu", dtype=torch.float32)
    if weights:
        given = load(weights)
        with torch.no_grad():
            coder.encoder.weight.copy_(given["W_enc"].T)
            coder.encoder.bias.copy_(given["b_enc"])
            coder.W_dec.copy_(given["W_dec"])
            coder.b_dec.copy_(given["b_dec"])
    optimizer = torch.optim.Adam(coder.parameters(), lr=learning_rate, betas=(0.9, 0.99))

    def step(batch: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def out() -> dict[str, torch.Tensor]:
        return {
            "W_enc": coder.encoder.weight.T,
            "b_enc": coder.encoder.bias,
            "W_dec": coder.W_dec,
            "b_dec": coder.b_dec,
        }

    return Training(step, out, rows, batch_rows)


serve_training(start)
