from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.evaluation.comparison import Arm, ArmResult, arm_result, best_static, by_stratum, run_arm, table
from asn_rl.ops.ngrams import distinct_n
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Prompt

CONFIG = RolloutConfig(max_new_tokens=4, head=8, tail=4)
PROMPTS = [Prompt("a", "w1"), Prompt("b", "w2"), Prompt("c", "w3")]
GREEDY = Arm("greedy", Pipeline([{"name": "greedy"}]), deterministic=True)
BASE = Arm("T=1", Pipeline([]))


def result(name: str, rewards: list[list[float]], **values: Any) -> ArmResult:
    array = np.array(rewards)
    defaults = {
        "tokens": np.ones(array.shape),
        "truncated": np.zeros(array.shape, bool),
        "distinct": np.ones(len(array)),
    }
    return ArmResult(name, array, **{**defaults, **values})


def test_a_deterministic_arm_is_generated_once_and_counted_as_all_its_samples(toy: ToyBackend):
    once = run_arm(GREEDY, toy, PROMPTS, CONFIG, 3, seed=0)
    every = run_arm(Arm("greedy", GREEDY.policy), toy, PROMPTS, CONFIG, 3, seed=0)
    assert once.completion_ids == every.completion_ids
    assert [prompt.id for prompt in once.prompts] == [prompt.id for prompt in every.prompts]
    assert once.behaviour_logprobs.tolist() == every.behaviour_logprobs.tolist()


def test_arms_share_their_draws(toy: ToyBackend):
    again = Arm("again", Pipeline([{"name": "temperature", "params": {"temperature": 1.0}}]))
    runs = [run_arm(arm, toy, PROMPTS, CONFIG, 4, seed=1).completion_ids for arm in (BASE, again)]
    assert runs[0] == runs[1]
    assert runs[0] != run_arm(BASE, toy, PROMPTS, CONFIG, 4, seed=2).completion_ids


def test_judging_gives_one_row_a_prompt(toy: ToyBackend):
    run = run_arm(BASE, toy, PROMPTS, CONFIG, 4, seed=1)
    with RewardSuite([RewardConfig("slow_rewards:length")]) as rewards:
        judged = arm_result("T=1", run, rewards, 4)
    texts = [run.completions[i : i + 4] for i in (0, 4, 8)]
    assert judged.rewards.tolist() == [[float(len(text)) for text in row] for row in texts]
    assert judged.tokens.tolist() == run.lengths.reshape(3, 4).tolist()
    assert judged.truncated.tolist() == (~run.terminated).reshape(3, 4).tolist()
    assert judged.distinct.tolist() == [distinct_n([text.split() for text in row]) for row in texts]


def test_masked_samples_count_in_no_mean():
    judged = result("x", [[1.0, math.nan], [math.nan, math.nan], [0.0, 1.0]])
    np.testing.assert_array_equal(judged.per_prompt(), [1.0, math.nan, 0.5])
    assert by_stratum(judged.per_prompt(), ["a", "a", "b"]) == {"a": 1.0, "b": 0.5}


def test_the_best_static_rule_is_best_on_the_mean_of_the_strata():
    strata = ["easy"] * 3 + ["hard"]
    specialist = result("specialist", [[0.9], [0.9], [0.9], [0.0]])
    all_rounder = result("all-rounder", [[0.6], [0.6], [0.6], [0.5]])
    assert specialist.rewards.mean() > all_rounder.rewards.mean()
    assert best_static([specialist, all_rounder], strata) == "all-rounder"


def test_the_table_holds_every_figure_of_every_arm():
    strata = ["a", "a", "b"]
    base = result("base", [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    other = result(
        "other",
        [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]],
        tokens=np.array([[2, 4], [6, 8], [10, 12]]),
        truncated=np.array([[True, False], [False, False], [False, True]]),
        distinct=np.array([0.2, 0.4, 0.9]),
    )
    first, second = table([base, other], strata, "base", resamples=200, level=0.9, seed=0)
    assert first["name"] == "base"
    assert first["reward"]["mean"] == (0.25 + 1.0) / 2
    assert first["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert second["reward"]["mean"] == (0.75 + 1.0) / 2
    assert second["difference"] == {"mean": 0.25, "low": 0.25, "high": 0.25}, "the same gain on every prompt of 'a'"
    assert second["by_stratum"] == {"a": 0.75, "b": 1.0}
    assert second["distinct_3"] == pytest.approx((0.3 + 0.9) / 2)
    assert second["tokens"] == 7.0
    assert second["truncated"] == 2 / 6


def test_prompts_masked_for_one_arm_are_left_out_of_its_difference():
    base = result("base", [[0.0], [0.5], [0.2]])
    other = result("other", [[1.0], [math.nan], [0.4]])
    _, row = table([base, other], ["all"] * 3, "base", resamples=50, level=0.9, seed=0)
    assert row["difference"]["mean"] == pytest.approx((1.0 + 0.2) / 2)
