from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis import Context, encoder_sparsity

D, N = 64, 20
OPTIONS = encoder_sparsity.OPTIONS()


def one(
    world: SimpleNamespace, *, sparse: int, rare: int, recovered: float, name: str = "", at: float = 0.0
) -> Context:
    """An autoencoder whose last ``sparse`` encoders are single neurons, and the others spread evenly."""
    encoder = np.ones((N, D))
    encoder[N - sparse :] = np.eye(D)[:sparse]
    trainer = {name: at} if name else {}
    found = {"loss_recovered": {"loss_recovered": recovered, "fve": 0.8}}
    return world.context(encoder, np.ones((N, D)), rare=rare, trainer=trainer, label=f"{name} {at:g}", numbers=found)


@pytest.fixture
def sweep(world: SimpleNamespace) -> Context:
    first = one(world, sparse=1, rare=8, recovered=0.95)
    others = (
        one(world, sparse=4, rare=6, recovered=0.945, name="encoder_l1", at=1e-5),
        one(world, sparse=9, rare=2, recovered=0.80, name="encoder_l1", at=1e-3),
        one(world, sparse=2, rare=8, recovered=0.95, name="encoder_l2", at=1e-4),
    )
    return replace(first, companions=others)


def test_the_sweep_answers_both_questions(sweep: Context) -> None:
    numbers = encoder_sparsity.run(sweep, OPTIONS).numbers
    assert numbers["rare_fraction"] == pytest.approx(8 / N)
    assert (numbers["rare_fraction_least"], numbers["rare_fraction_least_at"]) == (2 / N, "encoder_l1 0.001")
    assert numbers["rare_fraction_least_loss_recovered"] == 0.8
    # of frequent features alone: the last N - rare, among which the single neurons are
    assert numbers["encoder_sparse"] == pytest.approx(1 / 12)
    assert (numbers["encoder_sparse_most"], numbers["encoder_sparse_most_at"]) == (9 / 18, "encoder_l1 0.001")
    assert (numbers["encoder_sparse_free"], numbers["encoder_sparse_free_at"]) == (2 / 12, "encoder_l2 0.0001")
    assert numbers["encoder_sparse_free_rare_fraction"] == pytest.approx(8 / N)


@pytest.mark.parametrize(
    ("loss", "l0", "at"),
    [
        (0.01, 0.2, "encoder_l1 1e-05"),  # 14 features fire on a tenth of the rows where 12 did: 17 % more
        (0.01, 0.15, "encoder_l2 0.0001"),
        (0.001, 0.2, "encoder_l2 0.0001"),
        (0.2, 0.6, "encoder_l1 0.001"),
    ],
)
def test_what_costs_nothing_is_a_matter_of_loss_and_l0(sweep: Context, loss: float, l0: float, at: str) -> None:
    options = encoder_sparsity.OPTIONS(tolerated_loss=loss, tolerated_l0=l0)
    assert encoder_sparsity.run(sweep, options).numbers["encoder_sparse_free_at"] == at


def test_the_table_has_a_row_a_run_and_each_penalty_a_figure(sweep: Context) -> None:
    result = encoder_sparsity.run(sweep, OPTIONS)
    rows = result.tables["runs"].to_pylist()
    assert [(row["encoder_l1"], row["encoder_l2"]) for row in rows] == [(0, 0), (1e-5, 0), (1e-3, 0), (0, 1e-4)]
    assert rows[0]["l0"] == pytest.approx(12 * 0.1)
    assert rows[0]["dead_fraction"] == pytest.approx(8 / N)
    assert rows[0]["decoder_sparse_fraction"] == 0
    assert [list(figure.data[0].x) for figure in result.figures.values()] == [["0", "1e-05", "0.001"], ["0", "0.0001"]]


def test_neuron_sparse_is_what_is_not_dense() -> None:
    rows = np.stack([np.eye(D)[0], np.ones(D), np.repeat([1.0, 0.0], [10, D - 10]), np.zeros(D)])
    assert encoder_sparsity.neuron_sparse_fraction(rows) == pytest.approx(2 / 3)
    assert encoder_sparsity.neuron_sparse_fraction(np.zeros((2, D))) is None
