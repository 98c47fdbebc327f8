from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.action_set import compare_action_sets, coverage, greedy_coverage, repeated_action, top_actions

NAN = math.nan


def one(count: int) -> list[str]:
    return ["all"] * count


def bernoulli(probabilities: np.ndarray, seeds: int, seed: int = 0) -> np.ndarray:
    """(P, A, S) independent successes."""
    draws = np.random.default_rng(seed).random((*probabilities.shape, seeds))
    return (draws < probabilities[..., None]).astype(float)


def test_one_seed_is_the_papers_construction():
    rewards = np.random.default_rng(0).random((30, 12, 1))
    table, covered, expected = rewards[:, :, 0], np.zeros(30), []
    for _ in range(5):
        gains = [np.maximum(covered, table[:, a]).mean() for a in range(12)]
        expected.append(int(np.argmax(gains)))
        covered = np.maximum(covered, table[:, expected[-1]])
    found = greedy_coverage(rewards, one(30), 5)
    assert found == expected
    np.testing.assert_allclose(coverage(rewards, found), covered)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_reaches_its_bound_of_the_best_set(seed: int):
    rewards = bernoulli(np.random.default_rng(seed).random((20, 8)) ** 2, 1, seed)
    found = coverage(rewards, greedy_coverage(rewards, one(20), 3)).mean()
    best = max(coverage(rewards, actions).mean() for actions in itertools.combinations(range(8), 3))
    assert (1 - 1 / math.e) * best <= found <= best


def test_coverage_is_the_chance_that_one_of_several_succeeds():
    """Also when actions are perfectly correlated at equal seeds, as common random numbers make them."""
    p, seeds = 0.3, 20_000
    rewards = np.repeat(bernoulli(np.full((1, 1), p), seeds), 3, axis=1)
    for actions in ([0], [0, 1], [0, 1, 2], [2, 2, 2]):
        assert coverage(rewards, actions)[0] == pytest.approx(1 - (1 - p) ** len(actions), abs=0.01)


def test_greedy_prefers_what_complements_and_top_prefers_what_is_good():
    """Actions 0 and 1 solve the same half of the prompts, action 2 a quarter that they do not."""
    probabilities = np.zeros((40, 4))
    probabilities[:20, :2] = 1.0
    probabilities[20:30, 2] = 1.0
    rewards = bernoulli(probabilities, 8)
    assert set(greedy_coverage(rewards, one(40), 2)) == {0, 2}
    assert set(top_actions(rewards, one(40), 2)) == {0, 1}
    assert repeated_action(rewards, one(40), 2) == [0, 0]
    scores = compare_action_sets(rewards, one(40), 2)
    assert scores["greedy"].cross_fitted == pytest.approx(0.75)
    assert scores["top"].cross_fitted == scores["repeated"].cross_fitted == pytest.approx(0.5)
    np.testing.assert_allclose(scores["greedy"].per_prompt, [1.0] * 30 + [0.0] * 10)


def test_cross_fitting_removes_the_winners_curse():
    """All actions alike on every prompt: greedy seems to beat the n best, on other seeds it does not."""
    runs = []
    for seed in range(30):
        p = np.random.default_rng(seed).beta(1, 1, 60)[:, None].repeat(40, 1)
        runs.append(compare_action_sets(bernoulli(p, 8, seed + 100), one(60), 4))
    naive = np.array([run["greedy"].naive - run["top"].naive for run in runs])
    fair = np.array([run["greedy"].cross_fitted - run["top"].cross_fitted for run in runs])
    repeated = np.array([run["greedy"].cross_fitted - run["repeated"].cross_fitted for run in runs])
    assert (naive > 0).all()
    assert naive.mean() > 0.02
    for difference in (fair, repeated):
        error = difference.std(ddof=1) / math.sqrt(len(runs))
        assert abs(difference.mean()) < 3 * error
        assert difference.mean() < naive.mean() / 2


def test_cross_fitted_coverage_is_the_chance_by_enumeration():
    """Known probabilities: the set of one half, by its exact coverage, is what the other half estimates."""
    p = np.random.default_rng(3).random((4000, 5)) * np.array([1.0, 0.8, 0.3, 0.2, 0.1])
    score = compare_action_sets(bernoulli(p, 8), one(4000), 2)["greedy"]
    exact = 1 - np.prod(1 - p[:, list(score.actions)], axis=1)
    assert score.cross_fitted == pytest.approx(exact.mean(), abs=0.01)


def test_masked_cells_count_nowhere():
    rewards = np.array([[[1.0, NAN, 0.0, 0.0], [NAN, NAN, NAN, NAN]], [[NAN] * 4, [NAN] * 4]])
    np.testing.assert_allclose(coverage(rewards, [0]), [1 / 3, NAN])
    np.testing.assert_allclose(coverage(rewards, [0, 1]), [1 / 3, NAN])


def test_strata_weigh_the_same():
    rewards = np.zeros((10, 2, 4))
    rewards[:9, 0], rewards[9, 1] = 0.6, 1.0
    assert top_actions(rewards, one(10), 1) == [0]
    assert top_actions(rewards, ["many"] * 9 + ["few"], 1) == [1]
    assert greedy_coverage(rewards, ["many"] * 9 + ["few"], 1) == [1]


@pytest.mark.parametrize(("size", "message"), [(0, r"in \[1, 3\]"), (4, r"in \[1, 3\]"), (3, "half of the 4 seeds")])
def test_impossible_sizes_are_refused(size: int, message: str):
    rewards = np.zeros((2, 3, 4 if size == 3 else 20))
    with pytest.raises(InvalidValue, match=message):
        compare_action_sets(rewards, one(2), size)


def test_a_stratum_without_a_value_is_refused():
    with pytest.raises(InvalidValue, match="all are masked"):
        compare_action_sets(np.full((2, 3, 4), NAN), one(2), 2)
