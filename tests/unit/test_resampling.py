from __future__ import annotations

import numpy as np
import pytest

from asn_rl.ops.resampling import (
    annealing_temperature,
    effective_sample_size,
    multinomial,
    particle_weights,
    systematic,
    tempered,
)


def counts(drawn: np.ndarray) -> np.ndarray:
    return np.bincount(drawn, minlength=4)


def test_weights_are_powers_of_the_odds():
    np.testing.assert_allclose(particle_weights(np.array([0.9, 0.5])), [0.9, 0.1])
    np.testing.assert_allclose(particle_weights(np.array([0.9, 0.5]), temperature=0.5), [81 / 82, 1 / 82])
    np.testing.assert_allclose(particle_weights(np.array([0.2, 0.2, 0.2])), [1 / 3] * 3)


def test_the_effective_sample_size_of_k_equal_weights_is_k():
    for k in (1, 2, 5):
        assert effective_sample_size(np.array([1 / k] * k + [0.0] * (5 - k))) == pytest.approx(k)
    assert effective_sample_size(np.array([0.5, 0.25, 0.25])) == pytest.approx(8 / 3)


def test_the_annealing_temperature_at_hand_values():
    skewed = np.array([0.8, 0.2, 0.0, 0.0])  # effective sample size 1 / 0.68, a share of 0.37
    assert annealing_temperature(skewed, 0, 0.5, 0.5) == pytest.approx(4 * 0.68)
    assert annealing_temperature(skewed, 2 / 8, 0.5, 0.5) == pytest.approx(0.75 * 4 * 0.68)
    assert annealing_temperature(skewed, 3 / 8, 0.5, 0.5) == pytest.approx(0.625 * 4 * 0.68)
    assert annealing_temperature(skewed, 4 / 8, 0.5, 0.5) == 1, "half of the steps are over"
    assert annealing_temperature(np.array([0.5, 0.5, 0.0, 0.0]), 0, 0.5, 0.5) == 1, "half of the particles count"
    assert annealing_temperature(skewed, 6 / 8, 0.5, 1.0) == 1, "never sharpens: 0.25 * 2.72 < 1"


def test_multinomial_resampling_is_unbiased():
    weights, runs = np.array([0.1, 0.2, 0.3, 0.4]), 4000
    draws = np.random.default_rng(0).random((runs, 4))
    found = np.array([counts(multinomial(weights, row)) for row in draws])
    error = np.sqrt(4 * weights * (1 - weights) / runs)
    assert (np.abs(found.mean(0) - 4 * weights) < 4 * error).all()
    np.testing.assert_allclose(found.var(0), 4 * weights * (1 - weights), rtol=0.1)


def test_systematic_resampling_is_unbiased_and_rounds_the_expected_counts():
    weights, runs = np.array([0.14, 0.2, 0.3, 0.36]), 4000
    found = np.array([counts(systematic(weights, u)) for u in (np.arange(runs) + 0.5) / runs])
    assert (np.abs(found - 4 * weights) < 1).all()
    np.testing.assert_allclose(found.mean(0), 4 * weights, atol=1e-3)


def test_tempered_weights_are_powers_and_keep_what_is_impossible():
    weights = np.array([0.97, 0.02, 0.01, 0.0])
    np.testing.assert_allclose(tempered(weights, 1.0), weights)
    np.testing.assert_allclose(tempered(weights, 2.5), weights**0.4 / (weights**0.4).sum())


def test_a_weight_of_zero_is_never_drawn():
    weights = np.array([0.0, 1.0, 0.0])
    for u in (0.0, 0.5, 1 - 1e-16):
        assert set(multinomial(weights, np.full(3, u))) == set(systematic(weights, u)) == {1}
