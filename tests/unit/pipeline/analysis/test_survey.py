from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.analysis import survey as surveys
from pipeline.analysis.survey import Survey, bin_edges, from_arrays, to_arrays
from pipeline.analysis.surveying import Places, SurveyState
from sae.kernels.encoder import ActiveFeatures
from storage.errors import NumericsError

N, S = 2000, 30


class Planted(NamedTuple):
    acts: np.ndarray
    prompt: np.ndarray
    position: np.ndarray
    survey: Survey


@pytest.fixture(scope="module")
def planted() -> Planted:
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.standard_normal((N, S)) - np.linspace(0, 4, S), 0).astype(np.float32)
    acts[:, 3] = 0  # dead
    acts[:, 4] = np.where(rng.random(N) < 0.3, 2.5, 0)  # one value over and over
    prompt, position = (np.arange(N) % 97).astype(np.int32), (np.arange(N) // 97).astype(np.int32)
    state = SurveyState.empty(S, Places(5, 20, 30))
    for part in (slice(0, 1), slice(1, 700), slice(700, N)):
        state.take(compressed(acts[part]), prompt[part], position[part])
    return Planted(acts, prompt, position, state.survey())


def compressed(acts: np.ndarray) -> ActiveFeatures:
    row, feature = np.nonzero(acts)
    pointer = np.concatenate([[0], np.cumsum((acts > 0).sum(axis=1))]).astype(np.int64)
    return ActiveFeatures(pointer, feature.astype(np.int32), acts[row, feature])


def test_counts_sums_and_histograms_equal_a_dense_computation(planted: Planted) -> None:
    found, acts = planted.survey, planted.acts
    assert found.n_rows == N
    np.testing.assert_array_equal(found.count, (acts > 0).sum(axis=0))
    np.testing.assert_allclose(found.total, acts.sum(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(found.l0_histogram, np.bincount((acts > 0).sum(axis=1), minlength=S + 1))
    np.testing.assert_array_equal(found.largest, acts.max(axis=0))
    edges = bin_edges()
    for feature in range(S):
        own = acts[:, feature][acts[:, feature] > 0]
        np.testing.assert_array_equal(found.histogram[feature], np.histogram(own, edges)[0])


def test_top_firings_are_the_largest_and_ties_go_to_the_earlier_prompt(planted: Planted) -> None:
    for feature in range(S):
        own = planted.acts[:, feature]
        order = np.lexsort((planted.position, planted.prompt, -own))[:5]
        order = order[own[order] > 0]
        top = [column[feature] for column in planted.survey.top]
        np.testing.assert_array_equal(top[2][: len(order)], own[order])
        np.testing.assert_array_equal(top[0][: len(order)], planted.prompt[order])
        np.testing.assert_array_equal(top[1][: len(order)], planted.position[order])
        assert (top[0][len(order) :] == -1).all()
        assert (top[2][len(order) :] == 0).all()


def test_seldom_features_keep_every_firing_in_order_and_others_none(planted: Planted) -> None:
    seldom = planted.survey.seldom
    counts = planted.survey.count
    assert (counts > 30).any()
    assert (counts == 0).any()
    for feature in range(S):
        part = slice(seldom.pointer[feature], seldom.pointer[feature + 1])
        rows = np.flatnonzero(planted.acts[:, feature]) if counts[feature] <= 30 else np.empty(0, int)
        np.testing.assert_array_equal(seldom.prompt[part], planted.prompt[rows])
        np.testing.assert_array_equal(seldom.position[part], planted.position[rows])
        np.testing.assert_array_equal(seldom.activation[part], planted.acts[rows, feature])


def test_the_sample_holds_distinct_firings_or_all_of_them(planted: Planted) -> None:
    for feature in range(S):
        prompt, position, act = (column[feature] for column in planted.survey.sample)
        used = prompt >= 0
        assert used.sum() == min(20, planted.survey.count[feature])
        rows = position[used] * 97 + prompt[used]
        assert len(set(rows.tolist())) == used.sum()
        np.testing.assert_array_equal(planted.acts[rows, feature], act[used])


def test_every_firing_has_the_same_chance_of_being_sampled() -> None:
    features, rows, places = 4000, 50, 10
    acts = np.ones((rows, features), np.float32)
    state = SurveyState.empty(features, Places(1, places, 1))
    state.take(compressed(acts), np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32))
    taken = np.bincount(state.survey().sample.prompt.ravel(), minlength=rows)
    expected = features * places / rows
    deviation = np.sqrt(expected * (1 - places / rows))
    assert abs(taken - expected).max() < 4.5 * deviation
    assert taken.std() > 0.5 * deviation  # neither evener than chance


def test_a_state_saved_and_restored_ends_with_the_same_survey(planted: Planted) -> None:
    state = SurveyState.empty(S, Places(5, 20, 30))
    for start in range(0, N, 333):
        part = slice(start, start + 333)
        state.take(compressed(planted.acts[part]), planted.prompt[part], planted.position[part])
        arrays = safetensors.numpy.load(safetensors.numpy.save(state._asdict()))
        state = SurveyState(*(arrays[name] for name in SurveyState._fields))
    whole, resumed = to_arrays(planted.survey), to_arrays(state.survey())
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_files_read_back(planted: Planted) -> None:
    arrays = to_arrays(planted.survey)
    again = to_arrays(from_arrays(safetensors.numpy.load(safetensors.numpy.save(arrays))))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
        assert array.dtype == again[name].dtype


@given(st.lists(st.floats(2.0**-149, float(np.finfo(np.float32).max), width=32), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_activation_falls_into_the_bin_whose_edges_hold_it(values: list[float]) -> None:
    state = SurveyState.empty(1, Places(1, 1, 1))
    acts = np.array(values, np.float32)[:, None]
    state.take(compressed(acts), np.zeros(len(acts), np.int32), np.zeros(len(acts), np.int32))
    np.testing.assert_array_equal(state.histogram[0], np.histogram(acts.astype(np.float64), bin_edges())[0])


def test_edges_double_every_octave() -> None:
    edges = bin_edges()
    assert edges[0] == 0
    assert edges[-1] == np.inf
    np.testing.assert_array_equal(edges[1 + surveys.BINS_AN_OCTAVE : -1], 2 * edges[1 : -1 - surveys.BINS_AN_OCTAVE])


def test_a_feature_that_is_not_finite_is_named() -> None:
    state = SurveyState.empty(3, Places(1, 1, 1))
    active = ActiveFeatures(np.array([0, 1]), np.array([2], np.int32), np.array([np.nan], np.float32))
    state.take(active, np.zeros(1, np.int32), np.zeros(1, np.int32))
    with pytest.raises(NumericsError, match="feature 2"):
        state.survey()


def test_the_pass_through_the_encoder_counts_what_the_autoencoder_fires(world: SimpleNamespace) -> None:
    rng = np.random.default_rng(1)
    sae = world.autoencoder(rng.standard_normal((8, 20)), -np.ones(20), rng.standard_normal((20, 8)), np.zeros(8))
    rows = rng.standard_normal((1500, 8)).astype(np.float32)
    found = world.survey(sae, world.rows(rows))
    acts = np.maximum(rows @ sae.W_enc.numpy() + sae.b_enc.numpy(), 0)
    np.testing.assert_array_equal(found.count, (acts > 0).sum(axis=0))
    np.testing.assert_allclose(found.total, acts.sum(axis=0), rtol=1e-5)
