"""Models in Hugging Face's layout against transformers' own passes, which share no code with ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import language_model
from pipeline.language_model import LanguageModel
from storage.errors import ConfigError, InputError
from tests.model_folders import ARCHITECTURES, as_gpt2_was_published, as_pythia_was_published, in_transformers_layout

IDS = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
NEOX: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


def by_transformers(folder: Path, ids: Tensor) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, output_hidden_states=True)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama"])
def test_residual_streams_and_logits_equal_those_of_transformers(tmp_path: Path, name: str):
    ARCHITECTURES[name](tmp_path / name)
    model = language_model.load(str(tmp_path / name))
    expected = by_transformers(tmp_path / name, IDS)
    torch.testing.assert_close(model.logits(IDS), expected.logits, rtol=0, atol=2e-5)
    for layer, stream in enumerate(expected.hidden_states[:-1]):  # the last one is behind the final norm
        torch.testing.assert_close(model.activations(IDS, f"blocks.{layer}.hook_resid_pre"), stream, rtol=0, atol=2e-5)


def differing(folder: Path, model_type: str, **settings: Any) -> LanguageModel:
    in_transformers_layout(folder, model_type, **settings)
    return language_model.load(str(folder))


@pytest.mark.parametrize(
    ("model_type", "settings", "fast"),
    [
        ("gpt2", GPT2, True),
        ("gpt2", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 0.1, "n_inner": 40}, True),
        ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, False),
        ("gpt_neox", NEOX, True),
        (
            "gpt_neox",
            NEOX | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
            True,
        ),
        ("gpt_neox", NEOX | {"use_parallel_residual": False}, True),
    ],
    ids=str,
)
def test_the_fast_pass_equals_the_bridge_or_is_not_taken(
    tmp_path: Path, model_type: str, settings: dict[str, Any], fast: bool
):
    model = differing(tmp_path / "model", model_type, **settings)
    _, cache = model.bridge.run_with_cache(IDS)
    expected = by_transformers(tmp_path / "model", IDS)
    torch.testing.assert_close(model.logits(IDS), expected.logits, rtol=0, atol=2e-5)
    assert (model._forward is not None) == fast
    for layer in range(2):
        for site in ("hook_resid_pre", "hook_attn_out", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"):
            name = f"blocks.{layer}.{site}"
            scale = float(cache[name].abs().max())
            torch.testing.assert_close(model.activations(IDS, name), cache[name], rtol=0, atol=3e-6 * scale)


def test_an_architecture_that_the_bridge_overlooks_something_of_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="another function than transformers"):
        differing(tmp_path / "unscaled", "gpt2", **GPT2, scale_attn_weights=False)
    with pytest.raises(ConfigError, match="does not know this architecture"):
        differing(tmp_path / "unbiased", "gpt_neox", **NEOX, attention_bias=False)


def lacking(state: dict[str, Tensor]) -> None:
    del state["h.1.mlp.c_fc.weight"]


def with_more(state: dict[str, Tensor]) -> None:
    state["h.0.mlp.gate.weight"] = torch.ones(2)


def of_another_shape(state: dict[str, Tensor]) -> None:
    state["h.0.mlp.c_fc.bias"] = torch.ones(5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lacking, r"no transformer\.h\.1\.mlp\.c_fc\.weight"),
        (with_more, r"h\.0\.mlp\.gate\.weight, which it has not"),
        (of_another_shape, r"c_fc\.bias of shape \(5,\) and not \(64,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_by_its_keys(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
):
    as_gpt2_was_published(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=said):
        language_model.load(str(tmp_path / "model"))


def test_pickled_weights_are_read_as_tensors_alone(tmp_path: Path):
    as_gpt2_was_published(tmp_path / "model")
    expected = language_model.load(str(tmp_path / "model")).logits(IDS)
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert torch.equal(language_model.load(str(tmp_path / "model")).logits(IDS), expected)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    torch.save({"wte.weight": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="do not read"):
        language_model.load(str(tmp_path / "model"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_language_model_is_refused(tmp_path: Path):
    as_pythia_was_published(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    with pytest.raises(ConfigError, match="no causal language model that transformers loads"):
        language_model.load(str(tmp_path / "model"))


def test_files_cut_short_are_named(tmp_path: Path):
    as_pythia_was_published(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"do not read; where: .*model\.safetensors"):
        language_model.load(str(tmp_path / "model"))
