"""Random models in the files, names, shapes and types of real ones: gelu-1l's and SoLU's, GPT-2's, Pythia's."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

GELU_1L, DIGITS = "NeelNanda/GELU_1L512W_C4_Code", "NeelNanda/gpt-neox-tokenizer-digits"
SETTINGS: dict[str, Any] = {
    "n_layers": 1, "d_model": 512, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48262,
    "act_fn": "gelu", "attn_only": False, "normalization": "LN", "ln_eps": 1e-5, "shortformer_pos": False,
    "tokenizer_name": DIGITS, "version": 200,
}  # fmt: skip
"""What gelu-1l's config.json says, as far as a model is concerned."""
TINY = SETTINGS | {"d_model": 16, "d_mlp": 24, "d_head": 8, "n_heads": 2, "n_ctx": 16, "d_vocab": 300}


def random_weights(settings: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a model in TransformerLens's own layout, with the buffers that were saved beside them."""
    generator = torch.Generator().manual_seed(seed)
    d, hidden, heads, width = (settings[name] for name in ("d_model", "d_mlp", "n_heads", "d_head"))
    n, vocabulary = settings["n_ctx"], settings["d_vocab"]

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-2] ** -0.5

    def vector(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.1 * torch.randn(shape, generator=generator)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.w": vector(width, around=1.0), f"{name}.b": vector(width)}

    weights = {"embed.W_E": matrix(vocabulary, d) * vocabulary**0.5 / 4, "pos_embed.W_pos": matrix(n, d) * n**0.5 / 4}
    for layer in range(settings["n_layers"]):
        block = {f"attn.W_{letter}": matrix(heads, d, width) for letter in "QKV"}
        block |= {f"attn.b_{letter}": vector(heads, width) for letter in "QKV"}
        block |= {"attn.W_O": matrix(heads, width, d), "attn.b_O": vector(d)}
        block |= {"attn.mask": torch.ones(n, n, dtype=torch.bool).tril(), "attn.IGNORE": torch.tensor(-1e5)}
        block |= {"mlp.W_in": matrix(d, hidden), "mlp.b_in": vector(hidden)}
        block |= {"mlp.W_out": matrix(hidden, d), "mlp.b_out": vector(d)}
        block |= norm("ln1", d) | norm("ln2", d) | (norm("mlp.ln", hidden) if settings["act_fn"] == "solu_ln" else {})
        weights |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    return weights | norm("ln_final", d) | {"unembed.W_U": matrix(d, vocabulary)}


def tokenizer_json(specials: tuple[str, ...]) -> bytes:
    """A tokenizer of bytes, and of these special tokens."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer.to_str().encode()


def files_of(settings: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> dict[str, Path | bytes]:
    """The files of a repository in TransformerLens's own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights), folder / "model_final.pth")
    return {"config.json": json.dumps(settings).encode(), "model_final.pth": folder / "model_final.pth"}


def tokenizer_files() -> dict[str, Path | bytes]:
    specials = {"bos_token": "<|BOS|>", "eos_token": "<|EOS|>", "pad_token": "<|PAD|>"}
    return {
        "tokenizer.json": tokenizer_json(("<|EOS|>", "<|BOS|>", "<|PAD|>")),
        "tokenizer_config.json": json.dumps(specials | {"tokenizer_class": "GPTNeoXTokenizer"}).encode(),
        "special_tokens_map.json": json.dumps(specials).encode(),
    }


def in_property_layout(folder: Path, **settings: Any) -> None:
    """Writes a tiny model in TransformerLens's own layout."""
    for name, content in files_of(TINY | settings, random_weights(TINY | settings), folder).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(("<|BOS|>", "<|EOS|>")))


def in_transformers_layout(folder: Path, model_type: str, **settings: Any) -> None:
    """Writes a tiny model as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=300, bos_token_id=256, eos_token_id=256, **settings)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + ("norm" in name or "ln_" in name))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(("<|endoftext|>",)))


def as_gpt2_was_published(folder: Path) -> None:
    """Writes a tiny GPT-2 with the names and buffers of the repository ``gpt2``."""
    in_transformers_layout(folder, "gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=16)
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def as_pythia_was_published(folder: Path) -> None:
    """Writes a tiny Pythia with the settings, names, types and buffers of the repositories ``EleutherAI/pythia-*``."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    in_transformers_layout(folder, "gpt_neox", max_position_embeddings=16, **shape)
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention"
        state[f"{name}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        state[f"{name}.masked_bias"] = torch.tensor(-1e9).half()
        state[f"{name}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.01]).half()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 256, "eos_token_id": 256, "hidden_act": "gelu",
        "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 16, "model_type": "gpt_neox",
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 300, **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def as_llama(folder: Path) -> None:
    """Writes a tiny model of an architecture that only the bridge computes."""
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 16}
    in_transformers_layout(folder, "llama", hidden_size=16, num_hidden_layers=2, **shape)


ARCHITECTURES: dict[str, Callable[[Path], None]] = {
    "gelu-1l": in_property_layout,
    "gelu-2l": partial(in_property_layout, n_layers=2),
    "gelu-3l": partial(in_property_layout, n_layers=3),
    "gelu-4l": partial(in_property_layout, n_layers=4),
    "solu-1l": partial(in_property_layout, act_fn="solu_ln"),
    "solu-2l": partial(in_property_layout, act_fn="solu_ln", n_layers=2),
    "solu-3l": partial(in_property_layout, act_fn="solu_ln", n_layers=3),
    "solu-4l": partial(in_property_layout, act_fn="solu_ln", n_layers=4),
    "solu-6l": partial(in_property_layout, act_fn="solu_ln", n_layers=6, d_model=24, n_heads=3, d_mlp=36),
    "solu-8l": partial(in_property_layout, act_fn="solu_ln", n_layers=8, d_model=32, n_heads=4, d_mlp=48),
    "solu-10l": partial(in_property_layout, act_fn="solu_ln", n_layers=10, d_model=40, n_heads=5, d_mlp=60),
    "solu-12l": partial(in_property_layout, act_fn="solu_ln", n_layers=12, d_model=48, n_heads=6, d_mlp=72),
    "gpt2": as_gpt2_was_published,
    "pythia": as_pythia_was_published,
    "llama": as_llama,
}
"""Writers of tiny models."""
