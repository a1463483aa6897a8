import pytest
from pydantic import ValidationError

from sae.config import AnthropicResampling, NoResampling, ReinitResampling, TrainerConfig

from .cases import config


def test_defaults_are_the_posts():
    defaults = TrainerConfig(d_sae=16_384, l1_coeff=1.23, steps=488_281)
    assert (defaults.learning_rate, defaults.betas, defaults.batch_rows) == (1e-4, (0.9, 0.99), 4096)
    assert (defaults.lr_warmup_steps, defaults.lr_decay_fraction, defaults.gradient_clip_norm) == (0, 0, None)
    assert (defaults.init, defaults.b_dec_init, defaults.b_enc_init) == ("kaiming", "zero", "zero")
    assert defaults.resampling == NoResampling()


def test_learning_rate_warms_up_stays_and_decays_towards_zero():
    settings = config(learning_rate=1.0, steps=100, lr_warmup_steps=10, lr_decay_fraction=0.2)
    rates = [settings.learning_rate_at(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(rates[10:81]) == {1.0}
    assert rates[81:] == pytest.approx([i / 20 for i in range(19, 0, -1)])


def test_l1_coefficient_warms_up():
    settings = config(l1_coeff=2.0, l1_warmup_steps=4)
    assert [settings.l1_coeff_at(step) for step in (1, 2, 4, 5, 50)] == [0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"unknown": 1},
        {"b_enc_init": "calibrated"},
        {"target_l0": 5},
        {"b_enc_init": "calibrated", "target_l0": 40},
        {"betas": (0.9, 1.0)},
        {"resampling": {"scheme": "reinit", "window_rows": 10}},
        {"resampling": {"scheme": "reinit", "window_rows": 10, "interval_steps": 5, "steps": (3,)}},
        {"resampling": {"scheme": "anthropic", "window_rows": 10, "interval_steps": 5, "threshold": 1e-5}},
        {"precision": "bfloat16", "engine": "sparse"},
        {"precision": "bfloat16", "engine": "auto"},
        {"resampling": {"scheme": "reinit", "window_rows": 10 * 32, "interval_steps": 5}},
        {"resampling": {"scheme": "anthropic", "window_rows": 4 * 32, "steps": (5, 8)}},
        {"resampling": {"scheme": "anthropic", "window_rows": 32, "sample_rows": 4 * 32, "steps": (5, 8)}},
    ],
)
def test_inconsistent_options_are_refused(options: dict[str, object]):
    with pytest.raises(ValidationError):
        config(**options)


def test_resampling_is_due_at_multiples_but_never_after_the_last_step():
    scheme = ReinitResampling(interval_steps=10, window_rows=5, last_step=35)
    assert [step for step in range(-20, 101) if scheme.is_due(step, 100)] == [10, 20, 30]
    assert not ReinitResampling(interval_steps=10, window_rows=5).is_due(100, 100)


def test_resampling_is_due_at_listed_steps():
    scheme = AnthropicResampling(steps=(7, 9), window_rows=5)
    assert [step for step in range(20) if scheme.is_due(step, 20)] == [7, 9]


@pytest.mark.parametrize("model", [TrainerConfig, ReinitResampling, AnthropicResampling])
def test_every_field_says_what_it_is(model: type[TrainerConfig]):
    undocumented = [name for name, field in model.model_fields.items() if not field.description and name != "scheme"]
    assert undocumented == []


def test_json_round_trip():
    settings = config(resampling={"scheme": "anthropic", "steps": (20, 40), "window_rows": 64, "sample_rows": 64})
    assert TrainerConfig.model_validate_json(settings.model_dump_json()) == settings
