import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import language_model
from pipeline.language_model import LanguageModel
from storage.errors import ConfigError, InputError, UnknownHook


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return language_model.load(str(tiny_model))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))


def by_hand(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The transformer's equations, head by head, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.w"] + w[f"{name}.b"]

    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    y = norm(x, "blocks.0.ln1")
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    out = w["blocks.0.attn.b_O"]
    for head in range(2):
        q, k, v = (y @ w[f"blocks.0.attn.W_{n}"][head] + w[f"blocks.0.attn.b_{n}"][head] for n in "QKV")
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
        out = out + scores.softmax(-1) @ v @ w["blocks.0.attn.W_O"][head]
    x = x + out
    pre = norm(x, "blocks.0.ln2") @ w["blocks.0.mlp.W_in"] + w["blocks.0.mlp.b_in"]
    post = pre * 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
    mlp_out = post @ w["blocks.0.mlp.W_out"] + w["blocks.0.mlp.b_out"]
    logits = norm(x + mlp_out, "ln_final") @ w["unembed.W_U"]
    return {"blocks.0.mlp.hook_post": post, "blocks.0.hook_mlp_out": mlp_out, "logits": logits}


def test_forward_equals_the_equations(model: LanguageModel, tiny_model: Path, tokens: torch.Tensor):
    expected = by_hand(load_file(tiny_model / "model.safetensors"), tokens)
    for hook_name in ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"):
        torch.testing.assert_close(
            model.activations(tokens, hook_name).double(), expected[hook_name], rtol=0, atol=1e-4
        )
    torch.testing.assert_close(model.logits(tokens).double(), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("hook_name", ["blocks.0.mlp.hook_post", "blocks.0.attn.hook_z"])  # the fast pass; by hooks
def test_pass_to_a_hook_stops_there_and_leaves_no_hook(model: LanguageModel, tokens: torch.Tensor, hook_name: str):
    reached: list[str] = []
    handle = model.bridge.hook_dict["ln_final.hook_in"].register_forward_hook(lambda *_: reached.append("after"))
    try:
        got = model.activations(tokens, hook_name)
    finally:
        handle.remove()
    assert reached == []
    _, cache = model.bridge.run_with_cache(tokens)
    torch.testing.assert_close(got, cache[hook_name], rtol=1e-5, atol=1e-5)
    assert not any(hook.fwd_hooks for hook in model.bridge.hook_dict.values())


@pytest.mark.parametrize("others", [["blocks.0.hook_mlp_out"], ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"]])
def test_a_hook_gives_the_same_bits_whichever_others_are_asked_for(
    model: LanguageModel, tokens: torch.Tensor, others: list[str]
):
    names = ["blocks.0.mlp.hook_post", *others]
    together = model.activations_at(tokens, names)
    assert set(together) == set(names)
    for name in names:
        assert torch.equal(together[name], model.activations(tokens, name))


def test_edits_replace_activations(model: LanguageModel, tokens: torch.Tensor):
    plain = model.logits(tokens)
    hook_name = "blocks.0.mlp.hook_post"
    assert torch.equal(model.logits(tokens, {hook_name: lambda activation: activation}), plain)
    zeroed = model.logits(tokens, {hook_name: torch.zeros_like})
    assert not torch.allclose(zeroed, plain)
    assert torch.equal(model.logits(tokens), plain)


def test_weights_are_as_in_the_file(model: LanguageModel, tiny_model: Path):
    weights = load_file(tiny_model / "model.safetensors")
    assert torch.equal(model.W_out(0), weights["blocks.0.mlp.W_out"])  # not centred
    assert torch.equal(model.W_U, weights["unembed.W_U"])


def test_unknown_hook_names_those_that_exist(model: LanguageModel):
    model.check_hook("blocks.0.mlp.hook_post")
    with pytest.raises(UnknownHook, match=r"blocks\.0\.mlp\.hook_post"):
        model.check_hook("blocks.0.mlp.hook_posst")


def test_identity_follows_every_file(tiny_model: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert language_model.identity(str(copy)) == language_model.identity(str(tiny_model))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"ln_eps": 1e-6}))
    assert language_model.identity(str(copy)) != language_model.identity(str(tiny_model))


def test_bad_models_are_named(tmp_path: Path, tiny_model: Path):
    folder = tmp_path / "weightless"
    folder.mkdir()
    (folder / "config.json").write_text('{"d_mlp": 1}')
    with pytest.raises(ConfigError, match="no weights"):
        language_model.load(str(folder))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer file"):
        language_model.load(str(broken))


def test_shipped_model_is_small_and_loads():
    model = language_model.load("demo")
    size = sum(file.stat().st_size for file in language_model.DEMO_FOLDER.glob("*"))
    assert size < 8 * 2**20
    assert (model.n_ctx, model.d_vocab, model.W_out(0).shape) == (128, 4096, (512, 128))
    assert len(model.token_strings()) == 4096
    assert (model.bos_id, model.eos_id) == (0, 1)


def test_a_hub_repository_loads_from_the_cache_without_a_network(tiny_model: Path, tmp_path: Path):
    def cache(repository: str, files: dict[str, Path]) -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for name, file in files.items():
            shutil.copy(file, snapshot / name)

    config = json.loads((tiny_model / "config.json").read_text()) | {
        "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tiny_model / "model.safetensors")
    state |= {"blocks.0.attn.mask": torch.ones(16, 16).tril().bool(), "blocks.0.attn.IGNORE": torch.tensor(-1e5)}
    torch.save(state, tmp_path / "final.pth")
    cache(
        "NeelNanda/GELU_1L512W_C4_Code",
        {"config.json": tmp_path / "config.json", "model_final.pth": tmp_path / "final.pth"},
    )
    cache("NeelNanda/gpt-neox-tokenizer-digits", {"tokenizer.json": tiny_model / "tokenizer.json"})
    code = (
        "import torch; from pipeline import language_model as lm; model = lm.load('gelu-1l');"
        "print(model.logits(torch.arange(8)[None]).double().sum().item(), model.hook_names[0])"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    expected = language_model.load(str(tiny_model)).logits(torch.arange(8)[None]).double().sum().item()
    assert float(done.stdout.split()[0]) == pytest.approx(expected, rel=1e-6, abs=1e-4)
