from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.sequential import StopDecision, confidence_sequence, stop_decision

NAN = math.nan


def votes(losses: float, wins: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """Differences of two arms that agree on most prompts."""
    return generator.choice([-1.0, 0.0, 1.0], p=[losses, 1 - losses - wins, wins], size=count)


def test_peeking_after_every_prompt_calls_equal_arms_different_rarely_enough():
    generator, trials, level = np.random.default_rng(0), 200, 0.8
    wrong, fixed = 0, 0
    for _ in range(trials):
        x = votes(0.15, 0.15, 200, generator)
        wrong += stop_decision(x, level=level, points=101).outcome != "undecided"
        n = np.arange(20, 201)
        mean = np.cumsum(x)[19:] / n
        error = np.sqrt((np.cumsum(x**2)[19:] / n - mean**2) / n)
        fixed += bool((np.abs(mean) > 1.2816 * error).any())
    assert wrong / trials <= 1 - level + 3 * math.sqrt(level * (1 - level) / trials)
    assert fixed / trials > 2 * (1 - level), "which is what peeking does to intervals for a fixed number of prompts"


@pytest.mark.parametrize("truth", [-0.6, 0.0, 0.35])
def test_all_intervals_of_a_run_cover_the_mean_at_once(truth: float):
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        x = generator.beta(2 * (1 + truth), 2 * (1 - truth), 120) * 2 - 1
        low, high = confidence_sequence(x, level=0.8, points=401).T
        covered += bool((low <= truth).all() and (high >= truth).all())
    assert covered / 60 >= 0.8 - 3 * math.sqrt(0.16 / 60)


def test_it_is_tighter_than_hoeffdings_bound_for_one_look():
    x = votes(0.05, 0.1, 600, np.random.default_rng(2))
    low, high = confidence_sequence(x)[-1]
    hoeffding = 2 * math.sqrt(math.log(2 / 0.05) / (2 * 600))
    assert high - low < 0.8 * 2 * hoeffding
    # And wider than the interval for a fixed number of prompts, which may not be peeked at.
    assert high - low > 2 * 1.96 * x.std() / math.sqrt(600)


def capital(x: np.ndarray, mean: float, level: float) -> float:
    """Largest capital of the gambler who bets that the mean of x in [0, 1] is higher, bet by bet as in the paper."""
    money, most, seen = 1.0, 0.0, []
    squares, centres = 0.25, 0.5
    for t, value in enumerate(x.tolist(), start=1):
        variance = squares / t
        bet = min(math.sqrt(2 * math.log(2 / (1 - level)) / (variance * t * math.log(t + 1))), 0.5 / mean)
        money *= 1 + bet * (value - mean)
        most = max(most, money)
        seen.append(value)
        centres = (0.5 + sum(seen)) / (t + 1)
        squares += (value - centres) ** 2
    return most


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 0.95))
def test_the_bound_is_where_the_gamblers_capital_passes_its_threshold(seed: int, level: float):
    x = np.random.default_rng(seed).beta(4, 1, 40)
    low = confidence_sequence(x, bounds=(0, 1), level=level, points=101)[-1, 0]
    if low > 0:
        assert capital(x, low, level) >= 2 / (1 - level) * (1 - 1e-9)
    assert capital(x, low + 0.01, level) < 2 / (1 - level), "bounds are rounded outwards by less than a step"


def test_turning_the_comparison_round_turns_the_interval_round():
    x = votes(0.1, 0.3, 150, np.random.default_rng(3))
    np.testing.assert_allclose(confidence_sequence(-x), -confidence_sequence(x)[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(confidence_sequence(x * 5, bounds=(-5, 5)), 5 * confidence_sequence(x), atol=1e-12)


def test_what_was_known_stays_known_and_more_prompts_only_narrow_it():
    x = votes(0.05, 0.35, 300, np.random.default_rng(4))
    whole = confidence_sequence(x, points=201)
    np.testing.assert_array_equal(confidence_sequence(x[:120], points=201), whole[:120])
    assert (np.diff(whole[:, 0]) >= 0).all()
    assert (np.diff(whole[:, 1]) <= 0).all()
    found = stop_decision(x, points=201)
    assert found.outcome == "better"
    assert found.decided_at is not None
    before = stop_decision(x[: found.decided_at - 1], points=201)
    assert (before.outcome, before.decided_at) == ("undecided", None)
    assert stop_decision(x[: found.decided_at], points=201).outcome == "better"
    assert stop_decision(-x, points=201).outcome == "worse"


def test_masked_prompts_do_not_count():
    x = votes(0.1, 0.3, 60, np.random.default_rng(5))
    holes = np.insert(x, [3, 20], NAN)
    assert stop_decision(holes, points=101) == stop_decision(x, points=101)
    assert stop_decision(np.array([NAN])) == StopDecision("undecided", -1.0, 1.0, 0, None)


def test_bad_input_is_refused():
    with pytest.raises(InvalidValue, match=r"difference must be in \[-1, 1\], got 1.5; widen the bounds"):
        stop_decision(np.array([0.0, 1.5]))
    with pytest.raises(InvalidValue, match=r"level must be in \(0, 1\)"):
        confidence_sequence(np.zeros(2), level=1)
    with pytest.raises(InvalidValue, match="least < greatest"):
        confidence_sequence(np.zeros(2), bounds=(1, 1))
