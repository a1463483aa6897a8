import torch

from sae.generators import generator


def draw(*key: object) -> list[float]:
    return torch.rand(4, generator=generator(*key)).tolist()


def test_same_key_same_numbers_and_any_other_key_others():
    assert draw(0, "init", 1) == draw(0, "init", 1)
    assert len({tuple(draw(*key)) for key in ((0, "init", 1), (1, "init", 1), (0, "reinit", 1), (0, "init", 2))}) == 4


def test_torchs_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    generator(3, "init")
    assert torch.equal(torch.random.get_rng_state(), before)
