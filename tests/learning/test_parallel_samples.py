"""A policy that is told how many samples are drawn in parallel learns to be sure with one and to spread with many."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asn_policies import SequenceStrategy
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training import grpo
from asn_rl.training.on_policy import in_process
from asn_rl.types import Prompt

# w5 is followed by w1 with probability .7 and by w2, w3, w4 with .1 each; they end the completion.
TABLE = torch.full((8, 8), -torch.inf)
TABLE[:, 0] = 0.0
TABLE[5, :5] = torch.tensor([-torch.inf, *[math.log(p) for p in (0.7, 0.1, 0.1, 0.1)]])
BACKEND = ToyBackend(TABLE)
# The answers of half of the prompts are w1, those of the others w2, and nothing says which.
PROMPTS = [Prompt(f"p{i}", "w5", {"answer": "w1" if i % 2 else "w2"}) for i in range(12)]
STRATEGIES = [
    {"name": "greedy", "processors": [{"name": "greedy"}]},
    {"name": "even", "processors": [{"name": "temperature", "params": {"temperature": 100.0}}]},
]
ROLLOUT = RolloutConfig(max_new_tokens=2, head=8, tail=1)
REWARDS = RewardSuite([RewardConfig("exact_answer")])
CONFIG = grpo.GRPOConfig(
    steps=60, prompts_per_step=12, num_generations=16, advantage="pass_at_k", pass_k=(1, 8), learning_rate=3e-2, beta=0
)


def greedy_share(policy: SequenceStrategy, budget: int) -> float:
    """What the gate gives to greedy when it is told a budget."""
    drawn = rollout(policy, BACKEND, PROMPTS[:1], ROLLOUT, conditions=torch.tensor([[math.log2(budget)]]))
    return float(policy.gate_probabilities(drawn.per_token())[0, 0].detach())


def pass_at(budget: int, share: float) -> float:
    """pass@B where a completion is greedy with this probability, and else an even draw from four words."""
    right = [share + (1 - share) / 4, (1 - share) / 4]
    return 1 - sum((1 - p) ** budget for p in right) / 2


def test_one_sample_is_drawn_surely_and_eight_are_spread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = SequenceStrategy(STRATEGIES, inputs=["condition"], condition_size=1, width=8)
    assert greedy_share(policy, 1) == pytest.approx(0.5)
    grpo.train(policy, policy, BACKEND, PROMPTS, REWARDS, ROLLOUT, CONFIG, tmp_path)
    learned = {budget: greedy_share(policy, budget) for budget in CONFIG.pass_k}
    for budget, share in learned.items():
        best = max(pass_at(budget, i / 100) for i in range(101))
        assert pass_at(budget, share) > best - 0.02
    assert pass_at(1, learned[8]) < pass_at(1, learned[1]) - 0.1
    assert pass_at(8, learned[1]) < pass_at(8, learned[8]) - 0.1


def test_each_prompt_of_a_step_has_a_budget_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = SequenceStrategy(STRATEGIES, inputs=["condition"], condition_size=1, width=8)
    told = []

    def sample(policy, prompts, **options):
        told.append(options["conditions"].flatten().exp2().tolist())
        return in_process(BACKEND, ROLLOUT)(policy, prompts, **options)

    grpo.train(policy, policy, BACKEND, PROMPTS, REWARDS, ROLLOUT, replace(CONFIG, steps=3), tmp_path, sample=sample)
    assert [sorted(step) for step in told] == [[1.0] * 6 + [8.0] * 6] * 3
    assert told[0] != told[1] != told[2]


def test_a_policy_that_is_not_told_is_refused(tmp_path: Path) -> None:
    policy = SequenceStrategy(STRATEGIES)
    with pytest.raises(InvalidValue, match=r"pass_k must be one number.*inputs \[condition\]"):
        grpo.train(policy, policy, BACKEND, PROMPTS, REWARDS, ROLLOUT, CONFIG, tmp_path)
