from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from asn_rl.errors import InvalidValue, TrainingError
from asn_rl.training.bandit import BanditConfig, cross_fit, expected_rewards, gate_probs, train_bandit

NAN = math.nan
FREE = BanditConfig(l2=0.0, entropy_coef=0.5)


def one(count: int) -> list[str]:
    return ["all"] * count


def opposite(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, types and mean rewards of prompts of two types with opposite best actions, in eight noisy features."""
    rng = np.random.default_rng(seed)
    types = np.arange(count) % 2
    features = rng.normal(size=(count, 8))
    features[:, 0] += 4.0 * types
    return features, types, np.where(types[:, None] == np.arange(2), 0.8, 0.2)


def test_without_context_the_optimum_is_the_softmax_of_the_mean_rewards() -> None:
    """max sum_a pi_a r_a + c H(pi) has the solution pi ~ exp(r / c)."""
    rewards = np.random.default_rng(0).random((30, 4))
    gate = train_bandit(np.empty((30, 0)), rewards, one(30), FREE)
    weights = np.exp(rewards.mean(0) / 0.5)
    np.testing.assert_allclose(gate_probs(gate, np.empty((1, 0)))[0], weights / weights.sum(), atol=1e-4)


def test_strata_weigh_the_same() -> None:
    rewards = np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
    gate = train_bandit(np.empty((10, 0)), rewards, ["many"] * 9 + ["few"], FREE)
    np.testing.assert_allclose(gate_probs(gate, np.empty((1, 0)))[0], [0.5, 0.5], atol=1e-4)


def test_masked_actions_leave_their_share_to_the_others_and_masked_prompts_count_nowhere() -> None:
    probs = np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    rewards = np.array([[1.0, NAN, 0.0], [NAN, NAN, NAN], [NAN, 1.0, 1.0]])
    np.testing.assert_allclose(expected_rewards(probs, rewards), [2 / 3, NAN, NAN])
    known = np.random.default_rng(1).random((20, 3))
    features = np.random.default_rng(2).normal(size=(20, 2))
    more = np.concatenate([known, np.full((5, 3), NAN)]), np.concatenate([features, np.ones((5, 2))])
    config = BanditConfig(seed=3)
    plain, masked = (train_bandit(x, r, one(len(x)), config) for x, r in ((features, known), (more[1], more[0])))
    np.testing.assert_array_equal(gate_probs(plain, features), gate_probs(masked, features))


@pytest.mark.parametrize("width", [0, 8])
def test_opposite_optima_are_learned_from_the_context_and_lost_when_it_is_shuffled(width: int) -> None:
    features, types, rewards = opposite(120)
    fitted = cross_fit(features, rewards, one(120), BanditConfig(width=width))
    assert expected_rewards(fitted.probs, rewards).mean() > 0.72
    assert (fitted.probs.argmax(1) == types).mean() > 0.95
    assert expected_rewards(fitted.shuffled(), rewards).mean() == pytest.approx(0.5, abs=0.02)


def test_an_exclusive_or_needs_hidden_units() -> None:
    rng = np.random.default_rng(0)
    features = rng.choice([-1.0, 1.0], size=(200, 2)) + rng.normal(0, 0.1, (200, 2))
    types = (features[:, 0] * features[:, 1] > 0).astype(int)
    rewards = np.where(types[:, None] == np.arange(2), 1.0, 0.0)
    linear, hidden = (
        expected_rewards(cross_fit(features, rewards, one(200), BanditConfig(width=width)).probs, rewards).mean()
        for width in (0, 16)
    )
    assert linear < 0.8  # a line gets three of the four corners right
    assert hidden > 0.88


def test_noise_is_not_learned() -> None:
    """On prompts it has not seen, a bandit on rewards that do not depend on the features earns no more than chance."""
    rng = np.random.default_rng(0)
    gains = []
    for seed in range(6):
        features = rng.normal(size=(40, 5))
        rewards = rng.binomial(8, 0.4, (40, 4)) / 8
        fitted = cross_fit(features, rewards, one(40), BanditConfig(seed=seed))
        gains.append(expected_rewards(fitted.probs, rewards).mean() - rewards.mean())
    assert abs(np.mean(gains)) < 3 * np.std(gains) / math.sqrt(len(gains))


def test_the_shuffled_copy_is_the_mean_over_all_other_contexts_of_the_fold() -> None:
    features, _, rewards = opposite(10)
    fitted = cross_fit(features, rewards, one(10), BanditConfig(folds=2))
    for p in range(10):
        others = [q for q in range(10) if q != p and fitted.fold[q] == fitted.fold[p]]
        np.testing.assert_allclose(fitted.shuffled()[p], fitted.probs[others].mean(0))


def test_every_fold_has_its_share_of_every_stratum() -> None:
    strata = ["a"] * 20 + ["b"] * 10
    fitted = cross_fit(np.ones((30, 1)), np.random.default_rng(0).random((30, 2)), strata, BanditConfig(steps=1))
    assert np.bincount(fitted.fold[:20]).tolist() == [4] * 5
    assert np.bincount(fitted.fold[20:]).tolist() == [2] * 5


def test_a_run_is_a_function_of_the_seed_and_of_no_global_state() -> None:
    features, _, rewards = opposite(40)
    config = BanditConfig(width=4, seed=1, steps=10, folds=2)
    first = cross_fit(features, rewards, one(40), config)
    torch.manual_seed(99)
    again = cross_fit(features, rewards, one(40), config)
    np.testing.assert_array_equal(first.probs, again.probs)
    other = cross_fit(features, rewards, one(40), BanditConfig(width=4, seed=2, steps=10, folds=2))
    assert not np.array_equal(first.fold, other.fold)


def test_features_are_standardised_and_constant_ones_ignored() -> None:
    features, _, rewards = opposite(40)
    moved = np.concatenate([1000.0 + 50.0 * features, np.full((40, 1), 7.0)], 1)
    scaled = np.concatenate([features, np.zeros((40, 1))], 1)
    first, second = (cross_fit(x, rewards, one(40), BanditConfig()).probs for x in (scaled, moved))
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BanditConfig(folds=1), InvalidValue, "folds must be >= 2, got 1"),
        (lambda: BanditConfig(width=-1), InvalidValue, "width must be >= 0"),
        (lambda: BanditConfig(l2=-0.1), InvalidValue, "l2 must be >= 0"),
        (lambda: BanditConfig(steps=0), InvalidValue, "steps must be >= 1"),
        (
            lambda: cross_fit(np.ones((9, 1)), np.ones((9, 2)), one(9), BanditConfig()),
            InvalidValue,
            "prompts must be >= 10",
        ),
        (lambda: train_bandit(np.ones((3, 1)), np.ones((4, 2)), one(4), FREE), InvalidValue, "features must be 4 rows"),
        (lambda: train_bandit(np.ones((3, 1)), np.full((3, 2), NAN), one(3), FREE), TrainingError, "every reward"),
    ],
)
def test_bad_input_is_named(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
