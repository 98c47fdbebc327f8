"""Rating: closed forms, brute force and properties of the pure functions between labels and targets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asn_rl.errors import InvalidValue
from asn_rl.labelling.rating import (
    best_heuristic,
    best_single,
    cross_fitted_gain,
    cross_fitted_gains,
    gains,
    heuristic_ratings,
    lacking,
    robust_scale,
    soft_targets,
    spearman,
    top_candidates,
    total_score,
)

NAN = math.nan
SHAPE = (3, 2, 4)
NUMBERS = st.floats(-100, 100, allow_subnormal=False)


def grids(shape: tuple[int, int, int] = SHAPE, masked: bool = True) -> st.SearchStrategy[np.ndarray]:
    """(P, A, S) scores, some of them masked."""
    elements = st.one_of(st.integers(-5, 5).map(float), NUMBERS)
    return hnp.arrays(np.float64, shape, elements=st.one_of(elements, st.just(NAN)) if masked else elements)


def one(prompts: int) -> list[str]:
    return ["all"] * prompts


def different(shape: tuple[int, ...]) -> np.ndarray:
    """Digests of texts that all differ."""
    return np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)


def top(total: np.ndarray, k: int, **changes: np.ndarray) -> list[list[tuple[int, int, int]]]:
    arguments: dict[str, Any] = {
        "lacks": np.zeros(total.shape, int), "ratings": np.zeros(total.shape[:2]), "digest": different(total.shape)
    } | changes  # fmt: skip
    return top_candidates(total, k=k, **arguments)


# Scales


def test_scores_are_measured_from_the_median_in_absolute_deviations():
    # Median 10.5, distances .5 .5 1.5 1.5 ... 8.5 8.5 9.5 89.5: their median is 5.
    scores = np.array([*range(1, 20), 100.0])
    found = robust_scale(scores[None, None])
    assert (found.how, found.centre) == ("mad", 10.5)
    assert found.values[0, 0] == pytest.approx((scores - 10.5) / (5 * 1.4826))


def test_a_unit_is_at_least_half_of_what_the_deciles_say():
    scores = np.array([0.0] * 10 + [1.0, 1.0, 1.0, *range(2, 10)])  # median 1, deviations mostly 1
    found = robust_scale(scores[None, None])
    assert found.scale == pytest.approx(max(1.4826, (7 - 0) / 2.5631 / 2))


def test_one_outlier_moves_the_others_little():
    values = np.random.default_rng(0).normal(5, 2, 1001)[None, None]
    spoilt = values.copy()
    spoilt[0, 0, 0] = -1e6
    assert robust_scale(spoilt).values[0, 0, 1:] == pytest.approx(robust_scale(values).values[0, 0, 1:], abs=0.05)
    assert robust_scale(values).scale == pytest.approx(2, rel=0.06), "a standard deviation, for normal scores"


def test_verdicts_fall_back_to_the_standard_deviation():
    found = robust_scale(np.array([[[1.0, 1.0, 1.0, 0.0]]]))
    assert (found.how, found.centre, found.scale) == ("std", 0.75, pytest.approx(math.sqrt(3) / 4))
    assert found.values[0, 0] == pytest.approx(np.array([0.25, 0.25, 0.25, -0.75]) / (math.sqrt(3) / 4))


@settings(deadline=None, max_examples=60)
@given(zeros=st.integers(0, 700), seed=st.integers(0, 99), shape=st.sampled_from([0.3, 1.0, 3.0]))
def test_many_equal_scores_do_not_make_the_others_huge(zeros: int, seed: int, shape: float):
    scores = np.random.default_rng(seed).random(1000) ** shape
    scores[:zeros] = 1e-16 * scores[:zeros] if seed % 2 else 0.0
    assert np.abs(robust_scale(scores[None, None]).values).max() < 25


@pytest.mark.parametrize("value", [0.0, 0.1, 7e5])
def test_equal_scores_say_nothing(value: float):
    found = robust_scale(np.array([[[value, NAN, value, value]]]))
    assert (found.how, found.centre) == ("constant", value)
    np.testing.assert_array_equal(found.values, [[[0, NAN, 0, 0]]])


def test_nothing_known_stays_unknown():
    assert np.isnan(robust_scale(np.full(SHAPE, NAN)).values).all()


@settings(deadline=None, max_examples=60)
@given(scores=grids(), shift=st.integers(-50, 50), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_keeps_masks_and_order_and_forgets_units(scores: np.ndarray, shift: int, factor: float):
    found, other = robust_scale(scores), robust_scale(factor * scores + shift)
    np.testing.assert_array_equal(np.isnan(found.values), np.isnan(scores))
    known = ~np.isnan(scores)
    if found.how == other.how:  # rounding may make two neighbouring scores equal
        assert other.values[known] == pytest.approx(found.values[known], rel=1e-6, abs=1e-6)
    order = np.argsort(scores[known], kind="stable")
    assert (np.diff(found.values[known][order]) >= 0).all()


# Totals


def test_the_total_is_the_weighted_mean_of_what_applies():
    scores = {"a": np.array([[[1.0, 1.0, NAN, NAN]]]), "b": np.array([[[4.0, NAN, 4.0, NAN]]])}
    found = total_score(scores, {"a": 3.0, "b": -1.0})
    np.testing.assert_allclose(found, [[[(3 - 4) / 4, 1, -4, NAN]]])


def test_a_labeller_without_weight_gives_no_total():
    scores = {"a": np.array([[[NAN, 2.0]]]), "b": np.array([[[4.0, 4.0]]])}
    np.testing.assert_allclose(total_score(scores, {"a": 1.0, "b": 0.0}), [[[NAN, 2.0]]])


@settings(deadline=None, max_examples=80)
@given(
    table=hnp.arrays(np.float64, (3, 6), elements=st.integers(-9, 9).map(float)),
    weights=st.tuples(*[st.integers(0, 4)] * 3),
    more=st.integers(0, 9),
)
def test_raising_a_weight_never_hurts_the_candidate_that_is_best_on_that_label(table, weights, more):
    scores = {name: row.reshape(1, 3, 2) for name, row in zip("abc", table, strict=True)}
    best = int(table[0].argmax())
    ranks = []
    for extra in (0, more, 1e6):
        total = total_score(scores, dict(zip("abc", weights, strict=True)) | {"a": weights[0] + 1 + extra}).ravel()
        ranks.append(int((total > total[best] + 1e-9).sum()))
    assert ranks[0] >= ranks[1] >= ranks[2]
    if (table[0] == table[0].max()).sum() == 1:
        assert ranks[2] == 0


def test_every_weight_changes_the_order_within_a_prompt():
    """A verifier's weight too: the candidate that is better on it alone wins when it is raised."""
    scores = {"quality": np.array([[[2.0, 1.0, 0.0]]]), "verifier": np.array([[[0.0, 0.0, 1.0]]])}
    light, heavy = ({"quality": 1.0, "verifier": weight} for weight in (0.5, 3.0))
    assert top(total_score(scores, light), 3)[0] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert top(total_score(scores, heavy), 3)[0] == [(0, 0, 2), (0, 0, 0), (0, 0, 1)]


def test_a_candidate_lacks_only_what_a_sibling_has():
    scores = {
        "quality": np.array([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, NAN]]]),
        "verifier": np.array([[[1.0, NAN]], [[NAN, NAN]], [[1.0, NAN]]]),
        "ignored": np.array([[[1.0, NAN]], [[1.0, NAN]], [[1.0, NAN]]]),
    }
    weights = {"quality": 1.0, "verifier": -1.0, "ignored": 0.0}
    assert lacking(scores, weights).tolist() == [[[0, 1]], [[0, 0]], [[0, 2]]]


def test_no_candidate_wins_by_a_mask():
    """The masked one has the best total, because the verifier that all the others failed says nothing of it."""
    scores = {"quality": np.array([[[0.1, 2.0, 0.5]]]), "verifier": np.array([[[-1.0, NAN, -1.0]]])}
    weights = {"quality": 1.0, "verifier": 1.0}
    total, lacks = total_score(scores, weights), lacking(scores, weights)
    assert total.argmax() == 1
    assert top(total, 3, lacks=lacks)[0] == [(0, 0, 2), (0, 0, 0), (0, 0, 1)]


# Ratings


def test_a_hand_worked_rating():
    # Prompt levels 2 and 6; distances of the first heuristic -1 and +1, mean 0; of the second 1 and -1.
    total = np.array([[[0.0, 2.0], [3.0, 3.0]], [[7.0, 7.0], [5.0, 5.0]]])
    assert heuristic_ratings(total, one(2), 2.0) == pytest.approx(np.array([[1.5, 2.5], [6.5, 5.5]]))
    assert heuristic_ratings(total, one(2), 0.0) == pytest.approx(np.array([[1.0, 3.0], [7.0, 5.0]]))
    assert heuristic_ratings(total, one(2), math.inf) == pytest.approx(np.array([[2.0, 2.0], [6.0, 6.0]]))
    assert heuristic_ratings(total, ["a", "b"], math.inf) == pytest.approx(np.array([[1.0, 3.0], [7.0, 5.0]]))


@settings(deadline=None, max_examples=50)
@given(total=grids((4, 3, 4), masked=False), shrinkage=st.floats(0, 100))
def test_without_masks_the_order_is_that_of_means_shrunk_to_the_stratum(total: np.ndarray, shrinkage: float):
    strata = ["a", "b", "a", "b"]
    means = total.mean(-1)
    prior = np.stack([means[::2].mean(0), means[1::2].mean(0)] * 2)
    weight = 4 / (4 + shrinkage)
    expected = weight * means + (1 - weight) * prior
    found = heuristic_ratings(total, strata, shrinkage)
    shift = found - expected  # constant within a prompt
    assert shift == pytest.approx(np.broadcast_to(shift[:, :1], shift.shape), abs=1e-8)


def test_a_mask_on_a_hard_prompt_does_not_win_it():
    """The stratum's plain mean would: it says 5, and the others have -10 there."""
    total = np.array([[[5.0], [6.0]], [[5.0], [6.0]], [[NAN], [-10.0]]])
    assert best_heuristic(heuristic_ratings(total, one(3), 0.0)).tolist() == [1, 1, 1]


def test_a_prompt_without_scores_gets_what_its_stratum_says():
    total = np.array([[[1.0], [3.0]], [[NAN], [NAN]], [[9.0], [4.0]]])
    found = heuristic_ratings(total, ["a", "a", "b"], 8.0)
    assert found[1] == pytest.approx([1, 3])
    assert best_heuristic(found).tolist() == [1, 1, 0]


def test_a_heuristic_without_any_score_has_no_rating_and_no_share():
    total = np.array([[[1.0], [NAN]], [[2.0], [NAN]]])
    found = heuristic_ratings(total, one(2), 8.0)
    assert np.isnan(found[:, 1]).all()
    assert best_heuristic(found).tolist() == [0, 0]
    assert soft_targets(found, 0.1).tolist() == [[1, 0], [1, 0]]


@settings(deadline=None, max_examples=60)
@given(
    ratings=hnp.arrays(np.float64, (3, 4), elements=st.one_of(NUMBERS, st.just(NAN))), temperature=st.floats(0.01, 9)
)
def test_soft_targets_are_a_softmax(ratings: np.ndarray, temperature: float):
    ratings[:, 0] = 1.0
    found = soft_targets(ratings, temperature)
    assert found.sum(-1) == pytest.approx(np.ones(3))
    assert (found[np.isnan(ratings)] == 0).all()
    assert (found.argmax(-1) == best_heuristic(ratings)).all()
    one_row = np.exp((ratings[0] - np.nanmax(ratings[0])) / temperature)
    assert found[0] == pytest.approx(np.nan_to_num(one_row / np.nansum(one_row)))


def test_targets_of_nothing_are_refused():
    with pytest.raises(InvalidValue, match="temperature must be > 0, got 0"):
        soft_targets(np.ones((1, 2)), 0.0)
    with pytest.raises(InvalidValue, match="at least one number a prompt"):
        soft_targets(np.array([[1.0, 2.0], [NAN, NAN]]), 1.0)


# Gains


def noise(means: np.ndarray, seeds: int, seed: int) -> np.ndarray:
    return means[..., None] + np.random.default_rng(seed).normal(size=(*means.shape, seeds))


def test_where_all_heuristics_are_alike_only_the_naive_gain_is_not_zero():
    found = [cross_fitted_gain(noise(np.zeros((100, 6)), 8, seed), one(100), 8.0) for seed in range(40)]
    honest = [gain.cross_fitted.mean for gain in found if gain.cross_fitted]
    # Each trial differs by 100 prompts of two folds with the difference of two means over four seeds.
    error = math.sqrt(2 / 4 / 2 / 100 / 40)
    assert len(honest) == 40
    assert abs(np.mean(honest)) < 4 * error
    assert np.mean([gain.naive.mean for gain in found if gain.naive]) > 0.2, "the winner's curse"
    covered = sum(gain.cross_fitted.low <= 0 <= gain.cross_fitted.high for gain in found if gain.cross_fitted)
    assert covered >= 34


def test_a_planted_gain_is_found():
    means = np.zeros((200, 3))
    means[np.arange(200), np.arange(200) % 2] = 2.0  # half of the prompts want one, half the other
    gain = cross_fitted_gain(noise(means, 16, 0), one(200), 4.0)
    assert gain.cross_fitted is not None
    assert gain.cross_fitted.low < 1.0 < gain.cross_fitted.high + 0.05


def test_choosing_by_stratum_is_an_infinite_shrinkage():
    means = np.array([[1.0, 0.0]] * 30 + [[0.0, 2.0]] * 30)
    strata = ["a"] * 30 + ["b"] * 30
    total = np.repeat(means[..., None], 4, -1)
    assert best_single(total, strata) == 1
    found = gains(total, total, strata, math.inf)
    assert found.tolist() == [1.0] * 30 + [0.0] * 30
    assert gains(total, total, one(60), math.inf).tolist() == [0.0] * 60


def test_a_hand_worked_cross_fit():
    # Seeds 0 and 2 choose heuristic 0 (mean .8), which has .4 on the others; those choose 1, which has .2.
    total = np.array([[[0.9, 0.3, 0.7, 0.5], [0.1, 1.0, 0.3, 0.6]]])
    # One prompt: the best single heuristic of each half is the chosen one, so nothing is gained.
    assert cross_fitted_gains(total, one(1), 0.0).tolist() == [0.0]
    both = np.concatenate([total, np.array([[[0.0] * 4, [3.0] * 4]])])
    # Now heuristic 1 is the best single one on both halves: prompt 0 gains .4 - .8 and then 0, prompt 1 nothing.
    assert cross_fitted_gains(both, one(2), 0.0) == pytest.approx([-0.2, 0.0])


def test_the_gain_needs_two_seeds():
    with pytest.raises(InvalidValue, match="seeds must be >= 2, got 1"):
        cross_fitted_gains(np.ones((2, 2, 1)), one(2), 1.0)


# Ranking


@settings(deadline=None, max_examples=60)
@given(total=grids(), digest=hnp.arrays(np.uint64, SHAPE, elements=st.integers(0, 9)), k=st.integers(1, 9))
def test_the_ranking_is_that_of_a_plain_sort(total: np.ndarray, digest: np.ndarray, k: int):
    lacks = (digest % 3).astype(int)
    ratings = np.array([[1.0, 2.0], [2.0, 1.0], [NAN, 0.0]])
    found = top_candidates(total, lacks, ratings, digest, k)
    for i, j_k in enumerate(found):
        cells = [(i, j, s) for j, s in itertools.product(range(2), range(4)) if not math.isnan(total[i, j, s])]
        rating = np.nan_to_num(ratings, nan=-np.inf)
        cells.sort(key=lambda cell: (lacks[cell], -total[cell], -rating[cell[:2]], cell))
        expected, seen = [], set()
        for cell in cells:
            if digest[cell] not in seen:
                seen.add(digest[cell])
                expected.append(cell)
        assert j_k == expected[:k]


def test_ties_go_to_the_better_rated_heuristic_then_to_the_earlier_cell():
    total = np.zeros((1, 2, 2))
    assert top(total, 4)[0] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert top(total, 2, ratings=np.array([[0.0, 1.0]]))[0] == [(0, 1, 0), (0, 1, 1)]


def test_equal_texts_count_once():
    digest = np.array([[[7, 7], [7, 8]]], np.uint64)
    total = np.array([[[3.0, 3.0], [3.0, 1.0]]])
    assert top(total, 3, digest=digest)[0] == [(0, 0, 0), (0, 1, 1)]


# Correlations


@settings(deadline=None, max_examples=60)
@given(x=grids((1, 3, 4)), y=grids((1, 3, 4)))
def test_spearman_is_the_correlation_of_mean_ranks(x: np.ndarray, y: np.ndarray):
    pairs = [(a, b) for a, b in zip(x.ravel(), y.ravel(), strict=True) if not math.isnan(a + b)]

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < w for v in values) + (1 + sum(v == w for v in values)) / 2 for w in values]

    a, b = ([pair[i] for pair in pairs] for i in range(2))
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
        assert spearman(x, y) == pytest.approx(spearman(y, 8 * x)), "monotone maps keep ranks"
