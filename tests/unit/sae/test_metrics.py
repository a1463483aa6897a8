import torch

from sae.metrics import DensityWindow


def test_fractions_count_dead_features_below_every_threshold():
    window = DensityWindow(torch.tensor([0, 1, 10, 1000]), rows=1000, complete=True)
    assert window.density.tolist() == [0, 0.001, 0.01, 1]
    assert window.dead_fraction() == 0.25
    assert window.fractions_below((1e-6, 0.005, 0.01)) == (0.25, 0.5, 0.5)


def test_an_empty_window_has_zero_densities():
    assert DensityWindow(torch.tensor([0, 0]), rows=0, complete=False).density.tolist() == [0, 0]
