"""SAELens's own trainer, one step at a time, its own mixing buffer, and its own cache of activations."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from serving import Answer, Training, load, serve_training


def start(
    *, d_in: int, d_sae: int, l1: float, learning_rate: float, batch_rows: int, steps: int, rows: str,
    weights: str | None = None, autocast: bool = False, compiled: bool = False,
) -> Training:  # fmt: skip
    config = StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=l1, dtype="float32", device="cpu")
    sae = StandardTrainingSAE(config)
    if weights:
        with torch.no_grad():
            for name, tensor in load(weights).items():
                getattr(sae, name).copy_(tensor)
    trainer: Any = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch_rows, train_batch_size_samples=batch_rows,
            lr=learning_rate, lr_end=learning_rate,
            adam_beta2=0.99, device="cpu", autocast=autocast,
        ),
        sae, iter(()),
    )  # fmt: skip

    if compiled:  # as its runner does with compile_sae
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)

    def step(batch: torch.Tensor) -> None:  # as SAETrainer.fit does it
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    return Training(
        step, lambda: {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, rows, batch_rows
    )


def mix(*, n_prompts: int, positions: int, prompts_a_pass: int, buffer_rows: int, batch_rows: int, path: str) -> Answer:
    """Prompt numbers of the batches of SAELens's mixing buffer, prompts in order: what training would get."""
    passes = torch.arange(n_prompts).split(prompts_a_pass)
    loader = (prompts.repeat_interleave(positions)[:, None] for prompts in passes)
    batches = [batch[:, 0].numpy() for batch in mixing_buffer(buffer_rows, batch_rows, loader)]
    np.save(path, np.stack(batches).astype(np.int32))
    return None


def cache(
    *, model: str, tokens: str, hook_name: str, d_in: int, prompts_a_pass: int, dtype: str, path: str, shuffle: bool
) -> Answer:
    """One run of CacheActivationsRunner on a local model and given prompts."""
    import sae_lens.cache_activations_runner as runner
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = json.loads((Path(model) / "config.json").read_text())
    wanted = ("n_layers", "d_model", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")
    config = HookedTransformerConfig(
        **{name: shape[name] for name in wanted}, normalization_type=shape["normalization"], eps=shape["ln_eps"],
        device="cpu", seed=0,
    )  # fmt: skip
    transformer = HookedTransformer(config)
    transformer.load_state_dict(load_file(Path(model) / "model.safetensors"), strict=False)
    runner.load_model = lambda **_: transformer  # the runner knows models by their names on the Hub alone
    prompts = np.load(tokens)
    settings = runner.CacheActivationsRunnerConfig(
        dataset_path="local", model_name="local", model_batch_size=prompts_a_pass, hook_name=hook_name, d_in=d_in,
        training_tokens=prompts.size, context_size=prompts.shape[1], new_cached_activations_path=path, shuffle=shuffle,
        dtype=dtype, device="cpu", prepend_bos=False, streaming=False,
        buffer_size_gb=min(0.25, 1.01e-9 * prompts.size * d_in * 2),
    )  # fmt: skip
    data = Dataset.from_dict({"tokens": prompts.tolist()})
    began = time.perf_counter()
    made = runner.CacheActivationsRunner(settings, override_dataset=data).run()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "prompts": len(made),
        "bytes": sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()),
    }


serve_training(start, mix=mix, cache=cache)
