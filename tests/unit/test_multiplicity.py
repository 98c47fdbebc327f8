from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.multiplicity import compare_all, holm
from asn_rl.evaluation.statistics import Resampling, bootstrap

NAN = math.nan


def one(count: int) -> list[str]:
    return ["all"] * count


def half_width(differences: np.ndarray) -> float:
    found = compare_all(differences, one(len(differences)), Resampling(4000)).intervals[0]
    return (found.high - found.low) / 2


def test_of_equal_arms_none_is_called_different_more_often_than_the_level_allows():
    """20 arms and a baseline with the same rates by prompt, eight samples each."""
    generator, trials, level = np.random.default_rng(0), 300, 0.9
    wrong = np.zeros(3)
    naive = 0
    for trial in range(trials):
        rates = generator.beta(0.8, 1.6, 80)
        means = generator.binomial(8, rates[:, None], (80, 21)) / 8
        gaps = means[:, 1:] - means[:, :1]
        found = compare_all(gaps, one(80), Resampling(400, level, trial))
        missed = any(not row.low <= 0 <= row.high for row in found.intervals)
        wrong += [missed, min(found.holm) <= 1 - level, min(found.step_down) <= 1 - level]
        naive += min(found.p_values) <= 1 - level
    error = math.sqrt(level * (1 - level) / trials)
    assert (wrong / trials <= 1 - level + 3 * error).all(), wrong / trials
    assert wrong[0] / trials >= 1 - level - 3 * error, "not by being far too wide"
    assert naive / trials > 0.4, "which is what picking the best of 20 without correction does"


def test_one_comparison_has_the_interval_of_students_t():
    gaps = np.random.default_rng(1).normal(0.2, 1, (200, 1))
    expected = student.ppf(0.975, 199) * gaps.std(ddof=1) / math.sqrt(200)
    assert half_width(gaps) == pytest.approx(expected, rel=0.05)
    found = compare_all(gaps, one(200), Resampling(4000))
    assert found.p_values == found.holm == found.step_down
    expected = 2 * student.sf(gaps.mean() / (gaps.std(ddof=1) / math.sqrt(200)), 199)
    assert found.p_values[0] == pytest.approx(expected, abs=0.01)


def test_many_comparisons_cost_what_they_add():
    generator = np.random.default_rng(2)
    gap = generator.normal(0, 1, (300, 1))
    assert half_width(np.repeat(gap, 20, 1)) == pytest.approx(half_width(gap), rel=1e-9), "copies are free"
    apart = np.concatenate([gap, generator.normal(0, 1, (300, 19))], 1)
    alone, sidak = student.ppf([0.975, 1 - (1 - 0.95 ** (1 / 20)) / 2], 299)
    assert half_width(apart) / half_width(gap) == pytest.approx(sidak / alone, rel=0.06)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_definition_rejects(values: list[float]):
    adjusted, alpha = holm(values), 0.2
    rejected = 0
    for i, value in enumerate(sorted(values)):
        if value * (len(values) - i) > alpha:
            break
        rejected += 1
    assert (adjusted <= alpha).sum() == rejected
    assert (adjusted >= values).all()


def test_stepping_down_finds_at_least_what_the_intervals_find():
    generator = np.random.default_rng(3)
    gaps = generator.normal(np.linspace(0, 0.4, 8), 1, (150, 8))
    found = compare_all(gaps, one(150), Resampling(2000))
    claimed = [not row.low <= 0 <= row.high for row in found.intervals]
    assert 0 < sum(claimed) <= sum(p <= 0.05 for p in found.step_down) < 8
    assert all(a <= b for a, b in zip(found.p_values, found.step_down, strict=True))


def test_strata_weigh_the_same_and_masked_prompts_do_not_count():
    generator = np.random.default_rng(4)
    many, few = generator.normal(0, 1, (400, 2)), generator.normal(1, 3, (50, 2))
    many[:10, 0] = NAN
    strata = ["many"] * 400 + ["few"] * 50
    gaps = np.concatenate([many, few])
    found = compare_all(gaps, strata, Resampling(4000)).intervals[0]
    alone = bootstrap(gaps[:, 0], strata)
    assert found.mean == pytest.approx(alone.mean)
    assert found.high - found.low == pytest.approx(1.15 * (alone.high - alone.low), rel=0.08), "two comparisons"


def test_an_arm_without_spread_is_not_claimed_and_does_no_harm():
    gaps = np.random.default_rng(5).normal(0.5, 1, (100, 1))
    rarely = np.zeros((100, 1))
    rarely[:3] = 1.0  # resamples without any of these three have no spread
    spoilt = np.concatenate([gaps, np.full((100, 1), 0.1), np.zeros((100, 1)), rarely], 1)
    found = compare_all(spoilt, one(100), Resampling(2000))
    alone = compare_all(gaps, one(100), Resampling(2000)).intervals[0]
    assert vars(found.intervals[0]) == pytest.approx(vars(alone))
    assert [(row.low, row.high) for row in found.intervals[1:]] == [(-math.inf, math.inf)] * 3
    assert [row.mean for row in found.intervals[1:]] == [0.1, 0.0, 0.03]
    assert found.p_values[1:] == found.holm[1:] == found.step_down[1:] == (1.0, 1.0, 1.0)


def test_the_result_is_a_function_of_the_seed():
    gaps = np.random.default_rng(6).normal(0, 1, (50, 3))
    assert compare_all(gaps, one(50), Resampling(200, seed=3)) == compare_all(gaps, one(50), Resampling(200, seed=3))


def test_bad_input_is_refused():
    with pytest.raises(InvalidValue, match=r"shape of the differences must be \(prompts, comparisons\)"):
        compare_all(np.zeros(3), one(3))
    with pytest.raises(InvalidValue, match="prompts of stratum 'b' must be >= 2, got 1; one prompt says nothing"):
        compare_all(np.zeros((3, 1)), ["a", "a", "b"])
    with pytest.raises(InvalidValue, match=r"p_values must be a list of numbers in \[0, 1\]"):
        holm([0.5, NAN])
