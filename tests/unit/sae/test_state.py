import json

import pytest
import torch

from sae import state as states
from sae.errors import StateMismatch
from sae.trainer import Trainer

from .cases import batch, config, start


def saved(steps: int = 3, **options: object):
    settings = config(**options)
    trainer = start(settings)
    for step in range(steps):
        trainer.step(batch(step))
    return settings, trainer.state_tensors(), json.loads(json.dumps(trainer.state_json()))


def test_tensors_carry_the_fields_names_and_orientations():
    _, tensors, _ = saved()
    assert tensors["W_enc"].shape == tensors["adam.first.W_enc"].shape == (12, 40)
    assert tensors["W_dec"].shape == tensors["adam.second.W_dec"].shape == (40, 12)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_tensors_are_independent_of_training():
    trainer = start(config())
    tensors, sae = trainer.state_tensors(), trainer.autoencoder
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    trainer.step(batch(0))
    assert all(torch.equal(tensors[name], kept[name]) for name in tensors)
    assert torch.equal(sae.W_enc, kept["W_enc"])
    assert not torch.equal(trainer.state_tensors()["W_enc"], kept["W_enc"])


def test_autoencoder_round_trip():
    sae = start(config(subtract_b_dec=False)).autoencoder
    tensors, text = states.autoencoder_tensors(sae), json.loads(json.dumps(states.autoencoder_json(sae)))
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    again = states.autoencoder_from(tensors, text)
    assert torch.equal(again.W_enc, sae.W_enc)
    assert not again.subtract_b_dec


def test_an_unknown_activation_is_refused():
    sae = start(config()).autoencoder
    with pytest.raises(StateMismatch, match="relu"):
        states.autoencoder_from(states.autoencoder_tensors(sae), {"activation": "topk"})


@pytest.mark.parametrize("name", ["W_enc", "adam.second.b_dec", "dataset_mean", "resampling.counts", "density.counts"])
def test_a_missing_tensor_is_refused_by_name(name: str):
    settings, tensors, text = saved()
    del tensors[name]
    with pytest.raises(StateMismatch, match=name):
        Trainer.restore(settings, tensors, text)


def test_a_bias_that_is_a_single_number_is_refused_by_name():
    settings, tensors, text = saved()
    with pytest.raises(StateMismatch, match="W_enc"):
        Trainer.restore(settings, tensors | {"b_dec": torch.ones(())}, text)


@pytest.mark.parametrize("name", ["step", "last_l0", "version", "density_rows"])
def test_a_missing_or_mistyped_number_is_refused_by_name(name: str):
    settings, tensors, text = saved()
    for broken in ({key: value for key, value in text.items() if key != name}, text | {name: "3"}):
        with pytest.raises(StateMismatch, match=name):
            Trainer.restore(settings, tensors, broken)


def test_another_shape_or_precision_is_refused():
    settings, tensors, text = saved()
    for wrong in (tensors["W_dec"][:-1], tensors["W_dec"].double()):
        with pytest.raises(StateMismatch, match="W_dec"):
            Trainer.restore(settings, tensors | {"W_dec": wrong}, text)


def test_another_configuration_is_refused():
    _, tensors, text = saved()
    with pytest.raises(StateMismatch, match="config"):
        Trainer.restore(config(learning_rate=0.5), tensors, text)
