from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.allocation import (
    AnswerLog,
    answer_log,
    concave_envelope,
    early_stop,
    fixed,
    marginal_gain_allocation,
    mode_posterior,
    replay,
)
from asn_rl.evaluation.voting import vote_accuracy

LOG = answer_log(
    [["a", "a", "b", "a", None, "a"], ["x", "y", "z", "y", "x", "y"], ["q", "q", "q", "q", "q", "q"]], ["a", "x", "r"]
)


def concave_curves(prompts: int, most: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.floats(-0.2, 1), min_size=most, max_size=most).map(
        lambda gains: np.cumsum([0, *sorted(gains, reverse=True)])
    )
    return st.lists(row, min_size=prompts, max_size=prompts).map(np.stack)


# The log


def test_the_correct_answer_is_code_0_and_masked_ones_are_minus_1():
    assert LOG.codes.tolist() == [[0, 0, 1, 0, -1, 0], [0, 1, 2, 1, 0, 1], [1] * 6]
    assert LOG.votes().tolist() == [[4, 1, 0], [2, 3, 1], [0, 6, 0]]


def test_the_accuracy_of_the_log_is_that_of_its_empirical_answers():
    found = LOG.vote_accuracy(5)
    np.testing.assert_allclose(found[0], vote_accuracy([4 / 6, 1 / 6], 5))
    np.testing.assert_allclose(found[1], vote_accuracy([2 / 6, 3 / 6, 1 / 6], 5))
    np.testing.assert_allclose(found[2], 0)


@pytest.mark.parametrize("answers", [[], [[]], [["a"], ["a", "b"]]])
def test_ragged_or_empty_logs_are_refused(answers: list[list[str]]):
    with pytest.raises(DataError, match="as many samples"):
        answer_log(answers, ["a"] * len(answers))


def test_prompts_without_a_correct_answer_are_refused():
    with pytest.raises(DataError, match="prompt 1 has no correct answer"):
        answer_log([["a"], ["b"]], ["a", None])


# Replay


def test_a_replayed_number_of_samples_has_the_accuracy_of_all_choices_of_that_size():
    """Against every ordered choice of n of the 6 logged samples."""
    for n in (1, 2, 3, 6):
        found = replay(LOG, fixed([n] * 3), limit=6, resamples=4000)
        assert found.samples.tolist() == [n] * 3
        for p, codes in enumerate(LOG.codes):
            expected = mean_credit(codes, n)
            assert abs(found.accuracy[p] - expected) < 4 * 0.5 / math.sqrt(4000) + 1e-9


def mean_credit(codes: np.ndarray, n: int) -> float:
    from itertools import combinations

    credits = []
    for chosen in combinations(codes.tolist(), n):
        votes = [chosen.count(code) for code in range(3)]
        credits.append((votes[0] == max(votes)) / votes.count(max(votes)) if votes[0] else 0.0)
    return float(np.mean(credits))


def test_rules_see_the_same_orders_and_the_seed_decides_them():
    first = replay(LOG, fixed([3] * 3), limit=6, resamples=50, seed=1)
    again = replay(LOG, fixed([3] * 3), limit=4, resamples=50, seed=1)
    np.testing.assert_array_equal(first.accuracy, again.accuracy)
    assert (first.accuracy != replay(LOG, fixed([3] * 3), limit=6, resamples=50, seed=2).accuracy).any()


def test_a_replay_gives_prompts_their_own_numbers():
    found = replay(LOG, fixed([0, 2, 6]), limit=6, resamples=10)
    assert found.samples.tolist() == [0, 2, 6]
    assert found.accuracy[0] == 0


@pytest.mark.parametrize("limit", [0, 7])
def test_a_limit_beyond_the_log_is_refused(limit: int):
    with pytest.raises(InvalidValue, match=r"limit must be in \[1, 6\]"):
        replay(LOG, fixed([1] * 3), limit=limit)
    with pytest.raises(InvalidValue, match="resamples"):
        replay(LOG, fixed([1] * 3), limit=3, resamples=0)


# Early stop


def test_the_posterior_of_the_mode_equals_the_integral_of_the_beta_density():
    grid = (np.arange(200_000) + 0.5) / 200_000
    for first, second in product(range(6), range(4)):
        density = grid**first * (1 - grid) ** second
        assert mode_posterior(first, second) == pytest.approx(density[grid > 0.5].sum() / density.sum(), abs=1e-5)
    assert mode_posterior(0, 0) == mode_posterior(3, 3) == 0.5
    assert mode_posterior(4, 0) == 31 / 32


def test_stopping_only_when_settled_never_changes_the_vote():
    generator = np.random.default_rng(0)
    log = AnswerLog(generator.choice([-1, 0, 1, 2], (40, 9), p=[0.1, 0.5, 0.25, 0.15]))
    full = replay(log, fixed([9] * 40), limit=9, resamples=60)
    early = replay(log, early_stop(9), limit=9, resamples=60)
    np.testing.assert_allclose(early.accuracy, full.accuracy, atol=1e-12)
    assert early.samples.mean() < 8


def test_a_vote_is_settled_at_the_first_moment_that_no_continuation_changes_it():
    """Against all continuations, two answers and a masked one: sooner would be wrong, later would be waste."""
    limit, rule = 5, early_stop(5)
    for drawn in range(limit + 1):
        for path in product([0, 1, None], repeat=drawn):
            votes = np.array([[path.count(0), path.count(1), 0]])
            ends = {
                winner([*path, *rest])
                for rest in product([0, 1, 2, None], repeat=limit - drawn)  # 2: an answer nobody gave so far
            }
            assert rule(votes, 0, drawn)[0] == (len(ends) == 1), (path, ends)


def winner(answers: list[int | None]) -> frozenset[int]:
    given = [answer for answer in answers if answer is not None]
    most = max((given.count(answer) for answer in given), default=0)
    return frozenset(answer for answer in given if given.count(answer) == most)


def test_confidence_stops_at_the_votes_that_reach_it():
    rule = early_stop(40, confidence=0.9)
    assert rule(np.array([[3, 0], [2, 0], [4, 1], [5, 1], [0, 3]]), 0, 6).tolist() == [True, False, False, True, True]
    assert early_stop(40, 0.95)(np.array([[3, 0], [4, 0]]), 0, 4).tolist() == [False, True]


def test_a_limit_of_its_own_for_each_prompt():
    rule = early_stop([0, 1, 3])
    empty = np.zeros((1, 2), dtype=int)
    assert [bool(rule(empty, p, 0)[0]) for p in range(3)] == [True, False, False]
    assert bool(rule(np.array([[2, 0]]), 2, 2)[0])
    found = replay(LOG, rule, limit=6, resamples=20)
    assert found.samples[0] == 0
    assert found.samples[1] == 1
    assert 2 <= found.samples[2] <= 3


@pytest.mark.parametrize("limit", [0, [], [3, -1]])
def test_limits_out_of_range_are_refused(limit: int | list[int]):
    with pytest.raises(InvalidValue, match="limit must be"):
        early_stop(limit)


@pytest.mark.parametrize("confidence", [0.5, 1.01, math.nan])
def test_a_confidence_out_of_range_is_refused(confidence: float):
    with pytest.raises(InvalidValue, match=r"confidence must be in \(0.5, 1\]"):
        early_stop(8, confidence)


# Marginal gain


@settings(max_examples=40, deadline=None)
@given(concave_curves(3, 4), st.integers(0, 13), st.integers(0, 1))
def test_the_greedy_allocation_is_the_best_of_all(values: np.ndarray, budget: int, minimum: int):
    if budget < 3 * minimum:
        return
    counts = marginal_gain_allocation(values, budget, minimum=minimum)
    assert counts.sum() <= budget
    assert (counts >= minimum).all()
    best = max(
        sum(values[p, n] for p, n in enumerate(ns)) for ns in product(range(minimum, 5), repeat=3) if sum(ns) <= budget
    )
    assert sum(values[p, n] for p, n in enumerate(counts)) == pytest.approx(best, abs=1e-9)


def test_samples_go_where_they_help():
    solved, hopeless = [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]
    growing = [0, 0.4, 0.6, 0.7, 0.75]
    assert marginal_gain_allocation(np.array([solved, hopeless, growing]), 12).tolist() == [1, 0, 4]
    assert marginal_gain_allocation(np.array([solved, hopeless, growing]), 3).tolist() == [1, 0, 2]
    assert marginal_gain_allocation(np.array([solved, hopeless, growing]), 4, minimum=1).tolist() == [1, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=7))
def test_the_envelope_is_the_least_concave_curve_above(values: list[float]):
    curve = np.array([values])
    found = concave_envelope(curve)[0]
    assert (found >= curve[0] - 1e-12).all()
    assert (np.diff(found, 2) <= 1e-9).all()
    for i in range(len(values)):  # at every point the best chord between two others, or the curve itself
        chords = [
            curve[0, a] + (curve[0, b] - curve[0, a]) * (i - a) / (b - a)
            for a in range(i + 1)
            for b in range(i, len(values))
            if a < b
        ]
        assert found[i] == pytest.approx(max([curve[0, i], *chords]), abs=1e-9)


def test_votes_of_two_are_worth_one_so_their_curves_need_the_envelope():
    curve = vote_accuracy([0.6, 0.4], 5)[None]
    assert curve[0, 2] == pytest.approx(curve[0, 1])
    with pytest.raises(InvalidValue, match=r"concave in the number of samples.*concave_envelope"):
        marginal_gain_allocation(curve, 3)
    assert marginal_gain_allocation(concave_envelope(curve), 3).tolist() == [3]


def test_budgets_and_values_that_make_no_sense_are_refused():
    curve = np.array([[0.0, 0.5], [0.0, 0.2]])
    with pytest.raises(InvalidValue, match="budget must be >= 2, 1 for each of 2 prompts"):
        marginal_gain_allocation(curve, 1, minimum=1)
    with pytest.raises(InvalidValue, match=r"minimum must be in \[0, 1\]"):
        marginal_gain_allocation(curve, 9, minimum=2)
    with pytest.raises(InvalidValue, match="finite and concave"):
        marginal_gain_allocation(np.array([[0.0, math.nan]]), 3)
    with pytest.raises(InvalidValue, match="budget must be >= 0"):
        marginal_gain_allocation(curve, -1)


def test_on_a_mixture_of_settled_and_open_prompts_early_stop_saves_samples():
    """Enumerated answer distributions, logged deep: the saving is the rule's, not the log's."""
    generator = np.random.default_rng(1)
    easy = generator.choice([0, 1], (60, 64), p=[0.97, 0.03])
    hard = generator.choice([0, 1, 2, 3], (20, 64), p=[0.45, 0.25, 0.2, 0.1])
    log = AnswerLog(np.concatenate([easy, hard]))
    uniform = replay(log, fixed([8] * 80), limit=16)
    early = replay(log, early_stop(12, 0.9), limit=16)
    assert early.accuracy.mean() > uniform.accuracy.mean() - 0.002
    assert early.samples.mean() < 0.7 * 8
