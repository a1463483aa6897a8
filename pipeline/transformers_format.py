"""Models in Hugging Face's layout: loaded by transformers, checked, wrapped by TransformerBridge.

transformers draws weights that a checkpoint lacks at random and only warns; here that is an error that names them. A
bridge that computes another function than transformers does (it overlooks some settings) is refused, by a few tokens.
``boot_transformers`` gets the model and the tokenizer ready made, so that both come from the very files that the
model's identity was taken of, and nothing is asked of a network. It neither centres W_out nor folds layer norms.

For GPT-2 and GPT-NeoX (Pythia) the weights are also put under TransformerLens's property names, for the fast pass
(``pipeline.forward``). GPT-2 keeps matrices as (in, out) and query, key and value side by side; GPT-NeoX keeps them as
(out, in) and query, key and value head by head.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.model_files import ModelFiles
from storage.errors import ConfigError, InputError

Properties: TypeAlias = tuple[dict[str, Any], dict[str, Tensor]]
"""Settings and tensors as ``pipeline.forward`` wants them."""

_SHOWN = 4
_PROBED = 8
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def boot_transformers(
    files: ModelFiles, tokenizer: Tokenizer, device: str, dtype: torch.dtype
) -> tuple[Any, Properties | None]:
    """A TransformerBridge of a causal language model, in eval mode.

    Returns:
        ``(bridge, properties)``; properties are None for architectures that the fast pass does not know.

    Raises:
        ConfigError: no causal language model, or one that TransformerBridge does not know.
        InputError: the weights do not read, or are not those of the config.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    model = _load(files, dtype).to(device)
    tokens = torch.arange(_PROBED, device=device)[None] % model.config.vocab_size
    with torch.inference_mode():
        expected = model(tokens).logits.float()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    properties = _PROPERTIES.get(files.settings["model_type"], lambda *_: None)(model.config, model.state_dict())
    try:
        bridge = TransformerBridge.boot_transformers(
            str(files.config.parent), hf_model=model, tokenizer=wrapped, device=device, dtype=dtype
        )
    except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            "TransformerBridge does not know this architecture", where=files.config,
            found=files.settings.get("architectures"), expected="one that TransformerLens supports",
        ) from error  # fmt: skip
    with torch.inference_mode():
        off = float((bridge.eval()(tokens).float() - expected).abs().max() / expected.abs().max())
    if not off <= _TOLERANCES[dtype]:
        raise ConfigError(
            "TransformerBridge computes another function than transformers from this config.json", where=files.config,
            found=f"logits off by {off:.2g} of the largest", expected=f"at most {_TOLERANCES[dtype]:g}",
        )  # fmt: skip
    return bridge, properties


def _load(files: ModelFiles, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with _without_progress():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.weights[0].parent, dtype=dtype, attn_implementation="eager", local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except (ValueError, KeyError) as error:
            raise ConfigError(
                "no causal language model that transformers loads", where=files.config, found=_line(error)
            ) from error
        except (OSError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            raise InputError("the weights do not read", where=files.weights[0], found=_line(error)) from error
    model, told = loaded
    wrong = [f"no {name}" for name in sorted(told["missing_keys"])]
    wrong += [f"{name}, which it has not" for name in sorted(told["unexpected_keys"])]
    wrong += [f"{name} of shape {tuple(a)} and not {tuple(b)}" for name, a, b in sorted(told["mismatched_keys"])]
    if wrong:
        raise InputError(
            "the weights are not those of the model's config.json", where=files.weights[0],
            found="; ".join(wrong[:_SHOWN]), remedy="restore both files from one commit of the model",
        )  # fmt: skip
    return model.eval()


@contextmanager
def _without_progress() -> Generator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _gpt2(config: Any, state: Mapping[str, Tensor]) -> Properties | None:
    usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx and not config.add_cross_attention
    if not usual:
        return None
    d, heads = config.n_embd, config.n_head
    settings = {
        "n_layers": config.n_layer, "d_model": d, "n_heads": heads, "act_fn": config.activation_function,
        "normalization": "LN", "ln_eps": config.layer_norm_epsilon, "attn_only": False,
    }  # fmt: skip
    found = {"embed.W_E": state["transformer.wte.weight"], "pos_embed.W_pos": state["transformer.wpe.weight"]}
    for layer in range(config.n_layer):
        old, new = f"transformer.h.{layer}", f"blocks.{layer}"
        found |= {f"{new}.ln{n}.{to}": state[f"{old}.ln_{n}.{part}"] for n in (1, 2) for part, to in _NORM.items()}
        matrices, biases = state[f"{old}.attn.c_attn.weight"].split(d, 1), state[f"{old}.attn.c_attn.bias"].split(d)
        for letter, matrix, bias in zip("QKV", matrices, biases, strict=True):
            found[f"{new}.attn.W_{letter}"] = matrix.unflatten(1, (heads, -1)).transpose(0, 1)
            found[f"{new}.attn.b_{letter}"] = bias.unflatten(0, (heads, -1))
        found[f"{new}.attn.W_O"] = state[f"{old}.attn.c_proj.weight"].unflatten(0, (heads, -1))
        found[f"{new}.attn.b_O"] = state[f"{old}.attn.c_proj.bias"]
        for name, to in (("c_fc", "in"), ("c_proj", "out")):
            found[f"{new}.mlp.W_{to}"] = state[f"{old}.mlp.{name}.weight"]
            found[f"{new}.mlp.b_{to}"] = state[f"{old}.mlp.{name}.bias"]
    return settings, found


def _gpt_neox(config: Any, state: Mapping[str, Tensor]) -> Properties | None:
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or not config.attention_bias:
        return None
    d, heads = config.hidden_size, config.num_attention_heads
    settings = {
        "n_layers": config.num_hidden_layers, "d_model": d, "n_heads": heads, "act_fn": config.hidden_act,
        "normalization": "LN", "ln_eps": config.layer_norm_eps, "attn_only": False,
        "parallel_attn_mlp": config.use_parallel_residual, "n_ctx": config.max_position_embeddings,
        "rotary_dim": int(d // heads * rope.get("partial_rotary_factor", 1.0)), "rotary_base": rope["rope_theta"],
    }  # fmt: skip
    found = {"embed.W_E": state["gpt_neox.embed_in.weight"]}
    norms = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    for layer in range(config.num_hidden_layers):
        old, new = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
        found |= {
            f"{new}.{to}.{p}": state[f"{old}.{name}.{part}"] for name, to in norms.items() for part, p in _NORM.items()
        }
        matrix = state[f"{old}.attention.query_key_value.weight"].unflatten(0, (heads, 3, -1))
        bias = state[f"{old}.attention.query_key_value.bias"].unflatten(0, (heads, 3, -1))
        for number, letter in enumerate("QKV"):
            found[f"{new}.attn.W_{letter}"] = matrix[:, number].transpose(1, 2)
            found[f"{new}.attn.b_{letter}"] = bias[:, number]
        found[f"{new}.attn.W_O"] = state[f"{old}.attention.dense.weight"].T.unflatten(0, (heads, -1))
        found[f"{new}.attn.b_O"] = state[f"{old}.attention.dense.bias"]
        for name, to in (("dense_h_to_4h", "in"), ("dense_4h_to_h", "out")):
            found[f"{new}.mlp.W_{to}"] = state[f"{old}.mlp.{name}.weight"].T
            found[f"{new}.mlp.b_{to}"] = state[f"{old}.mlp.{name}.bias"]
    return settings, found


_NORM = {"weight": "w", "bias": "b"}
_PROPERTIES: dict[str, Callable[[Any, Mapping[str, Tensor]], Properties | None]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
