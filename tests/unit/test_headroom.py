from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.headroom import headroom
from asn_rl.evaluation.reward_log import RewardLog, draw_actions
from asn_rl.evaluation.statistics import Resampling, bootstrap, split_half_choices
from asn_rl.training.bandit import BanditConfig

FAST = BanditConfig(steps=10, folds=2)
HOW = Resampling(resamples=2000)


def simulated(success: np.ndarray, samples: int, seed: int, features: np.ndarray | None = None) -> RewardLog:
    """0/1 rewards with (P, A) success probabilities."""
    count, actions = success.shape
    rng = np.random.default_rng(seed)
    return RewardLog(
        rewards=rng.binomial(1, success[..., None], (count, actions, samples)).astype(float),
        tokens=np.ones((count, actions, samples), int),
        actions=tuple(f"action {i}" for i in range(actions)),
        prompt_ids=tuple(f"p{i}" for i in range(count)),
        strata=("all",) * count,
        features=rng.normal(size=(count, 3)) if features is None else features,
    )


def test_identical_actions_have_no_headroom_though_the_naive_oracle_promises_one() -> None:
    """The winner's curse: 200 logs in which every action succeeds alike. About 2.5 % may look positive by chance."""
    gains, naive, strata = [], [], ["all"] * 60
    for seed in range(200):
        log = simulated(np.full((60, 8), 0.4), 8, seed)
        oracle, static, _ = split_half_choices(log.rewards.swapaxes(0, 1), strata)
        gains.append(bootstrap(oracle - static, strata, resamples=500))
        naive.append(log.means.max(1).mean() - log.means.mean(0).max())
    means = [gain.mean for gain in gains]
    assert np.mean(naive) > 0.15
    assert abs(np.mean(means)) < 4 * np.std(means) / math.sqrt(200)
    assert sum(gain.low > 0 for gain in gains) <= 11  # P(more) < 1 % at 2.5 %
    report = headroom(simulated(np.full((60, 8), 0.4), 8, 0), FAST, Resampling(resamples=500))
    assert report.gains["oracle - static"] == gains[0]
    assert not report.positive


def test_hard_and_easy_prompts_alone_are_no_headroom() -> None:
    difficulty = np.random.default_rng(1).random((80, 1))
    report = headroom(simulated(np.repeat(difficulty, 6, 1), 8, 2), FAST, HOW)
    assert not report.positive
    assert report.verdict.startswith("No headroom shown (6 actions, 80 prompts, 8 samples each)")
    assert "does not show a gain" in report.verdict


def test_opposite_optima_by_prompt_type_are_found_and_learned_from_the_features() -> None:
    types = np.arange(80) % 2
    success = np.where(types[:, None] == np.arange(2), 0.8, 0.2)
    features = np.random.default_rng(0).normal(size=(80, 4))
    features[:, 0] += 4 * types
    report = headroom(simulated(success, 8, 0, features), BanditConfig(), HOW)
    assert report.positive
    assert report.rewards["oracle"].mean == pytest.approx(0.79, abs=0.04)  # chooses wrongly now and then
    assert report.rewards["static"].mean == pytest.approx(0.5, abs=0.05)
    assert report.rewards["context"].mean > 0.7
    assert report.rewards["shuffled context"].mean == pytest.approx(0.5, abs=0.05)
    assert report.gains["context - static"].low > 0
    assert report.gains["context - shuffled context"].low > 0
    assert report.gains["mixture - static"].high < 0.1
    assert "can help (2 actions, 80 prompts" in report.verdict
    assert "which the features already give in part" in report.verdict


def test_headroom_that_the_features_do_not_show_is_still_headroom() -> None:
    types = np.random.default_rng(5).integers(0, 2, 80)
    success = np.where(types[:, None] == np.arange(2), 0.8, 0.2)
    report = headroom(simulated(success, 8, 0), BanditConfig(), HOW)
    assert report.positive
    assert not report.gains["context - static"].low > 0
    assert "the features do not give it yet" in report.verdict


def test_the_intervals_are_paired() -> None:
    """Difficulty moves all actions alike, so differences are far tighter than means."""
    difficulty = np.random.default_rng(1).choice([0.02, 0.98], size=(100, 1))
    report = headroom(simulated(np.repeat(difficulty, 3, 1), 16, 0), FAST, HOW)
    mean, gain = report.rewards["static"], report.gains["oracle - static"]
    assert (gain.high - gain.low) < 0.3 * (mean.high - mean.low)


def test_masked_prompts_count_nowhere() -> None:
    log = simulated(np.random.default_rng(0).random((24, 3)), 4, 0)
    rewards = log.rewards.copy()
    rewards[20:] = math.nan
    report = headroom(replace(log, rewards=rewards), FAST, HOW)
    assert report.prompts == 20
    kept = replace(
        log, rewards=rewards[:20], tokens=log.tokens[:20], prompt_ids=log.prompt_ids[:20], strata=log.strata[:20],
        features=log.features[:20],
    )  # fmt: skip
    assert report.gains["oracle - static"].mean == pytest.approx(
        headroom(kept, FAST, HOW).gains["oracle - static"].mean
    )


def test_a_report_is_plain_json_and_the_same_again() -> None:
    log = simulated(np.random.default_rng(0).random((20, 3)), 4, 0)
    report = headroom(log, FAST, HOW)
    assert json.loads(json.dumps(report.as_dict()))["gains"]["oracle - static"]["mean"] == pytest.approx(
        report.rewards["oracle"].mean - report.rewards["static"].mean
    )
    assert headroom(log, FAST, HOW) == report


LOG = simulated(np.full((20, 3), 0.5), 4, 0)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (draw_actions(LOG, np.full((20, 3), 1 / 3), 0), "a log in which every action was run"),
        (simulated(np.full((20, 1), 0.5), 4, 0), "actions must be >= 2, got 1; there is nothing to choose from"),
        (simulated(np.full((20, 2), 0.5), 1, 0), "samples a prompt must be >= 2, got 1"),
        (simulated(np.full((5, 2), 0.5), 4, 0), "prompts must be >= 10 for 5 folds"),
    ],
)
def test_logs_without_an_answer_are_refused(log: RewardLog, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        headroom(log)
