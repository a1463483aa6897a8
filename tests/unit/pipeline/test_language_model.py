import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import language_model
from pipeline.language_model import LanguageModel
from pipeline.model_files import DEMO_FOLDER
from storage.errors import InputError, UnknownHook
from tests.transformers_by_hand import by_hand


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return language_model.load(str(tiny_model))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize("hook_name", ["blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"])
def test_the_loss_gradient_equals_finite_differences(model: LanguageModel, tokens: torch.Tensor, hook_name: str):
    gradient = model.loss_gradient(tokens, hook_name)
    acts = model.activations(tokens, hook_name)
    assert gradient.shape == acts.shape
    assert not gradient.requires_grad
    assert all(weight.grad is None for weight in model.bridge.parameters())
    step = torch.randn(acts.shape, generator=torch.Generator().manual_seed(2))
    step = 0.02 * (step + gradient / gradient.square().mean().sqrt())

    def loss(moved: float) -> float:
        logits = model.logits(tokens, {hook_name: lambda activation: activation + moved * step}).double()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses.sum().item()

    expected = (loss(1.0) - loss(-1.0)) / 2
    assert expected > 0.1
    assert (gradient * step).sum().item() == pytest.approx(expected, rel=0.02)
    assert not any(hook.fwd_hooks for hook in model.bridge.hook_dict.values())


def test_the_loss_gradient_of_mlp_outputs_equals_the_equations(
    model: LanguageModel, tiny_model: Path, tokens: torch.Tensor
):
    weights = load_file(tiny_model / "model.safetensors")
    mlp_out = by_hand(weights, tokens)["blocks.0.hook_mlp_out"].requires_grad_()
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = by_hand(weights, tokens)["blocks.0.hook_mlp_out"]
    residual = model.activations(tokens, "blocks.0.hook_resid_post").double() - x + mlp_out
    centred = residual - residual.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["ln_final.w"] + w["ln_final.b"]
    log_probabilities = (normed @ w["unembed.W_U"]).log_softmax(-1)[:, :-1]
    loss = -log_probabilities.gather(2, tokens[:, 1:, None]).sum()
    (expected,) = torch.autograd.grad(loss, mlp_out)
    torch.testing.assert_close(
        model.loss_gradient(tokens, "blocks.0.hook_mlp_out").double(), expected, rtol=1e-3, atol=1e-4
    )


def test_weights_are_as_in_the_file(model: LanguageModel, tiny_model: Path):
    weights = load_file(tiny_model / "model.safetensors")
    assert torch.equal(model.W_out(0), weights["blocks.0.mlp.W_out"])  # not centred
    assert torch.equal(model.W_U, weights["unembed.W_U"])


def test_unknown_hook_names_those_that_exist(model: LanguageModel):
    model.check_hook("blocks.0.mlp.hook_post")
    with pytest.raises(UnknownHook, match=r"blocks\.0\.mlp\.hook_post"):
        model.check_hook("blocks.0.mlp.hook_posst")


def test_a_broken_tokenizer_is_named(tmp_path: Path, tiny_model: Path):
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer file"):
        language_model.load(str(tmp_path / "broken"))


def test_passes_through_the_bridge_may_be_asked_for_by_several_threads(model: LanguageModel):
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 64, (2, 12), generator=generator) for _ in range(60)]
    alone = [model.activations(batch, "blocks.0.attn.hook_z") for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: model.activations(batch, "blocks.0.attn.hook_z"), batches))
    assert all(map(torch.equal, alone, together))


def test_bfloat16_rounds_weights_and_activations_and_gives_float32(model: LanguageModel, tiny_model: Path):
    tokens = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))
    rough = language_model.load(str(tiny_model), dtype="bfloat16")
    assert {weight.dtype for weight in rough.bridge.parameters()} == {torch.bfloat16}
    for name in ("blocks.0.mlp.hook_post", "blocks.0.attn.hook_z"):
        found, exact = rough.activations(tokens, name), model.activations(tokens, name)
        assert found.dtype is torch.float32
        assert torch.equal(found, found.bfloat16().float())
        assert 0 < float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())
    plain = rough.logits(tokens)
    assert plain.dtype is torch.float32
    seen: list[torch.dtype] = []

    def look(activation: torch.Tensor) -> torch.Tensor:
        seen.append(activation.dtype)
        return activation

    assert torch.equal(rough.logits(tokens, {"blocks.0.mlp.hook_post": look}), plain)
    assert seen == [torch.float32]
    gradient = rough.loss_gradient(tokens, "blocks.0.mlp.hook_post")
    exact = model.loss_gradient(tokens, "blocks.0.mlp.hook_post")
    assert gradient.dtype is torch.float32
    assert float((gradient - exact).norm() / exact.norm()) < 0.1
    assert (rough.W_out(0).dtype, rough.W_U.dtype) == (torch.float32, torch.float32)


def test_shipped_model_is_small_and_loads():
    model = language_model.load("demo")
    size = sum(file.stat().st_size for file in DEMO_FOLDER.glob("*"))
    assert size < 8 * 2**20
    assert (model.n_ctx, model.d_vocab, model.W_out(0).shape) == (128, 4096, (512, 128))
    assert len(model.token_strings()) == 4096
    assert (model.bos_id, model.eos_id) == (0, 1)
