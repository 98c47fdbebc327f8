"""Rewards predicted by a model that has not seen them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.off_policy import doubly_robust, ips
from asn_rl.evaluation.reward_log import RewardLog
from asn_rl.evaluation.reward_prediction import cross_fitted_rewards
from asn_rl.evaluation.statistics import Resampling
from asn_rl.training.bandit import stratified_folds


def logged(seed: int = 0, prompts: int = 60, features: int = 3, samples: int = 4, noise: float = 0.1) -> RewardLog:
    """Rewards linear in the features, actions drawn evenly."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(prompts, features))
    slopes = np.random.default_rng(99).normal(size=(features, 3))
    truth = seen @ slopes
    drawn = np.arange(3)[:, None] == rng.integers(3, size=(prompts, 1, samples))
    rewards = truth[..., None] + noise * rng.normal(size=(prompts, 3, samples))
    return RewardLog(
        np.where(drawn, rewards, np.nan), drawn.astype(int), ("a", "b", "c"), tuple(map(str, range(prompts))),
        tuple("xy"[i % 2] for i in range(prompts)), seen, np.full((prompts, 3), 1 / 3),
    )  # fmt: skip


def truth_of(log: RewardLog) -> np.ndarray:
    return log.features @ np.random.default_rng(99).normal(size=(log.features.shape[1], 3))


def test_a_linear_reward_is_found() -> None:
    log = logged()
    assert np.abs(cross_fitted_rewards(log, ridge=1e-3) - truth_of(log)).max() < 0.15


@pytest.mark.parametrize("features", [3, 80])
def test_it_is_weighted_ridge_regression_on_the_other_folds(features: int) -> None:
    """Against normal equations over single samples, intercept unpenalised, for few features and for many."""
    log = logged(features=features, prompts=20)
    found = cross_fitted_rewards(log, folds=4, ridge=2.0, seed=1)
    fold = stratified_folds(log.strata, 4, 1)
    z = (log.features - log.features.mean(0)) / log.features.std(0)
    z = np.concatenate([z, [[label == "x", label == "y"] for label in log.strata]], 1)
    for held in range(4):
        for action in range(3):
            rows = [(p, s) for p in range(20) if fold[p] != held for s in range(4) if log.present[p, action, s]]
            x = np.array([[1.0, *z[p]] for p, _ in rows])
            y = np.array([log.rewards[p, action, s] for p, s in rows])
            penalty = 2.0 * np.diag([0.0, *np.ones(z.shape[1])])
            solution = np.linalg.solve(x.T @ x + penalty, x.T @ y)
            for p in np.flatnonzero(fold == held):
                assert found[p, action] == pytest.approx(np.array([1.0, *z[p]]) @ solution, abs=1e-8)


def test_a_prompts_own_rewards_do_not_move_its_prediction() -> None:
    log = logged()
    changed = log.rewards.copy()
    changed[7] += 100.0
    before, after = cross_fitted_rewards(log), cross_fitted_rewards(replace(log, rewards=changed))
    np.testing.assert_array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


def test_an_action_that_others_never_took_gets_the_mean_of_all() -> None:
    log = logged(prompts=4, samples=1)
    drawn = np.zeros(log.rewards.shape, dtype=int)
    drawn[:, 1] = 1
    only = replace(log, rewards=np.where(drawn, 0.5, np.nan), tokens=drawn)
    np.testing.assert_allclose(cross_fitted_rewards(only, folds=2), 0.5)


def test_with_it_the_doubly_robust_estimate_is_tighter_and_stays_unbiased() -> None:
    target = np.tile([0.8, 0.1, 0.1], (60, 1))
    errors: dict[str, list[float]] = {"ips": [], "doubly robust": []}
    for seed in range(100):
        log = logged(seed)
        aim = np.mean([(target * truth_of(log)).sum(1)[stratum::2].mean() for stratum in range(2)])
        how = Resampling(resamples=2)
        errors["ips"].append(ips(log, target, how).reward.mean - aim)
        errors["doubly robust"].append(doubly_robust(log, target, cross_fitted_rewards(log), how).reward.mean - aim)
    spread = {name: np.std(values) for name, values in errors.items()}
    assert spread["doubly robust"] < 0.3 * spread["ips"]
    assert abs(np.mean(errors["doubly robust"])) < 4 * spread["doubly robust"] / 10


@pytest.mark.parametrize(
    ("options", "message"), [({"folds": 1}, "folds"), ({"folds": 61}, "folds"), ({"ridge": 0.0}, "ridge")]
)
def test_settings_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        cross_fitted_rewards(logged(), **options)  # type: ignore[arg-type]
