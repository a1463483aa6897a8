import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import language_model
from pipeline.model_files import find_files
from pipeline.property_format import read_properties
from storage.errors import ConfigError, InputError
from tests.model_folders import TINY, files_of, in_property_layout, random_weights
from tests.transformers_by_hand import by_hand

IDS = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))


def written(folder: Path, weights: dict[str, Tensor], **settings: Any) -> Path:
    """A folder with these weights, in a file with the names that gelu-1l's repository has."""
    in_property_layout(folder)
    for name, content in files_of(TINY | settings, weights, folder).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "settings", [{}, {"n_layers": 2}, {"act_fn": "solu_ln", "n_layers": 2}, {"ln_eps": 0.1}], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_every_site_and_the_logits_equal_the_equations(tmp_path: Path, settings: dict[str, Any], biased: bool):
    weights = random_weights(TINY | settings)
    if biased:
        weights["unembed.b_U"] = torch.randn(300, generator=torch.Generator().manual_seed(2))
    model = language_model.load(str(written(tmp_path / "model", weights, **settings)))
    whole: dict[str, Any] = TINY | settings
    expected = by_hand(weights, IDS, whole["act_fn"], whole["ln_eps"])
    torch.testing.assert_close(model.logits(IDS).double(), expected.pop("logits"), rtol=0, atol=2e-5)
    _, cache = model.bridge.run_with_cache(IDS)
    for name, activation in expected.items():
        torch.testing.assert_close(model.activations(IDS, name).double(), activation, rtol=0, atol=2e-5)
        if name in cache:
            torch.testing.assert_close(cache[name].double(), activation, rtol=0, atol=2e-5)


def test_hook_post_of_solu_is_behind_the_inner_norm(tmp_path: Path):
    weights = random_weights(TINY | {"act_fn": "solu_ln"})
    weights["blocks.0.mlp.ln.w"], weights["blocks.0.mlp.ln.b"] = torch.zeros(24), torch.arange(24.0)
    model = language_model.load(str(written(tmp_path / "model", weights, act_fn="solu_ln")))
    assert torch.equal(model.activations(IDS, "blocks.0.mlp.hook_post"), torch.arange(24.0).expand(3, 12, 24))


def test_buffers_are_dropped_and_half_precision_is_read_as_float32(tmp_path: Path):
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in random_weights(TINY).items()
    }
    state = read_properties(find_files(str(written(tmp_path / "model", weights))))
    assert not any(name.endswith((".mask", ".IGNORE")) for name in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["embed.W_E"], weights["embed.W_E"].float())
    assert torch.equal(state["unembed.b_U"], torch.zeros(300))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("blocks.0.attn.W_Q"), r"found no blocks\.0\.attn\.W_Q; expected 22 tensors"),
        (without("ln_final.w"), r"found no ln_final\.w;"),
        (lambda weights: weights.update({"blocks.0.attn.c_attn": torch.ones(1)}), r"c_attn, which it has not"),
        (
            lambda weights: weights.update({"blocks.0.mlp.W_in": torch.ones(24, 16)}),
            r"blocks\.0\.mlp\.W_in of shape \(24, 16\) and not \(16, 24\)",
        ),
        (lambda weights: [weights.pop(name) for name in list(weights)[:9]], r"no embed\.W_E; .* and 5 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_by_its_keys(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
):
    weights = random_weights(TINY)
    change(weights)
    folder = written(tmp_path / "model", weights)
    with pytest.raises(InputError, match=said):
        language_model.load(str(folder))


def test_a_file_that_holds_objects_is_not_run(tmp_path: Path):
    folder = written(tmp_path / "model", random_weights(TINY))

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    torch.save({"embed.W_E": Evil()}, folder / "model_final.pth")
    with pytest.raises(InputError, match="the weights do not read"):
        language_model.load(str(folder))
    (folder / "model_final.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InputError, match="the weights do not read"):
        language_model.load(str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model_final.pth", "model.safetensors"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str):
    folder = written(tmp_path / "model", random_weights(TINY))
    if name == "model.safetensors":
        (folder / "model_final.pth").unlink()
        save_file(random_weights(TINY), folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"do not read; where: .*{name}"):
        language_model.load(str(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shortformer_pos": True}, "shortformer"),
        ({"act_fn": "tanh"}, r"cannot compute this model; .*tanh"),
    ],
)
def test_what_the_bridge_cannot_compute_is_refused(tmp_path: Path, settings: dict[str, Any], said: str):
    folder = written(tmp_path / "model", random_weights(TINY), **settings)
    with pytest.raises(ConfigError, match=said):
        language_model.load(str(folder))


def test_settings_that_are_missing_are_named(tmp_path: Path):
    folder = written(tmp_path / "model", random_weights(TINY))
    settings = {name: value for name, value in TINY.items() if name not in {"d_head", "d_mlp"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"lacks settings; where: .*config\.json; found no d_head, d_mlp"):
        language_model.load(str(folder))
