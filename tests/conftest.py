"""Fixtures shared by all tests: a tiny model in gelu-1l's own layout, and a workspace in a temporary folder."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would children
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # asked when triton is first imported, which torch may do

LONG_FIRST = ("integration/test_prefect.py", "faults/", "integration/", "docs/", "property/", "")

TINY = {"n_layers": 1, "d_model": 16, "d_mlp": 24, "d_head": 8, "n_heads": 2, "n_ctx": 16, "d_vocab": 64}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of processes that share the files out among them, none shall begin a long one when the others have ended."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [item.nodeid.startswith(f"tests/{path}") for path in LONG_FIRST].index(True))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 1-layer GELU model, d_mlp 24, 16 positions, 64 tokens (word_0 ... word_61)."""
    folder = tmp_path_factory.mktemp("tiny-model")
    config = TINY | {"act_fn": "gelu", "attn_only": False, "normalization": "LN", "ln_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_weights(), folder / "model.safetensors")
    vocabulary = {"<|BOS|>": 0, "<|EOS|>": 1} | {f"word_{i}": i + 2 for i in range(62)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word_0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    d, heads, width = TINY["d_model"], TINY["n_heads"], TINY["d_head"]
    attention = {f"attn.W_{name}": random(heads, d, width) for name in "QKV"}
    attention |= {f"attn.b_{name}": random(heads, width) for name in "QKV"}
    block = attention | {
        "attn.W_O": random(heads, width, d),
        "attn.b_O": random(d),
        "mlp.W_in": random(d, TINY["d_mlp"]),
        "mlp.b_in": random(TINY["d_mlp"]),
        "mlp.W_out": random(TINY["d_mlp"], d),
        "mlp.b_out": random(d),
    }
    block |= {f"{ln}.{name}": 1 + 0.1 * random(d) for ln in ("ln1", "ln2") for name in "wb"}
    return {f"blocks.0.{name}": tensor for name, tensor in block.items()} | {
        "embed.W_E": random(TINY["d_vocab"], d),
        "pos_embed.W_pos": random(TINY["n_ctx"], d),
        "ln_final.w": 1 + 0.1 * random(d),
        "ln_final.b": random(d),
        "unembed.W_U": random(d, TINY["d_vocab"]),
    }


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 2,000 documents of 20 to 60 words that the tiny model's tokenizer knows."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(2000):
        words = rng.zipf(1.3, rng.integers(20, 60)) % 62
        lines.append(json.dumps({"text": " ".join(f"word_{word}" for word in words)}) + "\n")
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_preset(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset of the whole pipeline that runs in seconds."""
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(f"""
description = "the tiny model on its tiny corpus"
[tokenize]
language_model = "{tiny_model}"
prompt_tokens = 16
train_tokens = 40_000
held_out_tokens = 600
sources = [{{ name = "words", kind = "files", files = ["{tiny_corpus}"] }}]
[harvest]
language_model = "{tiny_model}"
window_prompts = 256
chunk_rows = 32
encoding = "float32"
[train]
pool_rows = 1024
evaluate_every_steps = 20
evaluate_prompts = 8
log_every_steps = 10
[train.autoencoder]
d_sae = 64
l1_coeff = 0.05
steps = 60
batch_rows = 256
learning_rate = 3e-3
density_window_rows = 4096
init = "tied"
b_dec_init = "mean"
[analyze]
analyses = ["density", "loss_recovered", "rare_cluster", "null_space", "neuron_sparsity", "kurtosis", "enc_dec"]
""")
    return path
