from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import Interval, bootstrap, split_half_oracle, stratified_mean

NAN = math.nan


def one(count: int) -> list[str]:
    return ["all"] * count


# Bootstrap


def test_the_interval_is_that_of_the_central_limit_theorem():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(values, one(400), seed=1)
    error = values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_every_stratum_weighs_the_same_in_mean_and_interval():
    generator = np.random.default_rng(0)
    many, few = generator.normal(0, 1, 900), generator.normal(10, 3, 100)
    found = bootstrap(np.concatenate([many, few]), ["many"] * 900 + ["few"] * 100, seed=1)
    error = math.sqrt(many.var() / 900 + few.var() / 100) / 2
    assert found.mean == pytest.approx((many.mean() + few.mean()) / 2)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth, trials, covered = 0.3, 400, 0
    for trial in range(trials):
        values = generator.binomial(8, truth, 60) / 8
        found = bootstrap(values, one(60), resamples=400, level=0.9, seed=trial)
        covered += found.low <= truth <= found.high
    # Three standard deviations of the count, and one percent for the percentile method's bias at 60 prompts.
    assert abs(covered / trials - 0.9) < 3 * math.sqrt(0.9 * 0.1 / trials) + 0.01


def test_differences_of_the_same_prompts_remove_what_the_prompts_share():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 5, 200)
    better, worse = (difficulty + shift + generator.normal(0, 0.1, 200) for shift in (0.1, 0.0))
    paired = bootstrap(better - worse, one(200))
    assert paired.low > 0
    assert paired.high - paired.low < 0.05 * (bootstrap(better, one(200)).high - bootstrap(better, one(200)).low)


def test_a_constant_has_no_uncertainty_and_one_prompt_shows_none():
    assert bootstrap(np.full(5, 0.25), one(5)) == Interval(0.25, 0.25, 0.25)
    assert bootstrap(np.array([0.7]), ["a"]) == Interval(0.7, 0.7, 0.7)


def test_the_interval_is_a_function_of_the_seed():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values, one(30), seed=3) == bootstrap(values, one(30), seed=3)
    assert bootstrap(values, one(30), seed=3) != bootstrap(values, one(30), seed=4)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.tuples(st.floats(-10, 10), st.sampled_from("ab")), min_size=1, max_size=12),
    level=st.floats(0.05, 0.99),
)
def test_the_interval_lies_between_the_extremes(values: list[tuple[float, str]], level: float):
    numbers, strata = np.array([value for value, _ in values]), [label for _, label in values]
    found = bootstrap(numbers, strata, resamples=50, level=level)
    assert numbers.min() - 1e-9 <= found.low <= found.high <= numbers.max() + 1e-9
    assert found.mean == pytest.approx(stratified_mean(numbers, strata))


def test_masked_prompts_count_nowhere():
    values = np.array([0.2, NAN, 0.6, 1.0, NAN])
    strata = ["a", "a", "a", "b", "b"]
    assert stratified_mean(values, strata) == pytest.approx((0.4 + 1.0) / 2)
    kept = ~np.isnan(values)
    assert bootstrap(values, strata) == bootstrap(values[kept], ["a", "a", "b"])


def test_inputs_that_make_no_mean_are_refused():
    with pytest.raises(InvalidValue, match=r"level must be in \(0, 1\), got 1"):
        bootstrap(np.ones(2), one(2), level=1)
    with pytest.raises(InvalidValue, match="one for each of the 3 strata labels"):
        bootstrap(np.ones(2), one(3))
    with pytest.raises(InvalidValue, match="at least one"):
        stratified_mean(np.ones(0), [])
    with pytest.raises(InvalidValue, match=r"values of stratum 'b' must be at least one number.*all are masked"):
        bootstrap(np.array([1.0, NAN]), ["a", "b"])


# Headroom


def bernoulli(means: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(A, P) means -> (A, P, n) rewards."""
    return np.random.default_rng(seed).binomial(1, means[..., None], (*means.shape, samples)).astype(float)


def test_the_oracle_is_unbiased_where_all_arms_are_alike():
    means = np.full((6, 100), 0.3)
    found = np.array([split_half_oracle(bernoulli(means, 8, seed), one(100)) for seed in range(60)])
    error = math.sqrt(0.3 * 0.7 / (100 * 8 * 60))  # each trial scores 100 prompts on 8 samples
    assert np.abs(found.mean(0) - 0.3).max() < 4 * error
    naive = np.mean([bernoulli(means, 8, seed).mean(-1).max(0).mean() for seed in range(10)])
    assert naive > 0.45, "choosing and scoring on the same samples would promise headroom that is not there"


def test_the_oracle_finds_planted_headroom():
    means = np.array([[0.9] * 50 + [0.1] * 50, [0.1] * 50 + [0.9] * 50, [0.45] * 100])
    oracle, static = split_half_oracle(bernoulli(means, 16, 0), one(100))
    assert oracle == pytest.approx(0.9, abs=0.03)
    assert static == pytest.approx(0.48, abs=0.06)


def test_strata_weigh_the_same_in_the_oracle_too():
    rewards = np.repeat(np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.5]])[..., None], 4, -1)
    oracle, static = split_half_oracle(rewards, ["a", "a", "a", "b"])
    assert (oracle, static) == (0.75, 0.5)


def test_a_hand_worked_split():
    # Samples 0 and 2 form one half, 1 and 3 the other.
    rewards = np.array([[[0.9, 0.3, 0.7, 0.5]], [[0.1, 1.0, 0.3, 0.6]]])
    # The first half prefers arm 0 (.8 to .2), which scores .4 on the second; that prefers arm 1, which scores .2.
    assert split_half_oracle(rewards, ["all"]) == pytest.approx((0.3, 0.3))


def test_masked_samples_and_prompts_count_nowhere_in_the_oracle():
    rewards = bernoulli(np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]]), 8, 0)
    hidden = rewards.copy()
    hidden[:, 2] = NAN
    assert split_half_oracle(hidden, one(3)) == split_half_oracle(rewards[:, :2], one(2))
    hidden[0, 0, ::2] = NAN  # nothing known of arm 0 on the first half of prompt 0
    assert np.isfinite(split_half_oracle(hidden, one(3))).all()


def test_the_order_of_the_arms_says_nothing():
    """Arm 1 is best; where all are alike on a prompt it is chosen, wherever it stands."""
    rewards = bernoulli(np.array([[0.2] * 40, [0.5] * 40, [0.3] * 40]), 4, 3)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert split_half_oracle(rewards[order], one(40)) == pytest.approx(split_half_oracle(rewards, one(40)))
    alike = np.zeros((2, 1, 2))
    alike[1, 0, 1] = 0.5  # the first half knows no difference on this prompt, but prefers arm 1 elsewhere
    rewards = np.concatenate([alike, np.array([[[0.0, 0.0]], [[1.0, 1.0]]])], 1)
    assert split_half_oracle(rewards, one(2))[0] == pytest.approx((0.5 + 0.0 + 1 + 1) / 4)


def test_the_oracle_needs_two_samples():
    with pytest.raises(InvalidValue, match="samples a prompt must be >= 2, got 1"):
        split_half_oracle(np.ones((2, 3, 1)), one(3))
