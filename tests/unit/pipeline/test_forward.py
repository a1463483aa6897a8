"""The fast pass against the bridge, which is the reference, at every site."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline import language_model
from pipeline.forward import FastForward
from pipeline.language_model import LanguageModel
from tests.conftest import TINY, tiny_weights

TOKENS = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))


def model_with(tiny_model: Path, folder: Path, **changes: Any) -> LanguageModel:
    """A model like the tiny one, of two layers, in a folder of its own."""
    settings = json.loads((tiny_model / "config.json").read_text()) | {"n_layers": 2} | changes
    weights = tiny_weights()
    second = {name: tensor.flip(-1) for name, tensor in weights.items() if name.startswith("blocks.0.")}
    weights |= {name.replace("blocks.0.", "blocks.1."): tensor.contiguous() for name, tensor in second.items()}
    if settings["normalization"] == "LNPre":
        weights = {name: tensor for name, tensor in weights.items() if ".ln" not in name and "ln_final" not in name}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    return language_model.load(str(folder))


@pytest.mark.parametrize(
    "changes",
    [{}, {"act_fn": "gelu_new"}, {"act_fn": "relu"}, {"act_fn": "solu"}, {"normalization": "LNPre"}, {"ln_eps": 0.1}],
    ids=str,
)
def test_every_site_equals_the_bridges_hook(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]):
    model = model_with(tiny_model, tmp_path / "model", **changes)
    forward = model._forward
    assert forward is not None
    assert len(forward.sites) == 14
    _, cache = model.bridge.run_with_cache(TOKENS)
    for site, activation in forward(TOKENS, forward.sites).items():
        scale = float(cache[site].abs().max())
        torch.testing.assert_close(activation, cache[site], rtol=0, atol=2e-6 * scale)
        assert torch.equal(forward(TOKENS, [site])[site], activation)


def test_every_site_is_a_hook_of_the_model(tiny_model: Path):
    model = language_model.load(str(tiny_model))
    assert model._forward is not None
    assert model._forward.sites < set(model.hook_names)


@pytest.mark.parametrize("changes", [{"act_fn": "silu"}, {"normalization": "RMS"}, {"attn_only": True}])
def test_what_it_does_not_compute_it_does_not_claim(changes: dict[str, Any]):
    settings = TINY | {"act_fn": "gelu", "attn_only": False, "normalization": "LN"}
    assert FastForward.knows(settings)
    assert not FastForward.knows(settings | changes)
