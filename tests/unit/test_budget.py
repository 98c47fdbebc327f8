"""A price per token, and the price that holds a constraint on their mean number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.metrics import read_metrics
from asn_rl.ops.advantages import group_advantages
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.training import grpo, ppo
from asn_rl.training.budget import BudgetConfig, Price, first_price, next_price
from asn_rl.types import Observation, Prompt

# After every word: the end with probability 0.4, the most probable point.
WORLD = ToyBackend(torch.tensor([[0.4, 0.35, 0.25]]).log().repeat(3, 1))
PROMPTS = [Prompt("p1", "w1"), Prompt("p2", "w2")]
ROLLOUT = RolloutConfig(max_new_tokens=12, head=3, tail=1)
SETTINGS = {"steps": 40, "prompts_per_step": 2, "num_generations": 64, "num_iterations": 2, "learning_rate": 0.2}
CONFIGS = {
    "grpo": (grpo.GRPOConfig(**SETTINGS, beta=0.0, advantage="batch"), grpo.train),
    "ppo": (ppo.PPOConfig(**SETTINGS, beta=0.0, critic_arguments={"width": 4, "point_width": 2}), ppo.train),
}


class Ending(PolicyModule):
    """One parameter: how much likelier the most probable point, the end, becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Parameter(torch.zeros(()))

    def shift(self, obs: Observation) -> Tensor:
        return self.end * (torch.arange(obs.sketch.log_mass.shape[-1]) == 0)


def length(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """The longer the better, by less and less."""
    return [1 - (1 - len(ids) / 12) ** 2 for ids in completion_ids]


def minus_quarter_length(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [0.5 - 0.25 * len(ids) for ids in completion_ids]


OWN = f"{__name__}:"


def run(folder: Path, method: str, budget: BudgetConfig | None, reward: str = OWN + "length", **changes: object):
    config, train = CONFIGS[method]
    policy, changed = Ending(), replace(config, budget=budget, **changes)
    rewards = RewardSuite([RewardConfig(reward)])
    train(policy, policy, WORLD, PROMPTS, rewards, ROLLOUT, changed, folder)  # type: ignore[arg-type]
    return read_metrics(folder)


class TestPrice:
    def test_a_fixed_price_stays(self) -> None:
        budget = BudgetConfig(price=0.25)
        assert first_price(budget) == Price(0.25)
        assert next_price(budget, Price(0.25), 1e6) == Price(0.25)
        assert first_price(None) == Price() == next_price(None, Price(), 10.0)

    def test_dual_ascent_by_hand(self) -> None:
        budget = BudgetConfig(max_mean_tokens=10.0, dual_learning_rate=0.1, dual_damping=0.0)
        price = first_price(budget)
        for tokens, multiplier in ((15.0, 0.05), (8.0, 0.03), (1.0, 0.0), (20.0, 0.1)):
            price = next_price(budget, price, tokens)
            assert price.multiplier == pytest.approx(multiplier)
            assert price.token == pytest.approx(multiplier / 10)

    def test_damping_answers_at_once_and_is_not_remembered(self) -> None:
        budget = BudgetConfig(max_mean_tokens=10.0, dual_learning_rate=0.1, dual_damping=2.0)
        high = next_price(budget, Price(), 15.0)
        assert (high.token, high.multiplier) == (pytest.approx((0.05 + 1.0) / 10), pytest.approx(0.05))
        low = next_price(budget, high, 9.0)
        assert (low.token, low.multiplier) == (0.0, pytest.approx(0.04))

    @given(st.floats(0, 10), st.floats(0, 1000), st.floats(0, 5))
    def test_a_price_is_never_negative_and_rises_above_the_limit(
        self, multiplier: float, tokens: float, damping: float
    ) -> None:
        budget = BudgetConfig(max_mean_tokens=20.0, dual_damping=damping)
        after = next_price(budget, Price(0.0, multiplier), tokens)
        assert min(after.token, after.multiplier) >= 0
        assert after.multiplier >= multiplier if tokens >= 20 else after.multiplier <= multiplier

    def test_it_is_taken_off_the_reward(self, tmp_path: Path) -> None:
        """Constant rewards with a price are what minus price times length is without one. (PPO charges every token,
        see test_ppo.)"""
        (priced,) = run(tmp_path / "priced", "grpo", BudgetConfig(price=0.25), "toy_rewards:constant", steps=1)
        (plain,) = run(tmp_path / "plain", "grpo", None, OWN + "minus_quarter_length", steps=1)
        for name in ("loss/surrogate", "policy/grad_norm", "policy/entropy"):
            assert priced[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6)
        assert priced["reward/total"] == 0.5, "the metric is the reward itself"
        assert priced["budget/price"] == 0.25
        assert "budget/price" not in plain


class TestConstraint:
    @pytest.mark.parametrize("method", ["grpo", "ppo"])
    def test_lengths_come_to_the_limit_where_they_are_rewarded(self, tmp_path: Path, method: str) -> None:
        slow = {"steps": 45, "learning_rate": 0.1, "num_generations": 32}
        free = run(tmp_path / "free", method, None, **slow | {"steps": 20})
        held = run(tmp_path / "held", method, BudgetConfig(max_mean_tokens=6.0), **slow)
        assert free[-1]["policy/length"] > 9
        late = [row["budget/tokens"] for row in held[-24:]]
        assert sum(late) / len(late) == pytest.approx(6.0, abs=1.0)
        assert sum(row["budget/price"] for row in held[-24:]) / 24 > 0.03

    def test_it_costs_nothing_where_it_holds_anyway(self, tmp_path: Path) -> None:
        rows = run(tmp_path, "grpo", BudgetConfig(max_mean_tokens=11.8), steps=3)
        assert [row["budget/price"] for row in rows] == [0.0] * 3

    def test_the_price_is_in_the_checkpoint(self, tmp_path: Path) -> None:
        budget = BudgetConfig(max_mean_tokens=1.5)
        whole = run(tmp_path / "whole", "grpo", budget, steps=4, save_every=2)
        run(tmp_path / "half", "grpo", budget, steps=2, save_every=2)
        half = run(tmp_path / "half", "grpo", budget, steps=4, save_every=2)
        costs = [(row["budget/price"], row["budget/multiplier"]) for row in whole]
        assert len(set(costs)) == 4
        assert [(row["budget/price"], row["budget/multiplier"]) for row in half] == costs


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "one of price and max_mean_tokens"),
            ({"price": 0.1, "max_mean_tokens": 5.0}, "one of price and max_mean_tokens"),
            ({"price": 0.0}, "price must be > 0"),
            ({"price": -0.1}, "price must be > 0"),
            ({"max_mean_tokens": 0.0}, "max_mean_tokens must be >= 1"),
            ({"max_mean_tokens": 0.5}, "max_mean_tokens must be >= 1"),
            ({"max_mean_tokens": 5.0, "dual_learning_rate": 0.0}, "dual_learning_rate"),
            ({"max_mean_tokens": 5.0, "dual_damping": -1.0}, "dual_damping"),
        ],
    )
    def test_illegal_budgets_are_named(self, values: dict[str, float], message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            BudgetConfig(**values)

    @pytest.mark.parametrize("method", ["grpo", "ppo"])
    def test_a_limit_that_nothing_can_exceed(self, tmp_path: Path, method: str) -> None:
        with pytest.raises(InvalidValue, match=r"max_mean_tokens must be < max_new_tokens \(12\)"):
            run(tmp_path, method, BudgetConfig(max_mean_tokens=12.0))

    def test_pass_at_k_takes_rewards_as_they_are(self) -> None:
        with pytest.raises(InvalidValue, match="budget must be null with advantage pass_at_k"):
            grpo.GRPOConfig(advantage="pass_at_k", budget=BudgetConfig(price=0.1))

    def test_a_scale_in_which_the_price_cancels(self) -> None:
        """Equal rewards: whatever the price is, the advantages of the group's standard deviation are the same."""
        lengths = torch.tensor([[3.0, 5.0, 9.0]])
        small, large = (group_advantages(0.5 - price * lengths) for price in (0.01, 0.1))
        torch.testing.assert_close(small, large, atol=5e-3, rtol=0)
        with pytest.raises(ConfigError, match=r"advantage group divides each group .* set advantage: batch or none"):
            grpo.GRPOConfig(advantage="group", budget=BudgetConfig(price=0.1))
