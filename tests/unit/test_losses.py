"""Losses, advantages and returns against closed forms, brute force, autograd and stable-baselines3."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.advantages import group_advantages, pass_at_k_advantages
from asn_rl.ops.losses import (
    aggregate,
    cispo,
    clip_cov,
    clipped_surrogate,
    covariances,
    kl_cov,
    sequence_surrogate,
    value_loss,
)
from asn_rl.ops.returns import gae, token_rewards, whitened

LENGTHS = torch.tensor([3, 1, 4])
ROWS = torch.repeat_interleave(torch.arange(3), LENGTHS)


def tokens(seed: int = 0, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(S,) float64 log-probs with gradient, old log-probs, advantages."""
    generator = torch.Generator().manual_seed(seed)
    old, shift, advantages = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(3))
    return (old + spread * shift).requires_grad_(), old, advantages


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logprobs)[0]


class TestClip:
    def test_it_is_the_minimum_of_two_terms(self) -> None:
        logprobs, old, advantages = tokens()
        loss, clipped = clipped_surrogate(logprobs, old, advantages, 0.2, 0.3)
        for i in range(8):
            ratio, advantage = math.exp((logprobs[i] - old[i]).item()), advantages[i].item()
            held = min(max(ratio, 0.8), 1.3)
            assert loss[i].item() == pytest.approx(-min(ratio * advantage, held * advantage))
            assert bool(clipped[i]) == (held * advantage < ratio * advantage)

    def test_clipping_removes_the_gradient_and_nothing_else_does(self) -> None:
        logprobs, old, advantages = tokens()
        loss, clipped = clipped_surrogate(logprobs, old, advantages, 0.2, 0.2)
        assert clipped.any()
        expected = torch.where(clipped, 0.0, -(logprobs - old).exp() * advantages)
        torch.testing.assert_close(gradient(loss, logprobs), expected.detach())


class TestSequence:
    def test_equal_advantages_give_the_value_and_gradient_of_gspo(self) -> None:
        """arXiv:2507.18071, eq. 5 and 7, written out for each completion."""
        logprobs, old, advantages = tokens(spread=0.1)
        of_completion = advantages[:3]
        loss, _ = sequence_surrogate(logprobs, old, of_completion[ROWS], ROWS, 0.05, 0.08)
        mine = aggregate(loss, ROWS, 3, "sequence")
        theirs = torch.zeros((), dtype=torch.float64)
        for i, (log_ratio, advantage) in enumerate(
            zip((logprobs - old).split(LENGTHS.tolist()), of_completion, strict=True)
        ):
            assert i < 3
            ratio = log_ratio.mean().exp()
            theirs = theirs - torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.08) * advantage) / 3
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(gradient(mine, logprobs), gradient(theirs, logprobs))

    def test_a_completion_is_clipped_as_a_whole(self) -> None:
        logprobs, old, _ = tokens()
        _, clipped = sequence_surrogate(logprobs, old, torch.ones(8).double(), ROWS, 0.01, 0.01)
        means = torch.stack([part.mean() for part in (logprobs - old).split(LENGTHS.tolist())])
        assert torch.equal(clipped, (means.exp() > 1.01)[ROWS])


class TestCispo:
    def test_the_gradient_is_a_bounded_weight_times_the_score(self) -> None:
        logprobs, old, advantages = tokens()
        found = gradient(cispo(logprobs, old, advantages, 0.2), logprobs)
        weight = (logprobs - old).exp().detach().clamp(max=1.2)
        assert (weight == 1.2).any()
        assert (weight < 0.8).any(), "no lower bound"
        torch.testing.assert_close(found, -weight * advantages)
        assert (found != 0).all(), "a clipped token keeps its gradient"


class TestCovariance:
    def test_the_parts_add_up_to_the_covariance(self) -> None:
        logprobs, _, advantages = tokens()
        theirs = np.cov(logprobs.detach(), advantages, bias=True)[0, 1]
        assert covariances(logprobs, advantages).mean().item() == pytest.approx(theirs)

    def test_clip_cov_drops_a_random_token_between_the_bounds(self) -> None:
        logprobs, old, advantages = tokens(spread=0.01)
        bounds = (0.05, 1.0)
        cov = covariances(logprobs.detach(), advantages)
        inside = ((cov > bounds[0]) & (cov < bounds[1])).nonzero().squeeze(-1).tolist()
        assert 1 < len(inside) < 8
        plain, _ = clipped_surrogate(logprobs, old, advantages, 0.2, 0.2)
        slope = gradient(plain, logprobs)
        seen = set()
        for seed in range(30):
            generator = torch.Generator().manual_seed(seed)
            loss, dropped = clip_cov(
                logprobs, old, advantages, 0.2, 0.2, fraction=0.01, bounds=bounds, generator=generator
            )
            assert int(dropped.sum()) == 1
            seen |= set(dropped.nonzero().squeeze(-1).tolist())
            torch.testing.assert_close(loss, torch.where(dropped, 0.0, plain))
            torch.testing.assert_close(gradient(loss, logprobs), torch.where(dropped, 0.0, slope))
        assert seen == set(inside)

    def test_clip_cov_takes_its_share_of_all_tokens(self) -> None:
        logprobs, old, advantages = tokens(spread=0.01)
        options = {"fraction": 0.3, "bounds": (-9.0, 9.0), "generator": torch.Generator().manual_seed(0)}
        _, dropped = clip_cov(logprobs, old, advantages, 0.2, 0.2, **options)
        assert int(dropped.sum()) == 2  # floor(0.3 * 8)

    def test_kl_cov_penalises_the_largest(self) -> None:
        logprobs, old, advantages = tokens()
        loss = kl_cov(logprobs, old, advantages, fraction=0.25, coefficient=2.0)
        cov = covariances(logprobs.detach(), advantages)
        top = cov >= cov.sort(descending=True).values[1]
        assert int(top.sum()) == 2
        log_ratio = logprobs - old
        expected = -log_ratio.exp() * advantages + 2.0 * torch.where(top, log_ratio.abs(), 0.0)
        torch.testing.assert_close(loss, expected)
        slope = -log_ratio.exp() * advantages + 2.0 * torch.where(top, log_ratio.sign(), 0.0)
        torch.testing.assert_close(gradient(loss, logprobs), slope.detach())


class TestValueLoss:
    def test_without_a_bound_it_is_half_the_square(self) -> None:
        values, old, returns = tokens()
        torch.testing.assert_close(value_loss(values, old, returns, None), 0.5 * (values - returns) ** 2)

    def test_a_value_that_moved_too_far_has_no_gradient_towards_the_return(self) -> None:
        values = torch.tensor([0.5, 0.5, 0.1], requires_grad=True)
        loss = value_loss(values, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2)
        torch.testing.assert_close(loss, 0.5 * torch.tensor([0.8**2, 1.5**2, 0.9**2]))
        torch.testing.assert_close(gradient(loss, values), torch.tensor([0.0, 1.5, -0.9]))


def brute_force_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[float]:
    """The sum of eq. 16 of arXiv:1506.02438, term by term, for one completion."""
    r, v = rewards.tolist(), [*values.tolist(), 0.0]
    return [
        sum((gamma * lam) ** (i - t) * (r[i] + gamma * v[i + 1] - v[i]) for i in range(t, len(r)))
        for t in range(len(r))
    ]


class TestGAE:
    @given(st.floats(0.1, 1), st.floats(0, 1), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
    def test_it_equals_the_double_loop(self, gamma: float, lam: float, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rewards, values = (torch.randn(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(2))
        found = gae(rewards, values, torch.tensor(lengths), gamma=gamma, gae_lambda=lam)
        parts = zip(rewards.split(lengths), values.split(lengths), strict=True)
        expected = [a for r, v in parts for a in brute_force_gae(r, v, gamma, lam)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))

    def test_it_equals_stable_baselines3(self) -> None:
        steps, gamma, lam = 8, 0.97, 0.9
        buffer = RolloutBuffer(
            steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=lam, gamma=gamma, n_envs=1
        )
        _, rewards, values = (part.detach() for part in tokens())
        begins = torch.diff(ROWS, prepend=torch.tensor([-1])) != 0
        zero = np.zeros((1, 1))
        for t in range(steps):
            buffer.add(
                zero, zero, rewards[t : t + 1].numpy(), begins[t : t + 1].numpy(), values[t : t + 1], torch.zeros(1)
            )
        buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
        mine = gae(rewards, values, LENGTHS, gamma=gamma, gae_lambda=lam)
        np.testing.assert_allclose(buffer.advantages.squeeze(-1), mine, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(buffer.returns.squeeze(-1), mine + values, rtol=1e-5, atol=1e-6)

    def test_lambda_one_is_the_return_minus_the_value(self) -> None:
        _, rewards, values = tokens()
        found = gae(rewards, values, LENGTHS, gamma=1.0, gae_lambda=1.0)
        returns = torch.cat([part.flip(0).cumsum(0).flip(0) for part in rewards.split(LENGTHS.tolist())])
        torch.testing.assert_close(found, returns - values)


class TestTokenRewards:
    def test_by_hand(self) -> None:
        rewards = token_rewards(
            torch.tensor([1.0, math.nan, 3.0], dtype=torch.float64),
            LENGTHS,
            price=0.1,
            shaping=torch.arange(8.0),
            following=torch.tensor([9.0, 0.5, 0.25, 9.0, 9.0, 1.0, 2.0, 4.0]),
        )
        expected = [
            0 - 0.1 - 0.5,
            1 - 0.1 - 0.25,
            2 - 0.1 + 1,
            3 - 0.1,
            4 - 0.1 - 1,
            5 - 0.1 - 2,
            6 - 0.1 - 4,
            7 - 0.1 + 3,
        ]
        torch.testing.assert_close(rewards, torch.tensor(expected))


class TestWhitened:
    def test_mean_and_deviation_are_those_of_the_tokens_that_count(self) -> None:
        _, _, advantages = tokens()
        among = torch.tensor([True, False] * 4)
        found, scale = whitened(advantages, among)
        assert float(found[among].mean()) == pytest.approx(0, abs=1e-9)
        assert float(found[among].std(correction=0)) == pytest.approx(1)
        assert (found[~among] == 0).all()
        torch.testing.assert_close(found[0] - found[2], (advantages[0] - advantages[2]) * scale)

    def test_equal_advantages_become_nothing(self) -> None:
        found, scale = whitened(torch.full((4,), 0.1), torch.ones(4, dtype=torch.bool))
        assert (found == 0).all()
        assert scale == 1.0

    def test_over_completions_it_is_one_group(self) -> None:
        rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = group_advantages(rewards[None])[0]
        torch.testing.assert_close(found, (rewards - rewards.mean()) / (rewards.std() + 1e-4))


class TestPassAtK:
    @pytest.mark.parametrize("right", range(7))
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_it_equals_the_enumeration_of_all_subsets(self, right: int, k: int) -> None:
        n = 6
        rewards = torch.tensor([1.0] * right + [0.0] * (n - right), dtype=torch.float64)
        subsets = list(itertools.combinations(range(n), k))
        worth = torch.tensor([max(float(rewards[i]) for i in subset) for subset in subsets], dtype=torch.float64)
        deviation = worth.std(correction=0)
        found = pass_at_k_advantages(rewards[None], k)[0]
        for i in range(n):
            mine = torch.tensor([i in subset for subset in subsets])
            expected = (worth[mine].mean() - worth.mean()) / deviation if deviation > 1e-9 else torch.tensor(0.0)
            assert float(found[i]) == pytest.approx(float(expected), abs=1e-12)

    def test_masked_completions_are_not_there(self) -> None:
        found = pass_at_k_advantages(torch.tensor([[1.0, 0.0, math.nan, 0.0]]), 2)
        assert found[0, 2] == 0
        torch.testing.assert_close(found[0, [0, 1, 3]], pass_at_k_advantages(torch.tensor([[1.0, 0.0, 0.0]]), 2)[0])

    def test_each_group_may_have_its_own_k(self) -> None:
        rewards = torch.tensor([[1.0, 0.0, math.nan, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
        found = pass_at_k_advantages(rewards, torch.tensor([1, 3, 2]))
        expected = [pass_at_k_advantages(row[None], k)[0] for row, k in zip(rewards, (1, 3, 2), strict=True)]
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)

    def test_other_rewards_are_refused(self) -> None:
        with pytest.raises(InvalidValue, match=r"reward must be 0 or 1, got 0\.5"):
            pass_at_k_advantages(torch.tensor([[1.0, 0.5]]), 1)
        with pytest.raises(InvalidValue, match="pass_k"):
            pass_at_k_advantages(torch.tensor([[1.0, 0.0]]), 3)
