"""Loss recovered on a real model, beside a plain computation with TransformerLens's own hooks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline import evaluation, language_model, training
from pipeline.config import Runtime, load_preset
from pipeline.evaluation import HeldOut
from pipeline.harvest import mean_activation
from pipeline.language_model import LanguageModel
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from sae.autoencoder import Autoencoder

HOOK = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def chain(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("home") / "store", threads=1), Quiet())
    return Chain(load_preset(str(tiny_preset)), workspace, run_directly)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return language_model.load(str(tiny_model))


@pytest.fixture(scope="module")
def prompts(chain: Chain) -> torch.Tensor:
    return torch.from_numpy(TokenTable(chain.tokenize()).prompts("held_out")).long()


def plain_loss(model: LanguageModel, prompts: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Cross-entropy of the predictions from position 1 on, with the activations there changed in a hook."""

    def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.cat([activation[:, :1], change(activation[:, 1:])], dim=1)

    logits = model.bridge.run_with_hooks(prompts, return_type="logits", fwd_hooks=[(HOOK, hook)]).double()
    return float(F.cross_entropy(logits[:, 1:-1].flatten(0, 1), prompts[:, 2:].flatten()))


def test_every_condition_equals_a_computation_with_plain_hooks(
    chain: Chain, model: LanguageModel, prompts: torch.Tensor
) -> None:
    trained = chain.train()
    sae, mean = training.load_autoencoder(trained), torch.from_numpy(mean_activation(chain.harvest()))
    numbers = facts(chain.analyze(trained, ["loss_recovered"])["loss_recovered"])["numbers"]
    assert numbers["n_prompts"] == len(prompts)
    with torch.inference_mode():
        losses = {
            "clean": plain_loss(model, prompts, lambda acts: acts),
            "zero": plain_loss(model, prompts, torch.zeros_like),
            "mean": plain_loss(model, prompts, mean.expand_as),
            "reconstruction": plain_loss(model, prompts, lambda acts: sae(acts).sae_out),
        }
    assert {name: numbers[f"ce_{name}"] for name in losses} == pytest.approx(losses, rel=1e-5)
    expected = (losses["zero"] - losses["reconstruction"]) / (losses["zero"] - losses["clean"])
    assert numbers["loss_recovered"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("scale", "recovered"), [(1.0, 1.0), (0.0, 0.0)])
def test_the_identity_recovers_exactly_all_and_zeros_exactly_nothing(
    scale: float, recovered: float, chain: Chain, model: LanguageModel, prompts: torch.Tensor
) -> None:
    d_in = facts(chain.harvest())["d_in"]
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])  # a pair of features a neuron: GELU goes below zero
    sae = Autoencoder(both.T.contiguous(), torch.zeros(2 * d_in), scale * both, torch.zeros(d_in))
    held_out = HeldOut(model, prompts, HOOK, first_position=1)
    assert evaluation.measure_quality(sae, held_out).recovered == recovered
