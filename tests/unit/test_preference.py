from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from asn_policies.strategy import TokenStrategy, at_points
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.ops.preference import Pairs, best_worst_pairs, latent_loss, separate_loss
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt, Trajectories

NAN = math.nan
ROWS = torch.tensor([0, 0, 1, 2, 2, 2, 3])
GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS = -torch.rand(7, generator=GENERATOR, dtype=torch.float64)
REFERENCE = -torch.rand(7, generator=GENERATOR, dtype=torch.float64)
PAIRS = Pairs(torch.tensor([0, 2]), torch.tensor([3, 1]), 0, 0)


# Pairs


def test_pairs_are_best_and_worst_of_each_group():
    rewards = torch.tensor([[0.2, 0.9, 0.1], [1.0, 1.0, 1.0], [NAN, 3.0, 2.0], [NAN, NAN, 5.0], [0.0, 1.0, 1.0]])
    pairs = best_worst_pairs(rewards)
    assert pairs.chosen.tolist() == [1, 7, 13]
    assert pairs.rejected.tolist() == [2, 8, 12]
    assert (pairs.tied, pairs.masked) == (1, 1)


def test_groups_that_are_all_ties_or_masked_leave_no_pair_and_are_counted():
    pairs = best_worst_pairs(torch.tensor([[NAN, NAN], [0.5, 0.5], [0.5, NAN]]))
    assert (len(pairs.chosen), len(pairs.rejected), pairs.tied, pairs.masked) == (0, 0, 1, 2)
    assert latent_loss(LOGPROBS, REFERENCE, ROWS, pairs, 0.1).shape == (0,)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_group_needs_two_completions(shape: tuple[int, ...]):
    with pytest.raises(InvalidValue, match="a pair takes two completions"):
        best_worst_pairs(torch.zeros(shape))


# Losses


def sums(values: Tensor) -> list[float]:
    return [values[i == ROWS].sum().item() for i in range(4)]


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_losses_are_the_papers_by_definition(beta: float):
    s, r = sums(LOGPROBS), sums(REFERENCE)
    for i, (chosen, rejected) in enumerate([(0, 3), (2, 1)]):
        separate = -math.log(1 / (1 + math.exp(-beta * (s[chosen] - s[rejected]))))
        assert separate_loss(LOGPROBS, ROWS, PAIRS, beta)[i].item() == pytest.approx(separate)
        margin = (s[chosen] - r[chosen]) - (s[rejected] - r[rejected])
        latent = -math.log(1 / (1 + math.exp(-beta * margin)))
        assert latent_loss(LOGPROBS, REFERENCE, ROWS, PAIRS, beta)[i].item() == pytest.approx(latent)


def test_at_the_reference_the_latent_loss_is_log_two():
    loss = latent_loss(LOGPROBS, LOGPROBS, ROWS, PAIRS, 0.3)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_gradients_are_those_of_dpo():
    values = LOGPROBS.clone().requires_grad_()
    loss = latent_loss(values, REFERENCE, ROWS, PAIRS, 0.5)
    loss[0].backward()
    push = -0.5 * (1 - math.exp(-loss[0].item()))  # -beta sigmoid(-margin)
    expected = torch.where(ROWS == 0, push, torch.where(ROWS == 3, -push, 0.0))
    assert values.grad is not None
    torch.testing.assert_close(values.grad, expected.double())


def test_a_huge_margin_does_not_overflow():
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), 0, 0)
    loss = separate_loss(torch.tensor([-1e4, 0.0]), torch.tensor([0, 1]), pairs, 10.0)
    torch.testing.assert_close(loss, torch.tensor([1e5, 0.0]))


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN])
def test_beta_must_be_positive(beta: float):
    with pytest.raises(InvalidValue, match="beta must be > 0"):
        separate_loss(LOGPROBS, ROWS, PAIRS, beta)


# Learning: greedy wins where the most probable word is rewarded, and both losses find it

TOY = ToyBackend.random(vocab=16, seed=3)
PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
STRATEGIES = [
    {"name": "hot", "processors": [{"name": "temperature", "params": {"temperature": 2.0}}]},
    {"name": "greedy", "processors": [{"name": "greedy"}]},
]


def first_choices(trajectories: Trajectories) -> Tensor:
    """(G, n) share of tokens that were the most probable one."""
    hits = torch.bincount(trajectories.rows, (trajectories.points == 0).double(), minlength=len(trajectories))
    return (hits / trajectories.lengths).reshape(len(PROMPTS), -1)


@pytest.mark.parametrize("kind", ["separate", "latent"])
def test_preference_training_finds_the_better_strategy(kind: str):
    torch.manual_seed(0)
    policy = TokenStrategy(STRATEGIES, width=8)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for step in range(20):
        drawn = rollout(policy, TOY, PROMPTS, RolloutConfig(6, 16, 1), num_generations=6, seed=step)
        pairs, obs = best_worst_pairs(first_choices(drawn)), drawn.per_token()
        gate, parts = policy.gate_logprobs(obs), at_points(policy.strategy_logprobs(obs)[0], drawn.points)
        if kind == "latent":
            start = torch.logsumexp(parts - math.log(2), -1)
            loss = latent_loss(torch.logsumexp(gate + parts, -1), start, drawn.rows, pairs, 1.0)
        else:
            strategy = torch.multinomial(policy.posterior(obs, drawn.points).detach(), 1)
            loss = separate_loss(gate.gather(-1, strategy).squeeze(-1), drawn.rows, pairs, 1.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    obs = rollout(policy, TOY, PROMPTS, RolloutConfig(6, 16, 1), num_generations=4, seed=99).per_token()
    assert policy.gate_probabilities(obs)[:, 1].mean() > 0.8
