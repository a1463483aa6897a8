from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.analysis import Context, FeatureDensities, direction_pass, logit_effects, passages, rare_direction
from pipeline.analysis.direction_gradients import mean_gradients
from pipeline.analysis.direction_pass import project_rows
from pipeline.analysis.direction_texts import EDITS, try_edits
from pipeline.statistics import Moments, Sums
from sae.config import TrainerConfig
from storage.errors import ConfigError

D, RARE, FREQUENT, VOCAB, POSITIONS, PROMPTS = 24, 12, 20, 40, 10, 150
OPTIONS = rare_direction.OPTIONS(ultra_low_below=0.02, top_tokens=5, top_logits=4, singular_vectors=6, flip_within=0.3)


@dataclass
class Planted:
    """A model, the store of its activations, and an autoencoder whose first features share a direction."""

    context: Context
    direction: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray

    @property
    def places(self) -> list[tuple[int, int]]:
        return [(number // (POSITIONS - 1), 1 + number % (POSITIONS - 1)) for number in range(len(self.rows))]


def moments_of(rows: np.ndarray) -> Moments:
    moments = Moments.empty(D)
    low, high = rows.min(axis=0), rows.max(axis=0)
    moments.add(Sums(len(rows), rows.sum(axis=0, dtype=np.float64), low, high, rows.T @ rows))
    return moments


def mixing_model(world: SimpleNamespace) -> Any:
    """The world's model, each position of which sees the mean of the tokens up to it as well."""
    plain = world.model(D, 6, VOCAB, POSITIONS)

    class Mixing(type(plain)):  # type: ignore[misc]
        def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
            assert hook_name == world.HOOK
            own, seen = self.W_E[tokens], torch.arange(1, tokens.shape[1] + 1)
            return torch.relu(own + 0.2 * self.W_pos[: tokens.shape[1]] + own.cumsum(dim=1) / seen[:, None])

    return Mixing(plain.W_E, plain.W_pos, plain.W, plain.W_U)


@pytest.fixture
def planted(world: SimpleNamespace) -> Planted:
    rng = np.random.default_rng(0)
    model = mixing_model(world)
    tokens = rng.integers(1, VOCAB, (PROMPTS + 40, POSITIONS))
    tokens[:, 0] = 0
    train = tokens[:PROMPTS]
    acts = model.activations(torch.from_numpy(train), world.HOOK)[:, 1:].reshape(-1, D).numpy()
    direction = np.abs(rng.standard_normal(D)) * np.where(np.arange(D) % 3, 1, -1)
    direction /= np.linalg.norm(direction)
    encoder = rng.standard_normal((RARE + FREQUENT, D))
    encoder[:RARE] = np.linspace(0.5, 2, RARE)[:, None] * (direction + 0.02 * encoder[:RARE])
    decoder = rng.standard_normal((RARE + FREQUENT, D)) / 5
    projection = acts @ encoder.T
    bias = -np.quantile(projection, 0.5, axis=0)
    bias[:RARE] = -np.quantile(projection[:, :RARE], np.linspace(0.985, 1, RARE), axis=0).diagonal()
    sae = world.autoencoder(encoder.T, bias, decoder, 0.1 * rng.standard_normal(D))
    counts = (sae.encode(torch.from_numpy(acts)) > 0).sum(dim=0).numpy()
    config = TrainerConfig(d_sae=RARE + FREQUENT, l1_coeff=0.3, steps=10).model_dump(mode="json")
    where = [(number // (POSITIONS - 1), 1 + number % (POSITIONS - 1)) for number in range(len(acts))]
    context = Context(
        sae=sae,
        hook_name=world.HOOK,
        sae_config={"autoencoder": config},
        model=model,
        reader=world.Rows(acts, *np.array(where).T),
        tokens=world.Prompts(train, tokens[PROMPTS:]),
        token_strings=["<B>", *[f"{' ' if number % 2 else ''}{'w' if number < 20 else 'W'}{number % 20 // 2}"
                                for number in range(VOCAB - 1)]],
        densities=FeatureDensities(counts, len(acts)),
        moments=moments_of(acts),
    )  # fmt: skip
    assert (counts[:RARE] / len(acts) < 0.02).all()
    assert (counts[RARE:] / len(acts) > 0.02).all()
    encoder64 = sae.W_enc.double().numpy().T[:RARE]
    mean = encoder64.mean(axis=0)
    return Planted(context, mean / np.linalg.norm(mean), acts, train)


def test_the_planted_direction_is_found_raw_and_unit(planted: Planted) -> None:
    encoder = planted.context.sae.W_enc.double().numpy().T[:RARE]
    raw, unit = rare_direction.mean_directions(encoder)
    np.testing.assert_allclose(raw, planted.direction)
    expected = (encoder / np.linalg.norm(encoder, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected))
    numbers = rare_direction.run(planted.context, OPTIONS).numbers
    assert numbers["n_rare"] == RARE
    assert numbers["cosine_raw_unit"] == pytest.approx(planted.direction @ expected / np.linalg.norm(expected))
    assert float(numbers["cosine_raw_unit"] or 0) > 0.99


def test_top_and_bottom_tokens_are_those_of_a_sort_with_their_text(planted: Planted) -> None:
    tables = rare_direction.run(planted.context, OPTIONS).tables
    projection = planted.rows.astype(np.float64) @ planted.direction
    strings = planted.context.token_strings or []
    for name, sign in (("top_tokens", -1), ("bottom_tokens", 1)):
        order = np.argsort(sign * projection.round(4), kind="stable")  # rows of one token in one place are equal
        found = tables[name].to_pylist()
        assert [(row["prompt"], row["position"]) for row in found] == [planted.places[row] for row in order[:5]]
        np.testing.assert_allclose([row["projection"] for row in found], projection[order[:5]], rtol=1e-5)
        np.testing.assert_allclose([row["norm"] for row in found], np.linalg.norm(planted.rows[order[:5]], axis=1))
        prompt, position = planted.places[order[0]]
        words = [strings[number] for number in planted.tokens[prompt]]
        assert found[0]["before"] + found[0]["token"] + found[0]["after"] == "".join(words[: position + 7])
        assert found[0]["token"] == words[position]


def test_numbers_of_the_direction_equal_an_independent_computation(planted: Planted) -> None:
    numbers = rare_direction.run(planted.context, OPTIONS).numbers
    u, rows = planted.direction, planted.rows.astype(np.float64)
    squares = np.sort(u**2)[::-1]
    projection = rows @ u
    model: Any = planted.context.model
    logits = u @ model.W.double().numpy() @ model.W_U.double().numpy()
    spaced = [text.startswith(" ") for text in planted.context.token_strings or ()]
    _, _, vectors = np.linalg.svd(rows, full_matrices=False)
    cosines = vectors[:6] @ u
    table = rare_direction.run(planted.context, OPTIONS).tables["singular_vectors"]
    np.testing.assert_allclose(np.abs(table["cosine"].to_numpy()), np.abs(cosines), rtol=1e-4)
    np.testing.assert_allclose(
        table["rms_projection"].to_numpy() ** 2, ((rows @ vectors[:6].T) ** 2).mean(axis=0), rtol=1e-4
    )
    mean = rows.mean(axis=0)
    expected = {
        "fve_top_1": squares[0],
        "fve_top_10": squares[:10].sum(),
        "neuron_kurtosis": stats.kurtosis(u),
        "logit_kurtosis": stats.kurtosis(logits),
        "space_correlation": stats.pearsonr(spaced, logits).statistic,
        "cosine_mean": u @ mean / np.linalg.norm(mean),
        "cosine_singular": np.abs(cosines).max(),
        "singular_number": np.abs(cosines).argmax() + 1,
        "singular_share": (cosines**2).sum(),
        "cosine_ones": u.sum() / D**0.5,
        "positive_share": (u > 0).mean(),
        "cosine_random": D**-0.5,
        "norm_correlation": stats.pearsonr(projection, np.linalg.norm(rows, axis=1)).statistic,
        "projection_mean": projection.mean(),
        "projection_std": projection.std(),
        "projection_max": projection.max(),
        "projection_min": projection.min(),
        "n_rows": len(rows),
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_planted_neuron_ones_vector_and_singular_vector_are_recognised(planted: Planted, world: Any) -> None:
    _, vectors = planted.context.need_moments().singular_vectors()
    neuron = np.eye(D)[7]

    def measure(direction: np.ndarray) -> Any:
        encoder = np.tile(direction[:, None], (1, RARE + FREQUENT))
        sae = planted.context.sae
        alike = world.autoencoder(encoder, sae.b_enc.numpy(), sae.W_dec.numpy(), sae.b_dec.numpy())
        return rare_direction.run(replace(planted.context, sae=alike), OPTIONS).numbers

    assert measure(neuron)["fve_top_1"] == pytest.approx(1)
    assert measure(neuron)["positive_share"] == pytest.approx(1 / D)
    assert measure(np.ones(D))["cosine_ones"] == pytest.approx(1)
    third = measure(-vectors[2])
    assert third["cosine_singular"] == pytest.approx(1, rel=1e-6)
    assert third["singular_number"] == 3
    assert measure(planted.rows.mean(axis=0))["cosine_mean"] == pytest.approx(1)


def test_logits_are_those_of_a_sort_and_apply_where_a_path_to_them_exists(planted: Planted) -> None:
    model: Any = planted.context.model
    logits = planted.direction @ model.W.double().numpy() @ model.W_U.double().numpy()
    logits -= logits.mean()
    table = rare_direction.run(planted.context, OPTIONS).tables["logits"]
    strings = np.array(planted.context.token_strings)
    assert table["raised"].to_pylist() == strings[np.argsort(-logits)[:4]].tolist()
    assert table["lowered"].to_pylist() == strings[np.argsort(logits)[:4]].tolist()
    np.testing.assert_allclose(table["logit_raised"].to_numpy(), -np.sort(-logits)[:4])
    residual = replace(planted.context, hook_name="blocks.0.hook_mlp_out")
    at_residual = logit_effects.logit_weights(residual, np.eye(6)[2])
    W_U = model.W_U.double().numpy()
    np.testing.assert_allclose(at_residual, W_U[2] - W_U[2].mean())
    assert logit_effects.logit_weights(residual, planted.direction) is None


def test_tokens_beyond_each_hyperplane_are_its_density(planted: Planted) -> None:
    result = rare_direction.run(planted.context, OPTIONS)
    table = result.tables["hyperplanes"]
    sae = planted.context.sae
    pre = sae.pre_activations(torch.from_numpy(planted.rows)).numpy()[:, :RARE]
    beyond = (pre > 0).mean(axis=0)
    np.testing.assert_allclose(table["beyond"].to_numpy(), beyond)
    np.testing.assert_allclose(table["behind"].to_numpy(), 1 - beyond)
    assert result.numbers["beyond_median"] == pytest.approx(np.median(beyond))
    assert result.numbers["beyond_max"] == pytest.approx(beyond.max())
    assert result.numbers["one_sided_fraction"] == pytest.approx((beyond == 0).mean())
    mean = planted.rows.astype(np.float64).mean(axis=0)
    for feature, threshold in enumerate(table["threshold"].to_pylist()):
        at = torch.from_numpy(mean + (threshold - mean @ planted.direction) * planted.direction)
        assert sae.to(torch.float64).pre_activations(at)[feature].item() == pytest.approx(0, abs=1e-5)


def test_gradients_equal_a_loop_over_tokens_and_features(planted: Planted) -> None:
    context, sae = planted.context, planted.context.sae.to(torch.float64)
    tokens = torch.from_numpy(context.need_tokens().prompts("held_out"))
    found = mean_gradients(context, np.arange(RARE), range(len(tokens)), within=0.3, micro_batch_prompts=7)
    model: Any = context.model
    to_logits = (model.W @ model.W_U).double()
    x_all = model.activations(tokens, context.hook_name).double()
    pre_std = (torch.from_numpy(planted.rows).double() @ sae.W_enc).numpy().std(axis=0)
    autoencoder = {name: np.zeros(D) for name in ("all", "firing", "flip")}
    of_model = {name: np.zeros(D) for name in autoencoder}
    pairs = dict.fromkeys(autoencoder, 0)
    for prompt, acts in zip(tokens, x_all, strict=True):
        for position in range(1, POSITIONS - 1):
            x = acts[position]
            residual = (x @ to_logits).softmax(0) - torch.eye(VOCAB, dtype=torch.float64)[prompt[position + 1]]
            by_x = (to_logits @ residual).numpy()
            error = sae(x).sae_out - x
            for feature in range(RARE):
                column = (2 * error @ sae.W_dec[feature] + 0.3) * (x - sae.b_dec)
                pre = sae.pre_activations(x)[feature].item()
                for name, counts in (("all", True), ("firing", pre > 0), ("flip", abs(pre) <= 0.3 * pre_std[feature])):
                    if counts:
                        autoencoder[name] += column.numpy()
                        of_model[name] += by_x
                        pairs[name] += 1
    assert found.rows == len(tokens) * (POSITIONS - 2)
    assert dict(found.pairs) == pairs
    assert 0 < pairs["firing"] < pairs["flip"] < pairs["all"]
    for name in autoencoder:
        np.testing.assert_allclose(found.autoencoder[name], autoencoder[name] / pairs[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.model[name], of_model[name] / pairs[name], rtol=1e-4, atol=1e-5)
    numbers = rare_direction.run(context, OPTIONS).numbers
    for loss, gradients in (("autoencoder", autoencoder), ("model", of_model)):
        for name, gradient in gradients.items():
            expected = planted.direction @ gradient / np.linalg.norm(gradient)
            assert numbers[f"gradient_{loss}_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (numbers["gradient_firings"], numbers["gradient_flips"]) == (pairs["firing"], pairs["flip"])


def test_the_gradient_over_firing_tokens_is_the_one_that_training_follows(planted: Planted) -> None:
    context, sae = planted.context, planted.context.sae.to(torch.float64)
    tokens = torch.from_numpy(context.need_tokens().prompts("held_out"))
    found = mean_gradients(context, np.arange(RARE), range(len(tokens)), within=0.3, micro_batch_prompts=8)
    x = context.need_model().activations(tokens, context.hook_name)[:, 1:-1].flatten(0, 1).double()
    W_enc = sae.W_enc.clone().requires_grad_()
    acts = torch.relu((x - sae.b_dec) @ W_enc + sae.b_enc)
    loss = (acts @ sae.W_dec + sae.b_dec - x).square().sum() + 0.3 * acts.sum()
    (gradient,) = torch.autograd.grad(loss, W_enc)
    expected = gradient[:, :RARE].sum(dim=1).numpy() / found.pairs["firing"]
    np.testing.assert_allclose(found.autoencoder["firing"], expected, rtol=1e-4, atol=1e-5)


def test_without_a_recorded_training_only_the_models_gradient_is_known(planted: Planted) -> None:
    numbers = rare_direction.run(replace(planted.context, sae_config={}), OPTIONS).numbers
    assert numbers["gradient_autoencoder_flip"] is None
    assert numbers["gradient_model_flip"] is not None


def test_edits_equal_projections_of_texts_edited_by_hand(planted: Planted) -> None:
    context, u = planted.context, planted.direction
    top = project_rows(context, u, np.linspace(-9, 9, 7), n_rows=10**6, kept=5).top
    outcomes = {outcome.edit: outcome for outcome in try_edits(context, u, top, batch=2)}
    strings: Any = context.token_strings
    model: Any = context.model

    def project(ids: list[int], position: int) -> float:
        return float(model.activations(torch.tensor([ids]), context.hook_name)[0, position].double() @ torch.tensor(u))

    def other_space(token: int) -> int:
        text = strings[token]
        other = text[1:] if text.startswith(" ") else " " + text
        return strings.index(other) if other in strings else token

    def other_case(token: int) -> int:
        other = strings[token].swapcase()
        return strings.index(other) if token and other in strings else token

    examples = [(planted.tokens[row.prompt].tolist(), row.position) for row in top]
    deleted = [(ids[: at - 1] + ids[at:], at - 1) for ids, at in examples if at > 1]
    spaced = [([*ids[:at], other_space(ids[at]), *ids[at + 1 :]], at) for ids, at in examples]
    spaced = [(ids, at) for (ids, at), (plain, _) in zip(spaced, examples, strict=True) if ids != plain]
    cased = [([*ids[:at], other_case(ids[at]), *ids[at + 1 :]], at) for ids, at in examples]
    for name, edited in (("token before it deleted", deleted), ("space before the token", spaced),
                         ("case of the token", cased)):  # fmt: skip
        assert outcomes[name].examples == len(edited), name
        assert outcomes[name].after == pytest.approx(np.mean([project(*one) for one in edited]), rel=1e-5), name
    assert outcomes["case of the token"].before == pytest.approx(np.mean([project(*one) for one in examples]), rel=1e-5)
    before = [([ids[0], *map(other_space, ids[1:at]), *ids[at:]], at) for ids, at in examples if at > 1]
    assert outcomes["spaces in all before it"].after == pytest.approx(np.mean([project(*one) for one in before]))
    assert outcomes["first token deleted"].examples == len(deleted)


def test_the_table_of_edits_says_what_is_left_above_the_mean(planted: Planted) -> None:
    result = rare_direction.run(planted.context, OPTIONS)
    mean = float(result.numbers["projection_mean"] or 0)
    rows = result.tables["edits"].to_pylist()
    assert {row["edit"] for row in rows} <= set(EDITS)
    shares = [(row["projection_after"] - mean) / (row["projection_before"] - mean) for row in rows]
    np.testing.assert_allclose([row["share_left"] for row in rows], shares)
    assert result.numbers["edit_share_left"] == pytest.approx(np.median(shares))


def test_no_edit_touches_the_first_token_of_a_prompt(planted: Planted) -> None:
    top = project_rows(planted.context, planted.direction, np.linspace(-9, 9, 7), n_rows=1, kept=1).top
    at_start = [top[0]._replace(position=0)]
    assert try_edits(planted.context, planted.direction, at_start, batch=4) == []
    names = {
        outcome.edit
        for outcome in try_edits(planted.context, planted.direction, [top[0]._replace(position=1)], batch=4)
    }
    assert names <= {"token itself replaced", "case of the token", "space before the token"}
    assert names


def test_a_pass_counts_every_row_once_and_stops_where_it_should(planted: Planted) -> None:
    edges = np.linspace(-1, 1, 9)
    found = project_rows(planted.context, planted.direction, edges, n_rows=1000, kept=3)
    projection = planted.rows[:1000].astype(np.float64) @ planted.direction
    assert found.n_rows == found.histogram.sum() == 1000
    np.testing.assert_array_equal(found.histogram, np.histogram(np.clip(projection, -1, 1), edges)[0])
    assert found.top[0].projection == pytest.approx(projection.max(), rel=1e-6)


def test_the_pass_gives_the_same_bits_whoever_computes_its_pieces(
    planted: Planted, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direction_pass, "_BATCH_ROWS", 100)
    options = OPTIONS.model_copy(update={"micro_batch_prompts": 7, "rows": 1230})
    elsewhere = world.assert_same_elsewhere(lambda context: rare_direction.run(context, options), planted.context)
    assert elsewhere.computed == {"gradients": 6, "projections": 13}
    assert elsewhere.sent["projections"][1] < 10_000  # counts and the outermost rows, not rows by the hundred


def test_a_pass_over_many_batches_equals_one_over_a_single_one(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = np.linspace(-3, 3, 9)
    whole = project_rows(planted.context, planted.direction, edges, n_rows=1100, kept=9)
    monkeypatch.setattr(direction_pass, "_BATCH_ROWS", 64)
    parts = project_rows(planted.context, planted.direction, edges, n_rows=1100, kept=9)
    assert (parts.n_rows, parts.top, parts.bottom) == (whole.n_rows, whole.top, whole.bottom)
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    assert (parts.mean, parts.std) == pytest.approx((whole.mean, whole.std), rel=1e-12)
    assert parts.norm_correlation == pytest.approx(whole.norm_correlation, rel=1e-9)


def test_equal_projections_go_by_prompt_and_position(world: SimpleNamespace) -> None:
    rows = world.Rows(np.ones((6, 2), np.float32), np.array([5, 3, 3, 9, 1, 5]), np.array([1, 2, 1, 1, 4, 0]))
    context = Context(sae=world.context(np.eye(2), np.eye(2)).sae, hook_name=world.HOOK, reader=rows)
    found = project_rows(context, np.array([1.0, 0.0]), np.linspace(-1, 2, 4), n_rows=6, kept=4)
    assert [(row.prompt, row.position) for row in found.top] == [(1, 4), (3, 1), (3, 2), (5, 0)]
    assert (found.std, found.norm_correlation) == (0, None)


@pytest.mark.parametrize("n_rare", [0, 1])
def test_fewer_than_two_rare_features_are_no_cluster(planted: Planted, n_rare: int) -> None:
    counts = np.where(np.arange(RARE + FREQUENT) < n_rare, 0, 500)
    numbers = rare_direction.run(replace(planted.context, densities=FeatureDensities(counts, 1000)), OPTIONS).numbers
    assert (numbers["cluster"], numbers["n_rare"]) == ("no cluster", n_rare)
    assert all(value is None for key, value in numbers.items() if key not in {"cluster", "n_rare"})


def test_opposite_encoders_have_no_shared_direction(planted: Planted, world: Any) -> None:
    sae = planted.context.sae
    encoder = sae.W_enc.numpy() * 0
    encoder[0, :RARE] = np.where(np.arange(RARE) % 2, 1, -1)
    opposite = world.autoencoder(encoder, sae.b_enc.numpy(), sae.W_dec.numpy(), sae.b_dec.numpy())
    assert rare_direction.run(replace(planted.context, sae=opposite), OPTIONS).numbers["cluster"] == "no cluster"


def test_features_named_take_the_place_of_ultra_low_ones(planted: Planted) -> None:
    options = OPTIONS.model_copy(update={"features": (20, 14, 14)})
    result = rare_direction.run(planted.context, options)
    encoder = planted.context.sae.W_enc.double().numpy().T
    mean = encoder[[14, 20]].mean(axis=0)
    assert result.numbers["n_rare"] == 2
    assert result.numbers["cosine_ones"] == pytest.approx(mean.sum() / np.linalg.norm(mean) / D**0.5)
    assert result.tables["hyperplanes"]["feature"].to_pylist() == [14, 20]
    with pytest.raises(ConfigError, match="0 to 31"):
        rare_direction.run(planted.context, OPTIONS.model_copy(update={"features": (3, 32)}))


def test_the_cosine_figure_shows_the_numbers(planted: Planted) -> None:
    result = rare_direction.run(planted.context, OPTIONS)
    (bars,) = result.figures["cosines"].data
    shown = dict(zip(bars.y, bars.x, strict=True))
    assert shown["mean activation"] == result.numbers["cosine_mean"]
    assert shown["autoencoder’s gradient, flipping"] == result.numbers["gradient_autoencoder_flip"]
    assert len(shown) == 2 + 6 + 6
    assert sum(result.figures["projection"].data[0].y) == result.numbers["n_rows"]
    assert [bar.name for bar in result.figures["edits"].data] == ["before", "after"]


def test_equal_runs_give_equal_results(planted: Planted) -> None:
    first, second = (rare_direction.run(planted.context, OPTIONS) for _ in range(2))
    assert first.numbers == second.numbers
    assert all(first.tables[name].equals(second.tables[name]) for name in first.tables)


def test_without_prompts_there_is_no_text(planted: Planted) -> None:
    assert passages.around(replace(planted.context, token_strings=None), 0, 1) == ("", "", "")
