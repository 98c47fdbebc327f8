"""GRPO solves a toy that no temperature can: prefer the second most probable word."""

from __future__ import annotations

from pathlib import Path

import torch
import toy_rewards

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.protocols import Policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.grpo import GRPOConfig, score, train
from asn_rl.types import Prompt

PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 17)]
ROLLOUT = RolloutConfig(max_new_tokens=8, head=32, tail=1)
SUITE = RewardSuite([RewardConfig("toy_rewards:second_choice")])


def mean_reward(policy: Policy) -> float:
    out = rollout(policy, toy_rewards.TOY, PROMPTS, ROLLOUT, num_generations=16, seed=99)
    return float(score(SUITE, out).total.mean())


def test_grpo_learns_the_second_choice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = OrderStatisticsNetwork(width=16, point_width=8)
    config = GRPOConfig(
        steps=60, prompts_per_step=8, num_generations=8, learning_rate=1e-2, beta=0.0, minibatch_tokens=256,
        entropy_coef=0.02,
    )  # fmt: skip
    base = mean_reward(Pipeline([]))
    rules = [Pipeline([{"name": "temperature", "params": {"temperature": t}}]) for t in (0.3, 0.6, 1.5)]
    static = max(mean_reward(rule) for rule in [*rules, Pipeline([{"name": "top_k", "params": {"top_k": 2}}])])
    train(policy, policy, toy_rewards.TOY, PROMPTS, SUITE, ROLLOUT, config, tmp_path)
    learned = mean_reward(policy)
    assert base < static < 0.6
    assert learned > 0.8
